"""Scores of many resamples at once: rows are weighted by how often each resample drew them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from featpipe.scores.interval import Floats, Statistic

__all__ = [
    "area",
    "average_precision",
    "mean_of",
    "mean_ratio",
    "over_columns",
    "rank_correlation",
    "ratio",
    "scatter",
]


def mean_of(values: NDArray[Any]) -> Statistic:
    """The mean of one value for each row."""
    return lambda drawn: values.astype(float) @ drawn / len(values)


def scatter(centred: Floats, drawn: Floats) -> Floats:
    """The sum of squares about the mean of each resample, shape (t, b); exactly zero where nothing varies."""
    squares = (centred**2).T @ drawn
    scatter = squares - (centred.T @ drawn) ** 2 / len(centred)
    return np.where(scatter > 1e-12 * squares, scatter, 0)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient; NaN where the denominator is zero."""
    nan = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=nan, where=denominator > 0)


def mean_ratio(numerators: Floats, denominators: Floats) -> Floats:
    """The mean over classes, of shape (k, b), of the quotients that are defined."""
    defined = denominators > 0
    ratios = np.divide(numerators, denominators, out=np.zeros_like(numerators), where=defined)
    return ratio(ratios.sum(axis=0), defined.sum(axis=0).astype(float))


def over_columns(
    statistic: Callable[[NDArray[Any], Floats, Floats], Floats], true: NDArray[Any], scores: Floats
) -> Statistic:
    """The mean over columns of a statistic of one column, where it is defined."""

    def resampled(drawn: Floats) -> Floats:
        total, defined = np.zeros(drawn.shape[1]), np.zeros(drawn.shape[1])
        for column in range(scores.shape[1]):
            values = statistic(true[:, column], scores[:, column], drawn)
            total += np.nan_to_num(values)
            defined += np.isfinite(values)
        return ratio(total, defined)

    return resampled


def _by_threshold(positive: NDArray[np.bool_], scores: Floats, drawn: Floats) -> tuple[Floats, Floats]:
    """Positive and all draws at each distinct score, the highest first: two arrays of shape (g, b)."""
    order = np.argsort(-scores, kind="stable")
    every = drawn[order]
    hits = every * positive[order, None]
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    if len(starts) < len(order):
        return np.add.reduceat(hits, starts, axis=0), np.add.reduceat(every, starts, axis=0)
    return hits, every


def area(positive: NDArray[np.bool_], scores: Floats, drawn: Floats) -> Floats:
    """The area under the ROC curve of each resample, shape (b,)."""
    hits, every = _by_threshold(positive, scores, drawn)
    held = hits.any(axis=1)
    misses = every - hits
    above = (np.cumsum(misses, axis=0) - misses / 2)[held]
    total_hits, total_misses = hits.sum(axis=0), misses.sum(axis=0)
    outranked = np.einsum("gb,gb->b", hits[held], above)
    return 1 - ratio(outranked, total_hits * total_misses)


def average_precision(positive: NDArray[np.bool_], scores: Floats, drawn: Floats) -> Floats:
    """The average precision of each resample, shape (b,)."""
    hits, every = _by_threshold(positive, scores, drawn)
    held = hits.any(axis=1)
    found, seen = np.cumsum(hits, axis=0)[held], np.cumsum(every, axis=0)[held]
    precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
    return ratio(np.einsum("gb,gb->b", hits[held], precision), hits.sum(axis=0))


def rank_correlation(true: Floats, predicted: Floats, drawn: Floats) -> Floats:
    """Spearman's correlation of each resample, shape (b,)."""
    middle = (len(true) + 1) / 2
    a, b = _ranks(true, drawn) - middle, _ranks(predicted, drawn) - middle
    covariance = np.einsum("mb,mb,mb->b", drawn, a, b)
    return ratio(covariance, np.sqrt((drawn * a * a).sum(axis=0) * (drawn * b * b).sum(axis=0)))


def _ranks(values: Floats, drawn: Floats) -> Floats:
    """The rank of each row within each resample, ties sharing their mean, shape (m, b)."""
    _, group = np.unique(values, return_inverse=True)
    member = csr_array((np.ones(len(values)), (group, np.arange(len(values)))))
    size = member @ drawn
    return (np.cumsum(size, axis=0) - (size - 1) / 2)[group]
