"""Benchmark of extraction on a machine: each step alone, their upper bound together, and the bottleneck."""

from __future__ import annotations

import io
import logging
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
from typing import Any, Unpack

import numpy as np
import torch

from featpipe import data
from featpipe.backbones import Backbone, PreparedImage
from featpipe.config import AUTO, EngineName, ExtractionConfig, ExtractionOptions, Precision
from featpipe.data import get_modality
from featpipe.errors import ArchiveError, SampleError
from featpipe.extraction import extract, load_backbone
from featpipe.inference import (
    OPENVINO_PRECISIONS,
    Engine,
    Loader,
    SampleList,
    available_cores,
    candidate_precisions,
    compute_embeddings,
    compute_min_cosine,
    has_openvino,
    make_worker_transforms,
    resolve_device,
    run_in_threads,
)

logger = logging.getLogger(__name__)

MAX_BENCHMARK_IMAGES = 256
N_PRECISION_CHECK_IMAGES = 16  # embeddings compared between precisions
MAX_DECODED_IMAGES = 64  # in memory at a time
ASSUMED_IMAGE_COUNT = 10**6  # engines are optimized as for an extraction of this size
WRITE_TEST_BYTES = 64 * 2**20
MIN_USEFUL_SPEEDUP = 1.15  # a smaller one is not recommended


@dataclass(frozen=True)
class ForwardBenchmark:
    """Throughput of forward passes alone, on all cores or on a GPU, which also copies and resizes images.

    Attributes
    ----------
    engine : str
    precision : str
    batch : int
    images_per_second : float
    cosine : float
        Minimum cosine to the float32 embeddings of some images.
    bound : float
        Images per second that reading, decoding, forward passes and writing allow together. If a GPU is the bottleneck,
        idle cores resize images for it, and an extraction may be faster.
    """

    engine: str
    precision: Precision
    batch: int
    images_per_second: float
    cosine: float
    bound: float


@dataclass(frozen=True)
class BenchResult:
    """Result of the benchmark.

    Attributes
    ----------
    machine : dict
        Device, cores, versions.
    backbone : str
    archive : str
    images : int
        Number of images measured.
    image_bytes : float
        Mean size of an encoded image.
    reading : float
        Images per second of one reader.
    decoding : float
        Images per second on all cores: decoding, resizing and cropping; for a GPU that resizes, decoding and copying
        to pinned memory.
    writing : float
        Bytes per second, synced to the disk.
    row_bytes : int
        Stored bytes of the embeddings of one image.
    forward : tuple of ForwardBenchmark
        The first one has the settings of the extraction.
    bound : float
        ``bound`` of the first one.
    extraction : float
        Images per second of a complete extraction from a .tar to a cache.
    seconds : dict
        Stage → seconds of that extraction, over all workers.
    bottleneck : {"reading", "decoding", "forward", "writing"}
    advice : tuple of str
        Recommended changes, the most useful first.
    """

    machine: dict[str, Any]
    backbone: str
    archive: str
    images: int
    image_bytes: float
    reading: float
    decoding: float
    writing: float
    forward: tuple[ForwardBenchmark, ...]
    bound: float
    extraction: float
    seconds: dict[str, float] = field(default_factory=dict)
    row_bytes: int = 0
    bottleneck: str = ""
    advice: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_benchmark(
    archives: Sequence[str] = (),
    *,
    seconds: float = 24.0,
    **settings: Unpack[ExtractionOptions],
) -> BenchResult:
    """Benchmark this machine for a backbone and an archive.

    Parameters
    ----------
    archives : sequence of path-like
        Their first images are measured; synthetic JPEGs of 500 × 375 pixels if there are no archives.
    seconds : float
        Approximate duration, without the preparation of the engines.
    **settings
        The fields of :class:`featpipe.config.ExtractionConfig`.

    Returns
    -------
    BenchResult

    Raises
    ------
    ArchiveError
        If no image of the archives can be read.
    """
    config = ExtractionConfig.from_settings(settings)
    benchmark = _Benchmark(config, resolve_device(config.device), load_backbone(config), seconds)
    if archives:
        encoded_images, read_rate, archive_name = _read_sample_images(archives, config, benchmark.backbone)
    else:
        encoded_images, archive_name = get_modality(benchmark.backbone.modality).make_encoded_samples()
        read_rate = math.inf
    logger.info(f"{len(encoded_images)} images of {archive_name}")
    decoded_images, decode_rate = benchmark.measure_decoding(encoded_images)
    write_bytes_per_second = _measure_write_bandwidth()
    write_rate = write_bytes_per_second / benchmark.row_bytes
    forward_benchmarks = benchmark.measure_engines(decoded_images, min(read_rate, write_rate), decode_rate)
    precision = forward_benchmarks[0].precision
    extraction_rate, stage_seconds = benchmark.measure_extraction(
        encoded_images, precision, forward_benchmarks[0].bound
    )
    stage_rates = {
        "reading": read_rate,
        "decoding": decode_rate,
        "forward": forward_benchmarks[0].images_per_second,
        "writing": write_rate,
    }
    result = BenchResult(
        machine=benchmark.describe_machine(),
        backbone=benchmark.backbone.name,
        archive=archive_name,
        images=len(encoded_images),
        image_bytes=float(np.mean([len(encoded_image) for encoded_image in encoded_images])),
        reading=read_rate,
        decoding=decode_rate,
        writing=write_bytes_per_second,
        row_bytes=benchmark.row_bytes,
        forward=tuple(forward_benchmarks),
        bound=forward_benchmarks[0].bound,
        extraction=extraction_rate,
        seconds=stage_seconds,
        bottleneck=min(stage_rates, key=lambda stage: stage_rates[stage]),
    )
    return replace(result, advice=tuple(_iter_advice(result)))


