"""The engine: a backbone prepared for a device, which embeds batches of images."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from featpipe.backbones import Backbone, ImageBatch, ImageTransform, PreparedImage
from featpipe.config import ENGINES, unknown_name_error
from featpipe.errors import ConfigError
from featpipe.inference import optimize
from featpipe.inference.devices import available_cores, keep_freed_memory
from featpipe.inference.flops import count_multiply_adds, default_batch_size
from featpipe.inference.pinned_transfer import make_worker_transforms
from featpipe.inference.runner import EagerRunner, Embeddings, Runner

PRECISION_DTYPES = {  # name → dtype of weights and activations
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
MIN_IMAGES_TO_FUSE = 100  # exporting and fusing a graph takes about one second, which fewer images do not save
MIN_IMAGES_FOR_OPENVINO = 1000  # conversion to OpenVINO takes about three seconds


class Engine:
    """Runs a backbone on a device.

    On a CPU each calling thread computes on one core, so that several callers use all cores without sharing data. On a
    GPU there is one caller, whose copies overlap with the computation.

    Parameters
    ----------
    backbone : Backbone
        A copy of its network is moved to the device and converted.
    device : torch.device
    precision : {"fp32", "tf32", "bf16", "fp16"}
        ``fp32`` is strict: no TF32 in matrix products or convolutions.
    batch : int, optional
        Images in one forward pass. Shorter batches are padded to this size, so that an embedding is computed by the
        same instructions for any batch. The default depends only on the network's multiply-adds and the precision,
        never on timings, so that a resumed run computes the same values. On a CPU: the largest number from 4 (8 in
        bf16) down to 1 that needs at most 36·10⁹ multiply-adds, so that a batch takes seconds for any network and
        little work is lost on an interrupt. On a GPU: the largest power of two from 512 down to 32 that needs at most
        10¹² multiply-adds; it is halved repeatedly if the memory does not suffice.
    kind : {"auto", "torch", "openvino"}
        Inference backend on a CPU. ``auto``: OpenVINO if it is installed and supports the network and precision. The
        embeddings of the two agree up to rounding in the precision, like those of different devices.
    images : int, optional
        Expected number of images, which decides how much optimization pays off; few by default.

    Attributes
    ----------
    multiply_adds : int or None
        Multiply-adds for one image; counted only if ``batch`` is not given. Convolutions, matrix products and attention
        are counted; other operations count as 0, so that a custom network without any of these runs in the largest
        batches.
    name : str
        Name of the inference backend.
    transform : callable
        Geometric part of the transform for one image, before :meth:`collate`. For a GPU, only the part that the CPU
        must do.
    fallback_transform : callable
        The whole geometric part; used by workers that would otherwise wait for the GPU.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        precision: str = "fp32",
        batch: int | None = None,
        *,
        kind: str = "auto",
        images: int | None = None,
    ) -> None:
        _check_settings(device, precision, batch, kind)
        self.device = device
        self.precision = precision
        self.dtype = PRECISION_DTYPES[precision]
        self._has_cuda_runner = device.type == "cuda" and isinstance(backbone.transform, ImageTransform)
        self.transform, self.fallback_transform = make_worker_transforms(backbone.transform, device)
        network = copy.deepcopy(backbone.network)  # the caller's backbone stays usable for another precision or device
        network.to(device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backbone = replace(backbone, network=network)
        if device.type == "cpu":
            keep_freed_memory()
        self._optimization_level = _choose_optimization_level(images or 0)
        self.multiply_adds = count_multiply_adds(self.backbone) if batch is None else None
        batch_size = batch or default_batch_size(device, self.multiply_adds, self.dtype)
        self._runner = self._make_runner(backbone, batch_size, kind, images or 0)

    def is_optimized_for(self, images: int) -> bool:
        """Whether an engine for this number of images would use the same optimizations."""
        return _choose_optimization_level(images) <= self._optimization_level

    def _make_runner(self, fp32_backbone: Backbone, batch: int, kind: str, images: int) -> Runner:
        """Make the fastest runner that supports the network; eager execution if it cannot be optimized."""
        if self._has_cuda_runner:
            from featpipe.inference.cuda import CudaRunner

            return CudaRunner(self.backbone, batch, self.precision, self.device)
        eager = EagerRunner(self.backbone, batch, self.dtype)
        if self.device.type != "cpu":
            return eager
        if kind == "openvino" or (kind == "auto" and images >= MIN_IMAGES_FOR_OPENVINO and optimize.has_openvino()):
            runner = optimize.make_openvino_runner(fp32_backbone, self.precision, eager, required=kind == "openvino")
            if runner is not None:
                return runner
        if images >= MIN_IMAGES_TO_FUSE:
            return optimize.make_fused_runner(fp32_backbone, eager) or eager
        return eager

    @property
    def name(self) -> str:
        return self._runner.name

    @property
    def batch(self) -> int:
        return self._runner.batch

    @property
    def workers(self) -> int:
        """Number of worker threads: one per core; each decodes and, on a CPU, embeds."""
        return available_cores()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Context for the thread that starts the callers of :meth:`embed`; restores torch's thread count on exit."""
        thread_count = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(thread_count)

    def enter_stream(self, workers: int) -> None:
        """Called once by each worker thread, which then computes on its own share of the cores."""
        torch.set_num_threads(max(1, available_cores() // workers))
        self._runner.enter_stream(workers)

    def collate(self, pictures: Sequence[PreparedImage]) -> ImageBatch:
        """Collate images to the input of :meth:`submit`: one tensor, channels last in memory.

        For a GPU the images stay separate, each in the pinned memory from which the GPU copies it.

        Parameters
        ----------
        pictures : sequence of Tensor of shape (3, h, w), or for a GPU UnresizedImage
            Results of ``transform``.
        """
        if self._has_cuda_runner:
            return list(pictures)
        return self.backbone.transform.collate(cast(Sequence[Tensor], pictures))

    def embed(self, images: ImageBatch) -> Embeddings:
        """Embed a batch of images.

        Parameters
        ----------
        images : Tensor of shape (b, 3, h, w), or a result of :meth:`collate`

        Returns
        -------
        dict from output name to ndarray of shape (b, …), float32
        """
        return self.submit(images)()

    def submit(self, images: ImageBatch) -> Callable[[], Embeddings]:
        """Start to embed a batch of images; calling the result waits for the embeddings and returns them.

        On a GPU the next batch can be copied and started in the meantime.
        """
        return self._runner.submit(images)  # type: ignore[arg-type]  # a sequence of images only for a GPU


def _choose_optimization_level(images: int) -> int:
    """Optimization level for this number of images: 0 eager, 1 fused, 2 OpenVINO."""
    return (images >= MIN_IMAGES_TO_FUSE) + (images >= MIN_IMAGES_FOR_OPENVINO)


def _check_settings(device: torch.device, precision: str, batch: int | None, kind: str) -> None:
    if precision not in PRECISION_DTYPES:
        raise unknown_name_error("precision", precision, PRECISION_DTYPES)
    if kind not in ENGINES:
        raise unknown_name_error("engine", kind, ENGINES)
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision 'tf32' needs a CUDA device, this is {device}; use fp32 or bf16")
    if kind == "openvino" and device.type != "cpu":
        raise ConfigError(f"engine 'openvino' computes on the CPU, and the device is {device}; pass --device cpu")
    if batch is not None and batch < 1:
        raise ConfigError(f"batch is {batch}; it must be at least 1")
