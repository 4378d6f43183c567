"""Nearest neighbours among embeddings by cosine: exact, by matrix products of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Directions", "nearest", "outlying"]

Floats = NDArray[np.float32]

_ROWS, _COLUMNS = 1024, 8192  # of a block of similarities, 32 MB
_SQUARE = 3392  # of a block that is used both ways
_SPAN = 64  # columns of which only the peak is looked at, at first


@dataclass(frozen=True, eq=False)
class Directions:
    """What makes embeddings comparable by their directions from a centre.

    Networks after a ReLU point all embeddings into one corner, where everything is similar to everything; seen from
    their mean they spread.

    Attributes
    ----------
    centre : ndarray of shape (d,)
    """

    centre: Floats

    @classmethod
    def of(cls, X: NDArray[Any]) -> Directions:
        """From the mean of some embeddings of shape (m, d)."""
        return cls(np.asarray(np.mean(X, axis=0, dtype=np.float64), np.float32))

    def __call__(self, X: NDArray[Any]) -> Floats:
        """Rows of length one, shape (m, d); zero where an embedding is the centre itself."""
        centred = np.asarray(X, np.float32) - self.centre
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)


def nearest(rows: Floats, others: Floats, k: int, *, same: bool = False) -> tuple[Floats, NDArray[np.int64]]:
    """The k most similar of some others for each row, the most similar first.

    Parameters
    ----------
    rows, others : ndarray of shape (m, d) and (n, d)
        Of length one.
    k : int
        As many as there are, at most.
    same : bool
        Whether ``others`` are ``rows``: a row is not its own neighbour.

    Returns
    -------
    similarities, numbers : ndarray of shape (m, k)
        Cosines, and row numbers of ``others``.
    """
    k = max(0, min(k, len(others) - same))
    best = np.full((len(rows), k), -np.inf, np.float32)
    number = np.zeros((len(rows), k), np.int64)
    if not k:
        return best, number
    if same:
        _nearest_within(rows, best, number)
        return best, number
    for top in range(0, len(rows), _ROWS):
        block = rows[top : top + _ROWS]
        held, held_number = best[top : top + _ROWS], number[top : top + _ROWS]
        for left in range(0, len(others), _COLUMNS):
            _keep_best(held, held_number, block @ others[left : left + _COLUMNS].T, left)
    return best, number


def _nearest_within(rows: Floats, best: Floats, number: NDArray[np.int64]) -> None:
    """Fill in the best of the other rows; each pair is compared once, for both."""
    starts = range(0, len(rows), _SQUARE)
    for top in starts:
        here = slice(top, top + _SQUARE)
        for left in starts[top // _SQUARE :]:
            there = slice(left, left + _SQUARE)
            found = rows[here] @ rows[there].T
            if left == top:
                np.fill_diagonal(found, -np.inf)
            else:
                _keep_best(best[there], number[there], found.T, top)
            _keep_best(best[here], number[here], found, left)


def _keep_best(held: Floats, held_number: NDArray[np.int64], found: Floats, left: int) -> None:
    """Merge the best of a block, in place."""
    k = held.shape[1]
    if found.shape[1] > k:
        some = _among_the_best(found, k)
        values = np.take_along_axis(found, some, axis=1)
        best = np.argpartition(-values, k - 1, axis=1)[:, :k]
        some, found = np.take_along_axis(some, best, axis=1), np.take_along_axis(values, best, axis=1)
        numbers = some + left
    else:
        numbers = np.broadcast_to(np.arange(found.shape[1]) + left, found.shape)
    every, every_number = np.hstack([held, found]), np.hstack([held_number, numbers])
    order = np.argsort(-every, axis=1, kind="stable")[:, :k]
    held[:], held_number[:] = np.take_along_axis(every, order, 1), np.take_along_axis(every_number, order, 1)


def _among_the_best(found: Floats, k: int) -> NDArray[np.int64]:
    """Columns of which the k best of each row are some: those of the k spans with the highest peaks."""
    m, n = found.shape
    spans = n // _SPAN
    if spans <= 2 * k:
        return np.broadcast_to(np.arange(n), (m, n))
    if found.flags.c_contiguous:
        peaks = found[:, : spans * _SPAN].reshape(m, spans, _SPAN).max(axis=2)
    else:  # a block seen from its other side
        peaks = found.T[: spans * _SPAN].reshape(spans, _SPAN, m).max(axis=1).T
    best = np.argpartition(-peaks, k - 1, axis=1)[:, :k]
    columns = (best[:, :, None] * _SPAN + np.arange(_SPAN)).reshape(m, k * _SPAN)
    rest = np.broadcast_to(np.arange(spans * _SPAN, n), (m, n - spans * _SPAN))
    return np.hstack([columns, rest])


def outlying(similarities: Floats) -> Floats:
    """How far each row is from its neighbours: the mean of 1 - cosine to them, shape (m,)."""
    return (
        np.asarray(1 - similarities.mean(axis=1)) if similarities.shape[1] else np.zeros(len(similarities), np.float32)
    )
