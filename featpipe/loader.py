"""Bytes → transformed batches with their row numbers, in parallel. Handles are opened where they are used."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe import decoding, image
from featpipe.errors import ConfigError, SampleError
from featpipe.fingerprint import digest
from featpipe.status import Status

__all__ = ["Batch", "Embeds", "Loader", "Pictures", "Readable", "embed_pictures", "embedded", "spread"]

R = TypeVar("R")
Embeddings = dict[str, NDArray[np.float32]]


class PictureTransform(Protocol):
    """The part of the fixed preprocessing that is each picture's own: uint8 (3, H, W) → (3, h, w)."""

    def __call__(self, image: Tensor, /) -> Tensor: ...


class Reads(Protocol):
    """An open source of images, read by row."""

    def read(self, row: int, /) -> bytes | NDArray[np.uint8]: ...
    def __exit__(self, *exception: object) -> None: ...


class Readable(Protocol):
    """What a loader reads from: an index of archives, or pictures at hand."""

    @property
    def sequential(self) -> bool: ...
    def open(self) -> Reads: ...


class Embeds(Protocol):
    """What a loader feeds: an engine."""

    @property
    def device(self) -> torch.device: ...
    @property
    def batch(self) -> int: ...
    @property
    def workers(self) -> int: ...
    @property
    def transform(self) -> PictureTransform: ...
    def collect(self, pictures: Sequence[Tensor], /) -> Tensor: ...
    def running(self) -> AbstractContextManager[None]: ...
    def enter_stream(self, workers: int) -> None: ...
    def embed(self, images: Tensor) -> Embeddings: ...
    def submit(self, images: Tensor) -> Callable[[], Embeddings]: ...


@dataclass(frozen=True)
class Pictures:
    """Images at hand, in the order given: paths, bytes, Pillow images, or uint8 arrays."""

    items: Sequence[object]
    sequential: bool = False

    def open(self) -> Pictures:
        return self

    def read(self, row: int) -> bytes | NDArray[np.uint8]:
        item = self.items[row]
        if isinstance(item, (bytes, bytearray, memoryview)):
            return bytes(item)
        if not isinstance(item, (str, os.PathLike)):
            try:
                return image.to_rgb(item)  # type: ignore[arg-type]  # it says itself what it takes
            except ConfigError as error:
                raise ConfigError(f"image {row}: {error}") from None
        try:
            with open(item, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise SampleError(f"{item}: there is no such file", status=Status.MISSING) from None
        except OSError as error:
            raise SampleError(f"{item}: {error.strerror}", status=Status.UNREADABLE) from None

    def __exit__(self, *exception: object) -> None:
        pass


@dataclass
class Seconds:
    """Where the time of one batch went."""

    reading: float = 0.0
    decoding: float = 0.0
    embedding: float = 0.0


@dataclass
class Batch:
    """Some rows of an index, read.

    Attributes
    ----------
    rows : list of int
        All rows that were read for this batch, in the order of the index.
    digests : list of bytes
        SHA-256 of each row's bytes; empty where they could not be had.
    status : list of Status
        ``OK`` also for a row that needs no picture, because its embedding is known already.
    images : Tensor of shape (b, 3, h, w), or None
        The pictures of the rows at ``places``, as the engine takes them.
    places : list of int
        Positions in ``rows``, one for each picture.
    """

    rows: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    status: list[Status] = field(default_factory=list)
    images: Tensor | None = None
    places: list[int] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)


class Loader:
    """Reads, decodes and transforms the rows of an index; its batches may be taken by several threads.

    Parameters
    ----------
    index : Index or Pictures
    rows : ndarray of shape (m,), int64
        The rows to read, ascending.
    transform : callable
        uint8 (3, H, W) → (3, h, w), of any type.
    batch : int
        Pictures in a batch; the last ones have fewer.
    is_known : callable
        Told the digest of a row's bytes, says whether its embedding is there already or under way; if so the row is
        not decoded.
    collect : callable
        Makes one tensor of a batch's pictures.
    """

    def __init__(
        self,
        index: Readable,
        rows: NDArray[np.int64],
        transform: PictureTransform,
        batch: int,
        is_known: Callable[[bytes], bool] = lambda digest: False,
        collect: Callable[[list[Tensor]], Tensor] = torch.stack,
    ) -> None:
        self.transform = transform
        self.collect = collect
        self.batch = batch
        self.is_known = is_known
        self.reader = index.open()
        self._sequential = index.sequential
        self._rows = iter(rows.tolist())
        self._feed = threading.Lock()

    def close(self) -> None:
        self.reader.__exit__(None, None, None)

    def batches(self) -> Iterator[Batch]:
        """Batches until the rows are used up; each thread runs a generator of its own over the shared rows."""
        while True:
            batch = Batch()
            pictures: list[Tensor] = []
            while len(pictures) < self.batch:
                taken = self._take(self.batch - len(pictures), batch.seconds)
                if not taken:
                    break
                for row, data in taken:
                    picture = self._load(batch, row, data)
                    if picture is not None:
                        batch.places.append(len(batch.rows) - 1)
                        pictures.append(picture)
                if len(batch.rows) >= 64 * self.batch:  # nearly all known: let the results out
                    break
            if not batch.rows:
                return
            if pictures:
                batch.images = self.collect(pictures)
            yield batch

    def _take(self, count: int, seconds: Seconds) -> list[tuple[int, bytes | NDArray[np.uint8] | SampleError]]:
        """The next rows with their bytes. What can only be read front to back is read in turn."""
        with self._feed:
            rows = list(islice(self._rows, count))
            if self._sequential:
                return [(row, self._read(row, seconds)) for row in rows]
        return [(row, self._read(row, seconds)) for row in rows]

    def _read(self, row: int, seconds: Seconds) -> bytes | NDArray[np.uint8] | SampleError:
        started = perf_counter()
        try:
            return self.reader.read(row)
        except SampleError as error:
            return error
        finally:
            seconds.reading += perf_counter() - started

    def _load(self, batch: Batch, row: int, data: bytes | NDArray[np.uint8] | SampleError) -> Tensor | None:
        """Add the row to the batch; the picture, if there is one to embed."""
        started = perf_counter()
        batch.rows.append(row)
        batch.digests.append(b"")
        batch.status.append(Status.OK)
        if isinstance(data, SampleError):
            batch.status[-1] = data.status
            return None
        if isinstance(data, bytes):
            batch.digests[-1] = digest(data)
            if self.is_known(batch.digests[-1]):
                return None
        try:
            picture = decoding.decode(data) if isinstance(data, bytes) else data
            return self.transform(torch.from_numpy(picture).permute(2, 0, 1))
        except SampleError as error:
            batch.status[-1] = error.status
        except MemoryError:
            batch.status[-1] = Status.OUT_OF_MEMORY
        finally:
            batch.seconds.decoding += perf_counter() - started
        return None


