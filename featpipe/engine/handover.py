"""What worker threads do with a picture: all of its geometry, or for a GPU as little of it as is worth their time.

A GPU resizes to the same bits (:mod:`featpipe.backbone.products`), so that whoever has the time may do it: nothing but
speed and memory depends on the choice.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from featpipe.backbone import CustomTransform, Transform
from featpipe.backbone.products import Picture, Unresized, is_exact, suits
from featpipe.engine.tf32 import tf32

__all__ = ["HandOver", "for_workers"]

UNRESIZED_PIXELS = 2_000_000  # at most, of a picture that is left so; decoding a larger one is what takes the time
WAITING_BYTES = 2**31  # of pictures that wait unresized, in pinned memory; some 4,000 photographs of 500 × 375


def for_workers(
    transform: Transform | CustomTransform, device: torch.device
) -> tuple[Callable[[Tensor], Picture], Callable[[Tensor], Picture]]:
    """What worker threads do for a device: uint8 (3, H, W) → a picture that is ready to be handed over.

    Twice: as little as the device needs of them, and all of it, for those who would have to wait for the device.
    """
    if device.type != "cuda":
        return transform.picture, transform.picture
    hand_over = HandOver(transform, device)
    return hand_over, hand_over.whole


class HandOver:
    """Makes pictures ready for a GPU, in pinned memory, from which it copies by itself.

    Left unresized is what the GPU resizes to the same bits, as long as not too much of that is waiting. What no pixel
    of the result needs is cut off.

    Parameters
    ----------
    transform : Transform or CustomTransform
        One of somebody's own does everything on the cores.
    device : torch.device
    """

    def __init__(self, transform: Transform | CustomTransform, device: torch.device) -> None:
        self.transform = transform
        self._resized_there = transform if isinstance(transform, Transform) and _is_exact(device) else None
        self._room = _Room(WAITING_BYTES)

    def __call__(self, image: Tensor) -> Picture:
        """uint8 (3, H, W) → what the engine is given; to be called by any thread."""
        unresized = None if self._resized_there is None else self._unresized(image, self._resized_there)
        return unresized or self.whole(image)

    def whole(self, image: Tensor) -> Tensor:
        """The same with all of it done here."""
        return _pinned(self.transform.picture(image))

    def _unresized(self, image: Tensor, transform: Transform) -> Unresized | None:
        """The picture as it is; None where it is better resized here."""
        filter_, (vertical, horizontal) = transform.interpolation, transform.axes(*image.shape[-2:])
        if (vertical.before, horizontal.before) == (vertical.after, horizontal.after):
            return None
        pixels = image[:, vertical.read(filter_), horizontal.read(filter_)]
        size = 1 << (pixels.nbytes - 1).bit_length()  # as torch takes pinned memory, by powers of two
        if (
            not suits(vertical, horizontal, filter_)
            or pixels.nbytes > 3 * UNRESIZED_PIXELS
            or not self._room.take(size)
        ):
            return None
        picture = Unresized(_pinned(pixels), vertical, horizontal)
        weakref.finalize(picture, self._room.give_back, size)
        return picture


class _Room:
    """So many bytes, taken and given back by any thread."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._given_back: deque[int] = deque()  # an object may be gone at any moment, also while the lock is held
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether there was room."""
        with self._lock:
            while self._given_back:
                self._left += self._given_back.popleft()
            if size > self._left:
                return False
            self._left -= size
            return True

    def give_back(self, size: int) -> None:
        self._given_back.append(size)


def _is_exact(device: torch.device) -> bool:
    with torch.inference_mode(), tf32(False):
        return is_exact(device)


def _pinned(picture: Tensor) -> Tensor:
    """A copy that a GPU can copy from while the cores go on, channels last in memory."""
    channels, height, width = picture.shape
    host = torch.empty((height, width, channels), dtype=picture.dtype, pin_memory=True).permute(2, 0, 1)
    return host.copy_(picture)
