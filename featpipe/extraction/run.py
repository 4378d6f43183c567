"""One extraction under way: what is not known is read, embedded and committed, and the ledger kept."""

from __future__ import annotations

import os
import platform
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import backbones
from featpipe.backbones import Backbone
from featpipe.config import ExtractionConfig
from featpipe.errors import ArchiveError
from featpipe.extraction import multi_device
from featpipe.extraction.auto_precision import PrecisionChoice
from featpipe.extraction.paths import list_archive_paths
from featpipe.extraction.plan import EmbeddingPlan, source_from_part
from featpipe.extraction.worker import ExtractionWorker, PartCommitted, RowsRead, WorkerMessage, WorkerStarted
from featpipe.inference import Engine, resolve_devices
from featpipe.runtime import Deadline, Progress, ProgressCallback
from featpipe.status import Status
from featpipe.storage import StagingArea

__all__ = ["ExtractionRun", "create_engine", "format_counts"]

TIMED_STEPS = ("preparing", "reading", "decoding", "embedding", "committing", "waiting", "total")


class ExtractionRun:
    """One extraction."""

    def __init__(
        self,
        plan: EmbeddingPlan,
        backbone: Backbone,
        settings: ExtractionConfig,
        parts: StagingArea,
        progress: ProgressCallback,
        precision_choice: PrecisionChoice | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self.plan = plan
        self.backbone = backbone
        self.settings = settings
        self.parts = parts
        self.progress = progress
        self.seconds: dict[str, float] = dict.fromkeys(TIMED_STEPS, 0.0)
        self.n_embedded = 0
        self.batch_size: int | None = None
        self.engine_name: str | None = None
        self.precision_choice = precision_choice
        self.deadline = deadline or Deadline(settings.time_limit)
        self._started_messages: list[WorkerStarted] = []
        self._claimed_digests: set[bytes] = set()
        self._claims_lock = threading.Lock()
        self._n_done, self._n_total = 0, 0
        self._start_time = 0.0

    def embed(self) -> None:
        """Read the rows of which nothing is known; embed the images whose bytes are new."""
        rows = self.plan.unread_rows
        n = len(self.plan.index)
        if len(rows):
            if len(rows) < n:
                self.progress(Progress("note", f"{n - len(rows)} of {n} images are in a cache already"))
            self._embed_rows(rows)
        if not self.n_embedded:
            subject = f"all {n} images are" if not self.plan.status.any() else f"all that can be read of {n} images is"
            self.progress(Progress("note", f"{subject} in a cache already: no forward pass"))
        self._raise_if_too_many_failures()
        self._report_failures()

    def _embed_rows(self, rows: NDArray[np.int64]) -> None:
        self._start_time = perf_counter()
        self._n_total = len(rows)
        backbones.prove_frozen(self.backbone)
        devices = resolve_devices(self.settings.device)
        if len(devices) > 1:
            multi_device.embed_on_devices(self, devices, rows)
        else:
            self.make_worker(self.has_embedding, self.handle_message).run(self.make_engine, rows)
        self.plan.resolve_duplicates()
        self.seconds["total"] = perf_counter() - self._start_time
        self._report_timing()

    def make_worker(
        self, has_embedding: Callable[[bytes], bool], send_message: Callable[[WorkerMessage], None]
    ) -> ExtractionWorker:
        """What embeds for this extraction."""
        plan = self.plan
        return ExtractionWorker(
            plan.index, plan.stamps, self.backbone, self.settings, self.parts, has_embedding, send_message
        )

    def make_engine(self) -> Engine:
        """The engine that was measured with, or one for the device of the settings."""
        if self.precision_choice is not None and self.precision_choice.engine is not None:
            return self.precision_choice.engine
        return create_engine(self.backbone, self.settings, len(self.plan.index))

    def handle_message(self, message: WorkerMessage) -> None:
        """Note what a stream tells."""
        if isinstance(message, WorkerStarted):
            self.batch_size, self.engine_name = message.batch_size, message.engine_name
            self.seconds["preparing"] = perf_counter() - self._start_time
            self._started_messages.append(message)
        elif isinstance(message, RowsRead):
            self._handle_rows_read(message)
        elif isinstance(message, PartCommitted):
            source_number = self.plan.lookup.add(source_from_part(message.part))
            self.plan.assign(message.rows, source_number, np.arange(len(message.rows)))
            with self._claims_lock:
                self._claimed_digests.difference_update(message.digests)
        else:
            self.seconds["committing"] += message.commit_seconds
            self.seconds["waiting"] += message.wait_seconds

    def _handle_rows_read(self, message: RowsRead) -> None:
        plan = self.plan
        if message.n_embedded and not self.n_embedded:
            for started_message in self._started_messages:
                self._report_engine(started_message)
        plan.status[message.rows] = message.status
        has_digest = message.digests.any(axis=1)
        plan.digests[message.rows[has_digest]] = message.digests[has_digest]
        self.n_embedded += message.n_embedded
        for name in ("reading", "decoding", "embedding"):
            self.seconds[name] += getattr(message.seconds, name)
        self._n_done += len(message.rows)
        self.progress(Progress("bar", "embedding" if self.n_embedded else "reading", self._n_done, self._n_total))
        self._raise_if_too_many_failures()
        if self._n_done < self._n_total:  # after a batch and never before one: who tries again and again gets on
            self.deadline.check()

    def _report_engine(self, message: WorkerStarted) -> None:
        batches = f"batches of {message.batch_size}" if message.batch_size > 1 else "one at a time"
        text = f"embedding on {message.device} in {self.settings.precision} with {message.engine_name}, {batches}"
        if not message.has_work_estimate:
            text += "; how much work an image is could not be counted: --batch says how many at a time"
        self.progress(Progress("note", text))

    @property
    def images_per_second(self) -> float | None:
        """Of all that was done with them, once the engine was ready."""
        seconds = self.seconds["total"] - self.seconds["preparing"]
        return round(self.n_embedded / seconds, 2) if seconds > 0 else None

    def _report_timing(self) -> None:
        if self.n_embedded:
            step_times = ", ".join(f"{name} {self.seconds[name]:.1f} s" for name in TIMED_STEPS[1:-1])
            text = f"embedded {self.n_embedded} images, {self.images_per_second:,.1f} a second after "
            self.progress(
                Progress("note", f"{text}{self.seconds['preparing']:.1f} s of preparing; of all workers: {step_times}")
            )

    def has_embedding(self, digest: bytes) -> bool:
        """Whether an image with these bytes is embedded already, or another worker has it in hand."""
        with self._claims_lock:
            if digest in self._claimed_digests:
                return True
            if self.plan.lookup.find_by_digest(digest) is not None:
                return True
            self._claimed_digests.add(digest)
            return False

    def _count_failures(self) -> Counter[str]:
        codes, counts = np.unique(self.plan.status, return_counts=True)
        return Counter(
            {Status(code).word: int(count) for code, count in zip(codes, counts, strict=True) if code != Status.OK}
        )

    def _raise_if_too_many_failures(self) -> None:
        limit = self.settings.get_max_bad_count(len(self.plan.index))
        if limit is None or np.count_nonzero(self.plan.status) <= limit:
            return
        raise ArchiveError(
            f"{self._count_failures().total()} images have no features ({format_counts(self._count_failures())}), more than --max-bad "
            f"{self.settings.max_bad} allows; the finished work is kept: run again with a higher --max-bad to go on"
        )

    def _report_failures(self) -> None:
        counts = self._count_failures()
        if counts:
            text = f"{counts.total()} of {len(self.plan.index)} images have no features: {format_counts(counts)}"
            self.progress(Progress("warning", f"{text}; their rows stay, with the reason as status"))

    def make_manifest(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        index, backbone = self.plan.index, self.backbone
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
            "device": self.settings.device,
            "engine": self.engine_name,
            "batch": self.batch_size,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **({"fidelity": self.precision_choice.fidelity} if self.precision_choice is not None else {}),
            "versions": {name: version(name) for name in ("featpipe", "torch", "torchvision", "timm", "h5py")},
        }


def create_engine(backbone: Backbone, settings: ExtractionConfig, n_images: int) -> Engine:
    """The engine of an extraction of so many images.

    All of them count, not those that are left, so that a run that goes on computes as before.
    """
    device = resolve_devices(settings.device)[0]
    return Engine(backbone, device, settings.precision, settings.batch, kind=settings.engine, images=n_images)


def format_counts(counts: Counter[str]) -> str:
    """Reasons with their numbers, the most frequent first."""
    return ", ".join(f"{count} {word}" for word, count in counts.most_common())
