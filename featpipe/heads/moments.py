"""Sums over rows from which closed-form heads are exact, however many rows there are and wherever they lie."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featpipe.heads.halves import as_float
from featpipe.workers import Workers

__all__ = ["Moments", "RowSource", "blocks", "moments", "read_into"]

Array = NDArray[np.float64]

NUMBERS_IN_A_BLOCK = 1 << 20  # that several operations in turn find in a core's cache
NUMBERS_FOR_A_GRAM = 1 << 22  # whose product is as large as a small block
SHIFT_ROWS = 1000
SUMMED_ROWS, SUMMED_ROWS_OF_A_CLASS = 1024, 128


class RowSource(Protocol):
    """Rows that need not fit into memory: a memory map, or a view of some rows of a cache."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, rows: slice) -> NDArray[Any]: ...


def read_into(source: RowSource, out: NDArray[Any], rows: slice) -> None:
    """Rows of a source to a place for them, of the type that is stored."""
    if hasattr(source, "read_into"):
        source.read_into(out, rows)
    else:
        out[...] = source[rows]


def blocks(source: RowSource, numbers: int) -> Iterator[slice]:
    """Runs of rows of about so many numbers, in order."""
    n, d = source.shape
    rows = max(1, numbers // max(1, d))
    return (slice(start, min(n, start + rows)) for start in range(0, n, rows))


@dataclass(frozen=True, eq=False)
class Moments:
    """Weighted sums over n rows x of width d and their targets y of width t, with x taken from ``shift``.

    Those of two sets of rows with one shift can be added.

    Attributes
    ----------
    rows : int
    weight : float
        Σ w
    x : ndarray of shape (d,)
        Σ w (x - shift)
    gram : ndarray of shape (d, d) or (d,)
        Σ w (x - shift)(x - shift)ᵀ, or its diagonal alone
    y : ndarray of shape (t,)
        Σ w y
    cross : ndarray of shape (d, t)
        Σ w (x - shift) yᵀ
    shift : ndarray of shape (d,)
        Near the mean, so that the differences of sums keep their digits.
    plain, squares : ndarray of shape (d,)
        Σ (x - shift) and Σ (x - shift)², without weights, as a scaler takes them.
    """

    rows: int
    weight: float
    x: Array
    gram: Array
    y: Array
    cross: Array
    shift: Array
    plain: Array
    squares: Array

    @property
    def mean(self) -> Array:
        """Of the rows, without weights, shape (d,)."""
        return self.shift + self.plain / self.rows

    @property
    def variance(self) -> Array:
        """Of each column, without weights, shape (d,)."""
        return np.maximum(self.squares / self.rows - (self.plain / self.rows) ** 2, 0.0)

    def __add__(self, other: Moments) -> Moments:
        if not np.array_equal(self.shift, other.shift):
            raise ValueError("moments of different shifts cannot be added")
        return Moments(
            self.rows + other.rows,
            self.weight + other.weight,
            self.x + other.x,
            self.gram + other.gram,
            self.y + other.y,
            self.cross + other.cross,
            self.shift,
            self.plain + other.plain,
            self.squares + other.squares,
        )

    def around(self, center: Array, scale: Array) -> Moments:
        """The moments of (x - center) / scale, with shift 0."""
        move = self.shift - center  # x - center = (x - shift) + move
        x = self.x + self.weight * move
        if self.gram.ndim == 2:
            gram = self.gram + np.outer(self.x, move) + np.outer(move, x)
            gram = gram / scale / scale[:, None]
        else:
            gram = (self.gram + self.x * move + move * x) / scale**2
        cross = (self.cross + np.outer(move, self.y)) / scale[:, None]
        plain = self.plain + self.rows * move
        squares = (self.squares + self.plain * move + move * plain) / scale**2
        none = np.zeros_like(center)
        return Moments(self.rows, self.weight, x / scale, gram, self.y, cross, none, plain / scale, squares)


def moments(
    source: RowSource,
    targets: NDArray[Any],
    weights: Array | None = None,
    *,
    outer: bool = True,
    k: int | None = None,
    shift: Array | None = None,
) -> Moments:
    """Gather moments in one pass over the rows, on all threads that BLAS may use.

    Parameters
    ----------
    source : RowSource of shape (n, d)
    targets : ndarray of shape (n, t), or (n,) with ``k``
        Numbers; or class codes, which stand for k columns of 0 and 1.
    weights : ndarray of shape (n,), optional
    outer : bool
        The whole Gram matrix, or its diagonal alone.
    k : int, optional
    shift : ndarray of shape (d,), optional
        That of the moments to which these are to be added; near the mean of the first rows if not given.

    Raises
    ------
    ValueError
        If a row holds NaN or infinity.
    """
    n, d = source.shape
    # Of float16 even the products are exact in float32; sums over blocks are in float64 always.
    dtype = np.float32 if source.dtype == np.float16 else np.float64
    if shift is None:
        shift = np.asarray(source[: min(n, SHIFT_ROWS)], np.float64).mean(axis=0).astype(dtype)
    elif not np.array_equal(shift, shift.astype(dtype)):
        dtype = np.float64  # in float32 it would be another shift

    runs = list(blocks(source, NUMBERS_FOR_A_GRAM if outer else NUMBERS_IN_A_BLOCK))
    places = _Places(source, dtype, runs[0].stop)

    def one(rows: slice) -> Moments:
        x = places.read(rows)
        x -= shift
        squares = np.einsum("ij,ij->j", x, x)
        w = np.ones(len(x), dtype) if weights is None else weights[rows].astype(dtype)
        y, cross = _times_classes(x, targets[rows], w, k) if k is not None else _times(x, targets[rows], w)
        plain = total = x.T @ w
        if weights is not None:
            plain = x.T @ np.ones_like(w)
            x *= np.sqrt(w)[:, None]
        gram = x.T @ x if outer else squares if weights is None else np.einsum("ij,ij->j", x, x)
        return _moments(len(x), float(w.sum(dtype=np.float64)), total, gram, y, cross, shift, plain, squares)

    gathered: Moments | None = None
    with Workers(float(n) * d * d) as workers:
        for part in workers.map(one, runs):
            gathered = part if gathered is None else gathered + part
    assert gathered is not None
    if not np.isfinite(gathered.squares).all():
        raise ValueError("Input X contains NaN or infinity")
    return gathered


class _Places(threading.local):
    """Where each thread reads its rows to: memory that is new for each block has to be cleared by the system."""

    def __init__(self, source: RowSource, dtype: Any, rows: int) -> None:
        self.source = source
        self.stored, self.numbers = (np.empty((rows, source.shape[1]), kind) for kind in (source.dtype, dtype))

    def read(self, rows: slice) -> NDArray[Any]:
        """Rows of the source as numbers that may be changed, until the thread reads others."""
        stored, numbers = (place[: rows.stop - rows.start] for place in (self.stored, self.numbers))
        read_into(self.source, stored, rows)
        return as_float(stored, numbers.dtype, numbers)


def _times(x: NDArray[Any], targets: NDArray[Any], w: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Σ w y and Σ w x yᵀ of numbers y."""
    y = targets.astype(x.dtype) * w[:, None]
    return y.sum(axis=0), x.T @ y


def _times_classes(x: NDArray[Any], codes: NDArray[Any], w: NDArray[Any], k: int) -> tuple[Array, Array]:
    """The same of columns of 0 and 1, of which each row has a single 1: sums of its rows for each class.

    A product with the columns takes as long as there are classes. So few rows at a time that sums in float32 keep
    their digits.
    """
    from scipy.sparse import csc_array

    cross = np.zeros((k, x.shape[1]))
    step = max(SUMMED_ROWS, SUMMED_ROWS_OF_A_CLASS * k)
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        ones = csc_array((w[some], codes[some], np.arange(len(w[some]) + 1)), shape=(k, len(w[some])))
        cross += ones @ x[some]
    return np.bincount(codes, w, k).astype(np.float64), cross.T


def _moments(rows: int, weight: float, *sums: NDArray[Any]) -> Moments:
    return Moments(rows, weight, *(each.astype(np.float64, copy=False) for each in sums))
