"""What worker threads do with an image: all of its geometry, or for a GPU as little of it as is worth their time.

A GPU resizes to the same bits (:mod:`featpipe.backbones.resize.matmul`), so that whoever has the time may do it: nothing but
speed and memory depends on the choice.
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

__all__ = ["PinnedTransfer", "make_worker_transforms"]

MAX_UNRESIZED_PIXELS = 2_000_000  # at most, of an image that is left so; decoding a larger one is what takes the time
MAX_PENDING_BYTES = 2**31  # of images that wait unresized, in pinned memory; some 4,000 photographs of 500 × 375


def make_worker_transforms(
    transform: SampleTransform, device: torch.device
) -> tuple[Callable[[Any], PreparedImage], Callable[[Any], PreparedImage]]:
    """What worker threads do for a device: uint8 (3, H, W) → an image that is ready to be handed over.

    Twice: as little as the device needs of them, and all of it, for those who would have to wait for the device.
    """
    if device.type != "cuda" or not isinstance(transform, ImageTransform):
        return transform.prepare, transform.prepare
    transfer = PinnedTransfer(transform, device)
    return transfer, transfer.transform_fully


class PinnedTransfer:
    """Makes images ready for a GPU, in pinned memory, from which it copies by itself.

    Left unresized is what the GPU resizes to the same bits, as long as not too much of that is waiting. What no pixel
    of the result needs is cut off.

    Parameters
    ----------
    transform : SampleTransform
        Of images. A custom one does everything on the CPU.
    device : torch.device
    """

    def __init__(self, transform: SampleTransform, device: torch.device) -> None:
        self.transform = transform
        self._device_transform = transform if isinstance(transform, Transform) and _is_exact_on(device) else None
        self._budget = _ByteBudget(MAX_PENDING_BYTES)

    def __call__(self, image: Tensor) -> PreparedImage:
        """uint8 (3, H, W) → what the engine is given; to be called by any thread."""
        deferred = None if self._device_transform is None else self._defer_resize(image, self._device_transform)
        return deferred or self.transform_fully(image)

    def transform_fully(self, image: Tensor) -> Tensor:
        """The same with all of it done here."""
        return _copy_to_pinned(self.transform.prepare(image))

    def _defer_resize(self, image: Tensor, transform: Transform) -> UnresizedImage | None:
        """The image as it is; None where it is better resized here."""
        filter_, (vertical, horizontal) = transform.interpolation, transform.resize_axes(*image.shape[-2:])
        if (vertical.source_size, horizontal.source_size) == (vertical.resized_size, horizontal.resized_size):
            return None
        pixels = image[:, vertical.source_slice(filter_), horizontal.source_slice(filter_)]
        pinned_bytes = 1 << (pixels.nbytes - 1).bit_length()  # as torch takes pinned memory, by powers of two
        if (
            not is_supported(vertical, horizontal, filter_)
            or pixels.nbytes > 3 * MAX_UNRESIZED_PIXELS
            or not self._budget.acquire(pinned_bytes)
        ):
            return None
        picture = UnresizedImage(_copy_to_pinned(pixels), vertical, horizontal)
        weakref.finalize(picture, self._budget.release, pinned_bytes)
        return picture


class _ByteBudget:
    """So many bytes, taken and given back by any thread."""

    def __init__(self, size: int) -> None:
        self._free_bytes = size
        self._released: deque[int] = deque()  # an object may be gone at any moment, also while the lock is held
        self._lock = threading.Lock()

    def acquire(self, size: int) -> bool:
        """Whether there was room."""
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
    """A copy that a GPU can copy from while the cores go on, channels last in memory."""
    channels, height, width = picture.shape
    host = torch.empty((height, width, channels), dtype=picture.dtype, pin_memory=True).permute(2, 0, 1)
    return host.copy_(picture)
