"""Resizing and cropping a picture at once: Pillow's bits, in about half its time.

Pillow resizes 8-bit pictures in two passes, along the rows and then along the columns. Each gives whole levels::

    result = clip((sum(weight * level) + 2**21) >> 22, 0, 255)

with weights that are whole numbers in units of 2⁻²² and level the neighbours on that axis. So every number of a pass
stands alone, and what a crop leaves out need not be computed. The weights are not computed here but read off Pillow
(:func:`featpipe.image.resize_weights`).

A pass is a sparse matrix times a dense one, which torch has as the embedding bag: the result is sums of some rows of a
table, weighted. Its float32 has 24 bits and such a sum 30, so that each weight is split, ``weight = 256 * high + low``
with ``low`` from -128 to 127, and both sums stay below 2²⁴, where float32 is exact in any order:
``255 * (2**14 * 1.5 + taps / 2)`` and ``255 * 128 * taps``, for up to 512 taps. Then, as floors of floors,

    result = clip(floor((sum(high * level) + floor(sum(low * level) / 256)) / 2**14 + 1/2), 0, 255)

where again every step is exact.

Notes
-----
The arithmetic is that of ``ImagingResample`` in Pillow's ``libImaging/Resample.c``. A build of Pillow that does it
otherwise is noticed (:func:`is_exact`) and then used itself, as Pillow is for a picture that shrinks more than 32 times
(bicubic; 64 times bilinear) or whose height loses more than twice as many pixels as its width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from featpipe import image as pictures

__all__ = ["TAPS_MAX", "Axis", "is_exact", "resize"]

TAPS_MAX = 128
"""Neighbours in one sum. Exact up to 512; fewer keep the memory small that lies between the two passes."""

STRIP_VALUES = 1 << 19  # of a picture at a time, so that memory is bounded: 2 MB of float32
SUPPORT = {"bilinear": 1, "bicubic": 2}  # of the filters, in pixels


@dataclass(frozen=True)
class Axis:
    """One side of a picture that is resized and then cropped.

    Attributes
    ----------
    before, after : int
        Pixels.
    start, length : int
        Which of the pixels after resizing are kept.
    """

    before: int
    after: int
    start: int
    length: int

    @property
    def kept(self) -> slice:
        return slice(self.start, self.start + self.length)

    def taps(self, filter_: str) -> int:
        """How many pixels count for one."""
        return min(self.before, math.ceil(2 * self._support(filter_)))

    def first(self, filter_: str) -> NDArray[np.int64]:
        """The first pixel that counts for each of those that are kept."""
        centre = (np.arange(self.kept.start, self.kept.stop) + 0.5) * (self.before / self.after)
        first = np.floor(centre - self._support(filter_) + 0.5).astype(np.int64)
        return first.clip(0, self.before - self.taps(filter_))

    def _support(self, filter_: str) -> float:
        return SUPPORT[filter_] * max(1.0, self.before / self.after)


@dataclass(frozen=True)
class _Sums:
    """What a pass adds up.

    Attributes
    ----------
    read : slice
        The pixels that count for anything.
    rows : Tensor of shape (2 n, taps), int32
        Counted from the first of ``read``; n rows for the high parts, then the same for the low ones.
    weights : Tensor of shape (2 n, taps), float32
    """

    read: slice
    rows: Tensor
    weights: Tensor

    def of(self, table: Tensor) -> Tensor:
        """Levels of shape (rows, m), float32 → levels of shape (n, m), float32."""
        high, low = embedding_bag(self.rows, table, mode="sum", per_sample_weights=self.weights).chunk(2)
        return high.add_(low.floor_(), alpha=2.0**-14).add_(0.5).floor_().clamp_(0, 255)


def resize(image: Tensor, vertical: Axis, horizontal: Axis, filter_: str) -> Tensor:
    """Resize a picture and crop it.

    Parameters
    ----------
    image : Tensor of shape (3, H, W), uint8
        In any memory layout; channels last in memory is the fastest.
    vertical, horizontal : Axis
    filter_ : {"bilinear", "bicubic"}

    Returns
    -------
    Tensor of shape (3, h, w), uint8
        Channels last in memory.
    """
    if _is_summed(vertical, horizontal, filter_) and is_exact():
        return _resize(image, vertical, horizontal, filter_)
    resized = pictures.resize(image.permute(1, 2, 0).numpy(), vertical.after, horizontal.after, filter_)
    return torch.from_numpy(resized[vertical.kept, horizontal.kept]).permute(2, 0, 1)


@cache
def is_exact() -> bool:
    """Whether the sums give the bits of the Pillow that is installed, tried once in a process."""
    picture = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    picture[::2, ::2], picture[::3, 1::2] = 0, 255
    image = torch.from_numpy(picture).permute(2, 0, 1)
    return all(
        np.array_equal(
            _resize(image, Axis(97, height, 0, height), Axis(131, width, 0, width), filter_).permute(1, 2, 0).numpy(),
            pictures.resize(picture, height, width, filter_),
        )
        for height, width in ((47, 64), (41, 103), (96, 30), (120, 140))
        for filter_ in SUPPORT
    )


def _is_summed(vertical: Axis, horizontal: Axis, filter_: str) -> bool:
    """Whether few enough neighbours are added up, and Pillow of any version goes along the rows first.

    Since 13.0 it begins with the columns where the height loses more than twice as many pixels as the width.
    """
    lower, narrower = vertical.before - vertical.after, horizontal.before - horizontal.after
    few = max(vertical.taps(filter_), horizontal.taps(filter_)) <= TAPS_MAX
    return few and (lower <= 0 or lower <= 2 * narrower)


def _resize(image: Tensor, vertical: Axis, horizontal: Axis, filter_: str) -> Tensor:
    across, down = _sums(horizontal, filter_, 3), _sums(vertical, filter_, 1)
    picture = image.permute(1, 2, 0)[down.read, across.read].flatten(1)
    rows = torch.empty(len(picture), 3 * horizontal.length)
    step = max(1, STRIP_VALUES // picture.shape[1])
    for part, result in zip(picture.split(step), rows.split(step), strict=True):
        columns = torch.from_numpy(np.ascontiguousarray(part.numpy().T))  # torch takes twice as long for this
        result.copy_(across.of(columns.to(torch.float32)).t())
    levels = down.of(rows).numpy().astype(np.uint8)  # as for this
    return torch.from_numpy(levels).view(vertical.length, horizontal.length, 3).permute(2, 0, 1)


@lru_cache(64)  # some 100 kB each for a photograph of 500 pixels, 1.4 MB at most for a crop of 224
def _sums(axis: Axis, filter_: str, channels: int) -> _Sums:
    """The sums along one axis, where each pixel is a number of neighbouring channels."""
    taps, first = axis.taps(filter_), axis.first(filter_)
    start, stop = int(first[0]), int(first[-1]) + taps
    pixels = first[:, None] + np.arange(taps)
    weights = pictures.resize_weights(axis.before, axis.after, filter_, taps)[:, axis.kept]
    weights = weights[pixels % taps, np.arange(axis.length)[:, None]]
    low = (weights + 128) % 256 - 128
    parts = np.stack([(weights - low) * 2.0**-22, low * 2.0**-8]).astype(np.float32)
    rows = (pixels - start)[:, None] * channels + np.arange(channels)[:, None]
    return _Sums(
        read=slice(start, stop),
        rows=torch.from_numpy(np.tile(rows.reshape(-1, taps).astype(np.int32), (2, 1))),
        weights=torch.from_numpy(np.repeat(parts, channels, axis=1).reshape(-1, taps)),
    )
