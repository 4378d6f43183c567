"""Exact nearest neighbours of embeddings by cosine similarity, by matrix products of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_BLOCK_ROWS, _BLOCK_COLUMNS = 1024, 8192  # of a block of similarities, 32 MB
_SQUARE_BLOCK_ROWS = 3392  # of a block of similarities among the rows, which serves both rows of a pair
_SPAN_COLUMNS = 64  # columns that are first compared by their maximum only


@dataclass(frozen=True, eq=False)
class CenteredNormalizer:
    """Centre embeddings and scale them to unit length, so that dot products are cosines about the centre.

    After a ReLU all coordinates are non-negative, so that all cosines are high; subtracting the mean spreads them.

    Attributes
    ----------
    center : ndarray of shape (d,)
    """

    center: Floats

    @classmethod
    def from_embeddings(cls, X: NDArray[Any]) -> CenteredNormalizer:
        """Centre at the mean of embeddings of shape (m, d)."""
        return cls(np.asarray(np.mean(X, axis=0, dtype=np.float64), np.float32))

    def __call__(self, X: NDArray[Any]) -> Floats:
        """Normalize embeddings of shape (m, d); an embedding equal to the centre becomes zero."""
        centered = np.asarray(X, np.float32) - self.center
        norms = np.linalg.norm(centered, axis=1, keepdims=True)
        return np.divide(centered, norms, out=np.zeros_like(centered), where=norms > 0)


def find_nearest_neighbors(
    queries: Floats, references: Floats, k: int, *, exclude_self: bool = False
) -> tuple[Floats, NDArray[np.int64]]:
    """Find the k most similar references of each query, most similar first.

    Parameters
    ----------
    queries, references : ndarray of shape (m, d) and (n, d)
        Rows of unit length.
    k : int
        Reduced to the number of references if larger.
    exclude_self : bool
        Whether `references` are `queries`; a row is then not its own neighbour.

    Returns
    -------
    similarities, indices : ndarray of shape (m, k)
        Cosines, and row numbers of `references`.
    """
    k = max(0, min(k, len(references) - exclude_self))
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    indices = np.zeros((len(queries), k), np.int64)
    if not k:
        return similarities, indices
    if exclude_self:
        _find_neighbors_within(queries, similarities, indices)
        return similarities, indices
    for row_start in range(0, len(queries), _BLOCK_ROWS):
        block = queries[row_start : row_start + _BLOCK_ROWS]
        block_similarities = similarities[row_start : row_start + _BLOCK_ROWS]
        block_indices = indices[row_start : row_start + _BLOCK_ROWS]
        for column_start in range(0, len(references), _BLOCK_COLUMNS):
            _merge_top_k(
                block_similarities,
                block_indices,
                block @ references[column_start : column_start + _BLOCK_COLUMNS].T,
                column_start,
            )
    return similarities, indices


def _find_neighbors_within(rows: Floats, similarities: Floats, indices: NDArray[np.int64]) -> None:
    """Fill in the nearest other rows, comparing each pair once."""
    block_starts = range(0, len(rows), _SQUARE_BLOCK_ROWS)
    for row_start in block_starts:
        row_block = slice(row_start, row_start + _SQUARE_BLOCK_ROWS)
        for column_start in block_starts[row_start // _SQUARE_BLOCK_ROWS :]:
            column_block = slice(column_start, column_start + _SQUARE_BLOCK_ROWS)
            block_similarities = rows[row_block] @ rows[column_block].T
            if column_start == row_start:
                np.fill_diagonal(block_similarities, -np.inf)
            else:
                _merge_top_k(similarities[column_block], indices[column_block], block_similarities.T, row_start)
            _merge_top_k(similarities[row_block], indices[row_block], block_similarities, column_start)


def _merge_top_k(
    top_similarities: Floats, top_indices: NDArray[np.int64], new_similarities: Floats, column_start: int
) -> None:
    k = top_similarities.shape[1]
    if new_similarities.shape[1] > k:
        candidate_columns = _select_candidate_columns(new_similarities, k)
        candidate_similarities = np.take_along_axis(new_similarities, candidate_columns, axis=1)
        top_positions = np.argpartition(-candidate_similarities, k - 1, axis=1)[:, :k]
        candidate_columns = np.take_along_axis(candidate_columns, top_positions, axis=1)
        new_similarities = np.take_along_axis(candidate_similarities, top_positions, axis=1)
        new_indices = candidate_columns + column_start
    else:
        new_indices = np.broadcast_to(np.arange(new_similarities.shape[1]) + column_start, new_similarities.shape)
    merged_similarities = np.hstack([top_similarities, new_similarities])
    merged_indices = np.hstack([top_indices, new_indices])
    order = np.argsort(-merged_similarities, axis=1, kind="stable")[:, :k]
    top_similarities[:] = np.take_along_axis(merged_similarities, order, 1)
    top_indices[:] = np.take_along_axis(merged_indices, order, 1)


def _select_candidate_columns(similarities: Floats, k: int) -> NDArray[np.int64]:
    """Select columns that contain the k best of each row: those of the k spans with the highest maxima."""
    m, n = similarities.shape
    n_spans = n // _SPAN_COLUMNS
    if n_spans <= 2 * k:
        return np.broadcast_to(np.arange(n), (m, n))
    if similarities.flags.c_contiguous:
        span_maxima = similarities[:, : n_spans * _SPAN_COLUMNS].reshape(m, n_spans, _SPAN_COLUMNS).max(axis=2)
    else:  # a transposed block: reduce along its contiguous axis
        span_maxima = similarities.T[: n_spans * _SPAN_COLUMNS].reshape(n_spans, _SPAN_COLUMNS, m).max(axis=1).T
    best_spans = np.argpartition(-span_maxima, k - 1, axis=1)[:, :k]
    columns = (best_spans[:, :, None] * _SPAN_COLUMNS + np.arange(_SPAN_COLUMNS)).reshape(m, k * _SPAN_COLUMNS)
    trailing_columns = np.broadcast_to(np.arange(n_spans * _SPAN_COLUMNS, n), (m, n - n_spans * _SPAN_COLUMNS))
    return np.hstack([columns, trailing_columns])


def compute_outlier_scores(similarities: Floats) -> Floats:
    """Compute the mean cosine distance of each row to its neighbours, shape (m,)."""
    return (
        np.asarray(1 - similarities.mean(axis=1)) if similarities.shape[1] else np.zeros(len(similarities), np.float32)
    )
