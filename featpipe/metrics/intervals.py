"""Confidence intervals of scores: by the bootstrap, and by Wilson's formula for proportions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featpipe.errors import ConfigError
from featpipe.runtime import BlasThreadPool

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # draw counts of each row, (m, b) -> one value per resample, (b,)

CONFIDENCE_LEVEL = 0.95
INTERVAL_PERCENTILES = (50 * (1 - CONFIDENCE_LEVEL), 50 * (1 + CONFIDENCE_LEVEL))
Z_SCORE = 1.959963984540054  # scipy.stats.norm.ppf of 0.975; a number, because reading scores loads no scipy
# Draw counts in memory at once: m rows × b resamples in float64, some 4 MB, so that results stay in a core's cache.
_BLOCK_COUNTS = 500_000


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % interval; ``low`` and ``high`` are NaN without an interval.

    Examples
    --------
    >>> print(Interval(0.92, 0.901, 0.9384))
    0.920 [0.901, 0.938]
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether the score has an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __str__(self) -> str:
        interval_text = f" [{format_score(self.low)}, {format_score(self.high)}]" if self.known else ""
        return format_score(self.value) + interval_text


@dataclass(frozen=True, eq=False)
class BootstrapMetric:
    """A score and the means to compute its interval.

    Attributes
    ----------
    value : float
    statistic : callable or None
        Computes the score of resampled rows; None where that would be too expensive.
    n_trials : float
        For a score between 0 and 1: the number of rows of a proportion with the same uncertainty. A score that is 0
        or 1 in every resample gets the interval of that proportion.
    is_share : bool
        Whether the score is a proportion of ``n_trials`` rows, which always gets Wilson's interval.
    max_resamples : int or None
        Limit for statistics that sort the rows in every resample.
    """

    value: float
    statistic: Statistic | None
    n_trials: float = 0.0
    is_share: bool = False
    max_resamples: int | None = None


def wilson_interval(n_correct: ArrayLike, n_trials: ArrayLike) -> tuple[Floats, Floats]:
    """Wilson's 95 % interval of a proportion, which has a positive width also at 0 and 1.

    Parameters
    ----------
    n_correct, n_trials : array-like
        The interval is NaN where ``n_trials`` is 0.

    Notes
    -----
    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927; recommended for few rows
    and for proportions near 0 and 1 by Brown, Cai and DasGupta, "Interval estimation for a binomial proportion", 2001.

    Examples
    --------
    >>> low, high = wilson_interval(20, 20)
    >>> f"{low:.3f} {high:.3f}"
    '0.839 1.000'
    """
    z, n = Z_SCORE, np.asarray(n_trials, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.asarray(n_correct, float) / n
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half_width = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.clip(np.minimum(center - half_width, p), 0, 1), np.clip(np.maximum(center + half_width, p), 0, 1)


def compute_intervals(
    metrics: Mapping[str, BootstrapMetric], n_rows: int, n_resamples: int, seed: int
) -> dict[str, Interval]:
    """All finite scores with their intervals, each from the same resamples."""
    if n_resamples < 0:
        raise ConfigError(f"bootstrap: found {n_resamples}, expected 0 (no intervals) or more")
    defined_metrics = {name: metric for name, metric in metrics.items() if math.isfinite(metric.value)}
    resampled_metrics = {
        name: metric for name, metric in defined_metrics.items() if metric.statistic and not metric.is_share
    }
    has_intervals = n_resamples > 0 and n_rows > 1
    resampled_values: dict[str, list[Floats]] = {name: [] for name in defined_metrics}
    with BlasThreadPool(n_rows * n_resamples) as workers:
        count_blocks = iter_bootstrap_counts(n_rows, n_resamples if has_intervals else 0, seed)
        for block_values in workers.map(lambda block: _evaluate_metrics(resampled_metrics, *block), count_blocks):
            for name, metric_values in block_values.items():
                resampled_values[name].append(metric_values)
    return {
        name: _compute_interval(metric, resampled_values[name], has_intervals)
        for name, metric in defined_metrics.items()
    }


def _evaluate_metrics(metrics: Mapping[str, BootstrapMetric], n_done: int, counts: Floats) -> dict[str, Floats]:
    """The values of each metric in a block of resamples, up to its limit of resamples."""
    values = {}
    for name, metric in metrics.items():
        metric_counts = counts if metric.max_resamples is None else counts[:, : max(0, metric.max_resamples - n_done)]
        if metric_counts.shape[1] and metric.statistic is not None:
            values[name] = metric.statistic(metric_counts)
    return values


def _compute_interval(metric: BootstrapMetric, value_blocks: list[Floats], has_interval: bool) -> Interval:
    value = float(metric.value)
    values = np.concatenate(value_blocks) if value_blocks else np.empty(0)
    values = values[np.isfinite(values)]
    is_constant = len(values) > 0 and bool((values == value).all()) and value in (0.0, 1.0)
    if has_interval and metric.n_trials and (metric.is_share or is_constant):
        low, high = wilson_interval(value * metric.n_trials, metric.n_trials)
        return Interval(value, float(low), float(high))
    if not len(values):
        return Interval(value)
    return make_interval(value, *np.percentile(values, INTERVAL_PERCENTILES))


def make_interval(value: float, low: float, high: float) -> Interval:
    """An interval that is extended to its value if necessary."""
    return Interval(value, min(float(low), value), max(float(high), value))


def iter_bootstrap_counts(n_rows: int, n_resamples: int, seed: int) -> Iterator[tuple[int, Floats]]:
    """How often each of m rows is drawn, in blocks of b resamples: the resamples before, and an array (m, b)."""
    rng = np.random.default_rng(seed)
    block_resamples = max(1, _BLOCK_COUNTS // n_rows)
    for start in range(0, n_resamples, block_resamples):
        n_block_resamples = min(block_resamples, n_resamples - start)
        drawn_rows = (
            rng.integers(0, n_rows, (n_block_resamples, n_rows)) + n_rows * np.arange(n_block_resamples)[:, None]
        )
        counts = np.bincount(drawn_rows.ravel(), minlength=n_block_resamples * n_rows).reshape(
            n_block_resamples, n_rows
        )
        yield start, np.ascontiguousarray(counts.T, np.float64)


def format_score(value: float) -> str:
    """A score as text: three decimals, or five significant digits from 100 on.

    Examples
    --------
    >>> format_score(0.92), format_score(12345.6), format_score(math.nan)
    ('0.920', '12,346', '–')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.5g}"
