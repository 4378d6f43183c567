"""Lookup of existing embeddings: rows of caches and parts, found by the digest or the stamp of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featpipe.cache.reader import FeatureCache
from featpipe.status import Status

MAX_KEY_INDEXES = 16


def _all_intact(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The check for sources that were verified as a whole."""
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
    find_intact: Callable[[NDArray[np.int64]], NDArray[np.bool_]] = _all_intact

    @classmethod
    def from_cache(cls, cache: FeatureCache, outputs: Iterable[str]) -> EmbeddingSource:
        """Make a source from a cache, for copying these outputs."""

        def find_intact(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
            return np.all([cache.whole_rows(rows, output) for output in outputs], axis=0)

        return cls(cache.digests, cache.stamps, cache.status_codes, cache.features, find_intact)


@dataclass(frozen=True, eq=False)
class _KeyIndex:
    """Sorted keys (the first eight bytes of a digest or a stamp), with the source and the row of each."""

    keys: NDArray[np.uint64]
    source_ids: NDArray[np.int32]
    source_rows: NDArray[np.int64]

    @classmethod
    def from_bytes(cls, byte_keys: NDArray[np.uint8], is_usable: NDArray[np.bool_], source_id: int) -> _KeyIndex:
        source_rows = np.flatnonzero(is_usable & byte_keys.any(axis=1))
        keys = _truncate_to_keys(byte_keys[source_rows])
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], np.full(len(source_rows), source_id, np.int32), source_rows[order].astype(np.int64))

    @classmethod
    def merge(cls, indexes: tuple[_KeyIndex, ...]) -> _KeyIndex:
        keys = np.concatenate([key_index.keys for key_index in indexes])
        order = np.argsort(keys, kind="stable")
        source_ids = np.concatenate([key_index.source_ids for key_index in indexes])[order]
        return cls(keys[order], source_ids, np.concatenate([key_index.source_rows for key_index in indexes])[order])


class EmbeddingLookup:
    """The existing embeddings with one fingerprint.

    Rows with a transient status, or a status unknown to this version, are excluded. Lookups may run in any thread while
    one thread adds sources.
    """

    def __init__(self) -> None:
        self.sources: list[EmbeddingSource] = []
        self._by_digest: tuple[_KeyIndex, ...] = ()
        self._by_stamp: tuple[_KeyIndex, ...] = ()

    def add(self, source: EmbeddingSource) -> int:
        """Add a source, and return its number."""
        source_id = len(self.sources)
        self.sources.append(source)
        is_final = np.isin(source.status, [status for status in Status if not status.transient])
        self._by_digest = _add_key_index(self._by_digest, _KeyIndex.from_bytes(source.digests, is_final, source_id))
        self._by_stamp = _add_key_index(self._by_stamp, _KeyIndex.from_bytes(source.stamps, is_final, source_id))
        return source_id

    def find_by_digest(self, digest: bytes) -> tuple[int, int] | None:
        """Find the source number and the row of an image by its digest. Damaged rows are skipped."""
        digest_bytes = np.frombuffer(digest, np.uint8)
        key = _truncate_to_keys(digest_bytes[None])[0]
        for key_index in self._by_digest:
            position = int(np.searchsorted(key_index.keys, key))
            while position < len(key_index.keys) and key_index.keys[position] == key:
                source_id, source_row = int(key_index.source_ids[position]), int(key_index.source_rows[position])
                if np.array_equal(self.sources[source_id].digests[source_row], digest_bytes) and self.is_intact(
                    source_id, source_row
                ):
                    return source_id, source_row
                position += 1
        return None

    def is_intact(self, source_id: int, source_row: int) -> bool:
        """Whether a row matches its checksums; damaged rows must not be copied."""
        return bool(self.sources[source_id].find_intact(np.array([source_row]))[0])

    def find_by_stamp(self, stamps: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Find the source numbers (-1 if not found) and the rows of n stamps, each of shape (n,).

        The caller must check that these rows are intact before it copies them.
        """
        source_ids = np.full(len(stamps), -1, np.int32)
        source_rows = np.zeros(len(stamps), np.int64)
        keys = _truncate_to_keys(stamps)
        for key_index in self._by_stamp:
            positions = np.searchsorted(key_index.keys, keys)
            pending = np.flatnonzero((source_ids < 0) & stamps.any(axis=1))
            while len(pending):  # repeats only for different stamps with the same first eight bytes
                pending = pending[positions[pending] < len(key_index.keys)]
                pending = pending[key_index.keys[positions[pending]] == keys[pending]]
                candidate_sources, candidate_rows = (
                    key_index.source_ids[positions[pending]],
                    key_index.source_rows[positions[pending]],
                )
                is_match = self._stamps_match(candidate_sources, candidate_rows, stamps[pending])
                source_ids[pending[is_match]], source_rows[pending[is_match]] = (
                    candidate_sources[is_match],
                    candidate_rows[is_match],
                )
                pending = pending[~is_match]
                positions[pending] += 1
        return source_ids, source_rows

    def _stamps_match(
        self, source_ids: NDArray[np.int32], source_rows: NDArray[np.int64], stamps: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        is_match = np.zeros(len(stamps), bool)
        for source_id in np.unique(source_ids):
            matching_rows = np.flatnonzero(source_ids == source_id)
            is_match[matching_rows] = (
                self.sources[source_id].stamps[source_rows[matching_rows]] == stamps[matching_rows]
            ).all(axis=1)
        return is_match


def _truncate_to_keys(byte_keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(byte_keys[:, :8]).view("<u8")[:, 0]


def _add_key_index(indexes: tuple[_KeyIndex, ...], key_index: _KeyIndex) -> tuple[_KeyIndex, ...]:
    """Add an index, and merge all when there are many: a lookup searches at most ``MAX_KEY_INDEXES`` indexes."""
    extended = (*indexes, key_index)
    return extended if len(extended) <= MAX_KEY_INDEXES else (_KeyIndex.merge(extended),)
