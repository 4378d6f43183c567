"""Two models on the same rows: how much one is better, and whether that may be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

from featpipe.scores.interval import LEVEL, Floats, Interval, Measure, resamples
from featpipe.scores.measuring import measures
from featpipe.scores.table import finite

__all__ = ["Contrast", "Paired", "paired"]


@dataclass(frozen=True)
class Contrast:
    """One score of two models.

    Attributes
    ----------
    difference : Interval
        The first minus the second.
    p : float
        How often a difference as large as this would be met if neither were better; two-sided.
    test : {"mcnemar", "bootstrap"}
    """

    difference: Interval
    p: float
    test: str


@dataclass(frozen=True)
class Paired:
    """Two models on the same rows.

    Attributes
    ----------
    n : int
        Rows.
    only_first, only_second : int or None
        Rows that one model alone gets right; None for a regression.
    contrasts : dict of str to Contrast
        By the names of the scores.
    """

    n: int
    only_first: int | None
    only_second: int | None
    contrasts: dict[str, Contrast]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "n": self.n,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "contrasts": {
                name: {
                    "difference": finite(contrast.difference.value),
                    "low": finite(contrast.difference.low),
                    "high": finite(contrast.difference.high),
                    "p": contrast.p,
                    "test": contrast.test,
                }
                for name, contrast in self.contrasts.items()
            },
        }


def paired(
    task: str,
    y: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    names: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Paired:
    """Compare the predictions of two models for the same rows.

    Parameters
    ----------
    task : {"classification", "multilabel", "regression"}
    y : array-like
    first, second : array-like
        As `featpipe.scores.score` takes predictions.
    names : sequence of str
    bootstrap, seed : int
        Resamples of the rows, the same for both models.

    Notes
    -----
    Accuracy, and the exact match of several labels, are compared by McNemar's exact test on the rows that one model
    alone gets right, with the interval of Agresti and Min ("Simple improved confidence intervals for comparing matched
    proportions", 2005), which has a width also where the models never differ. Other scores are compared by the paired
    bootstrap: the interval is of percentiles, and p is twice the share of resamples on the other side of zero.

    Examples
    --------
    >>> p = [[0.9, 0.1], [0.2, 0.8]] * 5
    >>> found = paired("classification", ["cat", "cat"] * 5, p, [[1, 0]] * 10, ["cat", "dog"])
    >>> found.only_second, found.contrasts["accuracy"].p
    (5, 0.0625)
    """
    ours, right = measures(task, y, first, names, bootstrap)
    theirs, also = measures(task, y, second, names, bootstrap)
    shared = [name for name in ours if name in theirs and _comparable(ours[name]) and _comparable(theirs[name])]
    whole = {"classification": "accuracy", "multilabel": "exact_match"}.get(task)
    m = len(np.asarray(first))
    resampled = [name for name in shared if name != whole]
    drawn = _differences({name: (ours[name], theirs[name]) for name in resampled}, m, bootstrap if m > 1 else 0, seed)
    contrasts = {}
    for name in shared:
        value = ours[name].value - theirs[name].value
        if name == whole and right is not None and also is not None:
            contrasts[name] = mcnemar(right, also)
        else:
            contrasts[name] = _bootstrapped(value, drawn[name])
    if right is None or also is None:
        return Paired(m, None, None, contrasts)
    return Paired(m, int((right & ~also).sum()), int((also & ~right).sum()), contrasts)


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Contrast:
    """The exact test of two shares of the same rows; arguments say which rows each gets right."""
    b, c, n = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    p = float(binomtest(b, b + c).pvalue) if b + c else 1.0
    value = (b - c) / n
    more, less, rows = b + 0.5, c + 0.5, n + 2
    middle = (more - less) / rows
    half = norm.ppf((1 + LEVEL) / 2) * math.sqrt(more + less - (more - less) ** 2 / rows) / rows
    return Contrast(Interval(value, min(middle - half, value), max(middle + half, value)), p, "mcnemar")


def _comparable(measure: Measure) -> bool:
    return math.isfinite(measure.value) and measure.statistic is not None and measure.resamples is None


def _differences(pairs: dict[str, tuple[Measure, Measure]], m: int, bootstrap: int, seed: int) -> dict[str, Floats]:
    found: dict[str, list[Floats]] = {name: [np.empty(0)] for name in pairs}
    for drawn in resamples(m, bootstrap, seed):
        for name, (ours, theirs) in pairs.items():
            assert ours.statistic is not None
            assert theirs.statistic is not None
            found[name].append(ours.statistic(drawn) - theirs.statistic(drawn))
    return {name: np.concatenate(values) for name, values in found.items()}


def _bootstrapped(value: float, drawn: Floats) -> Contrast:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Contrast(Interval(value), math.nan, "bootstrap")
    low, high = np.percentile(drawn, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (1 + len(drawn)))
    return Contrast(Interval(value, min(float(low), value), max(float(high), value)), p, "bootstrap")
