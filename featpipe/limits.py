"""How fast a machine can extract: each step alone, what they allow together, and what stands in the way."""

from __future__ import annotations

import io
import math
import os
import platform
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from featpipe import archive, image
from featpipe.backbone import Backbone
from featpipe.backbone.products import Picture
from featpipe.engine import (
    OPENVINO_PRECISIONS,
    Engine,
    available_cores,
    candidates,
    embeddings_of,
    for_workers,
    has_openvino,
    least_cosine,
    resolve_device,
)
from featpipe.errors import ArchiveError, SampleError
from featpipe.extraction import extract, load_backbone
from featpipe.loader import Loader, Pictures, spread
from featpipe.progress import Progress, Tell, quiet
from featpipe.recipe import AUTO, Extraction

__all__ = ["Forward", "Limits", "measure"]

IMAGES = 256  # that are looked at
COMPARED = 16  # of them, in another precision
PREVIEW = 64  # images that are decoded at a time
SIZE = (375, 500)  # of made-up images: many published sets of photographs have it
MANY = 10**6  # images to come, as far as an engine is concerned
WRITTEN_BYTES = 64 * 2**20
WORTH = 1.15  # times as fast: what is worth a change


@dataclass(frozen=True)
class Forward:
    """Forward passes alone, all cores or the GPU at work; a GPU also copies and, where the cores leave it, resizes.

    Attributes
    ----------
    engine : str
    precision : str
    batch : int
    images_per_second : float
    cosine : float
        The least, to float32, on some of the images.
    bound : float
        Images per second that reading, decoding, this and writing allow together. Where a GPU is the limit, cores that
        would wait resize for it, and an extraction may reach more.
    """

    engine: str
    precision: str
    batch: int
    images_per_second: float
    cosine: float
    bound: float


@dataclass(frozen=True)
class Limits:
    """What was measured.

    Attributes
    ----------
    machine : dict
        Device, cores, versions.
    backbone : str
    archive : str
    images : int
        How many were looked at.
    image_bytes : float
        Their mean size.
    reading : float
        Images per second, by one reader.
    decoding : float
        Images per second on all cores: checked, decoded, resized and cropped; for a GPU that resizes, put where it
        copies from.
    writing : float
        Bytes per second, made durable.
    row_bytes : int
        Of one image's embeddings, as they are stored.
    forward : tuple of Forward
        The first is what an extraction with these settings takes.
    bound : float
        Images per second of that one.
    extraction : float
        Images per second that a real one reached, from a .tar to a published cache.
    seconds : dict
        Where its time went.
    bottleneck : {"reading", "decoding", "forward", "writing"}
    advice : tuple of str
        What to change, the most useful first.
    """

    machine: dict[str, Any]
    backbone: str
    archive: str
    images: int
    image_bytes: float
    reading: float
    decoding: float
    writing: float
    forward: tuple[Forward, ...]
    bound: float
    extraction: float
    seconds: dict[str, float] = field(default_factory=dict)
    row_bytes: int = 0
    bottleneck: str = ""
    advice: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def measure(archives: Sequence[str] = (), *, seconds: float = 24.0, progress: Tell = quiet, **settings: Any) -> Limits:
    """Measure what this machine allows, for a backbone and an archive.

    Parameters
    ----------
    archives : sequence of path-like
        Whose first images are used; made-up JPEGs of 500 × 375 if there are none.
    seconds : float
        About how long to measure, apart from making the engines ready.
    progress : callable
    **settings
        The fields of :class:`featpipe.recipe.Extraction`.

    Returns
    -------
    Limits

    Raises
    ------
    ArchiveError
        If no image of the archives can be read.
    """
    asked = Extraction.of(settings)
    bench = _Bench(asked, resolve_device(asked.device), load_backbone(asked), seconds, progress)
    images, reading, name = _made_up() if not archives else _read(archives, asked)
    progress(Progress("note", f"{len(images)} images of {name}"))
    pictures, decoding = bench.decode(images)
    writing = _write()
    written = writing / bench.row_bytes
    forward = bench.forwards(pictures, min(reading, written), decoding)
    precision = forward[0].precision
    extraction, spent = bench.extract(images, precision, forward[0].bound)
    steps = {"reading": reading, "decoding": decoding, "forward": forward[0].images_per_second, "writing": written}
    found = Limits(
        machine=bench.machine(),
        backbone=bench.backbone.name,
        archive=name,
        images=len(images),
        image_bytes=float(np.mean([len(data) for data in images])),
        reading=reading,
        decoding=decoding,
        writing=writing,
        row_bytes=bench.row_bytes,
        forward=tuple(forward),
        bound=forward[0].bound,
        extraction=extraction,
        seconds=spent,
        bottleneck=min(steps, key=lambda step: steps[step]),
    )
    return replace(found, advice=tuple(_advice(found)))


