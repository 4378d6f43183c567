"""One extraction under way: reads and embeds what is not known, and commits it part by part."""

from __future__ import annotations

import os
import platform
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import backbone as backbones
from featpipe.backbone import Backbone
from featpipe.commit import Parts
from featpipe.engine import Engine, resolve_device
from featpipe.errors import ArchiveError
from featpipe.extraction.ledger import Ledger, source_of_part
from featpipe.extraction.places import places_of
from featpipe.extraction.precision import Chosen
from featpipe.loader import Batch, Loader, embedded
from featpipe.progress import Progress, Tell
from featpipe.recipe import Extraction
from featpipe.status import Status

__all__ = ["Run", "told"]

PART_SECONDS = 7.0  # with a batch of at most three seconds in hand, a kill costs at most about ten of work
PART_BYTES = 64 * 2**20
STEPS = ("preparing", "reading", "decoding", "embedding", "committing", "waiting", "total")


@dataclass
class _PartInHand:
    """The part in hand."""

    digests: list[bytes] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    features: dict[str, list[NDArray[np.floating]]] = field(default_factory=dict)
    bytes: int = 0


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
        self._claimed: set[bytes] = set()
        self._claims = threading.Lock()
        self._part = _PartInHand()
        self._committed_at = perf_counter()

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
        started = perf_counter()
        engine = self._engine()
        backbones.prove_frozen(self.backbone)
        self._committed_at = perf_counter()
        self.seconds["preparing"] = self._committed_at - started
        try:
            self._stream(engine, rows)
        finally:  # also when interrupted: what is finished is not lost
            self._commit()
        self.ledger.settle()
        self.seconds["total"] = perf_counter() - started
        self._tell_seconds()

    def _engine(self) -> Engine:
        settings = self.settings
        if self.chosen is not None and self.chosen.engine is not None:
            engine = self.chosen.engine
        else:
            device = resolve_device(settings.device)
            images = len(self.ledger.index)  # not those that are left: a run that goes on computes as before
            engine = Engine(
                self.backbone, device, settings.precision, settings.batch, kind=settings.engine, images=images
            )
        self.batch, self.engine = engine.batch, engine.name
        return engine

    def _stream(self, engine: Engine, rows: NDArray[np.int64]) -> None:
        workers = self.settings.workers or engine.workers
        loader = Loader(self.ledger.index, rows, engine.transform, engine.batch, self._is_known, engine.collect)
        started, done = perf_counter(), 0
        with closing(loader), engine.running(), closing(embedded(loader, engine, workers)) as results:
            for batch, features in results:
                if batch.places and not self.embedded:
                    self._tell_engine(engine)
                self._collect(batch, features)
                done += len(batch.rows)
                self.progress(Progress("bar", "embedding" if self.embedded else "reading", done, len(rows)))
                self._refuse_too_many_bad()
        busy = sum(self.seconds[name] for name in ("reading", "decoding", "embedding"))
        self.seconds["waiting"] = max(0.0, workers * (perf_counter() - started) - busy)

    def _tell_engine(self, engine: Engine) -> None:
        batches = f"batches of {engine.batch}" if engine.batch > 1 else "one at a time"
        text = f"embedding on {engine.device} in {self.settings.precision} with {engine.name}, {batches}"
        if self.settings.batch is None and engine.multiply_adds is None and engine.device.type == "cpu":
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

    def _is_known(self, digest: bytes) -> bool:
        """Whether an image with these bytes is embedded already, or another worker has it in hand."""
        with self._claims:
            if digest in self._claimed:
                return True
            if self.ledger.known.by_digest(digest) is not None:
                return True
            self._claimed.add(digest)
            return False

    def _collect(self, batch: Batch, features: Mapping[str, NDArray[np.float32]]) -> None:
        ledger, part = self.ledger, self._part
        for name in ("reading", "decoding", "embedding"):
            self.seconds[name] += getattr(batch.seconds, name)
        stored = {name: value.astype(self.settings.storage) for name, value in features.items()}
        finite = np.ones(len(batch.places), bool)
        for value in stored.values():
            finite &= np.isfinite(value.reshape(len(value), -1)).all(axis=1)
        place = dict(zip(batch.places, range(len(batch.places)), strict=True))
        for at, row in enumerate(batch.rows):
            status, digest = batch.status[at], batch.digests[at]
            if at in place and not finite[place[at]]:
                status = Status.NOT_FINITE
            ledger.status[row] = status
            if digest:
                ledger.digests[row] = np.frombuffer(digest, np.uint8)
            if at in place or (digest and not status.transient and status != Status.OK):
                part.rows.append(row)
                part.digests.append(digest)
                part.status.append(int(status))
                for name, shape in self.backbone.shapes.items():
                    value = stored[name][place[at]] if status == Status.OK else _nan(shape, self.settings.storage)
                    part.features.setdefault(name, []).append(value)
                    part.bytes += value.nbytes
                self.embedded += status == Status.OK
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
                    "stamp": self.ledger.stamps[rows],
                    "status": np.array(part.status, np.uint8),
                    **{f"features/{name}": value for name, value in arrays.items()},
                }
            )
            number = self.ledger.known.add(source_of_part(published))
            self.ledger.take(rows, number, np.arange(len(rows)))
            with self._claims:
                self._claimed.difference_update(part.digests)
        self._committed_at = perf_counter()
        self.seconds["committing"] += self._committed_at - started

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


def _nan(shape: tuple[int, ...], dtype: str) -> NDArray[np.floating]:
    return np.full(shape, np.nan, dtype)


def told(bad: Counter[str]) -> str:
    """Reasons with their numbers, the most frequent first."""
    return ", ".join(f"{count} {word}" for word, count in bad.most_common())