@dataclass(frozen=True)
class _Benchmark:
    """Configuration and steps of the benchmark."""

    config: ExtractionConfig
    device: torch.device
    backbone: Backbone
    seconds: float

    @property
    def workers(self) -> int:
        return self.config.workers or available_cores()

    @property
    def row_bytes(self) -> int:
        """Stored bytes of the embeddings of one image."""
        return sum(map(math.prod, self.backbone.shapes.values())) * np.dtype(self.config.storage).itemsize

    @property
    def seconds_per_measurement(self) -> float:
        """Duration of one measurement."""
        return self.seconds / 9

    def measure_decoding(self, encoded_images: Sequence[bytes]) -> tuple[list[PreparedImage], float]:
        """Decode on all cores; return some decoded images, and the images per second."""
        decoded_images: list[PreparedImage] = []
        transform, _ = make_worker_transforms(self.backbone.transform, self.device)
        n_decoded, started = 0, perf_counter()
        while perf_counter() - started < self.seconds_per_measurement:
            loader = Loader(
                SampleList(encoded_images, self.backbone.modality),
                np.arange(len(encoded_images)),
                transform,
                8,
                collate=list,
            )
            with closing(loader), closing(run_in_threads(loader.batches, self.workers)) as batches:
                for batch in batches:
                    n_decoded += len(batch.rows)
                    if len(decoded_images) < MAX_DECODED_IMAGES:
                        decoded_images.extend(batch.images if batch.images is not None else ())
                    if perf_counter() - started > self.seconds_per_measurement:
                        break
        if not decoded_images:
            raise ArchiveError(
                "none of the first images can be decoded, but the benchmark needs one; pass other archives"
            )
        return decoded_images[:MAX_DECODED_IMAGES], n_decoded / (perf_counter() - started)

    def measure_engines(
        self, decoded_images: list[PreparedImage], io_rate: float, decode_rate: float
    ) -> list[ForwardBenchmark]:
        """Measure each engine and precision that the device supports; those of the settings first.

        ``io_rate`` and ``decode_rate`` are the images per second of reading and writing, and of decoding.
        """
        results: list[ForwardBenchmark] = []
        reference_engine = Engine(self.backbone, self.device, batch=self.config.batch)
        reference_embeddings = compute_embeddings(reference_engine, decoded_images[:N_PRECISION_CHECK_IMAGES])
        for engine_kind, precision, batch in self._engine_variants():
            engine = Engine(self.backbone, self.device, precision, batch, kind=engine_kind, images=ASSUMED_IMAGE_COUNT)
            if any(
                (result.engine, result.precision, result.batch) == (engine.name, precision, engine.batch)
                for result in results
            ):
                continue  # another variant fell back to this engine, or chose this batch
            cosine = compute_min_cosine(
                compute_embeddings(engine, decoded_images[:N_PRECISION_CHECK_IMAGES]), reference_embeddings
            )
            forward_rate = self._measure_forward(engine, decoded_images)
            logger.info(f"forward with {engine.name} in {precision}: {forward_rate:,.1f} images/s")
            bound = _combine_rates(self.device.type, io_rate, decode_rate, forward_rate)
            results.append(ForwardBenchmark(engine.name, precision, engine.batch, forward_rate, cosine, bound))
        return results

    def _engine_variants(self) -> dict[tuple[EngineName, Precision, int | None], None]:
        """Engine, precision and batch: those of the settings, the same with the default batch, and the others."""
        default_precision: Precision = "fp32" if self.config.precision == AUTO else self.config.precision
        precisions = dict.fromkeys((default_precision, "fp32", *candidate_precisions(self.device)))
        engine_kinds: tuple[EngineName, ...] = ("auto", "torch") if has_openvino() else ("auto",)
        batch = self.config.batch
        variants = [(self.config.engine, default_precision, batch), (self.config.engine, default_precision, None)]
        variants.extend(
            (engine_kind, precision, batch)
            for engine_kind in dict.fromkeys((self.config.engine, *engine_kinds))
            for precision in precisions
            if engine_kind != "openvino" or precision in OPENVINO_PRECISIONS
        )
        return dict.fromkeys(variants)

    def _measure_forward(self, engine: Engine, decoded_images: list[PreparedImage]) -> float:
        """Images per second of forward passes alone."""
        image_batch = engine.collate([decoded_images[i % len(decoded_images)] for i in range(engine.batch)])
        n_streams = 1 if self.device.type == "cuda" else self.workers
        counts = [0] * n_streams
        start_barrier = threading.Barrier(n_streams)
        stream_seconds = [0.0] * n_streams

        def run_stream(stream_index: int) -> None:
            engine.enter_stream(n_streams)
            engine.embed(image_batch)
            start_barrier.wait()
            started = perf_counter()
            pending_result = engine.submit(image_batch)
            while perf_counter() - started < self.seconds_per_measurement:
                next_result = engine.submit(image_batch)  # a GPU works on two batches at a time
                pending_result()
                counts[stream_index] += len(image_batch)
                pending_result = next_result
            pending_result()
            stream_seconds[stream_index] = perf_counter() - started
            counts[stream_index] += len(image_batch)

        with engine.session():
            threads = [threading.Thread(target=run_stream, args=(stream_index,)) for stream_index in range(n_streams)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return sum(count / elapsed for count, elapsed in zip(counts, stream_seconds, strict=True))

    def measure_extraction(
        self, encoded_images: Sequence[bytes], precision: Precision, bound: float
    ) -> tuple[float, dict[str, float]]:
        """Run a complete extraction; return its images per second and the seconds of each stage."""
        n_images = max(len(encoded_images), math.ceil(min(bound, 1e5) * self.seconds / 4))
        with tempfile.TemporaryDirectory() as folder:
            path, suffix = Path(folder) / "images.tar", get_modality(self.backbone.modality).decoded_suffixes[0]
            with tarfile.open(path, "w") as tar:
                for i in range(n_images):
                    data = encoded_images[i % len(encoded_images)] + i.to_bytes(8, "big")  # distinct files
                    member = tarfile.TarInfo(f"{i:07}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            extraction_config = replace(
                self.config, precision=precision, out=Path(folder) / "bench.h5", cache=folder, max_bad=None, labels=None
            )
            cache = extract(path, **{**vars(extraction_config), "backbone": self.backbone})
            stage_seconds = dict(cache.manifest["seconds"])
            return cache.manifest["images_per_second"], stage_seconds

    def describe_machine(self) -> dict[str, Any]:
        """Device, cores and versions."""
        package_names = ("featpipe", "torch", "torchvision", "pillow", "numpy")
        gpu = {"gpu": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}
        return {
            "device": str(self.device),
            **gpu,
            "cores": os.cpu_count(),
            "usable_cores": available_cores(),
            "workers": self.workers,
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in package_names},
        }


