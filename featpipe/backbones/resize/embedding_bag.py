"""Resize and crop an image in one step, bit-identical to Pillow, in less than half the time.

Pillow resizes 8-bit images in two passes, along the rows and then along the columns. Each pass gives integer levels::

    result = clip((sum(weight * level) + 2**21) >> 22, 0, 255)

where the weights are integers in units of 2⁻²² and the levels are the neighbours on that axis. The values of a pass are
independent of each other, so that values outside the crop need not be computed. The weights are taken from Pillow
(:func:`featpipe.data.compute_resize_weights`).

A pass is the product of a sparse and a dense matrix, which torch implements as the embedding bag: each result is a
weighted sum of rows of a byte table, added sequentially. The sums are computed in float32. An exact sum needs six bits
more than the 24 bits of float32, so the terms are added in an order that loses no significant bit. Each weight is
split, ``weight = 512 * high + low`` with ``low`` from -256 to 255. In the following, numbers are in levels, and one
unit is 2⁻¹³ levels, the unit of ``high``:

1. Sum ``low * level``, whose fraction of a unit has 9 bits, and subtract 255/1024 of a unit: exact for 128 taps.
2. Add 514.5 levels. Between 512 and 1024 the step of float32 is half a unit, so that a fraction f, now f - 255/1024,
   is rounded to 0 or 1/2. This is the only step that rounds, and it stays within the same unit.
3. Add the sum of ``high * level``, which is an integer number of units, up to 1024 levels: exact.
4. Subtract 514 levels: exact.

The result is half a level plus the sum, rounded down to a unit or half a unit more. Clipping it and rounding it down
gives the result of the formula, because nested floors equal a single floor.

Notes
-----
The arithmetic is that of ``ImagingResample`` in Pillow's ``libImaging/Resample.c``. :func:`is_exact` detects a build of
Pillow that computes otherwise; Pillow is then used instead. Pillow is also used for an image that shrinks more than 32
times (bicubic; 64 times bilinear) or whose height loses more than twice as many pixels as its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe.data import compute_resize_weights, resize_image

EMBEDDING_BAG_MAX_TAPS = 128
"""Maximum number of taps for which the sum is exact."""

EXACTNESS_TEST_SIZES = ((47, 64), (41, 103), (96, 30), (120, 140), (300, 260))
"""Heights and widths to which the exactness check resizes an image of 97 × 131 pixels."""

MAX_STRIP_VALUES = 1 << 19  # values of an image that are processed at a time, to bound memory
FILTER_SUPPORT = {"bilinear": 1, "bicubic": 2}  # radius of the filters in pixels
HIGH_PART_UNIT = 2.0**-13  # levels
OFFSETS_BEFORE_HIGH, OFFSET_AFTER_HIGH = (-255 / 1024 * HIGH_PART_UNIT, 514.5), -514.0
# The scale and the offset that each row of a byte table ends with.
UNIT_SCALE_ZERO_OFFSET = np.array([1, 0], np.float32).view(np.uint8)
COLUMN_MULTIPLE = 16  # tables are padded to a multiple of it: fbgemm's code for these widths is the fastest
TRANSPOSED_ROWS = 256  # rows of an image that are transposed at a time, so that their cache lines stay in cache


@dataclass(frozen=True)
class ResizeAxis:
    """One axis of an image that is resized and then cropped.

    Attributes
    ----------
    source_size, resized_size : int
        Pixels before and after resizing.
    crop_start, crop_length : int
        Position and length of the crop, in pixels after resizing.
    """

    source_size: int
    resized_size: int
    crop_start: int
    crop_length: int

    @property
    def crop_slice(self) -> slice:
        return slice(self.crop_start, self.crop_start + self.crop_length)

    def taps(self, filter_: str) -> int:
        """Number of source pixels that contribute to one output pixel."""
        return min(self.source_size, math.ceil(2 * self._scaled_support(filter_)))

    def first_taps(self, filter_: str) -> NDArray[np.int64]:
        """For each output pixel, the first source pixel that contributes to it."""
        centers = (np.arange(self.crop_slice.start, self.crop_slice.stop) + 0.5) * (
            self.source_size / self.resized_size
        )
        first_pixels = np.floor(centers - self._scaled_support(filter_) + 0.5).astype(np.int64)
        return first_pixels.clip(0, self.source_size - self.taps(filter_))

    def source_slice(self, filter_: str) -> slice:
        """The range of source pixels that contribute to the crop."""
        return _source_slice(self, filter_)

    def tap_weights(self, filter_: str) -> NDArray[np.int32]:
        """The filter weights of each output pixel in units of 2⁻²², shape (crop_length, taps)."""
        taps = self.taps(filter_)
        pixels = self.first_taps(filter_)[:, None] + np.arange(taps)
        weights = compute_resize_weights(self.source_size, self.resized_size, filter_, taps)[:, self.crop_slice]
        return weights[pixels % taps, np.arange(self.crop_length)[:, None]]

    def _scaled_support(self, filter_: str) -> float:
        return FILTER_SUPPORT[filter_] * max(1.0, self.source_size / self.resized_size)


ResizeFunction = Callable[[Tensor, ResizeAxis, ResizeAxis, str], Tensor]


@lru_cache(1024)
def _source_slice(axis: ResizeAxis, filter_: str) -> slice:
    first_taps = axis.first_taps(filter_)
    return slice(int(first_taps[0]), int(first_taps[-1]) + axis.taps(filter_))


@dataclass(frozen=True)
class _ResizePass:
    """The weighted sums of one pass, in the form of an embedding bag.

    Attributes
    ----------
    source_slice : slice
        The range of source pixels that contribute.
    table_rows : Tensor of shape (n * terms,), int32
        Rows of the table, counted from the start of ``source_slice``; the last row holds ones.
    weights : Tensor of shape (n * terms,), float32
    offsets : Tensor of shape (n + 1,), int32
        Start of the terms of each sum, and the end of the last one.
    """

    source_slice: slice
    table_rows: Tensor
    weights: Tensor
    offsets: Tensor

    def apply(self, columns: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Apply the pass: levels of shape (m, rows) → levels of shape (n, m)."""
        embedding_bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        sums = embedding_bag(
            _make_byte_table(columns),
            self.table_rows,
            self.offsets,
            per_sample_weights=self.weights,
            include_last_offset=True,
        )
        levels: NDArray[np.float32] = sums[:, : len(columns)].clamp_(0, 255).numpy()
        return levels.astype(np.uint8)


