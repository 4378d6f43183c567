"""For each row of an index: what is known of it, and from where."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from time import time_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.archive import Index
from featpipe.cache import Table
from featpipe.commit import Part
from featpipe.known import Known, Source
from featpipe.status import Status

__all__ = ["RACY_NANOSECONDS", "Ledger", "source_of_part"]

RACY_NANOSECONDS = 2 * 10**9  # a file changed this shortly before it is read may change again under the same time


class Ledger:
    """For each row of an index: its digest and status, and from which source its features come."""

    def __init__(self, index: Index, check_content: bool) -> None:
        n = len(index)
        self.index = index
        self.known = Known()
        self.origin = np.full(n, -1, np.int32)
        self.place = np.zeros(n, np.int64)
        self.status = index.fault.astype(np.uint8)
        self.digests = np.zeros((n, 32), np.uint8)
        self.stamps = index.stamps()
        self.stamps[index.mtime_ns > time_ns() - RACY_NANOSECONDS] = 0
        self._check_content = check_content

    def resolve(self) -> None:
        """Take what is known by stamp, without reading a byte of an image."""
        if self._check_content:
            return
        origin, place = self.known.by_stamp(self.stamps)
        for number in np.unique(origin[origin >= 0]):
            rows = np.flatnonzero(origin == number)
            self.take(rows, int(number), place[rows])

    def drop_damaged(self) -> None:
        """Forget what is to be copied and is not as it was written; it is embedded again."""
        for number in np.unique(self.origin[self.origin >= 0]):
            rows = np.flatnonzero(self.origin == number)
            damaged = rows[~self.known.sources[number].whole(self.place[rows])]
            self.origin[damaged], self.status[damaged] = -1, self.index.fault[damaged]
            self.digests[damaged] = 0

    def take(self, rows: NDArray[np.intp], number: int, place: NDArray[np.int64]) -> None:
        """Note that the features of some rows are at some places of a source."""
        source = self.known.sources[number]
        self.origin[rows], self.place[rows] = number, place
        self.status[rows] = source.status[place]
        self.digests[rows] = source.digests[place]

    @property
    def unread(self) -> NDArray[np.int64]:
        """Rows of which nothing is known yet; what the listing found faulty for good is not among them."""
        sound = np.isin(self.index.fault, [status for status in Status if status == Status.OK or status.transient])
        return np.flatnonzero((self.origin < 0) & sound)

    def settle(self) -> None:
        """Give the rows that were read and not embedded what is known of their bytes by now."""
        for row in np.flatnonzero((self.origin < 0) & self.digests.any(axis=1)):
            found = self.known.by_digest(self.digests[row].tobytes())
            if found is None:  # the image with the same bytes ran out of memory, and so would this one
                self.status[row] = self.status[row] or Status.OUT_OF_MEMORY
            else:
                self.take(np.array([row]), found[0], np.array([found[1]]))

    def table(self) -> Table:
        index = self.index
        stamps = np.where((self.origin >= 0)[:, None], self.stamps, 0).astype(np.uint8)
        return Table(index.ids, self.status, self.digests, stamps, index.split, index.labels)

    def gather(self, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Any:
        """The function that :func:`write_cache` asks for blocks of features."""

        def block(output: str, start: int, stop: int) -> NDArray[np.floating]:
            values = np.full((stop - start, *shapes[output]), np.nan, dtype)
            origin = np.where(self.status[start:stop] == Status.OK, self.origin[start:stop], -1)
            for number in np.unique(origin[origin >= 0]):
                rows = np.flatnonzero(origin == number)
                values[rows] = self.known.sources[number].features(output)[self.place[start:stop][rows]]
            return values

        return block


def source_of_part(part: Part) -> Source:
    """A finished piece of an unfinished extraction, to copy from."""
    return Source(part.read("digest"), part.read("stamp"), part.read("status"), partial(_part_features, part))


@lru_cache(maxsize=4)  # a few parts at a time: all of them together may be larger than memory
def _part_features(part: Part, output: str) -> NDArray[np.floating]:
    return part.read(f"features/{output}")
