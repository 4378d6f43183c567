"""The commands on small archives: run twice, interrupted and run again, with wrong input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support.images import jpeg
from tests.support.interrupts import run_and_stop
from tests.support.networks import OWN


@pytest.fixture
def slow(tmp_path):
    (tmp_path / "slownets.py").write_text(OWN.format(slow=0.05))
    return "slownets:make"


def test_the_demonstration_leaves_everything_behind_and_does_no_forward_pass_the_second_time(command, tmp_path):
    first = command("demo", "--out", "demo")
    for name in ("logistic", "mlp", "linear", "raw pixels", "majority class"):
        assert name in first.stdout
    for left in ("tiles.tar", "tiles.csv", "cache/tiles.h5", "tiles.logistic.model", "report.html"):
        assert (tmp_path / "demo" / left).is_file(), left
    results = json.loads(command("demo", "--out", "demo", "--json").stdout)
    accuracy = {row["name"]: row["accuracy"] for row in results["comparison"]}
    assert min(accuracy[head] for head in ("logistic", "mlp", "linear")) > 0.85
    assert accuracy["raw pixels"] < 0.4
    assert accuracy["majority class"] < 0.1
    again = command("demo", "--out", "demo")
    assert "no forward pass" in again.stderr


def test_from_a_folder_to_predictions_and_a_second_time_the_same(command, make_folder, own, tmp_path):
    make_folder()
    runs = []
    for _ in range(2):
        cache = command("extract", "photos", "--backbone", own).stdout.strip()
        model = command("train", cache, "--cv", "3").stdout.strip()
        command("predict", model, "photos", "--backbone", own, "--out", "p.csv")
        runs.append((cache, model, (tmp_path / "p.csv").read_text()))
    assert runs[0] == runs[1]
    rows = list(csv.DictReader(runs[0][2].splitlines()))
    assert [row["id"] for row in rows] == [f"{label}/{i:02}.jpg" for label in ("ape", "bee", "cow") for i in range(6)]
    assert all(row["status"] == "ok" and row["label"] in ("ape", "bee", "cow") for row in rows)


def test_a_model_of_somebodys_own_code_is_not_run_unasked(command, make_folder, own):
    make_folder()
    cache = command("extract", "photos", "--backbone", own).stdout.strip()
    model = command("train", cache, "--cv", "0").stdout.strip()
    assert "--backbone" in command("predict", model, "photos", code=1).stderr


def test_results_are_json_on_request(command, make_folder, own):
    make_folder()
    done = json.loads(command("extract", "photos", "--backbone", own, "--json").stdout)
    assert (done["samples"], done["bad"]) == (18, {})
    trained = json.loads(command("train", done["cache"], "--cv", "2", "--json").stdout)
    assert trained["scores"]["cross_validation"]["n"] == 18
    facts = json.loads(command("info", done["cache"], "--json").stdout)
    assert facts["classes"] == {"ape": 6, "bee": 6, "cow": 6}
    assert json.loads(command("info", trained["model"], "--json").stdout)["head"] == "logistic"
    assert {row["head"] for row in json.loads(command("heads", "--json").stdout)} >= {"logistic", "mlp", "linear"}
    assert "resnet18" in json.loads(command("backbones", "resnet1*", "--json").stdout)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_extraction_that_is_stopped_says_how_to_go_on_and_goes_on(command, make_folder, slow, tmp_path, stop):
    make_folder(each=30)  # too few for a graph, which would leave out the sleeping
    arguments = ["extract", "photos", "--backbone", slow, "--batch", "2", "--workers", "2"]
    stopped = run_and_stop(arguments, tmp_path, stop)
    assert stopped.stdout == ""
    if stop != signal.SIGKILL:
        assert stopped.returncode == 1, stopped.stderr
        assert "interrupted" in stopped.stderr
        assert "Traceback" not in stopped.stderr
    assert not list(tmp_path.glob("cache/*.h5"))
    again = json.loads(command(*arguments, "--json").stdout)
    assert again["samples"] == 90
    assert 0 < again["manifest"]["embedded"] < 90


def wrong_input(tmp_path) -> dict[str, tuple[list[str], int, str]]:
    """Command line → exit code and what the one line must say."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.txt").write_text("no image")
    (tmp_path / "ghosts.csv").write_text("path,label\nape/00.jpg,a\nape/none.jpg,b\n")
    (tmp_path / "columns.csv").write_text("picture,kind\nape/00.jpg,a\n")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "torn.tar").write_bytes(b"x" * 700)
    (tmp_path / "torn.h5").write_bytes(b"x" * 700)
    (tmp_path / "torn.model").write_bytes(b"PK" + b"x" * 700)
    (tmp_path / "broken.pth").write_bytes(b"x" * 700)
    return {
        "a path that is not there": (["extract", "fotos"], 1, "fotos"),
        "an empty folder": (["extract", "empty"], 1, "empty"),
        "a folder without images": (["extract", "only"], 1, ".txt"),
        "a torn tar": (["extract", "torn.tar"], 1, "torn.tar"),
        "labels of files that are not there": (["extract", "photos", "--labels", "ghosts.csv"], 1, "ape/none.jpg"),
        "a table without the columns": (["extract", "photos", "--labels", "columns.csv"], 1, "picture"),
        "a table that is not there": (["extract", "photos", "--labels", "none.csv"], 1, "none.csv"),
        "a device that is not there": (["extract", "photos", "--device", "cuda:7"], 1, "cuda:7"),
        "an unknown device": (["extract", "photos", "--device", "gpu"], 1, "unknown device"),
        "an unknown backbone": (["extract", "photos", "--backbone", "resnet19"], 1, "resnet1"),
        "an unknown output": (
            ["extract", "photos", "--backbone", "resnet18", "--weights", "none", "--output", "layer9"],
            1,
            "layer",
        ),
        "weights that are not there": (["extract", "photos", "--weights", "none.pth"], 1, "none.pth"),
        "weights that are broken": (["extract", "photos", "--weights", "broken.pth"], 1, "broken.pth"),
        "a cache folder that is a file": (["extract", "photos", "--cache", "file"], 1, "file"),
        "an unwritable cache folder": (["extract", "photos", "--cache", "/proc/caches"], 1, "/proc"),
        "a limit that is none": (["extract", "photos", "--max-bad", "few"], 1, "max-bad"),
        "a cache that is not there": (["train", "none.h5"], 1, "none.h5"),
        "a cache that is none": (["train", "torn.h5"], 1, "torn.h5"),
        "a model that is none": (["predict", "torn.model", "photos"], 1, "torn.model"),
        "a model that is not there": (["predict", "none.model", "photos"], 1, "none.model"),
        "info of nothing": (["info", "nothing"], 1, "nothing"),
        "an unknown command": (["extrakt", "photos"], 2, "extract"),
        "an unknown option": (["extract", "photos", "--bakbone", "x"], 2, "--backbone"),
        "nothing to extract": (["extract"], 2, "ARCHIVE"),
        "an unknown precision": (["extract", "photos", "--precision", "fp8"], 2, "fp16"),
        "columns without a table": (["extract", "photos", "--label-column", "x"], 2, "--labels"),
    }


