"""How a frozen network is run fast on this device, and how faithful that is."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from featpipe.backbone import Backbone
from featpipe.errors import ConfigError
from featpipe.names import unknown

__all__ = ["Engine", "available_cores", "resolve_device"]

DTYPES = {  # name → dtype of weights and activations
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
CPU_BATCH = 8
GPU_BATCH = 64
CPU_BATCH_MULTIPLY_ADDS = 36e9  # some three seconds at 10 GMAC/s, what one slow core does in fp32

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def resolve_device(name: str = "auto") -> torch.device:
    """The device to run on.

    Parameters
    ----------
    name : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. ``auto`` is the first of cuda, mps, cpu that is there.

    Raises
    ------
    ConfigError
        If the name is unknown or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdigit())):
        raise unknown("device", name, ["auto", "cpu", "cuda", "cuda:1", "mps"])
    if kind == "cuda":
        count = torch.cuda.device_count()
        if int(number or 0) >= count:
            there = f"this machine has {count} CUDA device{'s' * (count != 1)} that torch can use"
            raise ConfigError(f"device {name!r} is not there: {there}; use --device auto or cpu")
    if kind == "mps" and not _has_mps():
        raise ConfigError("device 'mps' is not there: torch finds no Apple GPU; use --device auto or cpu")
    return torch.device(name)


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


class Engine:
    """Runs a backbone on a device.

    On a CPU, each calling thread computes alone on one core, so that several callers fill the cores with streams
    that share nothing; on a GPU there is one caller.

    Parameters
    ----------
    backbone : Backbone
        A copy of its network is moved to the device and converted.
    device : torch.device
    precision : {"fp32", "tf32", "bf16", "fp16"}
        ``fp32`` is strict: no TF32 in matrix products or convolutions.
    batch : int, optional
        Images in one forward pass. Shorter batches are padded to it, so that an image's embedding is computed by the
        same instructions whatever its neighbours are. If not given: 64 on a GPU; on a CPU from 8 down to 1, as many as
        36·10⁹ multiply-adds are enough for, so that a batch takes seconds and not minutes whatever the network, and
        little work is ever in hand. It follows from the network alone and never from the clock: a run that is resumed
        computes as the one before it did.

    Attributes
    ----------
    multiply_adds : int or None
        Of one image, as far as they were counted: on a CPU, where ``batch`` was not given. Convolutions, matrix
        products and attention count; other operations of a network of your own count nothing, so that one made of
        nothing else runs in batches of 8.
    """

    def __init__(
        self, backbone: Backbone, device: torch.device, precision: str = "fp32", batch: int | None = None
    ) -> None:
        if precision not in DTYPES:
            raise unknown("precision", precision, DTYPES)
        if precision == "tf32" and device.type != "cuda":
            raise ConfigError(f"precision 'tf32' needs a CUDA device, this is {device}; use fp32 or bf16")
        if batch is not None and batch < 1:
            raise ConfigError(f"batch is {batch}; it must be at least 1")
        self.device = device
        self.precision = precision
        self.dtype = DTYPES[precision]
        network = copy.deepcopy(backbone.network)  # the backbone stays as it is, for another precision or device
        network.to(device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backbone = replace(backbone, network=network)
        self.multiply_adds: int | None = None
        if device.type == "cpu":
            _keep_freed_memory()
            if batch is None:
                self.multiply_adds = _multiply_adds(self.backbone, self.dtype)
        self.batch = batch or (GPU_BATCH if device.type != "cpu" else _cpu_batch(self.multiply_adds))

    @property
    def workers(self) -> int:
        """How many threads keep this device busy: one for each core, that decodes and, on a CPU, embeds."""
        return available_cores()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """To be held by the thread that starts the callers of :meth:`embed`; puts torch's thread count back."""
        before = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def enter_stream(self, workers: int) -> None:
        """To be called once by each of some worker threads: it then computes on its own share of the cores."""
        torch.set_num_threads(max(1, available_cores() // workers))

    @torch.inference_mode()
    def embed(self, images: Tensor) -> dict[str, NDArray[np.float32]]:
        """The embeddings of some transformed images.

        Parameters
        ----------
        images : Tensor of shape (b, 3, H, W), float32
            At most ``batch`` of them.

        Returns
        -------
        dict from output name to ndarray of shape (b, …), float32
        """
        b = len(images)
        if b < self.batch:
            images = torch.cat([images, images.new_zeros(self.batch - b, *images.shape[1:])])
        images = images.to(self.device, self.dtype, memory_format=torch.channels_last, non_blocking=True)
        with _strict(self.device, self.precision):
            outputs = self.backbone.embed(images)
        return {name: value[:b].float().cpu().numpy() for name, value in outputs.items()}


def available_cores() -> int:
    """The cores that this process may use, which a container or a scheduler may have narrowed."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_batch(multiply_adds: int | None) -> int:
    """Images in one forward pass on one core."""
    if not multiply_adds:
        return CPU_BATCH
    return max(1, min(CPU_BATCH, int(CPU_BATCH_MULTIPLY_ADDS // multiply_adds)))


@torch.no_grad()
def _multiply_adds(backbone: Backbone, dtype: torch.dtype) -> int | None:
    """The work of one image, counted without doing it; None where that cannot be told.

    The network is run with tensors that have a shape and no values. A network that cannot do without values, because
    it makes tensors of its own or decides by them, is run once in earnest.
    """
    image = torch.zeros(1, 3, *backbone.transform.size, dtype=dtype)
    for values in (False, True):
        # A user's own network may raise anything.
        with contextlib.suppress(Exception), FlopCounterMode(display=False) as counter:
            if values:
                backbone.embed(image)
            else:
                replace(backbone, network=_shapes_of(backbone.network)).embed(image.to("meta"))
            return int(counter.get_total_flops()) // 2
    return None


def _shapes_of(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network whose weights have only their shapes; a copy, for what it may keep from a forward pass."""
    memo: dict[int, Any] = {id(value): torch.nn.Parameter(value.to("meta"), False) for value in network.parameters()}
    memo |= {id(value): value.to("meta") for value in network.buffers()}
    return copy.deepcopy(network, memo)


@contextlib.contextmanager
def _strict(device: torch.device, precision: str) -> Iterator[None]:
    """TF32 exactly where it was asked for, whatever the process had set, and as it was afterwards."""
    if device.type != "cuda":
        yield
        return
    wanted = precision == "tf32"
    settings: list[tuple[Any, bool]] = [
        (torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32),
        (torch.backends.cudnn, torch.backends.cudnn.allow_tf32),
    ]
    for place, _ in settings:
        place.allow_tf32 = wanted
    try:
        yield
    finally:
        for place, before in settings:
            place.allow_tf32 = before


@cache
def _keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks.

    It gives every large activation buffer back to the system and takes it again for the next layer; keeping them makes
    convolutional networks up to three times as fast on a CPU. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
