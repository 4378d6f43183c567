"""`featpipe verify`, as typed."""

from __future__ import annotations

import json

import pytest

from tests.support.caches import flip


@pytest.fixture
def cache(command, make_folder, custom_network, tmp_path):
    make_folder()
    command("extract", "photos", "--backbone", custom_network, "--out", "a.h5")
    return tmp_path / "a.h5"


def test_verify_reports_an_intact_cache(command, cache, custom_network):
    done = command("verify", "a.h5", "--sample", "5", "--backbone", custom_network)
    assert done.stdout.splitlines() == [
        "18 rows and all columns are intact",
        "5 rows embedded again, largest relative distance 0, 0.0001 allowed",
    ]


def test_verify_lists_damaged_rows_with_exit_code_1_and_repairs_them(command, cache, custom_network):
    whole = cache.read_bytes()
    flip(cache, "features/pooled", 3 * 32)
    done = command("verify", "a.h5", code=1)
    assert "3  ape/03.jpg  checksum mismatch" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "featpipe: a.h5: 1 row and 0 columns are damaged; `featpipe verify a.h5 --repair` computes them again"
    )
    document = json.loads(command("verify", "a.h5", "--json", code=1).stdout)
    assert (document["whole"], [damage["row"] for damage in document["damaged"]]) == (False, [3])
    done = command("verify", "a.h5", "--repair", "--backbone", custom_network)
    assert done.stdout.splitlines() == ["18 rows and all columns are intact", "1 row computed again"]
    assert "ape/03.jpg" in done.stderr
    assert len(cache.read_bytes()) >= len(whole)
    command("verify", "a.h5")