def test_wrong_input_is_answered_in_one_line_that_helps(command, make_folder, tmp_path):
    make_folder()
    for what, (arguments, code, says) in wrong_input(tmp_path).items():
        done = command(*arguments, code=code)
        assert says in done.stderr, f"{what}: {done.stderr}"
        assert "Traceback" not in done.stderr, what
        assert done.stdout == "", what
        if code == 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("featpipe: ")]
            assert len(lines) == 1, f"{what}: {done.stderr}"
    assert not list(tmp_path.glob("**/*.h5")) or (tmp_path / "torn.h5").exists()


def test_wrong_training_is_answered_in_one_line_that_helps(command, make_folder, own, tmp_path):
    folder = make_folder()
    (folder / "lone").mkdir()
    (folder / "lone" / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "flat").mkdir()
    for i in range(3):
        (tmp_path / "flat" / f"{i}.jpg").write_bytes(jpeg(i))
    cache = command("extract", "photos", "--backbone", own).stdout.strip()
    unlabelled = command("extract", "flat", "--backbone", own).stdout.strip()
    for arguments, says in {
        ("train", cache): "lone",
        ("train", cache, "--head", "logistik"): "logistic",
        ("train", cache, "--set", "D=1"): "featpipe heads logistic",
        ("train", cache, "--set", "C=-1"): "C",
        ("train", cache, "--output", "layer"): "pooled",
        ("train", unlabelled): "--labels",
    }.items():
        done = command(*arguments, code=1)
        assert says in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("featpipe: ")
    assert command("train", cache, "--cv", "0").stdout.strip().endswith(".model")


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_pipe_that_closes_early_is_no_error(command, make_folder, own, tmp_path):
    make_folder(each=30)
    cache = command("extract", "photos", "--backbone", own).stdout.strip()
    model = command("train", cache, "--cv", "0").stdout.strip()
    line = f"{sys.executable} -m featpipe predict {model} photos --backbone {own} | head -2"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("id,status,label")
    assert "Traceback" not in done.stderr
