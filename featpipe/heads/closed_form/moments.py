"""First and second moments of rows, from which closed-form heads are solved exactly, in one pass over the rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featpipe.runtime import BlasThreadPool, convert_float

Array = NDArray[np.float64]

DIAGONAL_BLOCK_ELEMENTS = 1 << 20  # so that consecutive operations find a block in a core's cache
GRAM_BLOCK_ELEMENTS = 1 << 22  # larger, because each block costs a d × d product
SHIFT_SAMPLE_ROWS = 1000
MIN_ROWS_PER_CLASS_SUM, ROWS_PER_CLASS_SUM = 1024, 128


class RowSource(Protocol):
    """Rows that need not fit into memory: a memory map, or a view of rows of a cache."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, rows: slice) -> NDArray[Any]: ...


def read_rows_into(source: RowSource, out: NDArray[Any], rows: slice) -> None:
    """Read rows into an array of the stored type."""
    if hasattr(source, "read_into"):
        source.read_into(out, rows)
    else:
        out[...] = source[rows]


def iter_row_blocks(source: RowSource, block_elements: int) -> Iterator[slice]:
    """Consecutive slices of rows with about ``block_elements`` values each."""
    n, d = source.shape
    block_rows = max(1, block_elements // max(1, d))
    return (slice(start, min(n, start + block_rows)) for start in range(0, n, block_rows))


@dataclass(frozen=True, eq=False)
class Moments:
    """Weighted sums over n rows x of width d and their targets y of width t, with x measured from ``shift``.

    Moments of two sets of rows with the same shift can be added.

    Attributes
    ----------
    rows : int
    weight : float
        Σ w
    x : ndarray of shape (d,)
        Σ w (x - shift)
    gram : ndarray of shape (d, d) or (d,)
        Σ w (x - shift)(x - shift)ᵀ, or only its diagonal
    y : ndarray of shape (t,)
        Σ w y
    cross : ndarray of shape (d, t)
        Σ w (x - shift) yᵀ
    shift : ndarray of shape (d,)
        Near the mean, to avoid cancellation.
    unweighted_sum, unweighted_square_sum : ndarray of shape (d,)
        Σ (x - shift) and Σ (x - shift)² without weights, for the scaler, which ignores weights.
    """

    rows: int
    weight: float
    x: Array
    gram: Array
    y: Array
    cross: Array
    shift: Array
    unweighted_sum: Array
    unweighted_square_sum: Array

    @property
    def mean(self) -> Array:
        """Unweighted mean of the rows, shape (d,)."""
        return self.shift + self.unweighted_sum / self.rows

    @property
    def variance(self) -> Array:
        """Unweighted variance of each column, shape (d,)."""
        return np.maximum(self.unweighted_square_sum / self.rows - (self.unweighted_sum / self.rows) ** 2, 0.0)

    def __add__(self, other: Moments) -> Moments:
        if not np.array_equal(self.shift, other.shift):
            raise ValueError("moments with different shifts cannot be added; compute both with the same shift")
        sums = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "shift"}
        return replace(self, **sums)

    def standardize(self, center: Array, scale: Array) -> Moments:
        """The moments of (x - center) / scale, with shift 0."""
        offset = self.shift - center  # x - center = (x - shift) + offset
        x = self.x + self.weight * offset
        if self.gram.ndim == 2:
            gram = self.gram + np.outer(self.x, offset) + np.outer(offset, x)
            gram = gram / scale / scale[:, None]
        else:
            gram = (self.gram + self.x * offset + offset * x) / scale**2
        cross = (self.cross + np.outer(offset, self.y)) / scale[:, None]
        unweighted_sum = self.unweighted_sum + self.rows * offset
        unweighted_square_sum = (
            self.unweighted_square_sum + self.unweighted_sum * offset + offset * unweighted_sum
        ) / scale**2
        zero_shift = np.zeros_like(center)
        return Moments(
            self.rows,
            self.weight,
            x / scale,
            gram,
            self.y,
            cross,
            zero_shift,
            unweighted_sum / scale,
            unweighted_square_sum,
        )


