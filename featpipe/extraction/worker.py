"""Read rows of an index, embed them and commit parts, in this process or in one of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featpipe import inference
from featpipe.config import ExtractionConfig
from featpipe.data import Index
from featpipe.status import Status
from featpipe.storage import Part, StagingArea

if TYPE_CHECKING:
    from featpipe.backbones import Backbone
    from featpipe.inference import DecodedBatch, Engine, StageSeconds

MAX_PART_SECONDS = 7.0  # with batches of up to three seconds, a kill costs about ten seconds at most
MAX_PART_BYTES = 64 * 2**20


@dataclass(frozen=True)
class WorkerStarted:
    """The engine is ready."""

    device: str
    engine_name: str
    batch_size: int
    has_work_estimate: bool


@dataclass(frozen=True)
class RowsRead:
    """Some rows were read, and embedded if necessary.

    Attributes
    ----------
    rows : ndarray of shape (b,), int64
    status : ndarray of shape (b,), uint8
    digests : ndarray of shape (b, 32), uint8
        Zero if the bytes could not be read.
    n_embedded : int
    seconds : StageSeconds
    """

    rows: NDArray[np.int64]
    status: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    n_embedded: int
    seconds: StageSeconds


@dataclass(frozen=True)
class PartCommitted:
    """A part is durably written; ``rows`` are rows of the index."""

    part: Part
    rows: NDArray[np.int64]
    digests: list[bytes]


@dataclass(frozen=True)
class WorkerFinished:
    """All rows were read; seconds spent committing, and seconds that threads waited."""

    commit_seconds: float
    wait_seconds: float


WorkerMessage = WorkerStarted | RowsRead | PartCommitted | WorkerFinished


@dataclass
class _PendingPart:
    """Rows that are embedded but not yet committed."""

    digests: list[bytes] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    features: dict[str, list[NDArray[np.floating]]] = field(default_factory=dict)
    n_bytes: int = 0


@dataclass(frozen=True, eq=False)
class ExtractionTask:
    """The rows that one worker embeds; it can be pickled.

    Attributes
    ----------
    index : Index
    stamps : ndarray of shape (n, 16), uint8
    backbone : Backbone
    config : ExtractionConfig
    staging_area : StagingArea
    rows : ndarray of shape (m,), int64
    """

    index: Index
    stamps: NDArray[np.uint8]
    backbone: Backbone
    config: ExtractionConfig
    staging_area: StagingArea
    rows: NDArray[np.int64]

    def create_engine(self) -> Engine:
        """Create the engine.

        It is chosen for all images of the archive, not only for the remaining ones, so that a resumed run uses the same
        engine.
        """
        device, config = inference.resolve_devices(self.config.device)[0], self.config
        return inference.Engine(
            self.backbone, device, config.precision, config.batch, kind=config.engine, images=len(self.index)
        )


@dataclass
class ExtractionWorker:
    """Reads, embeds and commits the rows of a task.

    Parameters
    ----------
    task : ExtractionTask
    has_embedding : callable
        Returns whether an image with this digest is already embedded; called once per image, from several threads.
    send_message : callable
        Called with every :data:`WorkerMessage`, in order.
    """

    task: ExtractionTask
    has_embedding: Callable[[bytes], bool]
    send_message: Callable[[WorkerMessage], None]
    _pending: _PendingPart = field(default_factory=_PendingPart)
    _last_commit_time: float = 0.0
    _commit_seconds: float = 0.0

    def run(self, engine: Engine) -> None:
        """Embed the rows. When interrupted, commit the finished rows."""
        task, config = self.task, self.task.config
        has_work_estimate = engine.multiply_adds is not None or config.batch is not None or engine.device.type != "cpu"
        self.send_message(WorkerStarted(str(engine.device), engine.name, engine.batch, has_work_estimate))
        start_time = self._last_commit_time = perf_counter()
        workers = config.workers or engine.workers
        loader = inference.Loader(
            task.index, task.rows, engine.transform, engine.batch, self.has_embedding, engine.collate
        )
        busy_seconds = 0.0
        try:
            with (
                closing(loader),
                engine.session(),
                closing(inference.embed_batches(loader, engine, workers)) as results,
            ):
                for batch, features in results:
                    seconds = batch.seconds
                    busy_seconds += seconds.reading + seconds.decoding + seconds.embedding
                    self._collect(batch, features)
        finally:
            self._commit()
        wait_seconds = max(0.0, workers * (perf_counter() - start_time) - busy_seconds)
        self.send_message(WorkerFinished(self._commit_seconds, wait_seconds))

    def _collect(self, batch: DecodedBatch, features: Mapping[str, NDArray[np.float32]]) -> None:
        pending, storage = self._pending, self.task.config.storage
        with np.errstate(over="ignore"):  # values too large for float16 become infinite; the row's status records it
            stored_features = {name: value.astype(storage) for name, value in features.items()}
        is_finite = np.ones(len(batch.positions), bool)
        for value in stored_features.values():
            is_finite &= np.isfinite(value.reshape(len(value), -1)).all(axis=1)
        feature_rows = dict(zip(batch.positions, range(len(batch.positions)), strict=True))
        statuses, n_embedded = np.array(batch.status, np.uint8), 0
        for position, row in enumerate(batch.rows):
            status, digest = batch.status[position], batch.digests[position]
            if position in feature_rows and not is_finite[feature_rows[position]]:
                status = Status.NOT_FINITE
            statuses[position] = status
            if position in feature_rows or (digest and not status.transient and status != Status.OK):
                pending.rows.append(row)
                pending.digests.append(digest)
                pending.status.append(int(status))
                for name, shape in self.task.backbone.shapes.items():
                    value = (
                        stored_features[name][feature_rows[position]]
                        if status == Status.OK
                        else np.full(shape, np.nan, storage)
                    )
                    pending.features.setdefault(name, []).append(value)
                    pending.n_bytes += value.nbytes
                n_embedded += status == Status.OK
        digests = np.frombuffer(b"".join(digest or bytes(32) for digest in batch.digests), np.uint8).reshape(-1, 32)
        self.send_message(RowsRead(np.array(batch.rows), statuses, digests, n_embedded, batch.seconds))
        if pending.n_bytes > MAX_PART_BYTES or perf_counter() - self._last_commit_time > MAX_PART_SECONDS:
            self._commit()

    def _commit(self) -> None:
        pending, self._pending = self._pending, _PendingPart()
        start_time = perf_counter()
        if pending.rows:
            rows = np.array(pending.rows)
            digests = np.frombuffer(b"".join(pending.digests), np.uint8).reshape(-1, 32)
            features = {name: np.stack(values) for name, values in pending.features.items()}
            part = self.task.staging_area.commit(
                {
                    "digest": digests,
                    "stamp": self.task.stamps[rows],
                    "status": np.array(pending.status, np.uint8),
                    **{f"features/{name}": value for name, value in features.items()},
                }
            )
            self.send_message(PartCommitted(part, rows, pending.digests))
        self._last_commit_time = perf_counter()
        self._commit_seconds += self._last_commit_time - start_time
