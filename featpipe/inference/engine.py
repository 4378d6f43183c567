"""The engine: a backbone made ready for a device, and called with batch after batch."""

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

__all__ = ["Engine"]

PRECISION_DTYPES = {  # name → dtype of weights and activations
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
MIN_IMAGES_TO_FUSE = 100  # following and fusing a graph takes about a second, which fewer images do not give back
MIN_IMAGES_FOR_OPENVINO = 1000  # bringing it into OpenVINO takes some three


class Engine:
    """Runs a backbone on a device.

    On a CPU, each calling thread computes alone on one core, so that several callers fill the cores with streams
    that share nothing; on a GPU there is one caller, whose copies overlap with the computing.

    Parameters
    ----------
    backbone : Backbone
        A copy of its network is moved to the device and converted.
    device : torch.device
    precision : {"fp32", "tf32", "bf16", "fp16"}
        ``fp32`` is strict: no TF32 in matrix products or convolutions.
    batch : int, optional
        Images in one forward pass. Shorter batches are padded to it, so that an image's embedding is computed by the
        same instructions whatever its neighbours are. If not given it follows from the network's work and the
        precision alone and never from the clock, so that a run that is resumed computes as the one before it did. On a
        CPU: from 4 (8 in bf16) down to 1, as many as 36·10⁹ multiply-adds are enough for, so that a batch takes
        seconds and not minutes whatever the network, and little work is ever in hand. On a GPU: from 512 down to 32, as
        many as 10¹² are enough for; half of that, again and again, where the memory is not enough.
    kind : {"auto", "torch", "openvino"}
        What computes on a CPU. ``auto``: OpenVINO if it is installed and the network and precision suit it. They
        agree to the rounding of the precision, as devices do.
    images : int, optional
        How many are going to come, of which follows how much making ready is worth it; few if not given.

    Attributes
    ----------
    multiply_adds : int or None
        Of one image, as far as they were counted: where ``batch`` was not given. Convolutions, matrix products and
        attention count; other operations of a network of your own count nothing, so that one made of nothing else
        runs in the largest batches.
    name : str
        Name of what computes.
    transform : callable
        What comes before :meth:`collate`, an image's own geometry; for a GPU, as little of it as the cores must do.
    unhurried : callable
        The same, by a core that would wait for the GPU otherwise.
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
        network = copy.deepcopy(backbone.network)  # the backbone stays as it is, for another precision or device
        network.to(device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backbone = replace(backbone, network=network)
        if device.type == "cpu":
            keep_freed_memory()
        self._optimization_level = _choose_optimization_level(images or 0)
        self.multiply_adds = count_multiply_adds(self.backbone) if batch is None else None
        batch_size = batch or default_batch_size(device, self.multiply_adds, self.dtype)
        self._runner = self._make_runner(backbone, batch_size, kind, images or 0)

    def is_optimized_for(self, images: int) -> bool:
        """Whether an engine for so many images would be made ready in the same way."""
        return _choose_optimization_level(images) <= self._optimization_level

    def _make_runner(self, fp32_backbone: Backbone, batch: int, kind: str, images: int) -> Runner:
        """The fastest that suits; what cannot be made ready is called as it is."""
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
        """How many threads keep this device busy: one for each core, that decodes and, on a CPU, embeds."""
        return available_cores()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """To be held by the thread that starts the callers of :meth:`embed`; puts torch's thread count back."""
        thread_count = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(thread_count)

    def enter_stream(self, workers: int) -> None:
        """To be called once by each of some worker threads: it then computes on its own share of the cores."""
        torch.set_num_threads(max(1, available_cores() // workers))
        self._runner.enter_stream(workers)

    def collate(self, pictures: Sequence[PreparedImage]) -> ImageBatch:
        """Some images together, as :meth:`submit` takes them: one tensor, channels last in memory.

        For a GPU they stay by themselves, where each was put for it to copy from.

        Parameters
        ----------
        pictures : sequence of Tensor of shape (3, h, w), or for a GPU UnresizedImage
            As ``transform`` gives them.
        """
        if self._has_cuda_runner:
            return list(pictures)
        return self.backbone.transform.collate(cast(Sequence[Tensor], pictures))

    def embed(self, images: ImageBatch) -> Embeddings:
        """The embeddings of some images.

        Parameters
        ----------
        images : Tensor of shape (b, 3, h, w), or what :meth:`collate` gives

        Returns
        -------
        dict from output name to ndarray of shape (b, …), float32
        """
        return self.submit(images)()

    def submit(self, images: ImageBatch) -> Callable[[], Embeddings]:
        """Begin to embed some images; what is returned waits for the embeddings.

        On a GPU the next images are copied and begun meanwhile.
        """
        return self._runner.submit(images)  # type: ignore[arg-type]  # each by itself for a GPU alone


def _choose_optimization_level(images: int) -> int:
    """How much is done to be fast for so many images."""
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
