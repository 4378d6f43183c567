"""Lookup of embeddings by digest and stamp, compared with a plain dict."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from featpipe.cache import EmbeddingLookup, EmbeddingSource
from featpipe.status import Status

FINAL_CODES = {int(status) for status in Status if not status.transient}


def read_no_features(output: str) -> np.ndarray:
    raise AssertionError("a lookup reads no features")


def source(digests: np.ndarray, stamps: np.ndarray | None = None, status: np.ndarray | int = 0) -> EmbeddingSource:
    n = len(digests)
    stamps = np.zeros((n, 16), np.uint8) if stamps is None else stamps
    return EmbeddingSource(digests, stamps, np.broadcast_to(np.uint8(status), n).copy(), read_no_features)


def rows(values: list[bytes], width: int) -> np.ndarray:
    return np.frombuffer(b"".join(value.ljust(width, b"\0") for value in values), np.uint8).reshape(-1, width).copy()


def crowded(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    """Keys that often begin with the same eight bytes, sometimes are all the same, and sometimes all zero."""
    values = rng.integers(0, 2, (n, width), np.uint8)
    values[:, :8] = rng.integers(0, 2, (n, 1), np.uint8) * rng.integers(0, 5, (n, 1), np.uint8)
    values[:, 8:-3] = 0
    values[rng.random(n) < 0.1] = 0
    return values


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("make", ["random", "crowded"])
@pytest.mark.parametrize("sources", [1, 5, 17])
def test_lookups_agree_with_a_dict(make, sources, at_once):
    rng = np.random.default_rng(sources)
    n = 4000 // sources if make == "random" else 300 // sources + 3

    def some(n: int, width: int) -> np.ndarray:
        return crowded(rng, n, width) if make == "crowded" else rng.integers(0, 256, (n, width), np.uint8)

    lookup, digests, stamps = EmbeddingLookup(), {}, {}
    all_sources = [
        EmbeddingSource(some(n, 32), some(n, 16), rng.integers(0, 13, n).astype(np.uint8), read_no_features)
        for _ in range(sources)
    ]
    if at_once:
        assert lookup.add(*all_sources) == 0
    else:
        assert [lookup.add(added) for added in all_sources] == list(range(sources))
    for number, added in enumerate(all_sources):
        for row in range(n):
            if int(added.status[row]) in FINAL_CODES:
                digests.setdefault(added.digests[row].tobytes(), set()).add((number, row))
                stamps.setdefault(added.stamps[row].tobytes(), set()).add((number, row))
    digests.pop(bytes(32), None)
    stamps.pop(bytes(16), None)
    assert min(len(digests), len(stamps)) > (1000 if make == "random" else 20)

    every_digest = np.concatenate([*(s.digests for s in lookup.sources), some(500, 32), np.zeros((1, 32), np.uint8)])
    for digest in map(np.ndarray.tobytes, every_digest):
        found = lookup.find_by_digest(digest)
        assert found in digests[digest] if digest in digests else found is None

    every_stamp = np.concatenate([*(s.stamps for s in lookup.sources), some(500, 16), np.zeros((1, 16), np.uint8)])
    every_stamp = every_stamp[rng.permutation(len(every_stamp))]
    found_source, found_row = lookup.find_by_stamp(every_stamp)
    assert (found_source.shape, found_row.shape) == ((len(every_stamp),), (len(every_stamp),))
    for stamp, *found in zip(every_stamp, found_source.tolist(), found_row.tolist(), strict=True):
        if stamp.tobytes() in stamps:
            assert tuple(found) in stamps[stamp.tobytes()]
        else:
            assert found[0] == -1


def test_an_empty_lookup_finds_nothing():
    lookup = EmbeddingLookup()
    assert lookup.find_by_digest(b"a" * 32) is None
    assert lookup.find_by_stamp(np.ones((3, 16), np.uint8))[0].tolist() == [-1, -1, -1]
    assert lookup.find_by_stamp(np.ones((0, 16), np.uint8))[0].shape == (0,)


def test_an_empty_source_is_numbered_too():
    lookup = EmbeddingLookup()
    assert lookup.add(source(np.zeros((0, 32), np.uint8))) == 0
    assert lookup.add(source(rows([b"a"], 32), rows([b"s"], 16))) == 1
    assert lookup.find_by_digest(b"a".ljust(32, b"\0")) == (1, 0)
    assert lookup.find_by_stamp(rows([b"s", b"t"], 16))[0].tolist() == [1, -1]


@pytest.mark.parametrize("position", range(3))
def test_keys_that_differ_only_after_their_first_eight_bytes_are_told_apart(position):
    tails = [b"samehead" + bytes([i]) for i in range(3)]
    lookup = EmbeddingLookup()
    lookup.add(source(rows(tails, 32), rows(tails, 16)))
    assert lookup.find_by_digest(tails[position].ljust(32, b"\0")) == (0, position)
    assert [array.tolist() for array in lookup.find_by_stamp(rows([tails[position]], 16))] == [[0], [position]]
    assert lookup.find_by_digest(b"samehead\x09".ljust(32, b"\0")) is None
    assert lookup.find_by_stamp(rows([b"samehead\x09"], 16))[0].tolist() == [-1]


def test_keys_that_begin_with_zeros_are_keys():
    late = bytes(15) + b"\x01"
    lookup = EmbeddingLookup()
    lookup.add(source(rows([late], 32), rows([late], 16)))
    assert lookup.find_by_digest(late.ljust(32, b"\0")) == (0, 0)
    assert lookup.find_by_stamp(rows([late], 16))[0].tolist() == [0]


def test_zeros_never_match():
    lookup = EmbeddingLookup()
    lookup.add(source(np.zeros((5, 32), np.uint8), np.zeros((5, 16), np.uint8)))
    assert lookup.find_by_digest(bytes(32)) is None
    assert lookup.find_by_stamp(np.zeros((5, 16), np.uint8))[0].tolist() == [-1] * 5


@pytest.mark.parametrize("status", [*range(12), 255])
def test_only_statuses_that_are_final_and_known_to_this_version_match(status):
    lookup = EmbeddingLookup()
    lookup.add(source(rows([b"a"], 32), rows([b"s"], 16), status))
    assert (lookup.find_by_digest(b"a".ljust(32, b"\0")) == (0, 0)) == (status in FINAL_CODES)
    assert (lookup.find_by_stamp(rows([b"s"], 16))[0].tolist() == [0]) == (status in FINAL_CODES)


def test_a_transient_row_does_not_hide_a_final_one():
    lookup = EmbeddingLookup()
    lookup.add(source(rows([b"a"], 32), rows([b"s"], 16), Status.OUT_OF_MEMORY))
    lookup.add(source(rows([b"a"], 32), rows([b"s"], 16)))
    assert lookup.find_by_digest(b"a".ljust(32, b"\0")) == (1, 0)
    assert lookup.find_by_stamp(rows([b"s"], 16))[0].tolist() == [1]


def test_among_equals_the_source_that_came_first_answers():
    lookup = EmbeddingLookup()
    for _ in range(35):
        lookup.add(source(rows([b"a", b"a"], 32), rows([b"s", b"s"], 16)))
    assert lookup.find_by_digest(b"a".ljust(32, b"\0")) == (0, 0)
    assert [array.tolist() for array in lookup.find_by_stamp(rows([b"s"], 16))] == [[0], [0]]


def test_lookups_while_another_thread_adds_find_all_that_was_there_before():
    lookup, ready, wrong = EmbeddingLookup(), [0], []

    def look() -> None:
        while ready[0] < 150:
            there = ready[0]
            wrong.extend(i for i in range(there) if lookup.find_by_digest((b"%d" % i).ljust(32, b"\0")) != (i, 0))
            found = lookup.find_by_stamp(rows([b"%d" % i for i in range(150)], 16))[0]
            wrong.extend(i for i in range(there) if found[i] != i)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(150):
        lookup.add(source(rows([b"%d" % number], 32), rows([b"%d" % number], 16)))
        ready[0] = number + 1
    for reader in readers:
        reader.join()
    assert wrong == []


def test_many_images_with_the_same_bytes_are_found_at_once():
    digests = np.tile(rows([b"a"], 32), (50_000, 1))
    lookup = EmbeddingLookup()
    lookup.add(source(digests, np.tile(rows([b"s"], 16), (50_000, 1))))
    assert lookup.find_by_digest(digests[0].tobytes()) == (0, 0)
    found, row = lookup.find_by_stamp(np.tile(rows([b"s"], 16), (50_000, 1)))
    assert (found == 0).all()
    assert (row == 0).all()
