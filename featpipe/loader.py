"""Bytes → transformed batches with their row numbers, in parallel. Handles are opened where they are used."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic, perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe import decoding, image
from featpipe.backbone.products import Images, Picture
from featpipe.errors import ConfigError, SampleError
from featpipe.fingerprint import digest
from featpipe.status import Status

__all__ = ["Batch", "Embeds", "Loader", "Pictures", "Readable", "embed_pictures", "embedded", "piece_for", "spread"]

MANY = 64  # times as many rows as a batch has pictures: so many are let out with fewer
PIECE = 32  # pictures, at most, that a worker hands on at a time where others embed them

R = TypeVar("R")
Embeddings = dict[str, NDArray[np.float32]]

Taken = tuple[int, bytes | NDArray[np.uint8] | SampleError]

SECONDS_TO_STOP = 10.0
TAKEN_BYTES = 32 << 20  # of encoded images that one thread has read and not decoded yet


class PictureTransform(Protocol):
    """What is done with each picture by itself: uint8 (3, H, W) → (3, h, w), or what an engine takes in its place."""

    def __call__(self, image: Tensor, /) -> Picture: ...


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
    @property
    def unhurried(self) -> PictureTransform: ...
    def collect(self, pictures: Sequence[Picture], /) -> Images: ...
    def running(self) -> AbstractContextManager[None]: ...
    def enter_stream(self, workers: int) -> None: ...
    def embed(self, images: Images) -> Embeddings: ...
    def submit(self, images: Images) -> Callable[[], Embeddings]: ...


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
    images : Tensor of shape (b, 3, h, w), or list of pictures, or None
        The pictures of the rows at ``places``, as the engine takes them.
    places : list of int
        Positions in ``rows``, one for each picture.
    """

    rows: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    status: list[Status] = field(default_factory=list)
    images: Images | None = None
    places: list[int] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)

    def take(self, other: Batch) -> None:
        """Add another batch's rows to this one's, and its seconds; whatever it has in ``images`` stays there."""
        self.places.extend(len(self.rows) + place for place in other.places)
        self.rows.extend(other.rows)
        self.digests.extend(other.digests)
        self.status.extend(other.status)
        for name, value in vars(other.seconds).items():
            setattr(self.seconds, name, getattr(self.seconds, name) + value)


class Loader:
    """Reads, decodes and transforms the rows of an index; its batches may be taken by several threads.

    Parameters
    ----------
    index : Index or Pictures
    rows : ndarray of shape (m,), int64
        The rows to read, ascending.
    transform : callable
        uint8 (3, H, W) → (3, h, w), of any type; or whatever ``collect`` takes.
    batch : int
        Pictures in a batch; the last ones have fewer.
    is_known : callable
        Told the digest of a row's bytes, says whether its embedding is there already or under way; if so the row is
        not decoded.
    collect : callable
        Makes one thing, for an engine, of a batch's pictures.
    """

    def __init__(
        self,
        index: Readable,
        rows: NDArray[np.int64],
        transform: PictureTransform,
        batch: int,
        is_known: Callable[[bytes], bool] = lambda digest: False,
        collect: Callable[[list[Any]], Images] = torch.stack,
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
        for batch in self.pieces(self.batch):
            if batch.images is not None:
                batch.images = self.collect(list(batch.images))
            yield batch

    def pieces(self, size: int, unhurried: PictureTransform | None = None) -> Iterator[Batch]:
        """The same in batches of another size, whose pictures are a list and not collected.

        Parameters
        ----------
        size : int
        unhurried : callable, optional
            Takes the place of ``transform`` for the batch after one that its taker was late for, by more than half of
            the time that it took.
        """
        transform = self.transform
        while True:
            batch, started = Batch(), perf_counter()
            pictures: list[Picture] = []
            while len(pictures) < size:
                before = len(batch.rows)
                for row, data in self._take(size - len(pictures), batch.seconds):
                    picture = self._load(batch, row, data, transform)
                    if picture is not None:
                        batch.places.append(len(batch.rows) - 1)
                        pictures.append(picture)
                if len(batch.rows) == before or len(batch.rows) >= MANY * size:  # the end; or nearly all are known
                    break
            if not batch.rows:
                return
            batch.images = pictures or None
            made = perf_counter()
            yield batch
            late = perf_counter() - made > (made - started) / 2
            transform = unhurried if late and unhurried is not None else self.transform

    def _take(self, count: int, seconds: Seconds) -> Iterator[Taken]:
        """The next rows with their bytes. What can only be read front to back is read in turn, not too much at once."""
        with self._feed:
            if self._sequential:
                return iter(self._read_ahead(count, seconds))
            rows = list(islice(self._rows, count))
        return ((row, self._read(row, seconds)) for row in rows)

    def _read_ahead(self, count: int, seconds: Seconds) -> list[Taken]:
        taken: list[Taken] = []
        nbytes = 0
        for row in islice(self._rows, count):
            data = self._read(row, seconds)
            taken.append((row, data))
            nbytes += len(data) if isinstance(data, bytes) else 0
            if nbytes > TAKEN_BYTES:
                break
        return taken

    def _read(self, row: int, seconds: Seconds) -> bytes | NDArray[np.uint8] | SampleError:
        started = perf_counter()
        try:
            return self.reader.read(row)
        except SampleError as error:
            return error
        finally:
            seconds.reading += perf_counter() - started

    def _load(
        self, batch: Batch, row: int, data: bytes | NDArray[np.uint8] | SampleError, transform: PictureTransform
    ) -> Picture | None:
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
            with decoding.in_turn(data) if isinstance(data, bytes) else nullcontext(data) as picture:
                return transform(torch.from_numpy(picture).permute(2, 0, 1))
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
    consumer) stops them within one item. Who hangs, in a network's file system that does not answer, is not waited for
    for ever: what was yielded is to be kept.

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
        end = monotonic() + SECONDS_TO_STOP
        for worker in workers:
            worker.join(max(0.0, end - monotonic()))


