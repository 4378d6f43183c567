"""The per-image transform of worker threads: resizing on the CPU, or transfer to a GPU that resizes.

Resizing on a GPU is bit-identical (:mod:`featpipe.backbones.resize.matmul`), so the choice between CPU and GPU affects
only speed and memory.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from featpipe.backbones import (
    ImageTransform,
    PreparedImage,
    SampleTransform,
    Transform,
    UnresizedImage,
    is_exact,
    is_supported,
)
from featpipe.inference.devices import allow_tf32

MAX_UNRESIZED_PIXELS = 2_000_000  # of an image that the GPU resizes; for larger images decoding takes most of the time
MAX_PENDING_BYTES = 2**31  # of unresized images in pinned memory: about 4,000 images of 500 × 375 pixels


def make_worker_transforms(
    transform: SampleTransform, device: torch.device
) -> tuple[Callable[[Any], PreparedImage], Callable[[Any], PreparedImage]]:
    """Make the per-image transforms of worker threads for a device: uint8 (3, H, W) → an input of the engine.

    Returns
    -------
    transform : callable
        Leaves resizing to the device if the device supports it.
    fallback_transform : callable
        Does the whole geometric part, for workers that would otherwise wait for the device.
    """
    if device.type != "cuda" or not isinstance(transform, ImageTransform):
        return transform.prepare, transform.prepare
    transfer = PinnedTransfer(transform, device)
    return transfer, transfer.transform_fully


class PinnedTransfer:
    """Places images in pinned memory, from which a GPU copies asynchronously.

    Resizing is left to the GPU if it is bit-identical there and the pending unresized images stay within a byte limit.
    Pixels that do not contribute to the crop are cut off before the transfer.

    Parameters
    ----------
    transform : SampleTransform
        A transform of images. A custom transform runs entirely on the CPU.
    device : torch.device
    """

    def __init__(self, transform: SampleTransform, device: torch.device) -> None:
        self.transform = transform
        self._device_transform = transform if isinstance(transform, Transform) and _is_exact_on(device) else None
        self._budget = _ByteBudget(MAX_PENDING_BYTES)

    def __call__(self, image: Tensor) -> PreparedImage:
        """Transform uint8 (3, H, W) to an input of the engine; thread-safe."""
        deferred = None if self._device_transform is None else self._defer_resize(image, self._device_transform)
        return deferred or self.transform_fully(image)

    def transform_fully(self, image: Tensor) -> Tensor:
        """Do the whole geometric part on the CPU and copy the result to pinned memory."""
        return _copy_to_pinned(self.transform.prepare(image))

    def _defer_resize(self, image: Tensor, transform: Transform) -> UnresizedImage | None:
        """Copy the unresized image to pinned memory; None if it should be resized on the CPU."""
        filter_, (vertical, horizontal) = transform.interpolation, transform.resize_axes(*image.shape[-2:])
        if (vertical.source_size, horizontal.source_size) == (vertical.resized_size, horizontal.resized_size):
            return None
        pixels = image[:, vertical.source_slice(filter_), horizontal.source_slice(filter_)]
        pinned_bytes = 1 << (pixels.nbytes - 1).bit_length()  # torch allocates pinned memory in powers of two
        if (
            not is_supported(vertical, horizontal, filter_)
            or pixels.nbytes > 3 * MAX_UNRESIZED_PIXELS
            or not self._budget.acquire(pinned_bytes)
        ):
            return None
        unresized = UnresizedImage(_copy_to_pinned(pixels), vertical, horizontal)
        weakref.finalize(unresized, self._budget.release, pinned_bytes)
        return unresized


class _ByteBudget:
    """A thread-safe budget of bytes."""

    def __init__(self, size: int) -> None:
        self._free_bytes = size
        self._released: deque[int] = deque()  # a deque, because a finalizer may run in a thread that holds the lock
        self._lock = threading.Lock()

    def acquire(self, size: int) -> bool:
        """Reserve bytes if the budget allows it, and return whether it did."""
        with self._lock:
            while self._released:
                self._free_bytes += self._released.popleft()
            if size > self._free_bytes:
                return False
            self._free_bytes -= size
            return True

    def release(self, size: int) -> None:
        self._released.append(size)


def _is_exact_on(device: torch.device) -> bool:
    with torch.inference_mode(), allow_tf32(False):
        return is_exact(device)


def _copy_to_pinned(picture: Tensor) -> Tensor:
    """Copy an image to pinned memory, channels last, for asynchronous transfer."""
    channels, height, width = picture.shape
    host = torch.empty((height, width, channels), dtype=picture.dtype, pin_memory=True).permute(2, 0, 1)
    return host.copy_(picture)
