"""What more labels would bring: a power law through the errors of heads that were trained on fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Forecast", "forecast"]

EXPONENTS = np.geomspace(0.05, 2.0, 40)
RESAMPLES = 500
LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Forecast:
    """A learning curve, measured up to n training rows and drawn out to ``ahead``.

    Attributes
    ----------
    sizes : tuple of int
        Training rows.
    errors, lows, highs : tuple of float
        The mean error at each, with the 95 % interval from resampled test rows.
    ahead : int
        Training rows that the law is drawn out to.
    expected, low, high : float
        The error there.
    """

    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    ahead: int
    expected: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def __str__(self) -> str:
        now, then = self.errors[-1], self.expected
        gain = "no gain can be told from chance" if self.high >= now else f"{now:.1%} → {then:.1%}"
        return f"with {self.ahead:,} training images: error {then:.1%} [{self.low:.1%}, {self.high:.1%}]; {gain}"


def forecast(sizes: ArrayLike, errors: ArrayLike, *, times: float = 2.0, seed: int = 0) -> Forecast:
    """Fit ``a + b n^-c`` to the errors of some training sizes and say what it expects of more.

    Parameters
    ----------
    sizes : array of shape (s,)
        Training rows, ascending; at least three.
    errors : array of shape (s, m)
        The error of each test row (0 or 1, or its mean over several draws of the training rows) at each size.
    times : float
        How many times the largest size is forecast.
    seed : int

    Notes
    -----
    The law is that of Hestness et al., "Deep learning scaling is predictable, empirically", 2017; a, b and c are not
    negative. The interval is of percentiles over resamples of the test rows, the law fitted anew to each; errors of
    few rows weigh less. It knows of the chance in the test rows, and of what the law leaves open, not of a change in
    what the new images show.

    Examples
    --------
    >>> n = np.array([100, 200, 400, 800])
    >>> found = forecast(n, np.repeat((0.05 + 3 / n)[:, None], 50, axis=1))
    >>> f"{found.expected:.3f}"
    '0.052'
    """
    n, rows = np.asarray(sizes, float), np.asarray(errors, float)
    m = rows.shape[1]
    rng = np.random.default_rng(seed)
    drawn = np.stack([np.bincount(rng.integers(0, m, m), minlength=m) for _ in range(RESAMPLES)], axis=1)
    resampled = rows @ drawn / m
    ahead = round(times * n[-1])
    expected = float(_law(n, rows.mean(axis=1)[:, None], ahead)[0])
    tails = (50 * (1 - LEVEL), 50 * (1 + LEVEL))
    low, high = np.percentile(_law(n, resampled, ahead), tails)
    lows, highs = np.percentile(resampled, tails, axis=1)
    return Forecast(
        sizes=tuple(int(size) for size in n),
        errors=tuple(rows.mean(axis=1).tolist()),
        lows=tuple(lows.tolist()),
        highs=tuple(highs.tolist()),
        ahead=ahead,
        expected=expected,
        low=min(float(low), expected),
        high=max(float(high), expected),
    )


def _law(n: Floats, errors: Floats, ahead: float) -> Floats:
    """The forecasts of the best laws through curves of shape (s, b): for each exponent a line, by least squares."""
    weights = np.sqrt(n / n[-1])[:, None]
    best, value = np.full(errors.shape[1], np.inf), np.zeros(errors.shape[1])
    for exponent in EXPONENTS:
        x = ((n / n[-1]) ** -exponent)[:, None]
        a, b = _line(x, errors, weights)
        misfit = (weights * (errors - a - b * x) ** 2).sum(axis=0)
        better = misfit < best - 1e-15
        best = np.where(better, misfit, best)
        value = np.where(better, a + b * (ahead / n[-1]) ** -exponent, value)
    return value


def _line(x: Floats, y: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weighted least squares of ``y = a + b x`` with a and b not negative."""
    w = weights / weights.sum()
    mean_x, mean_y = (w * x).sum(axis=0), (w * y).sum(axis=0)
    spread = (w * (x - mean_x) ** 2).sum(axis=0)
    b = np.maximum((w * (x - mean_x) * (y - mean_y)).sum(axis=0) / spread, 0)
    a = mean_y - b * mean_x
    through_zero = (w * x * y).sum(axis=0) / (w * x * x).sum(axis=0)
    return np.where(a < 0, 0.0, a), np.where(a < 0, through_zero, b)
