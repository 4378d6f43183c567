"""Paired tests: the difference between two models on the same rows, and its p value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from featpipe.metrics.intervals import (
    INTERVAL_PERCENTILES,
    Z_SCORE,
    BootstrapMetric,
    Floats,
    Interval,
    iter_bootstrap_counts,
    make_interval,
)
from featpipe.metrics.metrics import compute_metrics
from featpipe.runtime import nan_to_none


@dataclass(frozen=True)
class ScoreDifference:
    """The difference of one score between two models.

    Attributes
    ----------
    difference : Interval
        The first minus the second.
    p : float
        Two-sided p value of no difference.
    test : {"mcnemar", "bootstrap"}
    """

    difference: Interval
    p: float
    test: str


@dataclass(frozen=True)
class PairedComparison:
    """The comparison of two models on the same rows.

    Attributes
    ----------
    n : int
        Number of rows.
    only_first, only_second : int or None
        Rows that only one of the models gets right; None for a regression.
    contrasts : dict of str to ScoreDifference
        By the names of the scores.
    """

    n: int
    only_first: int | None
    only_second: int | None
    contrasts: dict[str, ScoreDifference]

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "contrasts": {
                name: {
                    "difference": nan_to_none(difference.difference.value),
                    "low": nan_to_none(difference.difference.low),
                    "high": nan_to_none(difference.difference.high),
                    "p": difference.p,
                    "test": difference.test,
                }
                for name, difference in self.contrasts.items()
            },
        }


def compare_paired(
    task: str,
    y: ArrayLike,
    first_predictions: ArrayLike,
    second_predictions: ArrayLike,
    class_names: Sequence[str],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> PairedComparison:
    """Compare the predictions of two models for the same rows.

    Parameters
    ----------
    task : {"classification", "multilabel", "regression"}
    y : array-like
    first_predictions, second_predictions : array-like
        As for `featpipe.metrics.score`.
    class_names : sequence of str
    n_resamples, seed : int
        Resamples of the rows, the same for both models.

    Notes
    -----
    Accuracy, and the exact match of multi-label rows, are compared by McNemar's exact test on the rows that only one
    model gets right, with the interval of Agresti and Min ("Simple improved confidence intervals for comparing matched
    proportions", 2005), which has a positive width also where the models never differ. Other scores are compared by the
    paired bootstrap: a percentile interval, and p is twice the share of resamples on the other side of zero.

    Examples
    --------
    >>> p = [[0.9, 0.1], [0.2, 0.8]] * 5
    >>> comparison = compare_paired("classification", ["cat", "cat"] * 5, p, [[1, 0]] * 10, ["cat", "dog"])
    >>> comparison.only_second, comparison.contrasts["accuracy"].p
    (5, 0.0625)
    """
    first_metrics, first_correct = compute_metrics(task, y, first_predictions, class_names, n_resamples)
    second_metrics, second_correct = compute_metrics(task, y, second_predictions, class_names, n_resamples)
    shared_metrics = [
        name
        for name in first_metrics
        if name in second_metrics and _is_comparable(first_metrics[name]) and _is_comparable(second_metrics[name])
    ]
    exact_test_metric = {"classification": "accuracy", "multilabel": "exact_match"}.get(task)
    n_rows = len(np.asarray(first_predictions))
    resampled_metrics = [name for name in shared_metrics if name != exact_test_metric]
    resampled_differences = _resample_differences(
        {name: (first_metrics[name], second_metrics[name]) for name in resampled_metrics},
        n_rows,
        n_resamples if n_rows > 1 else 0,
        seed,
    )
    differences = {}
    for name in shared_metrics:
        observed_difference = first_metrics[name].value - second_metrics[name].value
        if name == exact_test_metric and first_correct is not None and second_correct is not None:
            differences[name] = mcnemar_test(first_correct, second_correct)
        else:
            differences[name] = _bootstrap_difference(observed_difference, resampled_differences[name])
    if first_correct is None or second_correct is None:
        return PairedComparison(n_rows, None, None, differences)
    return PairedComparison(
        n_rows, int((first_correct & ~second_correct).sum()), int((second_correct & ~first_correct).sum()), differences
    )


def mcnemar_test(first_correct: NDArray[np.bool_], second_correct: NDArray[np.bool_]) -> ScoreDifference:
    """McNemar's exact test; the arguments, of shape (n,), say which rows each model gets right."""
    n_rows = len(first_correct)
    n_only_first = int((first_correct & ~second_correct).sum())
    n_only_second = int((second_correct & ~first_correct).sum())
    p = float(binomtest(n_only_first, n_only_first + n_only_second).pvalue) if n_only_first + n_only_second else 1.0
    observed_difference = (n_only_first - n_only_second) / n_rows
    adjusted_first, adjusted_second, adjusted_rows = n_only_first + 0.5, n_only_second + 0.5, n_rows + 2
    center = (adjusted_first - adjusted_second) / adjusted_rows
    half_width = (
        Z_SCORE
        * math.sqrt(adjusted_first + adjusted_second - (adjusted_first - adjusted_second) ** 2 / adjusted_rows)
        / adjusted_rows
    )
    return ScoreDifference(make_interval(observed_difference, center - half_width, center + half_width), p, "mcnemar")


def _is_comparable(metric: BootstrapMetric) -> bool:
    return math.isfinite(metric.value) and metric.statistic is not None and metric.max_resamples is None


def _resample_differences(
    metric_pairs: dict[str, tuple[BootstrapMetric, BootstrapMetric]], n_rows: int, n_resamples: int, seed: int
) -> dict[str, Floats]:
    resampled_differences: dict[str, list[Floats]] = {name: [np.empty(0)] for name in metric_pairs}
    for _, counts in iter_bootstrap_counts(n_rows, n_resamples, seed):
        for name, (first_metric, second_metric) in metric_pairs.items():
            assert first_metric.statistic is not None
            assert second_metric.statistic is not None
            resampled_differences[name].append(first_metric.statistic(counts) - second_metric.statistic(counts))
    return {name: np.concatenate(values) for name, values in resampled_differences.items()}


def _bootstrap_difference(observed_difference: float, resampled_differences: Floats) -> ScoreDifference:
    resampled_differences = resampled_differences[np.isfinite(resampled_differences)]
    if not len(resampled_differences):
        return ScoreDifference(Interval(observed_difference), math.nan, "bootstrap")
    low, high = np.percentile(resampled_differences, INTERVAL_PERCENTILES)
    n_opposite = min((resampled_differences <= 0).sum(), (resampled_differences >= 0).sum())
    p = min(1.0, 2 * (1 + int(n_opposite)) / (1 + len(resampled_differences)))
    return ScoreDifference(make_interval(observed_difference, low, high), p, "bootstrap")