def _make_byte_table(columns: NDArray[np.uint8]) -> Tensor:
    """Make the byte table: the transposed columns, and a row of ones."""
    m, n = columns.shape
    padded_width = -(-m // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    table = np.empty((n + 1, padded_width + len(UNIT_SCALE_ZERO_OFFSET)), np.uint8)
    for start in range(0, m, TRANSPOSED_ROWS):
        stop = min(m, start + TRANSPOSED_ROWS)
        table[:n, start:stop] = columns[start:stop].T
    table[n] = 1
    table[:, padded_width:] = UNIT_SCALE_ZERO_OFFSET
    return torch.from_numpy(table)


def resize(image: Tensor, vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> Tensor:
    """Resize and crop an image.

    Parameters
    ----------
    image : Tensor of shape (3, H, W), uint8
        In any memory layout; channels last in memory is the fastest.
    vertical, horizontal : ResizeAxis
    filter_ : {"bilinear", "bicubic"}

    Returns
    -------
    Tensor of shape (3, h, w), uint8
        Channels last in memory.
    """
    if _is_supported(vertical, horizontal, filter_) and is_exact():
        return _resize_by_embedding_bag(image, vertical, horizontal, filter_)
    resized = resize_image(image.permute(1, 2, 0).numpy(), vertical.resized_size, horizontal.resized_size, filter_)
    return torch.from_numpy(resized[vertical.crop_slice, horizontal.crop_slice]).permute(2, 0, 1)


@cache
def is_exact() -> bool:
    """Whether the results are bit-identical to the installed Pillow; checked once per process."""
    try:
        return matches_pillow(_resize_by_embedding_bag)
    except (AttributeError, RuntimeError):  # a torch without the operator, or built without fbgemm
        return False


def matches_pillow(
    resize_function: ResizeFunction,
    sizes: Iterable[tuple[int, int]] = EXACTNESS_TEST_SIZES,
    filters: Iterable[str] = tuple(FILTER_SUPPORT),
) -> bool:
    """Whether a resize function is bit-identical to the installed Pillow, on a test image of 97 × 131 pixels.

    Parameters
    ----------
    resize_function : callable
        Signature of :func:`resize`; its results may be on any device.
    sizes : iterable of (int, int)
        Heights and widths to test.
    filters : iterable of {"bilinear", "bicubic"}
    """
    picture = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    picture[::2, ::2], picture[::3, 1::2] = 0, 255
    image, filters = torch.from_numpy(picture).permute(2, 0, 1), tuple(filters)
    return all(
        np.array_equal(
            resize_function(image, ResizeAxis(97, height, 0, height), ResizeAxis(131, width, 0, width), filter_)
            .permute(1, 2, 0)
            .cpu(),
            resize_image(picture, height, width, filter_),
        )
        for height, width in sizes
        for filter_ in filters
    )


def is_rows_first(vertical: ResizeAxis, horizontal: ResizeAxis) -> bool:
    """Whether every version of Pillow resizes along the rows first.

    Since 13.0 Pillow begins with the columns if the height loses more than twice as many pixels as the width.
    """
    height_loss, width_loss = (axis.source_size - axis.resized_size for axis in (vertical, horizontal))
    return height_loss <= 0 or height_loss <= 2 * width_loss


def _is_supported(vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> bool:
    has_few_taps = max(vertical.taps(filter_), horizontal.taps(filter_)) <= EMBEDDING_BAG_MAX_TAPS
    return has_few_taps and is_rows_first(vertical, horizontal)


def _resize_by_embedding_bag(image: Tensor, vertical: ResizeAxis, horizontal: ResizeAxis, filter_: str) -> Tensor:
    horizontal_pass, vertical_pass = _make_resize_pass(horizontal, filter_, 3), _make_resize_pass(vertical, filter_, 1)
    pixels = image.permute(1, 2, 0).numpy()[vertical_pass.source_slice, horizontal_pass.source_slice]
    pixels = pixels.reshape(len(pixels), -1)
    step = max(1, MAX_STRIP_VALUES // pixels.shape[1])
    strips = [horizontal_pass.apply(pixels[top : top + step]) for top in range(0, len(pixels), step)]
    levels = vertical_pass.apply(strips[0] if len(strips) == 1 else np.concatenate(strips, axis=1))
    return torch.from_numpy(levels).view(vertical.crop_length, horizontal.crop_length, 3).permute(2, 0, 1)


@lru_cache(64)  # about 100 kB each for an image of 500 pixels, at most 1.4 MB for a crop of 224
def _make_resize_pass(axis: ResizeAxis, filter_: str, channels: int) -> _ResizePass:
    """Make the pass along one axis, for pixels of several interleaved channels."""
    source_slice, weights = axis.source_slice(filter_), axis.tap_weights(filter_)
    pixels = axis.first_taps(filter_)[:, None] - source_slice.start + np.arange(axis.taps(filter_))
    low = (weights + 256) % 512 - 256
    ones_column = np.ones((axis.crop_length, 1))
    offsets_before, offset_after = np.outer(ones_column, OFFSETS_BEFORE_HIGH), OFFSET_AFTER_HIGH * ones_column
    terms = np.concatenate([low * 2.0**-22, offsets_before, (weights - low) * 2.0**-22, offset_after], axis=1)
    ones_row = (source_slice.stop - source_slice.start) * channels
    rows = pixels[:, None] * channels + np.arange(channels)[:, None]
    ones_rows = np.full((*rows.shape[:2], 1), ones_row)
    table_rows = np.concatenate([rows, ones_rows, ones_rows, rows, ones_rows], axis=2)
    return _ResizePass(
        source_slice=source_slice,
        table_rows=torch.from_numpy(table_rows.astype(np.int32).ravel()),
        weights=torch.from_numpy(np.repeat(terms.astype(np.float32), channels, axis=0).ravel()),
        offsets=torch.arange(0, table_rows.size + 1, table_rows.shape[2], dtype=torch.int32),
    )