@dataclass(frozen=True)
class _Bench:
    """What is measured, and on what."""

    asked: Extraction
    device: torch.device
    backbone: Backbone
    seconds: float
    progress: Tell

    @property
    def workers(self) -> int:
        return self.asked.workers or available_cores()

    @property
    def row_bytes(self) -> int:
        """Of one image's embeddings, as they are stored."""
        return sum(map(math.prod, self.backbone.shapes.values())) * np.dtype(self.asked.storage).itemsize

    @property
    def share(self) -> float:
        """Seconds for one of the things that are measured."""
        return self.seconds / 9

    def decode(self, images: Sequence[bytes]) -> tuple[list[Picture], float]:
        """The pictures, and how many a second come of all cores."""
        pictures: list[Picture] = []
        transform, _ = for_workers(self.backbone.transform, self.device)
        count, started = 0, perf_counter()
        while perf_counter() - started < self.share:
            loader = Loader(Pictures(images), np.arange(len(images)), transform, 8, collect=list)
            with closing(loader), closing(spread(loader.batches, self.workers)) as batches:
                for batch in batches:
                    count += len(batch.rows)
                    if len(pictures) < PREVIEW:
                        pictures.extend(batch.images if batch.images is not None else ())
                    if perf_counter() - started > self.share:
                        break
        if not pictures:
            raise ArchiveError("none of the first images can be decoded; there is nothing to measure with")
        return pictures[:PREVIEW], count / (perf_counter() - started)

    def forwards(self, pictures: list[Picture], disk: float, decoding: float) -> list[Forward]:
        """Each engine and precision that this device has; first what the settings take.

        ``disk`` and ``decoding`` are images per second, that come and go, and that are decoded.
        """
        found: list[Forward] = []
        plain = Engine(self.backbone, self.device, batch=self.asked.batch)
        exact = embeddings_of(plain, pictures[:COMPARED])
        for kind, precision, batch in self._ways():
            engine = Engine(self.backbone, self.device, precision, batch, kind=kind, images=MANY)
            if any((way.engine, way.precision, way.batch) == (engine.name, precision, engine.batch) for way in found):
                continue  # what was asked for cannot run this network, and another did; or its batch is the chosen one
            cosine = least_cosine(embeddings_of(engine, pictures[:COMPARED]), exact)
            rate = self._forward(engine, pictures)
            self.progress(Progress("note", f"forward with {engine.name} in {precision}: {rate:,.1f} images/s"))
            bound = _together(self.device.type, disk, decoding, rate)
            found.append(Forward(engine.name, precision, engine.batch, rate, cosine, bound))
        return found

    def _ways(self) -> dict[tuple[str, str, int | None], None]:
        """Engine, precision and batch: what the settings take, the same with a batch that is chosen, and the others."""
        first = "fp32" if self.asked.precision == AUTO else self.asked.precision
        precisions = dict.fromkeys((first, "fp32", *candidates(self.device)))
        others = ("auto", "torch") if has_openvino() else ("auto",)  # which is torch then
        batch = self.asked.batch
        ways = [(self.asked.engine, first, batch), (self.asked.engine, first, None)]
        ways.extend(
            (kind, precision, batch)
            for kind in dict.fromkeys((self.asked.engine, *others))
            for precision in precisions
            if kind != "openvino" or precision in OPENVINO_PRECISIONS
        )
        return dict.fromkeys(ways)

    def _forward(self, engine: Engine, pictures: list[Picture]) -> float:
        """Images per second of forward passes alone."""
        images = engine.collect([pictures[place % len(pictures)] for place in range(engine.batch)])
        streams = 1 if self.device.type == "cuda" else self.workers
        counts = [0] * streams
        ready = threading.Barrier(streams)
        times = [0.0] * streams

        def stream(number: int) -> None:
            engine.enter_stream(streams)
            engine.embed(images)
            ready.wait()
            started = perf_counter()
            answer = engine.submit(images)
            while perf_counter() - started < self.share:
                following = engine.submit(images)  # begun before the one before it is waited for
                answer()
                counts[number] += len(images)
                answer = following
            answer()
            times[number] = perf_counter() - started
            counts[number] += len(images)

        with engine.running():
            threads = [threading.Thread(target=stream, args=(number,)) for number in range(streams)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return sum(count / time for count, time in zip(counts, times, strict=True))

    def extract(self, images: Sequence[bytes], precision: str, bound: float) -> tuple[float, dict[str, float]]:
        """A real extraction: images per second, and where the seconds went."""
        count = max(len(images), math.ceil(min(bound, 1e5) * self.seconds / 4))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.tar"
            with tarfile.open(path, "w") as tar:
                for number in range(count):
                    data = images[number % len(images)] + number.to_bytes(8, "big")  # as many different files
                    member = tarfile.TarInfo(f"{number:07}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            settings = replace(
                self.asked, precision=precision, out=Path(folder) / "bench.h5", cache=folder, max_bad=None, labels=None
            )
            cache = extract(path, **{**vars(settings), "backbone": self.backbone})
            seconds = dict(cache.manifest["seconds"])
            return cache.manifest["images_per_second"], seconds

    def machine(self) -> dict[str, Any]:
        """Device, cores and versions."""
        names = ("featpipe", "torch", "torchvision", "pillow", "numpy")
        gpu = {"gpu": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}
        return {
            "device": str(self.device),
            **gpu,
            "cores": os.cpu_count(),
            "usable_cores": available_cores(),
            "workers": self.workers,
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in names},
        }


