"""Lookup of existing embeddings: rows of caches and parts, found by the digest or the stamp of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featpipe.cache.reader import FeatureCache
from featpipe.status import Status


def _accept_all(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Treat all rows as intact: the source was verified as a whole."""
    return np.ones(len(rows), bool)


@dataclass(frozen=True, eq=False)
class EmbeddingSource:
    """Rows of a cache or a part that can be copied.

    Attributes
    ----------
    digests : ndarray of shape (r, 32), uint8
    stamps : ndarray of shape (r, 16), uint8
    status : ndarray of shape (r,), uint8
    features : callable
        ``features(output)`` returns an array of shape (r, …), memory-mapped or read from the part on demand.
    find_intact : callable
        ``find_intact(rows)`` returns which of m rows match their checksums, shape (m,), bool.
    """

    digests: NDArray[np.uint8]
    stamps: NDArray[np.uint8]
    status: NDArray[np.uint8]
    features: Callable[[str], NDArray[np.floating]]
    find_intact: Callable[[NDArray[np.int64]], NDArray[np.bool_]] = _accept_all

    @classmethod
    def from_cache(cls, cache: FeatureCache, outputs: Iterable[str]) -> EmbeddingSource:
        """Make a source from a cache, for copying these outputs."""

        def find_intact(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
            return np.all([cache.whole_rows(rows, output) for output in outputs], axis=0)

        return cls(cache.digests, cache.stamps, cache.status_codes, cache.features, find_intact)


class EmbeddingLookup:
    """The existing embeddings with one fingerprint.

    Rows with a transient status, or a status unknown to this version, are excluded. Lookups may run in any thread while
    one thread adds sources.
    """

    def __init__(self) -> None:
        self.sources: list[EmbeddingSource] = []
        self._by_digest = _KeyIndex.from_sources([], "digests")

    def add(self, *sources: EmbeddingSource) -> int:
        """Add sources, and return the number of the first. Many are added fastest in one call."""
        first_number = len(self.sources)
        self.sources += sources
        self._by_digest = self._by_digest.merge(_KeyIndex.from_sources(sources, "digests", first_number))
        return first_number

    def find_by_digest(self, digest: bytes) -> tuple[int, int] | None:
        """Find the source number and the row of an image by its digest. Damaged rows are skipped."""
        digest_bytes, index = np.frombuffer(digest, np.uint8), self._by_digest
        key = _truncate_to_keys(digest_bytes[None])[0]
        for position in range(int(np.searchsorted(index.keys, key)), len(index.keys)):
            if index.keys[position] != key:
                break
            source_number, source_row = int(index.source_numbers[position]), int(index.source_rows[position])
            source = self.sources[source_number]
            if (
                np.array_equal(source.digests[source_row], digest_bytes)
                and source.find_intact(np.array([source_row]))[0]  # damaged rows must not be copied
            ):
                return source_number, source_row
        return None

    def find_by_stamp(self, stamps: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Find the source numbers (-1 if not found) and the rows of n stamps, each of shape (n,).

        The caller must check that these rows are intact before it copies them.
        """
        source_numbers, source_rows = np.full(len(stamps), -1, np.int32), np.zeros(len(stamps), np.int64)
        index, keys = _KeyIndex.from_sources(self.sources, "stamps"), _truncate_to_keys(stamps)
        positions = np.searchsorted(index.keys, keys)
        pending = np.flatnonzero(stamps.any(axis=1))
        while len(pending):  # repeats only for different stamps with the same first eight bytes
            pending = pending[positions[pending] < len(index.keys)]
            pending = pending[index.keys[positions[pending]] == keys[pending]]
            candidates = index.source_numbers[positions[pending]], index.source_rows[positions[pending]]
            is_match = self._compare_stamps(*candidates, stamps[pending])
            source_numbers[pending[is_match]], source_rows[pending[is_match]] = (rows[is_match] for rows in candidates)
            pending = pending[~is_match]
            positions[pending] += 1
        return source_numbers, source_rows

    def _compare_stamps(
        self, source_numbers: NDArray[np.int32], source_rows: NDArray[np.int64], stamps: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Compare the stamps of m rows of sources with ``stamps``; shape (m,)."""
        is_match = np.zeros(len(stamps), bool)
        for source_number in np.flatnonzero(np.bincount(source_numbers)):
            rows = np.flatnonzero(source_numbers == source_number)
            is_match[rows] = (self.sources[source_number].stamps[source_rows[rows]] == stamps[rows]).all(axis=1)
        return is_match


@dataclass(frozen=True, eq=False)
class _KeyIndex:
    """Sorted keys (the first eight bytes of a digest or a stamp), with the source and the row of each."""

    keys: NDArray[np.uint64]
    source_numbers: NDArray[np.int32]
    source_rows: NDArray[np.int64]

    @classmethod
    def from_sources(
        cls, sources: Sequence[EmbeddingSource], column: Literal["digests", "stamps"], first_number: int = 0
    ) -> _KeyIndex:
        keys, numbers, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for number, source in enumerate(sources, first_number):
            byte_keys: NDArray[np.uint8] = getattr(source, column)
            is_final = np.isin(source.status, [status for status in Status if not status.transient])
            rows.append(np.flatnonzero(is_final & byte_keys.any(axis=1)))
            keys.append(_truncate_to_keys(byte_keys[rows[-1]]))
            numbers.append(np.full(len(rows[-1]), number, np.int32))
        return cls(np.concatenate(keys), np.concatenate(numbers), np.concatenate(rows))._sort()

    def merge(self, other: _KeyIndex) -> _KeyIndex:
        return _KeyIndex(
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.source_numbers, other.source_numbers]),
            np.concatenate([self.source_rows, other.source_rows]),
        )._sort()

    def _sort(self) -> _KeyIndex:
        order = np.argsort(self.keys, kind="stable")  # linear in time if the keys are two sorted runs
        return _KeyIndex(self.keys[order], self.source_numbers[order], self.source_rows[order])


def _truncate_to_keys(byte_keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(byte_keys[:, :8]).view("<u8")[:, 0]
