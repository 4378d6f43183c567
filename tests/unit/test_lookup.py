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


def make_source(digests: np.ndarray, stamps: np.ndarray | None = None, status: np.ndarray | int = 0) -> EmbeddingSource:
    n = len(digests)
    stamps = np.zeros((n, 16), np.uint8) if stamps is None else stamps
    return EmbeddingSource(digests, stamps, np.broadcast_to(np.uint8(status), n).copy(), read_no_features)


def make_keys(values: list[bytes], width: int) -> np.ndarray:
    return np.frombuffer(b"".join(value.ljust(width, b"\0") for value in values), np.uint8).reshape(-1, width).copy()


def make_colliding_keys(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    """Make keys that often share their first eight bytes, and are sometimes equal or all zero."""
    values = rng.integers(0, 2, (n, width), np.uint8)
    values[:, :8] = rng.integers(0, 2, (n, 1), np.uint8) * rng.integers(0, 5, (n, 1), np.uint8)
    values[:, 8:-3] = 0
    values[rng.random(n) < 0.1] = 0
    return values


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("key_kind", ["random", "colliding"])
@pytest.mark.parametrize("sources", [1, 5, 17])
def test_lookups_agree_with_a_dict(key_kind, sources, at_once):
    rng = np.random.default_rng(sources)
    n = 4000 // sources if key_kind == "random" else 300 // sources + 3

    def make_random_keys(n: int, width: int) -> np.ndarray:
        return (
            make_colliding_keys(rng, n, width)
            if key_kind == "colliding"
            else rng.integers(0, 256, (n, width), np.uint8)
        )

    lookup, digests, stamps = EmbeddingLookup(), {}, {}
    sources_to_add = [
        EmbeddingSource(
            make_random_keys(n, 32), make_random_keys(n, 16), rng.integers(0, 13, n).astype(np.uint8), read_no_features
        )
        for _ in range(sources)
    ]
    if at_once:
        assert lookup.add(*sources_to_add) == 0
    else:
        assert [lookup.add(source) for source in sources_to_add] == list(range(sources))
    for number, source in enumerate(sources_to_add):
        for row in range(n):
            if int(source.status[row]) in FINAL_CODES:
                digests.setdefault(source.digests[row].tobytes(), set()).add((number, row))
                stamps.setdefault(source.stamps[row].tobytes(), set()).add((number, row))
    digests.pop(bytes(32), None)
    stamps.pop(bytes(16), None)
    assert min(len(digests), len(stamps)) > (1000 if key_kind == "random" else 20)

    every_digest = np.concatenate(
        [*(s.digests for s in lookup.sources), make_random_keys(500, 32), np.zeros((1, 32), np.uint8)]
    )
    for digest in map(np.ndarray.tobytes, every_digest):
        match = lookup.find_by_digest(digest)
        assert match in digests[digest] if digest in digests else match is None

    every_stamp = np.concatenate(
        [*(s.stamps for s in lookup.sources), make_random_keys(500, 16), np.zeros((1, 16), np.uint8)]
    )
    every_stamp = every_stamp[rng.permutation(len(every_stamp))]
    found_source, found_row = lookup.find_by_stamp(every_stamp)
    assert (found_source.shape, found_row.shape) == ((len(every_stamp),), (len(every_stamp),))
    for stamp, *match in zip(every_stamp, found_source.tolist(), found_row.tolist(), strict=True):
        if stamp.tobytes() in stamps:
            assert tuple(match) in stamps[stamp.tobytes()]
        else:
            assert match[0] == -1


def test_an_empty_lookup_finds_nothing():
    lookup = EmbeddingLookup()
    assert lookup.find_by_digest(b"a" * 32) is None
    assert lookup.find_by_stamp(np.ones((3, 16), np.uint8))[0].tolist() == [-1, -1, -1]
    assert lookup.find_by_stamp(np.ones((0, 16), np.uint8))[0].shape == (0,)


def test_an_empty_source_gets_a_number():
    lookup = EmbeddingLookup()
    assert lookup.add(make_source(np.zeros((0, 32), np.uint8))) == 0
    assert lookup.add(make_source(make_keys([b"a"], 32), make_keys([b"s"], 16))) == 1
    assert lookup.find_by_digest(b"a".ljust(32, b"\0")) == (1, 0)
    assert lookup.find_by_stamp(make_keys([b"s", b"t"], 16))[0].tolist() == [1, -1]


@pytest.mark.parametrize("position", range(3))
def test_keys_that_share_their_first_eight_bytes_are_distinguished(position):
    tails = [b"samehead" + bytes([i]) for i in range(3)]
    lookup = EmbeddingLookup()
    lookup.add(make_source(make_keys(tails, 32), make_keys(tails, 16)))
    assert lookup.find_by_digest(tails[position].ljust(32, b"\0")) == (0, position)
    assert [array.tolist() for array in lookup.find_by_stamp(make_keys([tails[position]], 16))] == [[0], [position]]
    assert lookup.find_by_digest(b"samehead\x09".ljust(32, b"\0")) is None
    assert lookup.find_by_stamp(make_keys([b"samehead\x09"], 16))[0].tolist() == [-1]


def test_keys_that_begin_with_zeros_are_found():
    late = bytes(15) + b"\x01"
    lookup = EmbeddingLookup()
    lookup.add(make_source(make_keys([late], 32), make_keys([late], 16)))
    assert lookup.find_by_digest(late.ljust(32, b"\0")) == (0, 0)
    assert lookup.find_by_stamp(make_keys([late], 16))[0].tolist() == [0]


def test_keys_of_zeros_never_match():
    lookup = EmbeddingLookup()
    lookup.add(make_source(np.zeros((5, 32), np.uint8), np.zeros((5, 16), np.uint8)))
    assert lookup.find_by_digest(bytes(32)) is None
    assert lookup.find_by_stamp(np.zeros((5, 16), np.uint8))[0].tolist() == [-1] * 5


@pytest.mark.parametrize("status", [*range(12), 255])
def test_only_statuses_that_are_final_and_known_to_this_version_match(status):
    lookup = EmbeddingLookup()
    lookup.add(make_source(make_keys([b"a"], 32), make_keys([b"s"], 16), status))
    assert (lookup.find_by_digest(b"a".ljust(32, b"\0")) == (0, 0)) == (status in FINAL_CODES)
    assert (lookup.find_by_stamp(make_keys([b"s"], 16))[0].tolist() == [0]) == (status in FINAL_CODES)


def test_a_transient_row_does_not_hide_a_final_one():
    lookup = EmbeddingLookup()
    lookup.add(make_source(make_keys([b"a"], 32), make_keys([b"s"], 16), Status.OUT_OF_MEMORY))
    lookup.add(make_source(make_keys([b"a"], 32), make_keys([b"s"], 16)))
    assert lookup.find_by_digest(b"a".ljust(32, b"\0")) == (1, 0)
    assert lookup.find_by_stamp(make_keys([b"s"], 16))[0].tolist() == [1]


def test_among_equal_keys_the_first_source_is_found():
    lookup = EmbeddingLookup()
    for _ in range(35):
        lookup.add(make_source(make_keys([b"a", b"a"], 32), make_keys([b"s", b"s"], 16)))
    assert lookup.find_by_digest(b"a".ljust(32, b"\0")) == (0, 0)
    assert [array.tolist() for array in lookup.find_by_stamp(make_keys([b"s"], 16))] == [[0], [0]]


def test_lookups_find_all_earlier_sources_while_another_thread_adds():
    lookup, n_ready, wrong_rows = EmbeddingLookup(), [0], []

    def look_up() -> None:
        while n_ready[0] < 150:
            n_added = n_ready[0]
            wrong_rows.extend(
                i for i in range(n_added) if lookup.find_by_digest((b"%d" % i).ljust(32, b"\0")) != (i, 0)
            )
            source_numbers = lookup.find_by_stamp(make_keys([b"%d" % i for i in range(150)], 16))[0]
            wrong_rows.extend(i for i in range(n_added) if source_numbers[i] != i)

    readers = [threading.Thread(target=look_up) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(150):
        lookup.add(make_source(make_keys([b"%d" % number], 32), make_keys([b"%d" % number], 16)))
        n_ready[0] = number + 1
    for reader in readers:
        reader.join()
    assert wrong_rows == []


def test_many_equal_keys_are_found_quickly():
    digests = np.tile(make_keys([b"a"], 32), (50_000, 1))
    lookup = EmbeddingLookup()
    lookup.add(make_source(digests, np.tile(make_keys([b"s"], 16), (50_000, 1))))
    assert lookup.find_by_digest(digests[0].tobytes()) == (0, 0)
    source_numbers, source_rows = lookup.find_by_stamp(np.tile(make_keys([b"s"], 16), (50_000, 1)))
    assert (source_numbers == 0).all()
    assert (source_rows == 0).all()
