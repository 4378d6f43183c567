"""The command `featpipe verify`."""

from __future__ import annotations

import json

import pytest

from tests.support.caches import flip_bit


@pytest.fixture
def cache(command, make_folder, custom_network, tmp_path):
    make_folder()
    command("extract", "photos", "--backbone", custom_network, "--out", "a.h5")
    return tmp_path / "a.h5"


def test_verify_reports_an_intact_cache(command, cache, custom_network):
    process = command("verify", "a.h5", "--sample", "5", "--backbone", custom_network)
    assert process.stdout.splitlines() == [
        "18 rows and all columns are intact",
        "5 rows embedded again, largest relative distance 0, 0.0001 allowed",
    ]


def test_verify_lists_damaged_rows_with_exit_code_1_and_repairs_them(command, cache, custom_network):
    cache_bytes = cache.read_bytes()
    flip_bit(cache, "features/pooled", 3 * 32)
    process = command("verify", "a.h5", code=1)
    assert "3  ape/03.jpg  checksum mismatch" in process.stdout
    assert process.stderr.splitlines()[-1] == (
        "featpipe: a.h5: 1 row and 0 columns are damaged; `featpipe verify a.h5 --repair` computes them again"
    )
    document = json.loads(command("verify", "a.h5", "--json", code=1).stdout)
    assert (document["whole"], [damage["row"] for damage in document["damaged"]]) == (False, [3])
    process = command("verify", "a.h5", "--repair", "--backbone", custom_network)
    assert process.stdout.splitlines() == ["18 rows and all columns are intact", "1 row computed again"]
    assert "ape/03.jpg" in process.stderr
    assert len(cache.read_bytes()) >= len(cache_bytes)
    command("verify", "a.h5")