def _together(device: str, disk: float, decoding: float, forward: float) -> float:
    """Images per second when all is done at once: the same cores decode and embed, or a GPU embeds beside them."""
    busy = min(decoding, forward) if device == "cuda" else 1 / (1 / decoding + 1 / forward)
    return min(disk, busy)


def _made_up() -> tuple[list[bytes], float, str]:
    """JPEGs of about 70 kB: smooth shapes with grain."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(32):
        smooth = image.resize(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), *SIZE, "bicubic")
        grainy = np.clip(smooth + rng.normal(0, 12, (*SIZE, 3)), 0, 255).astype(np.uint8)
        images.append(image.thumbnail(grainy, max(SIZE)))
    return images, math.inf, "made-up JPEGs"


def _read(archives: Sequence[str], asked: Extraction) -> tuple[list[bytes], float, str]:
    """The bytes of the first images, how many a second come, and what they are called."""
    index = archive.index(list(archives), labels=asked.labels)
    images: list[bytes] = []
    started = perf_counter()
    with index.open() as reader:
        for row in range(min(len(index), 2 * IMAGES)):
            try:
                images.append(bytes(reader.read(row)))
            except SampleError:
                continue
            if len(images) == IMAGES:
                break
    if not images:
        raise ArchiveError(f"none of the first images of {archives[0]} can be read; there is nothing to measure with")
    return images, len(images) / (perf_counter() - started), ", ".join(map(str, archives))


def _write() -> float:
    """Bytes per second to the disk of temporary files, made durable."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile() as file:
        started = perf_counter()
        for _ in range(WRITTEN_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN_BYTES / (perf_counter() - started)


def _change(taken: Forward, way: Forward) -> str:
    faster = f"{way.bound / taken.bound:.1f} times as fast"
    if (way.engine, way.precision) == (taken.engine, taken.precision):
        return f"leave --batch out: batches of {way.batch} are {faster} as those of {taken.batch}"
    engine = " --engine openvino" if "OpenVINO" in way.engine and "OpenVINO" not in taken.engine else ""
    return (
        f"--precision {way.precision}{engine}: {faster}, "
        f"least cosine {way.cosine:.4f} to fp32 (--precision auto takes it above --min-cosine)"
    )


def _advice(found: Limits) -> Iterator[str]:
    """What to change, the most useful first."""
    taken, machine = found.forward[0], found.machine
    ways = sorted(found.forward[1:], key=lambda way: -way.bound)
    for way in ways:
        if way.bound > WORTH * taken.bound:
            yield _change(taken, way)
            break
    if machine["device"] == "cpu" and not has_openvino():
        yield "pip install 'featpipe[cpu]': OpenVINO is usually 1.3 times as fast as torch on a CPU"
    if machine["usable_cores"] < (machine["cores"] or 1):
        text = f"this process may use {machine['usable_cores']} of {machine['cores']} cores"
        yield f"{text}; a container or scheduler can give more"
    if machine["workers"] < machine["usable_cores"]:
        yield f"--workers {machine['usable_cores']}: one for each core, where there are {machine['workers']} now"
    if found.reading < 2 * taken.bound:
        yield "reading is near the limit: pack single files into .tar shards on a local disk"
    if found.row_bytes and found.writing / found.row_bytes < 2 * taken.bound:
        yield (
            f"writing is near the limit, {found.row_bytes:,} bytes an image: --storage float16 halves float32, "
            "--output NODE:avg makes one number of each map, and --cache can name a faster disk"
        )
    if machine["device"] != "cpu" and found.bottleneck == "decoding":
        yield "the GPU waits for images: more cores, or images stored nearer to the size that the network sees"
    if found.extraction < 0.8 * found.bound:
        share = found.extraction / found.bound
        yield f"an extraction reached {share:.0%} of the bound: something else may be using this machine"
