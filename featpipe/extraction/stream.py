"""Rows of an index through an engine into parts, in this process or in one of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.commit import Part, Parts
from featpipe.engine import Engine
from featpipe.loader import Batch, Loader, Seconds, embedded
from featpipe.recipe import Extraction
from featpipe.status import Status

__all__ = ["Ended", "Message", "Published", "Read", "Started", "Stream"]

PART_SECONDS = 7.0  # with a batch of at most three seconds in hand, a kill costs at most about ten of work
PART_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Started:
    """The engine is ready."""

    device: str
    name: str
    batch: int
    counted: bool


@dataclass(frozen=True)
class Read:
    """Some rows were read, and embedded where they had to be.

    Attributes
    ----------
    rows : ndarray of shape (b,), int64
    status : ndarray of shape (b,), uint8
    digests : ndarray of shape (b, 32), uint8
        Zero where the bytes could not be had.
    embedded : int
    seconds : Seconds
    """

    rows: NDArray[np.int64]
    status: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    embedded: int
    seconds: Seconds


@dataclass(frozen=True)
class Published:
    """A part is durable; its rows are those of the index."""

    part: Part
    rows: NDArray[np.int64]
    digests: list[bytes]


@dataclass(frozen=True)
class Ended:
    """All rows were read; seconds of committing, and of workers waiting."""

    committing: float
    waiting: float


Message = Started | Read | Published | Ended


@dataclass
class _PartInHand:
    """The part in hand."""

    digests: list[bytes] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    features: dict[str, list[NDArray[np.floating]]] = field(default_factory=dict)
    bytes: int = 0


@dataclass
class Stream:
    """Reads, embeds and commits.

    Parameters
    ----------
    index : Index
    stamps : ndarray of shape (n, 16), uint8
    backbone : Backbone
    settings : Extraction
    parts : Parts
    is_known : callable
        Whether an image with this digest needs no embedding; asked once for each, by several threads.
    deliver : callable
        Is told everything that is to be known of the rows, in the order in which it happens.
    """

    index: Index
    stamps: NDArray[np.uint8]
    backbone: Backbone
    settings: Extraction
    parts: Parts
    is_known: Callable[[bytes], bool]
    deliver: Callable[[Message], None]
    _part: _PartInHand = field(default_factory=_PartInHand)
    _committed_at: float = 0.0
    _committing: float = 0.0

    def run(self, make_engine: Callable[[], Engine], rows: NDArray[np.int64]) -> None:
        """Embed some rows. What is finished when this is interrupted is committed."""
        engine = make_engine()
        counted = engine.multiply_adds is not None or self.settings.batch is not None or engine.device.type != "cpu"
        self.deliver(Started(str(engine.device), engine.name, engine.batch, counted))
        started = self._committed_at = perf_counter()
        workers = self.settings.workers or engine.workers
        loader = Loader(self.index, rows, engine.transform, engine.batch, self.is_known, engine.collect)
        busy = 0.0
        try:
            with closing(loader), engine.running(), closing(embedded(loader, engine, workers)) as results:
                for batch, features in results:
                    seconds = batch.seconds
                    busy += seconds.reading + seconds.decoding + seconds.embedding
                    self._collect(batch, features)
        finally:
            self._commit()
        waiting = max(0.0, workers * (perf_counter() - started) - busy)
        self.deliver(Ended(self._committing, waiting))

    def _collect(self, batch: Batch, features: Mapping[str, NDArray[np.float32]]) -> None:
        part = self._part
        with np.errstate(over="ignore"):  # what is too large for float16 is infinite then, which the row's status says
            stored = {name: value.astype(self.settings.storage) for name, value in features.items()}
        finite = np.ones(len(batch.places), bool)
        for value in stored.values():
            finite &= np.isfinite(value.reshape(len(value), -1)).all(axis=1)
        place = dict(zip(batch.places, range(len(batch.places)), strict=True))
        found, embedded_ = np.array(batch.status, np.uint8), 0
        for at, row in enumerate(batch.rows):
            status, digest = batch.status[at], batch.digests[at]
            if at in place and not finite[place[at]]:
                status = Status.NOT_FINITE
            found[at] = status
            if at in place or (digest and not status.transient and status != Status.OK):
                part.rows.append(row)
                part.digests.append(digest)
                part.status.append(int(status))
                for name, shape in self.backbone.shapes.items():
                    value = stored[name][place[at]] if status == Status.OK else _nan(shape, self.settings.storage)
                    part.features.setdefault(name, []).append(value)
                    part.bytes += value.nbytes
                embedded_ += status == Status.OK
        digests = np.frombuffer(b"".join(digest or bytes(32) for digest in batch.digests), np.uint8).reshape(-1, 32)
        self.deliver(Read(np.array(batch.rows), found, digests, embedded_, batch.seconds))
        if part.bytes > PART_BYTES or perf_counter() - self._committed_at > PART_SECONDS:
            self._commit()

    def _commit(self) -> None:
        part, self._part = self._part, _PartInHand()
        started = perf_counter()
        if part.rows:
            rows = np.array(part.rows)
            digests = np.frombuffer(b"".join(part.digests), np.uint8).reshape(-1, 32)
            arrays = {name: np.stack(values) for name, values in part.features.items()}
            published = self.parts.commit(
                {
                    "digest": digests,
                    "stamp": self.stamps[rows],
                    "status": np.array(part.status, np.uint8),
                    **{f"features/{name}": value for name, value in arrays.items()},
                }
            )
            self.deliver(Published(published, rows, part.digests))
        self._committed_at = perf_counter()
        self._committing += self._committed_at - started


def _nan(shape: tuple[int, ...], dtype: str) -> NDArray[np.floating]:
    return np.full(shape, np.nan, dtype)
