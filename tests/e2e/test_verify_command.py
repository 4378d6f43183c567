"""`featpipe verify`, as typed."""

from __future__ import annotations

import json

import pytest

from tests.support.caches import flip


@pytest.fixture
def cache(command, make_folder, own, tmp_path):
    make_folder()
    command("extract", "photos", "--backbone", own, "--out", "a.h5")
    return tmp_path / "a.h5"


def test_a_whole_cache_is_said_to_be_whole(command, cache, own):
    done = command("verify", "a.h5", "--sample", "5", "--backbone", own)
    assert done.stdout.splitlines() == [
        "18 rows and all columns are intact",
        "5 rows embedded again, largest relative distance 0, 0.0001 allowed",
    ]


def test_damage_is_named_ends_with_exit_code_1_and_is_mended(command, cache, own):
    whole = cache.read_bytes()
    flip(cache, "features/pooled", 3 * 32)
    done = command("verify", "a.h5", code=1)
    assert "3  ape/03.jpg  checksum mismatch" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "featpipe: a.h5: 1 row and 0 columns are damaged; `featpipe verify a.h5 --repair` computes them again"
    )
    found = json.loads(command("verify", "a.h5", "--json", code=1).stdout)
    assert (found["whole"], [damage["row"] for damage in found["damaged"]]) == (False, [3])
    done = command("verify", "a.h5", "--repair", "--backbone", own)
    assert done.stdout.splitlines() == ["18 rows and all columns are intact", "1 row computed again"]
    assert "ape/03.jpg" in done.stderr
    assert len(cache.read_bytes()) >= len(whole)
    command("verify", "a.h5")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.h5"], "there is no such file"),
        (["photos"], "is a folder"),
        (["a.h5", "--sample", "2"], "is not run unasked; pass --backbone"),
        (["a.h5", "--sample", "2", "--archive", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line(command, cache, arguments, words):
    done = command("verify", *arguments, code=1)
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
