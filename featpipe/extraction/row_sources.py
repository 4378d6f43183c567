"""The status, digest and embedding source of each row of an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from time import time_ns

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import EmbeddingLookup, EmbeddingSource, SampleTable
from featpipe.data import Index
from featpipe.status import Status
from featpipe.storage import RACY_NANOSECONDS, Part

FeatureReader = Callable[[str, int, int], NDArray[np.floating]]
"""``read(output, start, stop)``: the features of these rows, NaN where the status is not OK."""


class RowSources:
    """The status, digest and embedding source of each row of an index.

    Parameters
    ----------
    index : Index
    check_content : bool
        Ignore stamps: every image is read to compute its digest.

    Attributes
    ----------
    lookup : EmbeddingLookup
        The sources that embeddings may be copied from.
    source_numbers : ndarray of shape (n,), int32
        Index into ``lookup.sources``, -1 where the embedding is unknown.
    source_rows : ndarray of shape (n,), int64
        The row inside that source.
    status : ndarray of shape (n,), uint8
        Codes of :class:`featpipe.status.Status`.
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes, zero where unknown.
    stamps : ndarray of shape (n, 16), uint8
        Zero if a file changed so recently that it may change again with the same modification time.
    """

    def __init__(self, index: Index, check_content: bool) -> None:
        n = len(index)
        self.index = index
        self.lookup = EmbeddingLookup()
        self.source_numbers = np.full(n, -1, np.int32)
        self.source_rows = np.zeros(n, np.int64)
        self.status = index.fault.astype(np.uint8)
        self.digests = np.zeros((n, 32), np.uint8)
        self.stamps = index.compute_stamps()
        self.stamps[index.mtime_ns > time_ns() - RACY_NANOSECONDS] = 0
        self._check_content = check_content

    def resolve_by_stamp(self) -> None:
        """Assign a source to every row whose stamp is known, without reading any image."""
        if self._check_content:
            return
        source_numbers, source_rows = self.lookup.find_by_stamp(self.stamps)
        for source_number, rows in _iter_groups(source_numbers):
            self.assign(rows, source_number, source_rows[rows])

    def drop_damaged(self) -> None:
        """Unassign rows whose stored embedding fails its checksum; they are embedded again."""
        for source_number, rows in _iter_groups(self.source_numbers):
            damaged = rows[~self.lookup.sources[source_number].find_intact(self.source_rows[rows])]
            self.source_numbers[damaged], self.status[damaged] = -1, self.index.fault[damaged]
            self.digests[damaged] = 0

    def assign(self, rows: NDArray[np.intp], source_number: int, source_rows: NDArray[np.int64]) -> None:
        """Set the source of the embeddings of some rows."""
        source = self.lookup.sources[source_number]
        self.source_numbers[rows], self.source_rows[rows] = source_number, source_rows
        self.status[rows] = source.status[source_rows]
        self.digests[rows] = source.digests[source_rows]

    @property
    def unread_rows(self) -> NDArray[np.int64]:
        """Rows that have no source yet, except those that the listing found permanently unreadable."""
        readable_codes = np.isin(
            self.index.fault, [status for status in Status if status == Status.OK or status.transient]
        )
        return np.flatnonzero((self.source_numbers < 0) & readable_codes)

    def resolve_duplicates(self) -> None:
        """Assign a source by digest to the rows that were read but not embedded."""
        for row in np.flatnonzero((self.source_numbers < 0) & self.digests.any(axis=1)):
            match = self.lookup.find_by_digest(self.digests[row].tobytes())
            if match is None:  # the image with the same bytes ran out of memory
                self.status[row] = self.status[row] or Status.OUT_OF_MEMORY
            else:
                self.assign(np.array([row]), match[0], np.array([match[1]]))

    def to_table(self) -> SampleTable:
        """Make the sample table of the cache."""
        index = self.index
        stamps = np.where((self.source_numbers >= 0)[:, None], self.stamps, 0).astype(np.uint8)
        return SampleTable(index.ids, self.status, self.digests, stamps, index.split, index.labels)

    def make_reader(self, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> FeatureReader:
        """Make the function that :func:`featpipe.cache.write_cache` calls to read blocks of features."""

        def read_block(output: str, start: int, stop: int) -> NDArray[np.floating]:
            values = np.full((stop - start, *shapes[output]), np.nan, dtype)
            source_numbers = np.where(self.status[start:stop] == Status.OK, self.source_numbers[start:stop], -1)
            for source_number, rows in _iter_groups(source_numbers):
                values[rows] = self.lookup.sources[source_number].features(output)[self.source_rows[start:stop][rows]]
            return values

        return read_block


def _iter_groups(source_numbers: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield each source number that is not negative, with its rows."""
    for source_number in np.flatnonzero(np.bincount(source_numbers[source_numbers >= 0])):
        yield int(source_number), np.flatnonzero(source_numbers == source_number)


def source_from_part(part: Part) -> EmbeddingSource:
    """Make an embedding source from a committed part of an unfinished extraction."""
    return EmbeddingSource(
        part.read("digest"), part.read("stamp"), part.read("status"), partial(_read_part_features, part)
    )


@lru_cache(maxsize=4)  # a few parts only: all parts together may be larger than memory
def _read_part_features(part: Part, output: str) -> NDArray[np.floating]:
    return part.read(f"features/{output}")
