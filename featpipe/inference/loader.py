"""Read, decode and transform samples to batches with row numbers, in parallel worker threads."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic, perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from featpipe.backbones import ImageBatch, PreparedImage
from featpipe.data import DEFAULT_MODALITY, Index, SampleReader, get_modality
from featpipe.errors import ConfigError, SampleError
from featpipe.inference.engine import Engine
from featpipe.inference.runner import Embeddings
from featpipe.status import Status
from featpipe.storage import digest

MAX_ROWS_PER_IMAGE = 64  # per image of a full batch; a batch with this many rows is yielded even if it has fewer images
MAX_MICRO_BATCH = 32  # maximum number of images that a worker passes on at a time if another thread embeds them

R = TypeVar("R")

Sample = Any  # encoded bytes, or an item for the transform
ReadRow = tuple[int, Sample | SampleError]

STOP_TIMEOUT_SECONDS = 10.0
MAX_READ_AHEAD_BYTES = 32 << 20  # encoded images that one thread has read but not decoded


PrepareItem = Callable[[Any], PreparedImage]
"""The per-item part of the transform: an item → an input of the engine's ``collate``."""


@dataclass(frozen=True)
class SampleList:
    """Samples from a Python caller, in the order given: paths, encoded bytes, or decoded objects of the modality."""

    items: Sequence[object]
    modality: str = DEFAULT_MODALITY
    sequential: bool = False

    def open(self) -> SampleList:
        return self

    def read(self, row: int) -> Sample:
        item = self.items[row]
        if isinstance(item, (bytes, bytearray, memoryview)):
            return bytes(item)
        if not isinstance(item, (str, os.PathLike)):
            try:
                return get_modality(self.modality).to_item(item)
            except ConfigError as error:
                raise ConfigError(f"{self.modality} {row}: {error}") from None
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
class StageSeconds:
    """Time spent on one batch, by stage."""

    reading: float = 0.0
    decoding: float = 0.0
    embedding: float = 0.0


@dataclass
class DecodedBatch:
    """A batch of rows of an index, with the images that need to be embedded.

    Attributes
    ----------
    rows : list of int
        All rows that were read for this batch, in the order of the index.
    digests : list of bytes
        SHA-256 of each row's bytes; empty if they could not be read.
    status : list of Status
        ``OK`` also for a row without an image because its embedding exists already.
    images : Tensor of shape (b, 3, h, w), or list of images, or None
        The images of the rows at ``positions``, as input for the engine.
    positions : list of int
        Positions in ``rows``, one for each image.
    seconds : StageSeconds
    """

    rows: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    status: list[Status] = field(default_factory=list)
    images: ImageBatch | None = None
    positions: list[int] = field(default_factory=list)
    seconds: StageSeconds = field(default_factory=StageSeconds)

    def extend(self, other: DecodedBatch) -> None:
        """Append the rows and times of another batch; its ``images`` are not moved."""
        self.positions.extend(len(self.rows) + position for position in other.positions)
        self.rows.extend(other.rows)
        self.digests.extend(other.digests)
        self.status.extend(other.status)
        for name, value in vars(other.seconds).items():
            setattr(self.seconds, name, getattr(self.seconds, name) + value)