def embedded(loader: Loader, engine: Embeds, workers: int) -> Generator[Embedded, None, None]:
    """The batches of a loader with their embeddings, in no particular order.

    On a CPU each worker embeds what it decoded; for a GPU the workers decode, and the caller's thread has it embed one
    batch while the next is on its way. A worker that has to wait for the GPU takes work off it (``engine.unhurried``).

    Notes
    -----
    For a GPU the workers together have at most one of its batches in their hands, in pieces (see :func:`piece_for`).
    As many pictures may wait in the queue, and the caller's thread joins pieces to one batch: so at most three batches
    of pictures and a piece are in memory, however many cores there are, and up to two batches more are being copied. Of
    those that are yet to be resized, which may be large, the engine limits the bytes.
    """
    if engine.device.type == "cpu":
        return spread(lambda: _in_turn(_entered(loader.batches(), engine, workers), engine), workers)
    size = piece_for(engine, workers)
    pieces = spread(lambda: _entered(loader.pieces(size, engine.unhurried), engine, workers), workers, ahead=1)
    return _overlapping(_joined(pieces, engine), engine)


def piece_for(engine: Embeds, workers: int) -> int:
    """Pictures that each of some workers decodes before it hands them on.

    On a CPU a batch. Else a power of two, as batches are unless they were asked for otherwise: at most 32, and so few
    that all workers together have one batch in their hands, or one picture each.
    """
    if engine.device.type == "cpu":
        return engine.batch
    share = max(1, min(PIECE, engine.batch // workers))
    return 1 << (share.bit_length() - 1)


def _entered(batches: Iterator[Batch], engine: Embeds, workers: int) -> Iterator[Batch]:
    engine.enter_stream(workers)
    return batches


def _in_turn(batches: Iterator[Batch], engine: Embeds) -> Generator[Embedded, None, None]:
    for batch in batches:
        started = perf_counter()
        features = engine.embed(batch.images) if batch.images is not None else {}
        batch.images = None
        batch.seconds.embedding += perf_counter() - started
        yield batch, features


def _joined(pieces: Generator[Batch, None, None], engine: Embeds) -> Generator[Batch, None, None]:
    """Pieces as batches of the engine's size, which it may halve meanwhile; no piece is taken apart."""
    batch, pictures = Batch(), list[Picture]()

    def taken() -> Batch:
        nonlocal batch, pictures
        whole, batch = batch, Batch()
        whole.images = engine.collect(pictures) if pictures else None
        pictures = []
        return whole

    with closing(pieces):
        for piece in pieces:
            if pictures and len(pictures) + len(piece.places) > engine.batch:
                yield taken()
            batch.take(piece)
            pictures.extend(piece.images if piece.images is not None else ())
            piece.images = None  # the worker that made it may still hold it
            if len(pictures) >= engine.batch or len(batch.rows) >= MANY * engine.batch:
                yield taken()
        if batch.rows:
            yield taken()


def _overlapping(
    batches: Generator[Batch, None, None], engine: Embeds, ahead: int = 1
) -> Generator[Embedded, None, None]:
    """In order, with so many batches begun after the one that is waited for."""
    begun: deque[tuple[Batch, Callable[[], Embeddings]]] = deque()

    def finish() -> Embedded:
        batch, answer = begun.popleft()
        started = perf_counter()
        features = answer()
        batch.seconds.embedding += perf_counter() - started
        return batch, features

    with closing(batches):
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
    workers = min(engine.workers, -(-n // piece_for(engine, engine.workers)))
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
