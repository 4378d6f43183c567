"""What is embedded already: rows of caches and parts, found by an image's digest or stamp."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.status import Status

__all__ = ["Known", "Source"]

TABLES_MAX = 16


def _all(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For what was verified as a whole."""
    return np.ones(len(rows), bool)


@dataclass(frozen=True, eq=False)
class Source:
    """Rows that can be copied.

    Attributes
    ----------
    digests : ndarray of shape (r, 32), uint8
    stamps : ndarray of shape (r, 16), uint8
    status : ndarray of shape (r,), uint8
    features : callable
        ``features(output)`` is an array of shape (r, …), memory-mapped or read from the part when asked for.
    whole : callable
        ``whole(rows)`` says which of some rows are as they were written, shape (m,), bool.
    """

    digests: NDArray[np.uint8]
    stamps: NDArray[np.uint8]
    status: NDArray[np.uint8]
    features: Callable[[str], NDArray[np.floating]]
    whole: Callable[[NDArray[np.int64]], NDArray[np.bool_]] = _all

    @classmethod
    def of_cache(cls, cache: FeatureCache, outputs: Iterable[str]) -> Source:
        """The rows of a cache, of which these outputs are wanted."""

        def whole(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
            return np.all([cache.whole_rows(rows, output) for output in outputs], axis=0)

        return cls(cache.digests, cache.stamps, cache.status_codes, cache.features, whole)


@dataclass(frozen=True, eq=False)
class _Table:
    """Sorted keys of some rows: the first eight bytes of digest or stamp, and where the row is."""

    keys: NDArray[np.uint64]
    source: NDArray[np.int32]
    place: NDArray[np.int64]

    @classmethod
    def of(cls, bytes_: NDArray[np.uint8], usable: NDArray[np.bool_], source: int) -> _Table:
        place = np.flatnonzero(usable & bytes_.any(axis=1))
        keys = _keys(bytes_[place])
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], np.full(len(place), source, np.int32), place[order].astype(np.int64))

    @classmethod
    def merged(cls, tables: tuple[_Table, ...]) -> _Table:
        keys = np.concatenate([t.keys for t in tables])
        order = np.argsort(keys, kind="stable")
        source = np.concatenate([t.source for t in tables])[order]
        return cls(keys[order], source, np.concatenate([t.place for t in tables])[order])


class Known:
    """The embeddings that are there already under one fingerprint.

    Rows whose status may end better on another attempt, or is not known to this version, are not among them. Lookups
    may run in any thread while one thread adds sources.
    """

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self._by_digest: tuple[_Table, ...] = ()
        self._by_stamp: tuple[_Table, ...] = ()

    def add(self, source: Source) -> int:
        """Add a source; its number."""
        number = len(self.sources)
        self.sources.append(source)
        lasting = np.isin(source.status, [status for status in Status if not status.transient])
        self._by_digest = _grown(self._by_digest, _Table.of(source.digests, lasting, number))
        self._by_stamp = _grown(self._by_stamp, _Table.of(source.stamps, lasting, number))
        return number

    def by_digest(self, digest: bytes) -> tuple[int, int] | None:
        """Source number and place of an image with these bytes, or None."""
        wanted = np.frombuffer(digest, np.uint8)
        key = _keys(wanted[None])[0]
        for table in self._by_digest:
            at = int(np.searchsorted(table.keys, key))
            while at < len(table.keys) and table.keys[at] == key:
                source, place = int(table.source[at]), int(table.place[at])
                if np.array_equal(self.sources[source].digests[place], wanted) and self.is_whole(source, place):
                    return source, place
                at += 1
        return None

    def is_whole(self, source: int, place: int) -> bool:
        """Whether a row is as it was written; damaged ones are not copied."""
        return bool(self.sources[source].whole(np.array([place]))[0])

    def by_stamp(self, stamps: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Source numbers (-1 where unknown) and places of many stamps at once, each of shape (n,).

        Whether those rows are whole is for the caller to see, before it copies them.
        """
        source = np.full(len(stamps), -1, np.int32)
        place = np.zeros(len(stamps), np.int64)
        keys = _keys(stamps)
        for table in self._by_stamp:
            at = np.searchsorted(table.keys, keys)
            rows = np.flatnonzero((source < 0) & stamps.any(axis=1))
            while len(rows):  # another round only where different stamps begin with the same eight bytes
                rows = rows[at[rows] < len(table.keys)]
                rows = rows[table.keys[at[rows]] == keys[rows]]
                found, there = table.source[at[rows]], table.place[at[rows]]
                same = self._same_stamps(found, there, stamps[rows])
                source[rows[same]], place[rows[same]] = found[same], there[same]
                rows = rows[~same]
                at[rows] += 1
        return source, place

    def _same_stamps(
        self, source: NDArray[np.int32], place: NDArray[np.int64], stamps: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        same = np.zeros(len(stamps), bool)
        for number in np.unique(source):
            rows = np.flatnonzero(source == number)
            same[rows] = (self.sources[number].stamps[place[rows]] == stamps[rows]).all(axis=1)
        return same


def _keys(bytes_: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(bytes_[:, :8]).view("<u8")[:, 0]


def _grown(tables: tuple[_Table, ...], table: _Table) -> tuple[_Table, ...]:
    """With one more table, merged when there are many: a lookup asks at most ``TABLES_MAX`` of them."""
    grown = (*tables, table)
    return grown if len(grown) <= TABLES_MAX else (_Table.merged(grown),)
