"""How sure one can be of a score: intervals from resampled rows, and of shares by Wilson's formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from featpipe.errors import ConfigError
from featpipe.workers import Workers

__all__ = ["Floats", "Interval", "Measure", "Statistic", "intervals", "number", "resamples", "share_interval"]

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # how often each row was drawn, (m, b) -> one value a resample, (b,)

LEVEL = 0.95
# Draws that are held at once: m rows × b resamples of float64, some 4 MB: what is made of them stays near the core.
_BLOCK = 500_000


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % interval; ``low`` and ``high`` are NaN where there is none.

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
        """Whether there is an interval, not the value alone."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __str__(self) -> str:
        bounds = f" [{number(self.low)}, {number(self.high)}]" if self.known else ""
        return number(self.value) + bounds


@dataclass(frozen=True, eq=False)
class Measure:
    """A score of some rows, and what is needed for its interval.

    Attributes
    ----------
    value : float
    statistic : callable or None
        The same score of resampled rows; None where that would cost too much.
    trials : float
        Of a score between 0 and 1: how many rows it judges, as if it were a share of them. Where it is 0 or 1 in every
        resample, its interval is that of such a share.
    share : bool
        It is the share of ``trials`` rows that are right, and always has the interval of one.
    resamples : int or None
        At most so many of the resamples, for what sorts the rows of each.
    """

    value: float
    statistic: Statistic | None
    trials: float = 0.0
    share: bool = False
    resamples: int | None = None


def share_interval(right: ArrayLike, trials: ArrayLike) -> tuple[Floats, Floats]:
    """The 95 % interval of a share: Wilson's, which has a width also where all or none are right.

    Parameters
    ----------
    right, trials : array-like
        How many, of how many; NaN where there were none.

    Notes
    -----
    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927; recommended for few rows
    and for shares near 0 and 1 by Brown, Cai and DasGupta, "Interval estimation for a binomial proportion", 2001.

    Examples
    --------
    >>> low, high = share_interval(20, 20)
    >>> f"{low:.3f} {high:.3f}"
    '0.839 1.000'
    """
    z = norm.ppf((1 + LEVEL) / 2)
    n = np.asarray(trials, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.asarray(right, float) / n
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.clip(np.minimum(middle - half, p), 0, 1), np.clip(np.maximum(middle + half, p), 0, 1)


def intervals(measures: Mapping[str, Measure], m: int, bootstrap: int, seed: int) -> dict[str, Interval]:
    """All scores that are defined, with their intervals over the same resamples."""
    if bootstrap < 0:
        raise ConfigError(f"bootstrap: found {bootstrap}, expected 0 (no intervals) or more")
    defined = {name: measure for name, measure in measures.items() if math.isfinite(measure.value)}
    resampled = {name: measure for name, measure in defined.items() if measure.statistic and not measure.share}
    judged = bootstrap > 0 and m > 1
    found: dict[str, list[Floats]] = {name: [] for name in defined}
    with Workers(m * bootstrap) as workers:
        draws = _numbered(resamples(m, bootstrap if judged else 0, seed))
        for values in workers.map(lambda drawn: _values(resampled, *drawn), draws):
            for name, value in values.items():
                found[name].append(value)
    return {name: _interval(measure, found[name], judged) for name, measure in defined.items()}


def _numbered(draws: Iterable[Floats]) -> Iterator[tuple[int, Floats]]:
    """Each block with the number of resamples before it."""
    done = 0
    for drawn in draws:
        yield done, drawn
        done += drawn.shape[1]


def _values(measures: Mapping[str, Measure], done: int, drawn: Floats) -> dict[str, Floats]:
    """What each measure is in the resamples of a block that it wants."""
    found = {}
    for name, measure in measures.items():
        wanted = drawn if measure.resamples is None else drawn[:, : max(0, measure.resamples - done)]
        if wanted.shape[1] and measure.statistic is not None:
            found[name] = measure.statistic(wanted)
    return found


def _interval(measure: Measure, found: list[Floats], judged: bool) -> Interval:
    value = float(measure.value)
    values = np.concatenate(found) if found else np.empty(0)
    values = values[np.isfinite(values)]
    still = len(values) > 0 and bool((values == value).all()) and value in (0.0, 1.0)
    if judged and measure.trials and (measure.share or still):
        low, high = share_interval(value * measure.trials, measure.trials)
        return Interval(value, float(low), float(high))
    if not len(values):
        return Interval(value)
    low, high = np.percentile(values, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return Interval(value, min(float(low), value), max(float(high), value))


def resamples(m: int, bootstrap: int, seed: int) -> Iterator[Floats]:
    """How often each of m rows is drawn, for b resamples at a time: arrays of shape (m, b)."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // m)
    for start in range(0, bootstrap, block):
        b = min(block, bootstrap - start)
        draws = rng.integers(0, m, (b, m)) + m * np.arange(b)[:, None]
        counts = np.bincount(draws.ravel(), minlength=b * m).reshape(b, m)
        yield np.ascontiguousarray(counts.T, np.float64)


def number(value: float) -> str:
    """A score as people read it: three decimals, or five digits of a large one.

    Examples
    --------
    >>> number(0.92), number(12345.6), number(math.nan)
    ('0.920', '12,346', '–')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.5g}"