class Loader:
    """Reads, decodes and transforms the rows of an index; several threads may iterate over its batches.

    Parameters
    ----------
    index : Index or SampleList
    rows : ndarray of shape (m,), int64
        The rows to read, ascending.
    transform : callable
        uint8 (3, H, W) → (3, h, w) of any dtype, or any other input of ``collate``.
    batch : int
        Images in a batch; the last batch of each thread has fewer.
    has_embedding : callable
        Digest of a row's bytes → whether its embedding exists or is being computed; if so the row is not decoded.
    collate : callable
        List of transformed images → input for the engine.
    """

    def __init__(
        self,
        index: Index | SampleList,
        rows: NDArray[np.int64],
        transform: PrepareItem,
        batch: int,
        has_embedding: Callable[[bytes], bool] = lambda digest: False,
        collate: Callable[[list[Any]], ImageBatch] = torch.stack,
    ) -> None:
        self.transform = transform
        self.collate = collate
        self.batch = batch
        self.has_embedding = has_embedding
        self.reader: SampleReader | SampleList = index.open()
        self._decode = get_modality(index.modality).decode
        self._sequential = index.sequential
        self._rows = iter(rows.tolist())
        self._rows_lock = threading.Lock()

    def close(self) -> None:
        self.reader.__exit__(None, None, None)

    def batches(self) -> Iterator[DecodedBatch]:
        """Yield batches until all rows are read; each thread runs its own generator over the shared rows."""
        for batch in self.micro_batches(self.batch):
            if batch.images is not None:
                batch.images = self.collate(list(batch.images))
            yield batch

    def micro_batches(self, size: int, fallback_transform: PrepareItem | None = None) -> Iterator[DecodedBatch]:
        """Yield batches of another size, with lists of images that are not collated.

        Parameters
        ----------
        size : int
            Images in a micro-batch.
        fallback_transform : callable, optional
            Replaces ``transform`` for the next batch if the consumer took longer than half of a batch's loading time
            before it requested that batch.
        """
        transform = self.transform
        while True:
            batch, started = DecodedBatch(), perf_counter()
            pictures: list[PreparedImage] = []
            while len(pictures) < size:
                rows_before = len(batch.rows)
                for row, data in self._next_rows(size - len(pictures), batch.seconds):
                    picture = self._add_row(batch, row, data, transform)
                    if picture is not None:
                        batch.positions.append(len(batch.rows) - 1)
                        pictures.append(picture)
                # At the end of the rows, or if nearly all embeddings exist.
                if len(batch.rows) == rows_before or len(batch.rows) >= MAX_ROWS_PER_IMAGE * size:
                    break
            if not batch.rows:
                return
            batch.images = pictures or None
            yielded_at = perf_counter()
            yield batch
            is_consumer_late = perf_counter() - yielded_at > (yielded_at - started) / 2
            transform = fallback_transform if is_consumer_late and fallback_transform is not None else self.transform

    def _next_rows(self, count: int, seconds: StageSeconds) -> Iterator[ReadRow]:
        """Return the next rows with their bytes. A sequential source is read under the lock, in bounded chunks."""
        with self._rows_lock:
            if not self._sequential:
                rows = list(islice(self._rows, count))
                return ((row, self._read(row, seconds)) for row in rows)
            read_rows: list[ReadRow] = []
            nbytes = 0
            for row in islice(self._rows, count):
                data = self._read(row, seconds)
                read_rows.append((row, data))
                nbytes += len(data) if isinstance(data, bytes) else 0
                if nbytes > MAX_READ_AHEAD_BYTES:
                    break
            return iter(read_rows)

    def _read(self, row: int, seconds: StageSeconds) -> Sample | SampleError:
        started = perf_counter()
        try:
            return self.reader.read(row)
        except SampleError as error:
            return error
        finally:
            seconds.reading += perf_counter() - started

    def _add_row(
        self, batch: DecodedBatch, row: int, data: Sample | SampleError, transform: PrepareItem
    ) -> PreparedImage | None:
        """Add a row to the batch and return its image, if it must be embedded."""
        started = perf_counter()
        batch.rows.append(row)
        batch.digests.append(b"")
        batch.status.append(Status.OK)
        if isinstance(data, SampleError):
            batch.status[-1] = data.status
            return None
        if isinstance(data, bytes):
            batch.digests[-1] = digest(data)
            if self.has_embedding(batch.digests[-1]):
                return None
        try:
            with self._decode(data) if isinstance(data, bytes) else nullcontext(data) as item:
                return transform(item)
        except SampleError as error:
            batch.status[-1] = error.status
        except MemoryError:
            batch.status[-1] = Status.OUT_OF_MEMORY
        finally:
            batch.seconds.decoding += perf_counter() - started
        return None


def run_in_threads(
    make_generator: Callable[[], Iterator[R]], threads: int, prefetch: int = 4
) -> Generator[R, None, None]:
    """Run the same generator in several threads and yield all their items in order of arrival.

    An exception in one thread stops the others and is raised here. Closing this generator (after an interrupt or an
    error of the consumer) stops the threads within one item. A thread that hangs, for example on a network file system
    that does not respond, is abandoned after `STOP_TIMEOUT_SECONDS`, so that the consumer can save its results.

    Parameters
    ----------
    make_generator : callable
        Makes a generator; called once in each thread.
    threads : int
        At least 1.
    prefetch : int
        Number of items that each thread may be ahead of the consumer.
    """
    results: queue.Queue[R | BaseException | None] = queue.Queue(threads * prefetch)
    stop = threading.Event()

    def put(item: R | BaseException | None) -> None:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in make_generator():
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # passed to the consumer, which raises it
            put(error)

    workers = [threading.Thread(target=produce, name=f"featpipe-{i}", daemon=True) for i in range(threads)]
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
        deadline = monotonic() + STOP_TIMEOUT_SECONDS
        for worker in workers:
            worker.join(max(0.0, deadline - monotonic()))


EmbeddedBatch = tuple[DecodedBatch, Embeddings]


