"""Resizing and cropping an image at once: Pillow's bits, in less than half its time.

Pillow resizes 8-bit images in two passes, along the rows and then along the columns. Each gives whole levels::

    result = clip((sum(weight * level) + 2**21) >> 22, 0, 255)

with weights that are whole numbers in units of 2⁻²² and level the neighbours on that axis. So every number of a pass
stands alone, and what a crop leaves out need not be computed. The weights are not computed here but read off Pillow
(:func:`featpipe.data.compute_resize_weights`).

A pass is a sparse matrix times a dense one, which torch has as the embedding bag: the result is sums of some rows of a
table of bytes, weighted, one after the other. They are added in float32, whose 24 bits such a sum exceeds by six, in an
order in which nothing that counts is lost. Each weight is split, ``weight = 512 * high + low`` with ``low`` from -256
to 255, and all is said in levels, of which 2⁻¹³ are one unit of ``high``:

1. the sum of ``low * level``, whose fraction of a unit has 9 bits, less 255/1024 of a unit: exact for 128 taps;
2. plus 514.5 levels: between 512 and 1024 float32 has steps of half a unit, so that what had a fraction f, and has
   f - 255/1024 now, gets 0 or 1/2. This is the one step that rounds, and it does so into the same unit;
3. plus the sum of ``high * level``, all whole units, up to 1024 levels: exact;
4. less 514 levels: exact.

That is half a level and the sum rounded down to a unit, or half a unit more: clipped and rounded down, as floors of
floors, the result of the formula.

Notes
-----
The arithmetic is that of ``ImagingResample`` in Pillow's ``libImaging/Resample.c``. A build of Pillow that does it
otherwise is noticed (:func:`is_exact`) and then used itself, as Pillow is for an image that shrinks more than 32 times
(bicubic; 64 times bilinear) or whose height loses more than twice as many pixels as its width.
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

__all__ = [
    "EMBEDDING_BAG_MAX_TAPS",
    "FILTER_SUPPORT",
    "ResizeAxis",
    "is_exact",
    "is_rows_first",
    "matches_pillow",
    "resize",
]

EMBEDDING_BAG_MAX_TAPS = 128
"""Neighbours in one sum, for which it is exact."""

EXACTNESS_TEST_SIZES = ((47, 64), (41, 103), (96, 30), (120, 140), (300, 260))
"""Heights and widths to which an image of 97 × 131 is resized, to see whether that is exact."""

MAX_STRIP_VALUES = 1 << 19  # of an image at a time, so that memory is bounded
FILTER_SUPPORT = {"bilinear": 1, "bicubic": 2}  # of the filters, in pixels
HIGH_PART_UNIT = 2.0**-13  # levels
OFFSETS_BEFORE_HIGH, OFFSET_AFTER_HIGH = (-255 / 1024 * HIGH_PART_UNIT, 514.5), -514.0
UNIT_SCALE_ZERO_OFFSET = np.array([1, 0], np.float32).view(
    np.uint8
)  # a scale and an offset, which a table has in each row
COLUMN_MULTIPLE = 16  # a table's columns are a multiple of it: code is made for each width, and is quickest so
TRANSPOSED_ROWS = 256  # rows of an image that are turned into columns at a time, with all of their cache lines at hand


@dataclass(frozen=True)
class ResizeAxis:
    """One side of an image that is resized and then cropped.

    Attributes
    ----------
    source_size, resized_size : int
        Pixels.
    crop_start, crop_length : int
        Which of the pixels after resizing are kept.
    """

    source_size: int
    resized_size: int
    crop_start: int
    crop_length: int

    @property
    def crop_slice(self) -> slice:
        return slice(self.crop_start, self.crop_start + self.crop_length)

    def taps(self, filter_: str) -> int:
        """How many pixels count for one."""
        return min(self.source_size, math.ceil(2 * self._scaled_support(filter_)))

    def first_taps(self, filter_: str) -> NDArray[np.int64]:
        """The first pixel that counts for each of those that are kept."""
        centers = (np.arange(self.crop_slice.start, self.crop_slice.stop) + 0.5) * (
            self.source_size / self.resized_size
        )
        first_pixels = np.floor(centers - self._scaled_support(filter_) + 0.5).astype(np.int64)
        return first_pixels.clip(0, self.source_size - self.taps(filter_))

    def source_slice(self, filter_: str) -> slice:
        """The pixels that count for anything."""
        return _source_slice(self, filter_)

    def tap_weights(self, filter_: str) -> NDArray[np.int32]:
        """How much each of its taps counts for each pixel that is kept, in units of 2⁻²², of shape (length, taps)."""
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
    """What a pass adds up.

    Attributes
    ----------
    source_slice : slice
        The pixels that count for anything.
    table_rows : Tensor of shape (n * terms,), int32
        Of the table, counted from the first of ``read``; the last one is ones.
    weights : Tensor of shape (n * terms,), float32
    offsets : Tensor of shape (n + 1,), int32
        Where the terms of each sum begin and end.
    """

    source_slice: slice
    table_rows: Tensor
    weights: Tensor
    offsets: Tensor

    def apply(self, columns: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Levels of shape (m, rows) → levels of shape (n, m)."""
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
    """The columns as rows, and a row of ones."""
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
    """Resize an image and crop it.

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
    """Whether the sums give the bits of the Pillow that is installed, tried once in a process."""
    try:
        return matches_pillow(_resize_by_embedding_bag)
    except (AttributeError, RuntimeError):  # a torch without that operator, or built without what computes it
        return False


def matches_pillow(
    resize_function: ResizeFunction,
    sizes: Iterable[tuple[int, int]] = EXACTNESS_TEST_SIZES,
    filters: Iterable[str] = tuple(FILTER_SUPPORT),
) -> bool:
    """Whether a way of resizing gives the bits of the Pillow that is installed, on a hard image of 97 × 131.

    Parameters
    ----------
    resize_function : callable
        As :func:`resize`; its results may be on any device.
    sizes : iterable of (int, int)
        Heights and widths to try.
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
    """Whether Pillow of any version goes along the rows first.

    Since 13.0 it begins with the columns where the height loses more than twice as many pixels as the width.
    """
    height_loss, width_loss = (
        vertical.source_size - vertical.resized_size,
        horizontal.source_size - horizontal.resized_size,
    )
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


@lru_cache(64)  # some 100 kB each for a photograph of 500 pixels, 1.4 MB at most for a crop of 224
def _make_resize_pass(axis: ResizeAxis, filter_: str, channels: int) -> _ResizePass:
    """The sums along one axis, where each pixel is a number of neighbouring channels."""
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
