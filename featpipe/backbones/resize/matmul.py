"""Resizing and cropping many images at once by products of matrices, on any device: Pillow's bits.

The formula is that of :mod:`featpipe.backbones.resize.embedding_bag`, a pass along the rows and one along the columns::

    result = clip((sum(weight * level) + 2**21) >> 22, 0, 255)

A pass is a product of matrices here, one of weights, most of which are 0, and one of levels. It is computed in float32,
which holds whole numbers up to 2²⁴. So each weight is split, ``weight = 2048 * high + low`` with ``low`` from -1024 to
1023, and both sums are of whole numbers that stay below that whatever the order in which they are added up:

- the terms of ``sum(low * level)`` are at most 64 · 1024 · 255 < 2²⁴ together, for 64 taps;
- those of ``sum(high * level)`` are at most 255 · (2²³ / 2048 + 64 / 2) < 2²¹ together: the weights add up to 2²², and
  without their signs to less than 2²³, as the negative ones are much the smaller part; rounding adds a half each.

The rest is done in whole numbers of 32 bits: 255 · 2²³ + 2²¹ < 2³¹.

Notes
-----
A product is exact as long as nothing is rounded to fewer bits before it: TF32, a setting of the whole process, must be
off. That is the caller's to see to. Whether a device then gives Pillow's bits is tried (:func:`is_exact`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from featpipe.backbones.resize.embedding_bag import EXACTNESS_TEST_SIZES, ResizeAxis, is_rows_first, matches_pillow

__all__ = [
    "MATMUL_MAX_TAPS",
    "ImageBatch",
    "MatmulResizer",
    "PreparedImage",
    "UnresizedImage",
    "is_exact",
    "is_supported",
    "max_resize_batch",
]

MATMUL_MAX_TAPS = 64
"""Neighbours in one sum, for which it is exact."""

MAX_CACHED_MATRIX_BYTES = 2**28  # of matrices that are kept: some 300 of those that make 224 pixels of 500, 900 kB each
MAX_TENSOR_VALUES = 2**24  # in the largest tensor of a product, some four of which are there at a time
LOW_PART_SIZE = 2048  # as many values has the low part of a weight
SHRINK_TEST_SIZES = ((4, 5), (90, 5))  # tried also, bilinear: sums of some 50 taps


@dataclass(frozen=True, eq=False)
class UnresizedImage:
    """An image that is yet to be resized and cropped.

    Attributes
    ----------
    pixels : Tensor of shape (3, H, W), uint8
        The rows and columns that count for anything, as :meth:`ResizeAxis.source_slice` has them; channels last in memory.
    vertical, horizontal : ResizeAxis
    """

    pixels: Tensor
    vertical: ResizeAxis
    horizontal: ResizeAxis


PreparedImage = Tensor | UnresizedImage
"""As the network is to see it, but for the arithmetic; or yet to be resized."""

ImageBatch = Tensor | Sequence[PreparedImage]
"""Some images: one tensor (b, 3, h, w), or for a GPU each by itself."""


def is_supported(vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> bool:
    """Whether few enough neighbours are added up, and Pillow of any version goes along the rows first."""
    has_few_taps = max(vertical.taps(filter_), horizontal.taps(filter_)) <= MATMUL_MAX_TAPS
    return has_few_taps and is_rows_first(vertical, horizontal)


def max_resize_batch(vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> int:
    """How many images may be resized in one product, so that it takes some 300 MB at most; one may always."""
    height, width = (_slice_length(axis.source_slice(filter_)) for axis in (vertical, horizontal))
    largest = max(height * max(width, 2 * horizontal.crop_length), 2 * vertical.crop_length * horizontal.crop_length)
    return max(1, MAX_TENSOR_VALUES // (3 * largest))


class MatmulResizer:
    """Resizes on one device, and keeps the matrices that it used last.

    Parameters
    ----------
    device : torch.device

    Notes
    -----
    For one thread; and on CUDA for one stream, on which alone its matrices are in order.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._matrices: OrderedDict[tuple[ResizeAxis, str], Tensor] = OrderedDict()
        self._cached_bytes = 0

    def resize(self, pixels: Tensor, vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> Tensor:
        """Resize some images of one size, and crop them.

        Parameters
        ----------
        pixels : Tensor of shape (b, 3, H, W), uint8
            On the device, in any memory layout; as those of :class:`UnresizedImage`.
        vertical, horizontal : ResizeAxis
        filter_ : {"bilinear", "bicubic"}

        Returns
        -------
        Tensor of shape (b, 3, h, w), uint8

        Raises
        ------
        ValueError
            If they are not what :func:`is_supported` says.
        """
        if not is_supported(vertical, horizontal, filter_):
            raise ValueError(f"{vertical} and {horizontal}, {filter_}: not exact as products; expected what suits them")
        levels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        levels = _round_to_levels(levels @ self._get_matrix(horizontal, filter_).T, -1)
        levels = _round_to_levels(self._get_matrix(vertical, filter_) @ levels.to(torch.float32), -2)
        return levels.to(torch.uint8)

    def _get_matrix(self, axis: ResizeAxis, filter_: str) -> Tensor:
        """The high parts of an axis's weights, and below them the low ones: of shape (2 * length, read), float32."""
        matrix = self._matrices.pop((axis, filter_), None)
        if matrix is None:
            matrix = _make_matrix(axis, filter_, self.device)
            self._cached_bytes += matrix.nbytes
        self._matrices[axis, filter_] = matrix
        while self._cached_bytes > MAX_CACHED_MATRIX_BYTES and len(self._matrices) > 1:
            self._cached_bytes -= self._matrices.popitem(last=False)[1].nbytes
        return matrix


def _make_matrix(axis: ResizeAxis, filter_: str, device: torch.device) -> Tensor:
    source_slice, weights = axis.source_slice(filter_), axis.tap_weights(filter_)
    columns = axis.first_taps(filter_)[:, None] - source_slice.start + np.arange(axis.taps(filter_))
    low = (weights + LOW_PART_SIZE // 2) % LOW_PART_SIZE - LOW_PART_SIZE // 2
    parts = np.stack([(weights - low) // LOW_PART_SIZE, low]).astype(np.float32)
    device_arrays = [
        torch.from_numpy(value).to(device, non_blocking=True) for value in (columns, parts)
    ]  # few: taps alone
    matrix = torch.zeros((2, axis.crop_length, _slice_length(source_slice)), device=device)
    return matrix.scatter_(2, device_arrays[0].expand(2, -1, -1), device_arrays[1]).flatten(0, 1)


def _round_to_levels(sums: Tensor, dim: int) -> Tensor:
    """From the sums of both parts, one after the other along an axis, to levels, int32."""
    high, low = sums.to(torch.int32).chunk(2, dim)
    return (high * LOW_PART_SIZE + low).add_(1 << 21).bitwise_right_shift_(22).clamp_(0, 255)


def _slice_length(source_slice: slice) -> int:
    return int(source_slice.stop - source_slice.start)


@cache
def is_exact(device: torch.device) -> bool:
    """Whether products on this device give the bits of the Pillow that is installed, tried once in a process."""
    resizer = MatmulResizer(device)

    def resize(image: Tensor, vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> Tensor:
        source_pixels = image[:, vertical.source_slice(filter_), horizontal.source_slice(filter_)].to(device)
        return resizer.resize(source_pixels.expand(16, -1, -1, -1), vertical, horizontal, filter_)[-1]

    try:
        return matches_pillow(resize, EXACTNESS_TEST_SIZES) and matches_pillow(resize, SHRINK_TEST_SIZES, ["bilinear"])
    except RuntimeError:  # a device without one of the operations, or without memory
        return False