def _combine_rates(device: str, io_rate: float, decode_rate: float, forward_rate: float) -> float:
    """Images per second of all stages together: the same cores decode and embed, or a GPU embeds in parallel."""
    compute_rate = min(decode_rate, forward_rate) if device == "cuda" else 1 / (1 / decode_rate + 1 / forward_rate)
    return min(io_rate, compute_rate)


def _read_sample_images(
    archives: Sequence[str], config: ExtractionConfig, backbone: Backbone
) -> tuple[list[bytes], float, str]:
    """Read the first images; return their bytes, the images per second, and the names of the archives."""
    index = data.index(list(archives), labels=config.labels, modality=backbone.modality)
    images: list[bytes] = []
    started = perf_counter()
    with index.open() as reader:
        for row in range(min(len(index), 2 * MAX_BENCHMARK_IMAGES)):
            try:
                images.append(bytes(reader.read(row)))
            except SampleError:
                continue
            if len(images) == MAX_BENCHMARK_IMAGES:
                break
    if not images:
        raise ArchiveError(
            f"none of the first images of {archives[0]} can be read, but the benchmark needs one; pass other archives"
        )
    return images, len(images) / (perf_counter() - started), ", ".join(map(str, archives))


def _measure_write_bandwidth() -> float:
    """Bytes per second written and synced to the disk of temporary files."""
    block = os.urandom(2**20)
    with tempfile.TemporaryFile() as file:
        started = perf_counter()
        for _ in range(WRITE_TEST_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITE_TEST_BYTES / (perf_counter() - started)


def _describe_speedup(current: ForwardBenchmark, candidate: ForwardBenchmark) -> str:
    speedup_text = f"{candidate.bound / current.bound:.1f} times as fast"
    if (candidate.engine, candidate.precision) == (current.engine, current.precision):
        return f"leave --batch out: batches of {candidate.batch} are {speedup_text} as those of {current.batch}"
    engine_option = " --engine openvino" if "OpenVINO" in candidate.engine and "OpenVINO" not in current.engine else ""
    return (
        f"--precision {candidate.precision}{engine_option}: {speedup_text}, "
        f"minimum cosine {candidate.cosine:.4f} to fp32 (--precision auto selects it if that is at least --min-cosine)"
    )


def _iter_advice(result: BenchResult) -> Iterator[str]:
    """Advice, most useful first."""
    current, machine = result.forward[0], result.machine
    candidates_by_bound = sorted(result.forward[1:], key=lambda candidate: -candidate.bound)
    for candidate in candidates_by_bound:
        if candidate.bound > MIN_USEFUL_SPEEDUP * current.bound:
            yield _describe_speedup(current, candidate)
            break
    if machine["device"] == "cpu" and not has_openvino():
        yield "pip install 'featpipe[cpu]': OpenVINO is usually 1.3 times as fast as torch on a CPU"
    if machine["usable_cores"] < (machine["cores"] or 1):
        text = f"this process may use {machine['usable_cores']} of {machine['cores']} cores"
        yield f"{text}; a container or scheduler can give more"
    if machine["workers"] < machine["usable_cores"]:
        yield f"--workers {machine['usable_cores']}: one per core instead of {machine['workers']} now"
    if result.reading < 2 * current.bound:
        yield "reading is near the limit: pack single files into .tar shards on a local disk"
    if result.row_bytes and result.writing / result.row_bytes < 2 * current.bound:
        yield (
            f"writing is near the limit, {result.row_bytes:,} bytes per image: --storage float16 halves float32, "
            "--output NODE:avg averages each feature map, and --cache can name a faster disk"
        )
    if machine["device"] != "cpu" and result.bottleneck == "decoding":
        yield "the GPU waits for images: more cores, or images stored closer to the input size of the backbone"
    if result.extraction < 0.8 * result.bound:
        reached_share = result.extraction / result.bound
        yield f"an extraction reached {reached_share:.0%} of the bound: something else may be using this machine"
