"""The commands that maintain caches: pack, merge, clean, and info with --why."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from featpipe import FeatureCache
from tests.support.images import jpeg, make_files_old
from tests.support.interrupts import start_and_hold
from tests.support.networks import CUSTOM_NETWORK_CODE


@pytest.fixture
def custom_network(tmp_path):
    (tmp_path / "nets.py").write_text(CUSTOM_NETWORK_CODE.format(slow=0))
    (tmp_path / "slownets.py").write_text(CUSTOM_NETWORK_CODE.format(slow=0.05))
    return "nets:make"


@pytest.fixture
def photos(make_folder):
    return make_files_old(make_folder())


def test_merging_the_caches_of_two_folders_equals_one_extraction_of_both(
    command, photos, make_folder, custom_network, tmp_path
):
    make_folder(("bee", "dog"), 3, "more")
    for name in ("photos", "more"):
        command("extract", name, "--backbone", custom_network, "--out", f"{name}.h5")
    merge = ["merge", "photos.h5", "more.h5", "--out", "all.h5"]
    assert command(*merge).stdout == "all.h5\n"
    assert "up to date" in command(*merge).stderr
    merged, first = FeatureCache(tmp_path / "all.h5"), FeatureCache(tmp_path / "photos.h5")
    assert merged.classes == ("ape", "bee", "cow", "dog")
    assert list(merged.ids[18:]) == [
        "bee/00.jpg#2", "bee/01.jpg#2", "bee/02.jpg#2", "dog/00.jpg", "dog/01.jpg", "dog/02.jpg",
    ]  # fmt: skip
    assert list(merged.labels) == [*first.labels, "bee", "bee", "bee", "dog", "dog", "dog"]
    assert np.array_equal(merged.features()[:18], first.features())
    document = json.loads(command("info", "all.h5", "--json").stdout)
    assert (document["samples"], document["classes"]["bee"], len(document["merged_from"])) == (24, 9, 2)
    assert "merged from" in command("info", "all.h5").stdout
    command("extract", "photos", "--backbone", custom_network, "--out", "f16.h5", "--storage", "float16")
    error_text = command("merge", "photos.h5", "f16.h5", "--out", "no.h5", code=1).stderr
    assert "storage is 'float16', in photos.h5 'float32'" in error_text


def test_a_sharded_cache_is_packed_and_shown(command, make_folder, custom_network, tmp_path):
    (tmp_path / "wide.py").write_text(
        CUSTOM_NETWORK_CODE.format(slow=0).replace("nn.Conv2d(3, 8, 3)", "nn.Conv2d(3, 1024, 3)")
    )
    make_folder(each=12)
    command("extract", "photos", "--backbone", "wide:make", "--out", "a.h5", "--shard-bytes", "65536")
    sharded = FeatureCache(tmp_path / "a.h5")
    assert "the file and 3 shards" in command("info", "a.h5").stdout
    document = json.loads(command("pack", "a.h5", "--out", "out/b.h5", "--json").stdout)
    assert (document["cache"], document["samples"], document["shards"]) == ("out/b.h5", 36, [])
    assert np.array_equal(FeatureCache(tmp_path / "out" / "b.h5").features(), sharded.features())
    assert command("pack", "a.h5").stdout == "a.h5\n"
    assert not (tmp_path / "a.h5.shards").exists()
    assert "in one file" in command("info", "a.h5").stdout
    log_text = command("extract", "photos", "--backbone", "wide:make", "--out", "a.h5").stderr
    assert "no forward pass" in log_text


def test_clean_lists_unfinished_work_and_removes_it_only_on_confirmation(
    command, make_folder, custom_network, tmp_path
):
    make_folder(each=30)  # too few images for a traced graph, which would skip the sleep
    process = start_and_hold(["extract", "photos", "--backbone", "slownets:make", "--batch", "2"], tmp_path)
    assert "nothing to remove" in command("clean").stdout  # the extraction is running
    process.kill()
    process.communicate()
    listing = command("clean", "--dry-run").stdout
    assert "an unfinished extraction of" in listing
    assert "the same extract command would resume from it" in listing
    [abandoned] = json.loads(command("clean", "cache", "--json").stdout)["found"]
    assert abandoned["images"] > 0
    assert "--yes" in command("clean", code=1).stderr  # no terminal to ask for confirmation
    assert os.path.isdir(tmp_path / abandoned["path"])
    assert json.loads(command("clean", "--json", "--yes").stdout)["found"][0]["removed"]
    assert list((tmp_path / "cache").iterdir()) == []
    assert "nowhere: No such file" in command("clean", "nowhere", code=1).stderr
    command("clean", "--yes", "--dry-run", code=2)


def test_info_why_compares_a_cache_with_the_arguments_of_an_extract_command(command, photos, custom_network):
    extraction = [
        "photos",
        "--backbone",
        custom_network,
        "--out",
        "a.h5",
        "--workers",
        "1",
        "--batch",
        "4",
        "--max-bad",
        "5%",
    ]
    command("extract", *extraction)
    output = command("info", "a.h5", "--why", *extraction).stdout
    assert output.startswith("a.h5 matches the request\n")
    assert "\n18  are in the cache, with unchanged path, size and time\n" in output
    assert "Samples, order, labels and splits are the cache's own." in output
    (photos / "ape" / "00.jpg").write_bytes(jpeg(99))
    (photos / "ape" / "new.jpg").write_bytes(jpeg(98))
    shutil.rmtree(photos / "cow")
    arguments = ["info", "a.h5", "--json", "--why", *extraction, "--precision", "bf16"]
    document = json.loads(command(*arguments).stdout)
    assert document["differences"] == ["precision is 'fp32', asked for 'bf16'"]
    assert document["usable"] is False
    assert document["samples"] == {
        "images": 13, "unchanged": 11, "changed": 1, "new": 1, "gone": 6, "same_table": False
    }  # fmt: skip
    other_output = command("info", "a.h5", "--why", "--backbone", "slownets:make").stdout
    assert "backbone.name is 'nets:make', asked for 'slownets:make'" in other_output


def test_info_why_compares_two_caches(command, photos, custom_network):
    for storage in ("float32", "float16"):
        command("extract", "photos", "--backbone", custom_network, "--out", f"{storage}.h5", "--storage", storage)
    difference = command("info", "float32.h5", "--why", "float16.h5").stdout
    assert difference == (
        "float32.h5 and float16.h5 differ in 1 setting:\n  storage is 'float32', in float16.h5 'float16'\n"
    )
    output = command("info", "float32.h5", "--why", "float32.h5").stdout
    assert output == "float32.h5 and float32.h5 have the same backbone and settings\n"
    command("info", "float32.h5", "photos", code=2)
    command("info", "float32.h5", "--storage", "float16", code=2)
    command("info", "float32.h5", "--why", "float16.h5", "--storage", "float16", code=2)
