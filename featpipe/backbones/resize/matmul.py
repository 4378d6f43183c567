"""Resize and crop a batch of images by matrix products on any device, bit-identical to Pillow.

The formula is that of :mod:`featpipe.backbones.resize.embedding_bag`, for a pass along the rows and one along the
columns::

    result = clip((sum(weight * level) + 2**21) >> 22, 0, 255)

A pass is the product of a weight matrix, most of whose entries are 0, and a matrix of levels. It is computed in
float32, which represents integers up to 2²⁴ exactly. Each weight is split, ``weight = 2048 * high + low`` with ``low``
from -1024 to 1023, so that both sums stay below this bound in any order of summation:

- The terms of ``sum(low * level)`` total at most 64 · 1024 · 255 < 2²⁴, for 64 taps.
- The terms of ``sum(high * level)`` total at most 255 · (2²³ / 2048 + 64 / 2) < 2²¹: the weights add up to 2²² and
  their absolute values to less than 2²³, because the negative weights are much smaller; rounding adds at most 1/2 each.

The remaining steps use 32-bit integers: 255 · 2²³ + 2²¹ < 2³¹.

Notes
-----
A product is exact only if its inputs are not rounded to fewer bits. The caller must disable TF32, which is a setting of
the whole process. :func:`is_exact` checks whether a device then gives Pillow's bits.
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

MATMUL_MAX_TAPS = 64
"""Maximum number of taps for which the sum is exact."""

MAX_CACHED_MATRIX_BYTES = 2**28  # cached weight matrices: about 300 of those that resize 500 to 224 pixels, 900 kB each
MAX_TENSOR_VALUES = 2**24  # in the largest tensor of a product; about four such tensors exist at a time
LOW_PART_SIZE = 2048  # number of values of the low part of a weight
SHRINK_TEST_SIZES = ((4, 5), (90, 5))  # also tested, bilinear: sums of about 50 taps


@dataclass(frozen=True, eq=False)
class UnresizedImage:
    """An image that the device will resize and crop.

    Attributes
    ----------
    pixels : Tensor of shape (3, H, W), uint8
        The rows and columns of :meth:`ResizeAxis.source_slice`; channels last in memory.
    vertical, horizontal : ResizeAxis
    """

    pixels: Tensor
    vertical: ResizeAxis
    horizontal: ResizeAxis


PreparedImage = Tensor | UnresizedImage
"""An image after resizing and cropping but before normalisation, or an image that the device will resize."""

ImageBatch = Tensor | Sequence[PreparedImage]
"""A batch of images: one tensor (b, 3, h, w), or for a GPU a sequence of single images."""


def is_supported(vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> bool:
    """Whether the number of taps is small enough, and every version of Pillow resizes along the rows first."""
    has_few_taps = max(vertical.taps(filter_), horizontal.taps(filter_)) <= MATMUL_MAX_TAPS
    return has_few_taps and is_rows_first(vertical, horizontal)


def max_resize_batch(vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> int:
    """Number of images to resize in one product, so that it needs at most about 300 MB; at least 1."""
    height, width = (_slice_length(axis.source_slice(filter_)) for axis in (vertical, horizontal))
    largest = max(height * max(width, 2 * horizontal.crop_length), 2 * vertical.crop_length * horizontal.crop_length)
    return max(1, MAX_TENSOR_VALUES // (3 * largest))


class MatmulResizer:
    """Resizes on one device, and caches the most recently used weight matrices.

    Parameters
    ----------
    device : torch.device

    Notes
    -----
    Not thread-safe. On CUDA use it from a single stream: the cached matrices are ordered only on that stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._matrices: OrderedDict[tuple[ResizeAxis, str], Tensor] = OrderedDict()
        self._cached_bytes = 0

    def resize(self, pixels: Tensor, vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> Tensor:
        """Resize and crop images of the same size.

        Parameters
        ----------
        pixels : Tensor of shape (b, 3, H, W), uint8
            On the device, in any memory layout; stacked ``pixels`` of :class:`UnresizedImage`.
        vertical, horizontal : ResizeAxis
        filter_ : {"bilinear", "bicubic"}

        Returns
        -------
        Tensor of shape (b, 3, h, w), uint8

        Raises
        ------
        ValueError
            If :func:`is_supported` is false for the axes.
        """
        if not is_supported(vertical, horizontal, filter_):
            raise ValueError(
                f"{vertical} and {horizontal}, {filter_}: not exact as matrix products; "
                "expected axes for which is_supported is true"
            )
        levels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        levels = _round_to_levels(levels @ self._get_matrix(horizontal, filter_).T, -1)
        levels = _round_to_levels(self._get_matrix(vertical, filter_) @ levels.to(torch.float32), -2)
        return levels.to(torch.uint8)

    def _get_matrix(self, axis: ResizeAxis, filter_: str) -> Tensor:
        """The high parts of an axis's weights above the low parts, shape (2 * crop_length, source length), float32."""
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
    # Only the taps are copied; the matrix is filled on the device.
    device_arrays = [torch.from_numpy(value).to(device, non_blocking=True) for value in (columns, parts)]
    matrix = torch.zeros((2, axis.crop_length, _slice_length(source_slice)), device=device)
    return matrix.scatter_(2, device_arrays[0].expand(2, -1, -1), device_arrays[1]).flatten(0, 1)


def _round_to_levels(sums: Tensor, dim: int) -> Tensor:
    """Combine the sums of the high and low parts, concatenated along an axis, to levels, int32."""
    high, low = sums.to(torch.int32).chunk(2, dim)
    return (high * LOW_PART_SIZE + low).add_(1 << 21).bitwise_right_shift_(22).clamp_(0, 255)


def _slice_length(source_slice: slice) -> int:
    return int(source_slice.stop - source_slice.start)


@cache
def is_exact(device: torch.device) -> bool:
    """Whether resizing on this device is bit-identical to the installed Pillow; checked once per process."""
    resizer = MatmulResizer(device)

    def resize(image: Tensor, vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> Tensor:
        source_pixels = image[:, vertical.source_slice(filter_), horizontal.source_slice(filter_)].to(device)
        return resizer.resize(source_pixels.expand(16, -1, -1, -1), vertical, horizontal, filter_)[-1]

    try:
        return matches_pillow(resize, EXACTNESS_TEST_SIZES) and matches_pillow(resize, SHRINK_TEST_SIZES, ["bilinear"])
    except RuntimeError:  # the device lacks an operation or memory
        return False