Embedded = tuple[Batch, Embeddings]


def spread(work: Callable[[], Iterator[R]], threads: int, ahead: int = 4) -> Generator[R, None, None]:
    """Run the same generator in several threads and yield what they all yield, as it comes.

    A failure in one thread stops the others and is raised here; closing this generator (an interrupt, an error of the
    consumer) stops them within one item.

    Parameters
    ----------
    work : callable
        Makes a generator; called once in each thread.
    threads : int
        At least 1.
    ahead : int
        Items that each thread may be ahead of the consumer.
    """
    results: queue.Queue[R | BaseException | None] = queue.Queue(threads * ahead)
    stop = threading.Event()

    def put(item: R | BaseException | None) -> None:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in work():
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    workers = [threading.Thread(target=run, name=f"featpipe-{i}", daemon=True) for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        running = threads
        while running:
            item = results.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def embedded(loader: Loader, engine: Embeds, workers: int) -> Generator[Embedded, None, None]:
    """The batches of a loader with their embeddings, in no particular order.

    On a CPU each worker embeds what it decoded; for a GPU the workers decode, and the caller's thread has it embed one
    batch while the next is on its way.
    """

    def decode() -> Iterator[Batch]:
        engine.enter_stream(workers)
        return loader.batches()

    if engine.device.type == "cpu":
        return spread(lambda: _in_turn(decode(), engine), workers)
    return _overlapping(spread(decode, workers), engine)


def _in_turn(batches: Iterator[Batch], engine: Embeds) -> Generator[Embedded, None, None]:
    for batch in batches:
        started = perf_counter()
        features = engine.embed(batch.images) if batch.images is not None else {}
        batch.images = None
        batch.seconds.embedding += perf_counter() - started
        yield batch, features


def _overlapping(batches: Iterator[Batch], engine: Embeds, ahead: int = 1) -> Generator[Embedded, None, None]:
    """In order, with so many batches begun after the one that is waited for."""
    begun: deque[tuple[Batch, Callable[[], Embeddings]]] = deque()

    def finish() -> Embedded:
        batch, answer = begun.popleft()
        started = perf_counter()
        features = answer()
        batch.seconds.embedding += perf_counter() - started
        return batch, features

    for batch in batches:
        started = perf_counter()
        begun.append((batch, engine.submit(batch.images) if batch.images is not None else dict))
        batch.images = None
        batch.seconds.embedding += perf_counter() - started
        if len(begun) > ahead:
            yield finish()
    while begun:
        yield finish()


def embed_pictures(pictures: Pictures, engine: Embeds, output: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The embeddings of images at hand, in the order given.

    Returns
    -------
    features : ndarray of shape (n, …)
        NaN in the rows whose status is not 0.
    status : ndarray of shape (n,), uint8
    """
    n = len(pictures.items)
    status = np.zeros(n, np.uint8)
    features: NDArray[np.float32] | None = None
    workers = min(engine.workers, -(-n // engine.batch))
    loader = Loader(pictures, np.arange(n), engine.transform, engine.batch, collect=engine.collect)
    with closing(loader), engine.running(), closing(embedded(loader, engine, workers)) as batches:
        for batch, values in batches:
            status[batch.rows] = batch.status
            if values:
                if features is None:
                    features = np.full((n, *values[output].shape[1:]), np.nan, np.float32)
                rows = np.array(batch.rows)[batch.places]
                features[rows] = values[output]
                finite = np.isfinite(values[output].reshape(len(rows), -1)).all(axis=1)
                status[rows[~finite]] = Status.NOT_FINITE
    return (np.full((n, 0), np.nan, np.float32) if features is None else features), status