def compute_moments(
    source: RowSource,
    targets: NDArray[Any],
    weights: Array | None = None,
    *,
    full_gram: bool = True,
    n_classes: int | None = None,
    shift: Array | None = None,
) -> Moments:
    """Compute moments in one pass over the rows, on all threads that BLAS may use.

    Parameters
    ----------
    source : RowSource of shape (n, d)
    targets : ndarray of shape (n, t), or (n,) with ``n_classes``
        Numbers; or class codes, which stand for ``n_classes`` columns of 0 and 1.
    weights : ndarray of shape (n,), optional
    full_gram : bool
        Compute the whole Gram matrix, or only its diagonal.
    n_classes : int, optional
    shift : ndarray of shape (d,), optional
        The shift of moments that these will be added to; by default the mean of the first rows.

    Raises
    ------
    ValueError
        If X contains NaN or infinity.
    """
    n, d = source.shape
    # Products of float16 values are exact in float32; sums over blocks are always in float64.
    dtype = np.float32 if source.dtype == np.float16 else np.float64
    if shift is None:
        shift = np.asarray(source[: min(n, SHIFT_SAMPLE_ROWS)], np.float64).mean(axis=0).astype(dtype)
    elif not np.array_equal(shift, shift.astype(dtype)):
        dtype = np.float64  # float32 would round the shift

    row_blocks = list(iter_row_blocks(source, GRAM_BLOCK_ELEMENTS if full_gram else DIAGONAL_BLOCK_ELEMENTS))
    read_buffers = _ReadBuffers(source, dtype, row_blocks[0].stop)

    def compute_block_moments(rows: slice) -> Moments:
        x = read_buffers.read(rows)
        x -= shift
        squares = np.einsum("ij,ij->j", x, x)
        block_weights = np.ones(len(x), dtype) if weights is None else weights[rows].astype(dtype)
        if n_classes is not None:
            target_sum, cross = _sum_by_class(x, targets[rows], block_weights, n_classes)
        else:
            weighted_targets: NDArray[Any] = targets[rows].astype(x.dtype) * block_weights[:, None]
            target_sum, cross = weighted_targets.sum(axis=0), x.T @ weighted_targets
        unweighted_sum = weighted_sum = x.T @ block_weights
        if weights is not None:
            unweighted_sum = x.T @ np.ones_like(block_weights)
            x *= np.sqrt(block_weights)[:, None]
        gram = x.T @ x if full_gram else squares if weights is None else np.einsum("ij,ij->j", x, x)
        weight = float(block_weights.sum(dtype=np.float64))
        sums = (weighted_sum, gram, target_sum, cross, shift, unweighted_sum, squares)
        return Moments(len(x), weight, *(array.astype(np.float64, copy=False) for array in sums))

    total_moments: Moments | None = None
    with BlasThreadPool(float(n) * d * d) as workers:
        for block_moments in workers.map(compute_block_moments, row_blocks):
            total_moments = block_moments if total_moments is None else total_moments + block_moments
    assert total_moments is not None
    if not np.isfinite(total_moments.unweighted_square_sum).all():
        raise ValueError("Input X contains NaN or infinity")
    return total_moments


class _ReadBuffers(threading.local):
    """Read buffers of each thread, reused because the system has to zero newly allocated memory."""

    def __init__(self, source: RowSource, dtype: Any, rows: int) -> None:
        self.source = source
        self.stored_buffer, self.float_buffer = (
            np.empty((rows, source.shape[1]), buffer_dtype) for buffer_dtype in (source.dtype, dtype)
        )

    def read(self, rows: slice) -> NDArray[Any]:
        """Rows as floats in a buffer that the caller may modify and the next call overwrites."""
        stored_rows, float_rows = (
            buffer[: rows.stop - rows.start] for buffer in (self.stored_buffer, self.float_buffer)
        )
        read_rows_into(self.source, stored_rows, rows)
        return convert_float(stored_rows, float_rows.dtype, float_rows)


def _sum_by_class(x: NDArray[Any], codes: NDArray[Any], weights: NDArray[Any], n_classes: int) -> tuple[Array, Array]:
    """Σ w y and Σ w x yᵀ for class codes: the weighted sum of the rows of each class.

    A sparse product costs the same for any number of classes. Blocks are short enough that float32 sums stay accurate.
    """
    from scipy.sparse import csc_array

    cross = np.zeros((n_classes, x.shape[1]))
    block_rows = max(MIN_ROWS_PER_CLASS_SUM, ROWS_PER_CLASS_SUM * n_classes)
    for start in range(0, len(x), block_rows):
        block = slice(start, start + block_rows)
        class_indicators = csc_array(
            (weights[block], codes[block], np.arange(len(weights[block]) + 1)), shape=(n_classes, len(weights[block]))
        )
        cross += class_indicators @ x[block]
    return np.bincount(codes, weights, n_classes).astype(np.float64), cross.T