def embed_batches(loader: Loader, engine: Engine, workers: int) -> Generator[EmbeddedBatch, None, None]:
    """Yield the batches of a loader with their embeddings, in no particular order.

    On a CPU each worker embeds the images that it decoded. For a GPU the workers decode, and the caller's thread
    submits one batch to the GPU while the next is being loaded. A worker that would have to wait for the GPU does the
    whole transform on the CPU (``engine.fallback_transform``).

    Notes
    -----
    For a GPU the workers together hold at most one batch, as micro-batches (see :func:`micro_batch_size`). The queue
    holds at most as many images, and the caller's thread merges micro-batches to one batch. So at most three batches of
    images and one micro-batch are in memory for any number of cores, plus up to two batches that are being copied. The
    engine limits the total bytes of unresized images, which may be large.
    """
    if engine.device.type == "cpu":
        return run_in_threads(lambda: _embed_sequentially(loader, engine, workers), workers)
    micro_batch = micro_batch_size(engine, workers)

    def decode() -> Iterator[DecodedBatch]:
        engine.enter_stream(workers)
        return loader.micro_batches(micro_batch, engine.fallback_transform)

    micro_batches = run_in_threads(decode, workers, prefetch=1)
    return _embed_overlapped(_merge_micro_batches(micro_batches, engine), engine)


def micro_batch_size(engine: Engine, workers: int) -> int:
    """Number of images that each worker decodes before it passes them on.

    On a CPU this is the batch size. Otherwise it is a power of two, like the default batch sizes, of at most 32, such
    that all workers together hold at most one batch or one image each.
    """
    if engine.device.type == "cpu":
        return engine.batch
    images_per_worker = max(1, min(MAX_MICRO_BATCH, engine.batch // workers))
    return 1 << (images_per_worker.bit_length() - 1)


def _embed_sequentially(loader: Loader, engine: Engine, workers: int) -> Generator[EmbeddedBatch, None, None]:
    engine.enter_stream(workers)
    for batch in loader.batches():
        started = perf_counter()
        features = engine.embed(batch.images) if batch.images is not None else {}
        batch.images = None
        batch.seconds.embedding += perf_counter() - started
        yield batch, features


def _merge_micro_batches(
    micro_batches: Generator[DecodedBatch, None, None], engine: Engine
) -> Generator[DecodedBatch, None, None]:
    """Merge micro-batches to batches of the engine's size, which the engine may halve; micro-batches are not split."""
    batch, pictures = DecodedBatch(), list[PreparedImage]()

    def pop_batch() -> DecodedBatch:
        nonlocal batch, pictures
        full_batch, batch = batch, DecodedBatch()
        full_batch.images = engine.collate(pictures) if pictures else None
        pictures = []
        return full_batch

    with closing(micro_batches):
        for micro_batch in micro_batches:
            if pictures and len(pictures) + len(micro_batch.positions) > engine.batch:
                yield pop_batch()
            batch.extend(micro_batch)
            pictures.extend(micro_batch.images if micro_batch.images is not None else ())
            micro_batch.images = None  # free the list: the worker may still reference the micro-batch
            if len(pictures) >= engine.batch or len(batch.rows) >= MAX_ROWS_PER_IMAGE * engine.batch:
                yield pop_batch()
        if batch.rows:
            yield pop_batch()


def _embed_overlapped(
    batches: Generator[DecodedBatch, None, None], engine: Engine, prefetch: int = 1
) -> Generator[EmbeddedBatch, None, None]:
    """Embed batches in order; up to ``prefetch`` batches are submitted ahead of the one that is waited for."""
    pending: deque[tuple[DecodedBatch, Callable[[], Embeddings]]] = deque()

    def pop_embedded() -> EmbeddedBatch:
        batch, wait_for_embeddings = pending.popleft()
        started = perf_counter()
        features = wait_for_embeddings()
        batch.seconds.embedding += perf_counter() - started
        return batch, features

    with closing(batches):
        for batch in batches:
            started = perf_counter()
            pending.append((batch, engine.submit(batch.images) if batch.images is not None else dict))
            batch.images = None
            batch.seconds.embedding += perf_counter() - started
            if len(pending) > prefetch:
                yield pop_embedded()
        while pending:
            yield pop_embedded()


def embed_sample_list(images: SampleList, engine: Engine, output: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Embed a list of samples, in the order given.

    Returns
    -------
    features : ndarray of shape (n, …)
        NaN in the rows whose status is not 0.
    status : ndarray of shape (n,), uint8
    """
    n = len(images.items)
    status = np.zeros(n, np.uint8)
    features: NDArray[np.float32] | None = None
    workers = min(engine.workers, -(-n // micro_batch_size(engine, engine.workers)))
    loader = Loader(images, np.arange(n), engine.transform, engine.batch, collate=engine.collate)
    with closing(loader), engine.session(), closing(embed_batches(loader, engine, workers)) as batches:
        for batch, embeddings in batches:
            status[batch.rows] = batch.status
            if embeddings:
                if features is None:
                    features = np.full((n, *embeddings[output].shape[1:]), np.nan, np.float32)
                rows = np.array(batch.rows)[batch.positions]
                features[rows] = embeddings[output]
                is_finite = np.isfinite(embeddings[output].reshape(len(rows), -1)).all(axis=1)
                status[rows[~is_finite]] = Status.NOT_FINITE
    return (np.full((n, 0), np.nan, np.float32) if features is None else features), status
