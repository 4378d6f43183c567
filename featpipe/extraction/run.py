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

from featpipe import backbone as backbones
from featpipe.backbone import Backbone
from featpipe.commit import Parts
from featpipe.deadline import Deadline
from featpipe.engine import Engine, resolve_devices
from featpipe.errors import ArchiveError
from featpipe.extraction import processes
from featpipe.extraction.ledger import Ledger, source_of_part
from featpipe.extraction.places import places_of
from featpipe.extraction.precision import Chosen
from featpipe.extraction.stream import Message, Published, Read, Started, Stream
from featpipe.progress import Progress, Tell
from featpipe.recipe import Extraction
from featpipe.status import Status

__all__ = ["Run", "engine_for", "told"]

STEPS = ("preparing", "reading", "decoding", "embedding", "committing", "waiting", "total")


class Run:
    """One extraction."""

    def __init__(
        self,
        ledger: Ledger,
        backbone: Backbone,
        settings: Extraction,
        parts: Parts,
        progress: Tell,
        chosen: Chosen | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self.ledger = ledger
        self.backbone = backbone
        self.settings = settings
        self.parts = parts
        self.progress = progress
        self.seconds: dict[str, float] = dict.fromkeys(STEPS, 0.0)
        self.embedded = 0
        self.batch: int | None = None
        self.engine: str | None = None
        self.chosen = chosen
        self.deadline = deadline or Deadline(settings.time_limit)
        self._started: list[Started] = []
        self._claimed: set[bytes] = set()
        self._claims = threading.Lock()
        self._done, self._wanted = 0, 0
        self._began = 0.0

    def embed(self) -> None:
        """Read the rows of which nothing is known; embed the images whose bytes are new."""
        rows = self.ledger.unread
        n = len(self.ledger.index)
        if len(rows):
            if len(rows) < n:
                self.progress(Progress("note", f"{n - len(rows)} of {n} images are in a cache already"))
            self._embed_rows(rows)
        if not self.embedded:
            what = f"all {n} images are" if not self.ledger.status.any() else f"all that can be read of {n} images is"
            self.progress(Progress("note", f"{what} in a cache already: no forward pass"))
        self._refuse_too_many_bad()
        self._tell_bad()

    def _embed_rows(self, rows: NDArray[np.int64]) -> None:
        self._began = perf_counter()
        self._wanted = len(rows)
        backbones.prove_frozen(self.backbone)
        devices = resolve_devices(self.settings.device)
        if len(devices) > 1:
            processes.embed(self, devices, rows)
        else:
            self.stream(self.is_known, self.receive).run(self.make_engine, rows)
        self.ledger.settle()
        self.seconds["total"] = perf_counter() - self._began
        self._tell_seconds()

    def stream(self, is_known: Callable[[bytes], bool], deliver: Callable[[Message], None]) -> Stream:
        """What embeds for this extraction."""
        ledger = self.ledger
        return Stream(ledger.index, ledger.stamps, self.backbone, self.settings, self.parts, is_known, deliver)

    def make_engine(self) -> Engine:
        """The engine that was measured with, or one for the device of the settings."""
        if self.chosen is not None and self.chosen.engine is not None:
            return self.chosen.engine
        return engine_for(self.backbone, self.settings, len(self.ledger.index))

    def receive(self, message: Message) -> None:
        """Note what a stream tells."""
        if isinstance(message, Started):
            self.batch, self.engine = message.batch, message.name
            self.seconds["preparing"] = perf_counter() - self._began
            self._started.append(message)
        elif isinstance(message, Read):
            self._read(message)
        elif isinstance(message, Published):
            number = self.ledger.known.add(source_of_part(message.part))
            self.ledger.take(message.rows, number, np.arange(len(message.rows)))
            with self._claims:
                self._claimed.difference_update(message.digests)
        else:
            self.seconds["committing"] += message.committing
            self.seconds["waiting"] += message.waiting

    def _read(self, message: Read) -> None:
        ledger = self.ledger
        if message.embedded and not self.embedded:
            for started in self._started:
                self._tell_engine(started)
        ledger.status[message.rows] = message.status
        had = message.digests.any(axis=1)
        ledger.digests[message.rows[had]] = message.digests[had]
        self.embedded += message.embedded
        for name in ("reading", "decoding", "embedding"):
            self.seconds[name] += getattr(message.seconds, name)
        self._done += len(message.rows)
        self.progress(Progress("bar", "embedding" if self.embedded else "reading", self._done, self._wanted))
        self._refuse_too_many_bad()
        if self._done < self._wanted:  # after a batch and never before one: who tries again and again gets on
            self.deadline.check()

    def _tell_engine(self, started: Started) -> None:
        batches = f"batches of {started.batch}" if started.batch > 1 else "one at a time"
        text = f"embedding on {started.device} in {self.settings.precision} with {started.name}, {batches}"
        if not started.counted:
            text += "; how much work an image is could not be counted: --batch says how many at a time"
        self.progress(Progress("note", text))

    @property
    def images_per_second(self) -> float | None:
        """Of all that was done with them, once the engine was ready."""
        seconds = self.seconds["total"] - self.seconds["preparing"]
        return round(self.embedded / seconds, 2) if seconds > 0 else None

    def _tell_seconds(self) -> None:
        if self.embedded:
            where = ", ".join(f"{name} {self.seconds[name]:.1f} s" for name in STEPS[1:-1])
            text = f"embedded {self.embedded} images, {self.images_per_second:,.1f} a second after "
            self.progress(
                Progress("note", f"{text}{self.seconds['preparing']:.1f} s of preparing; of all workers: {where}")
            )

    def is_known(self, digest: bytes) -> bool:
        """Whether an image with these bytes is embedded already, or another worker has it in hand."""
        with self._claims:
            if digest in self._claimed:
                return True
            if self.ledger.known.by_digest(digest) is not None:
                return True
            self._claimed.add(digest)
            return False

    def _bad(self) -> Counter[str]:
        codes, counts = np.unique(self.ledger.status, return_counts=True)
        return Counter({Status(c).word: int(k) for c, k in zip(codes, counts, strict=True) if c != Status.OK})

    def _refuse_too_many_bad(self) -> None:
        limit = self.settings.bad_limit(len(self.ledger.index))
        if limit is None or np.count_nonzero(self.ledger.status) <= limit:
            return
        raise ArchiveError(
            f"{self._bad().total()} images have no features ({told(self._bad())}), more than --max-bad "
            f"{self.settings.max_bad} allows; the finished work is kept: run again with a higher --max-bad to go on"
        )

    def _tell_bad(self) -> None:
        bad = self._bad()
        if bad:
            text = f"{bad.total()} of {len(self.ledger.index)} images have no features: {told(bad)}"
            self.progress(Progress("warning", f"{text}; their rows stay, with the reason as status"))

    def manifest(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        index, backbone = self.ledger.index, self.backbone
        return {
            "facts": facts,
            "backbone": backbone.request,
            "archives": places_of(index),
            "archive_kinds": [source.kind for source in index.sources],
            "ignored": dict(index.ignored),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "embedded": int(self.embedded),
            "images_per_second": self.images_per_second,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "device": self.settings.device,
            "engine": self.engine,
            "batch": self.batch,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **({"fidelity": self.chosen.facts} if self.chosen is not None else {}),
            "versions": {name: version(name) for name in ("featpipe", "torch", "torchvision", "timm", "h5py")},
        }


def engine_for(backbone: Backbone, settings: Extraction, images: int) -> Engine:
    """The engine of an extraction of so many images.

    All of them count, not those that are left, so that a run that goes on computes as before.
    """
    device = resolve_devices(settings.device)[0]
    return Engine(backbone, device, settings.precision, settings.batch, kind=settings.engine, images=images)


def told(bad: Counter[str]) -> str:
    """Reasons with their numbers, the most frequent first."""
    return ", ".join(f"{count} {word}" for word, count in bad.most_common())
