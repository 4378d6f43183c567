"""Metrics of many bootstrap resamples at once: rows are weighted by how often each resample drew them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from featpipe.metrics.intervals import Floats, Statistic


def make_mean_statistic(values: NDArray[Any]) -> Statistic:
    """The mean of one value per row."""
    return lambda counts: values.astype(float) @ counts / len(values)


def sum_of_squares(centered: Floats, counts: Floats) -> Floats:
    """The sum of squares about the mean of each resample, shape (t, b); exactly zero where nothing varies."""
    raw_squares = (centered**2).T @ counts
    centered_squares = raw_squares - (centered.T @ counts) ** 2 / len(centered)
    return np.where(centered_squares > 1e-12 * raw_squares, centered_squares, 0)


def safe_divide(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient; NaN where the denominator is zero."""
    nan = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=nan, where=denominator > 0)


def mean_of_ratios(numerators: Floats, denominators: Floats) -> Floats:
    """The mean over classes of the quotients that are defined; inputs of shape (k, b), output of shape (b,)."""
    defined = denominators > 0
    ratios = np.divide(numerators, denominators, out=np.zeros_like(numerators), where=defined)
    return safe_divide(ratios.sum(axis=0), defined.sum(axis=0).astype(float))


def make_column_mean_statistic(
    statistic: Callable[[NDArray[Any], Floats, Floats], Floats], true: NDArray[Any], scores: Floats
) -> Statistic:
    """The mean over columns of a statistic of one column, without the columns where it is undefined."""

    def mean_over_columns(counts: Floats) -> Floats:
        total, defined = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
        for column in range(scores.shape[1]):
            values = statistic(true[:, column], scores[:, column], counts)
            total += np.nan_to_num(values)
            defined += np.isfinite(values)
        return safe_divide(total, defined)

    return mean_over_columns


def _cumulate_by_threshold(positive: NDArray[np.bool_], scores: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Positive and all draws at each distinct score, the highest first: two arrays of shape (g, b)."""
    order = np.argsort(-scores, kind="stable")
    all_counts = counts[order]
    positive_counts = all_counts * positive[order, None]
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    if len(starts) < len(order):
        return np.add.reduceat(positive_counts, starts, axis=0), np.add.reduceat(all_counts, starts, axis=0)
    return positive_counts, all_counts


def roc_auc(positive: NDArray[np.bool_], scores: Floats, counts: Floats) -> Floats:
    """The area under the ROC curve of each resample, shape (b,)."""
    positive_counts, all_counts = _cumulate_by_threshold(positive, scores, counts)
    has_positives = positive_counts.any(axis=1)
    negative_counts = all_counts - positive_counts
    negatives_above = (np.cumsum(negative_counts, axis=0) - negative_counts / 2)[has_positives]
    n_positives, n_negatives = positive_counts.sum(axis=0), negative_counts.sum(axis=0)
    n_misranked = np.einsum("gb,gb->b", positive_counts[has_positives], negatives_above)
    return 1 - safe_divide(n_misranked, n_positives * n_negatives)


def average_precision(positive: NDArray[np.bool_], scores: Floats, counts: Floats) -> Floats:
    """The average precision of each resample, shape (b,)."""
    positive_counts, all_counts = _cumulate_by_threshold(positive, scores, counts)
    has_positives = positive_counts.any(axis=1)
    cumulative_positives = np.cumsum(positive_counts, axis=0)[has_positives]
    cumulative_counts = np.cumsum(all_counts, axis=0)[has_positives]
    precision = np.divide(
        cumulative_positives, cumulative_counts, out=np.zeros_like(cumulative_positives), where=cumulative_counts > 0
    )
    return safe_divide(np.einsum("gb,gb->b", positive_counts[has_positives], precision), positive_counts.sum(axis=0))


def spearman_correlation(true: Floats, predicted: Floats, counts: Floats) -> Floats:
    """Spearman's correlation of each resample, shape (b,)."""
    mean_rank = (len(true) + 1) / 2
    true_ranks = _compute_weighted_ranks(true, counts) - mean_rank
    predicted_ranks = _compute_weighted_ranks(predicted, counts) - mean_rank
    covariance = np.einsum("mb,mb,mb->b", counts, true_ranks, predicted_ranks)
    return safe_divide(
        covariance,
        np.sqrt(
            (counts * true_ranks * true_ranks).sum(axis=0) * (counts * predicted_ranks * predicted_ranks).sum(axis=0)
        ),
    )


def _compute_weighted_ranks(values: Floats, counts: Floats) -> Floats:
    """The rank of each row within each resample, ties sharing their mean, shape (m, b)."""
    _, value_codes = np.unique(values, return_inverse=True)
    value_indicators = csr_array((np.ones(len(values)), (value_codes, np.arange(len(values)))))
    group_counts = value_indicators @ counts
    return (np.cumsum(group_counts, axis=0) - (group_counts - 1) / 2)[value_codes]
