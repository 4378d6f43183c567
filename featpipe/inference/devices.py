"""Select devices and configure their runtime."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError


def resolve_device(name: str = "auto") -> torch.device:
    """Resolve a device name.

    Parameters
    ----------
    name : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. ``auto`` is the first available of cuda, mps, cpu.

    Raises
    ------
    ConfigError
        If the name is unknown or the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu"
    device_type, _, index = name.partition(":")
    if device_type not in ("cpu", "cuda", "mps") or (index and not (device_type == "cuda" and index.isdigit())):
        raise unknown_name_error("device", name, ["auto", "cpu", "cuda", "cuda:1", "mps"])
    if device_type == "cuda":
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            raise ConfigError(
                f"device {name!r} is not available: torch can use {count} CUDA device{'s' * (count != 1)} of this "
                "machine; use --device auto or cpu"
            )
    if device_type == "mps" and not _has_mps():
        raise ConfigError("device 'mps' is not available: torch finds no Apple GPU; use --device auto or cpu")
    return torch.device(name)


def resolve_devices(name: str = "auto") -> tuple[torch.device, ...]:
    """Resolve device names to a tuple of devices; several devices run in one process each.

    Parameters
    ----------
    name : str
        A name for :func:`resolve_device`, or several separated by commas. ``cuda``, and ``auto`` if it resolves to
        ``cuda``, mean all CUDA devices that torch can use.

    Raises
    ------
    ConfigError
        If a device is unknown or not available.
    """
    devices = tuple(resolve_device(part.strip()) for part in name.split(","))
    if len(devices) > 1 or devices[0] != torch.device("cuda") or torch.cuda.device_count() < 2:
        return devices
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


@dataclass(frozen=True)
class CudaSupport:
    """What this build of torch can do with NVIDIA GPUs.

    Attributes
    ----------
    build : str or None
        Version of CUDA that torch is built for; None for CPUs alone.
    memory_by_device : mapping from str to int
        Name of each device, such as ``cuda:0 NVIDIA H200``, to its memory in bytes.
    """

    build: str | None
    memory_by_device: Mapping[str, int]


def inspect_cuda() -> CudaSupport:
    """The CUDA devices that torch can use."""
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    memory = {f"cuda:{index} {device.name}": device.total_memory for index, device in enumerate(properties)}
    return CudaSupport(torch.version.cuda, memory)


def available_cores() -> int:
    """Number of cores that this process may use; a container or a scheduler may restrict it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


@cache
def keep_freed_memory() -> None:
    """Configure glibc's malloc to keep freed blocks.

    By default glibc returns every large activation buffer to the system and requests it again for the next layer.
    Keeping them makes convolutional networks up to three times as fast on a CPU. Without glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextlib.contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 within the context, and restore the process-wide settings afterwards."""
    settings: list[tuple[Any, bool]] = [
        (torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32),
        (torch.backends.cudnn, torch.backends.cudnn.allow_tf32),
    ]
    for backend, _ in settings:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, previous in settings:
            backend.allow_tf32 = previous
