"""One extraction in progress: reads unread rows, embeds new images, and reports counts and timing."""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe import backbones, inference
from featpipe.backbones import BackboneIdentity
from featpipe.config import ExtractionConfig
from featpipe.errors import ArchiveError
from featpipe.extraction import multi_device
from featpipe.extraction.auto_precision import PrecisionChoice
from featpipe.extraction.paths import list_archive_paths
from featpipe.extraction.row_sources import RowSources, source_from_part
from featpipe.extraction.worker import (
    ExtractionTask,
    ExtractionWorker,
    PartCommitted,
    RowsRead,
    WorkerMessage,
    WorkerStarted,
)
from featpipe.runtime import Deadline, Progress, ProgressCallback
from featpipe.status import Status
from featpipe.storage import StagingArea

if TYPE_CHECKING:
    from featpipe.backbones import Backbone

logger = logging.getLogger(__name__)

TIMED_STEPS = ("preparing", "reading", "decoding", "embedding", "committing", "waiting", "total")


class ExtractionRun:
    """One extraction in progress.

    Parameters
    ----------
    row_sources : RowSources
        Updated as images are read and embedded.
    backbone : Backbone or BackboneIdentity
        An identity is sufficient if no row is unread.
    config : ExtractionConfig
    staging_area : StagingArea
        Where finished parts are committed.
    progress : callable
    precision_choice : PrecisionChoice, optional
        The outcome of ``--precision auto``, with the engine that it measured.
    deadline : Deadline, optional
        By default the time limit of the configuration, from now.
    """

    def __init__(
        self,
        row_sources: RowSources,
        backbone: Backbone | BackboneIdentity,
        config: ExtractionConfig,
        staging_area: StagingArea,
        progress: ProgressCallback,
        precision_choice: PrecisionChoice | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self.row_sources = row_sources
        self.backbone = backbone
        self.config = config
        self.staging_area = staging_area
        self.progress = progress
        self.seconds: dict[str, float] = dict.fromkeys(TIMED_STEPS, 0.0)
        self.n_embedded = 0
        self.batch_size: int | None = None
        self.engine_name: str | None = None
        self.precision_choice = precision_choice
        self.deadline = deadline or Deadline(config.time_limit)
        self._started_messages: list[WorkerStarted] = []
        self._claimed_digests: set[bytes] = set()
        self._claims_lock = threading.Lock()
        self._n_done, self._n_total = 0, 0
        self._start_time = 0.0

    def embed(self) -> None:
        """Read the rows that have no source yet; embed the images whose bytes are new."""
        rows = self.row_sources.unread_rows
        n = len(self.row_sources.index)
        if len(rows):
            if len(rows) < n:
                logger.info(f"{n - len(rows)} of {n} images are in a cache already")
            self._embed_rows(rows)
        if not self.n_embedded:
            subject = f"all readable images of {n}" if self.row_sources.status.any() else f"all {n} images"
            logger.info(f"{subject} are in a cache already: no forward pass")
        self._raise_if_too_many_failures()

    def _embed_rows(self, rows: NDArray[np.int64]) -> None:
        self._start_time = perf_counter()
        self._n_total = len(rows)
        backbone = self.backbone
        if isinstance(backbone, BackboneIdentity):
            raise TypeError("rows must be embedded, but only the identity of the backbone is known")
        backbones.prove_frozen(backbone)
        devices = inference.resolve_devices(self.config.device)
        task = ExtractionTask(
            self.row_sources.index, self.row_sources.stamps, backbone, self.config, self.staging_area, rows
        )
        worker = ExtractionWorker(task, self.has_embedding, self.handle_message)
        if len(devices) > 1:
            multi_device.embed_on_devices(worker, devices)
        else:
            measured_engine = None if self.precision_choice is None else self.precision_choice.engine
            worker.run(measured_engine or task.create_engine())
        self.row_sources.resolve_duplicates()
        self.seconds["total"] = perf_counter() - self._start_time
        self._report_timing()

    def handle_message(self, message: WorkerMessage) -> None:
        """Update counts and row sources from a worker's message."""
        if isinstance(message, WorkerStarted):
            self.batch_size, self.engine_name = message.batch_size, message.engine_name
            self.seconds["preparing"] = perf_counter() - self._start_time
            self._started_messages.append(message)
        elif isinstance(message, RowsRead):
            self._handle_rows_read(message)
        elif isinstance(message, PartCommitted):
            source_number = self.row_sources.lookup.add(source_from_part(message.part))
            self.row_sources.assign(message.rows, source_number, np.arange(len(message.rows)))
            with self._claims_lock:
                self._claimed_digests.difference_update(message.digests)
        else:
            self.seconds["committing"] += message.commit_seconds
            self.seconds["waiting"] += message.wait_seconds

    def _handle_rows_read(self, message: RowsRead) -> None:
        row_sources = self.row_sources
        if message.n_embedded and not self.n_embedded:
            for started_message in self._started_messages:
                self._report_engine(started_message)
        row_sources.status[message.rows] = message.status
        has_digest = message.digests.any(axis=1)
        row_sources.digests[message.rows[has_digest]] = message.digests[has_digest]
        self.n_embedded += message.n_embedded
        for name in ("reading", "decoding", "embedding"):
            self.seconds[name] += getattr(message.seconds, name)
        self._n_done += len(message.rows)
        self.progress(Progress("embedding" if self.n_embedded else "reading", self._n_done, self._n_total))
        self._raise_if_too_many_failures()
        if self._n_done < self._n_total:  # only after a batch, so that every run makes progress
            self.deadline.check()

    def _report_engine(self, message: WorkerStarted) -> None:
        batches = f"batches of {message.batch_size}" if message.batch_size > 1 else "one image at a time"
        text = f"embedding on {message.device} in {self.config.precision} with {message.engine_name}, {batches}"
        if not message.has_work_estimate:
            text += "; the multiply-adds of this network cannot be counted: set the batch size with --batch"
        logger.info(text)

    @property
    def images_per_second(self) -> float | None:
        """Throughput of the whole extraction, without the start-up of the engine."""
        seconds = self.seconds["total"] - self.seconds["preparing"]
        return round(self.n_embedded / seconds, 2) if seconds > 0 else None

    def _report_timing(self) -> None:
        if self.n_embedded:
            step_times = ", ".join(f"{name} {self.seconds[name]:.1f} s" for name in TIMED_STEPS[1:-1])
            logger.info(
                f"embedded {self.n_embedded} images at {self.images_per_second:,.1f} images/s, after "
                f"{self.seconds['preparing']:.1f} s of preparation; time of all workers: {step_times}"
            )

    def has_embedding(self, digest: bytes) -> bool:
        """Whether an image with these bytes is embedded already, or is being embedded by another worker."""
        with self._claims_lock:
            if digest in self._claimed_digests:
                return True
            if self.row_sources.lookup.find_by_digest(digest) is not None:
                return True
            self._claimed_digests.add(digest)
            return False

    def _count_failures(self) -> Counter[str]:
        codes, counts = np.unique(self.row_sources.status, return_counts=True)
        return Counter(
            {Status(code).word: int(count) for code, count in zip(codes, counts, strict=True) if code != Status.OK}
        )

    def _raise_if_too_many_failures(self) -> None:
        limit = self.config.get_max_bad_count(len(self.row_sources.index))
        if limit is None or np.count_nonzero(self.row_sources.status) <= limit:
            return
        counts = self._count_failures()
        raise ArchiveError(
            f"{counts.total()} images have no features ({format_counts(counts)}), more than --max-bad "
            f"{self.config.max_bad} allows; finished work is kept: run again with a higher --max-bad to resume"
        )

    def report_failures(self) -> None:
        """Log a warning if images have no features."""
        counts = self._count_failures()
        if counts:
            text = f"{counts.total()} of {len(self.row_sources.index)} images have no features: {format_counts(counts)}"
            logger.warning(f"{text}; their rows have the reason as their status")

    def make_manifest(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Make the manifest of the cache, without the keys that the writer adds."""
        index, backbone = self.row_sources.index, self.backbone
        return {
            "facts": facts,
            "backbone": backbone.request,
            "archives": list_archive_paths(index),
            "archive_kinds": [source.kind for source in index.sources],
            "ignored": dict(index.ignored),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "embedded": int(self.n_embedded),
            "images_per_second": self.images_per_second,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "device": self.config.device if self.n_embedded else None,
            "engine": self.engine_name,
            "batch": self.batch_size,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **({"fidelity": self.precision_choice.fidelity} if self.precision_choice is not None else {}),
            "versions": {name: version(name) for name in ("featpipe", "torch", "torchvision", "timm", "h5py")},
        }


def format_counts(counts: Counter[str]) -> str:
    """Format counts in descending order, such as ``"3 missing, 1 damaged"``."""
    return ", ".join(f"{count} {word}" for word, count in counts.most_common())
