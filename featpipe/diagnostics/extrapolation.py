"""Extrapolate a learning curve by a power law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

POWER_LAW_EXPONENTS = np.geomspace(0.05, 2.0, 40)
N_CURVE_RESAMPLES = 500
CURVE_CONFIDENCE_LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Errors measured by number of training rows, and a forecast for a larger number.

    Attributes
    ----------
    sizes : tuple of int
        Training rows, ascending.
    errors, lows, highs : tuple of float
        Mean error for each size, with the bounds of the 95 % interval from resampled test rows.
    ahead : int
        Training rows of the forecast.
    expected, low, high : float
        The forecast error, with the bounds of its 95 % interval.
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
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def __str__(self) -> str:
        gain = f"now {self.errors[-1]:.1%}"
        if self.high >= self.errors[-1]:
            gain += ", no significant gain"
        forecast = f"error {self.expected:.1%} [{self.low:.1%}, {self.high:.1%}]"
        return f"forecast for {self.ahead:,} training images: {forecast}; {gain}"


def extrapolate_learning_curve(
    sizes: ArrayLike, errors: ArrayLike, *, size_factor: float = 2.0, seed: int = 0
) -> LearningCurve:
    """Fit the power law ``a + b n^-c`` to errors by number of training rows n, and forecast the error of a larger n.

    Parameters
    ----------
    sizes : array of shape (s,)
        Training rows, ascending; at least three.
    errors : array of shape (s, m)
        The error of each test row for each size: 0 or 1, or the mean over several draws of the training rows.
    size_factor : float
        The forecast is for this multiple of the largest size.
    seed : int
        Of the resamples of the test rows.

    Returns
    -------
    LearningCurve

    Notes
    -----
    The power law is that of Hestness et al., "Deep learning scaling is predictable, empirically", 2017, with
    non-negative a, b and c, fitted by least squares with smaller weights for smaller n. The interval is a percentile
    bootstrap over test rows, with the law fitted to each resample. It covers the sampling error of the test rows and
    the uncertainty of the fit, but no change in the distribution of the images.

    Examples
    --------
    >>> n = np.array([100, 200, 400, 800])
    >>> curve = extrapolate_learning_curve(n, np.repeat((0.05 + 3 / n)[:, None], 50, axis=1))
    >>> f"{curve.expected:.3f}"
    '0.052'
    """
    n, row_errors = np.asarray(sizes, float), np.asarray(errors, float)
    m = row_errors.shape[1]
    rng = np.random.default_rng(seed)
    resample_counts = np.stack(
        [np.bincount(rng.integers(0, m, m), minlength=m) for _ in range(N_CURVE_RESAMPLES)], axis=1
    )
    resampled_errors = row_errors @ resample_counts / m
    forecast_size = round(size_factor * n[-1])
    expected_error = float(_extrapolate_power_law(n, row_errors.mean(axis=1)[:, None], forecast_size)[0])
    percentiles = (50 * (1 - CURVE_CONFIDENCE_LEVEL), 50 * (1 + CURVE_CONFIDENCE_LEVEL))
    low, high = np.percentile(_extrapolate_power_law(n, resampled_errors, forecast_size), percentiles)
    lows, highs = np.percentile(resampled_errors, percentiles, axis=1)
    return LearningCurve(
        sizes=tuple(int(size) for size in n),
        errors=tuple(row_errors.mean(axis=1).tolist()),
        lows=tuple(lows.tolist()),
        highs=tuple(highs.tolist()),
        ahead=forecast_size,
        expected=expected_error,
        low=min(float(low), expected_error),
        high=max(float(high), expected_error),
    )


def _extrapolate_power_law(n: Floats, errors: Floats, forecast_size: float) -> Floats:
    """Fit the law to each of b curves of shape (s, b), and forecast: a grid over c, a and b by least squares."""
    weights = np.sqrt(n / n[-1])[:, None]
    best_residual, forecasts = np.full(errors.shape[1], np.inf), np.zeros(errors.shape[1])
    for exponent in POWER_LAW_EXPONENTS:
        x = ((n / n[-1]) ** -exponent)[:, None]
        a, b = _fit_line(x, errors, weights)
        residual = (weights * (errors - a - b * x) ** 2).sum(axis=0)
        is_better = residual < best_residual - 1e-15
        best_residual = np.where(is_better, residual, best_residual)
        forecasts = np.where(is_better, a + b * (forecast_size / n[-1]) ** -exponent, forecasts)
    return forecasts


def _fit_line(x: Floats, y: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weighted least squares of ``y = a + b x`` with non-negative a and b."""
    w = weights / weights.sum()
    mean_x, mean_y = (w * x).sum(axis=0), (w * y).sum(axis=0)
    variance_x = (w * (x - mean_x) ** 2).sum(axis=0)
    b = np.maximum((w * (x - mean_x) * (y - mean_y)).sum(axis=0) / variance_x, 0)
    a = mean_y - b * mean_x
    slope_through_origin = (w * x * y).sum(axis=0) / (w * x * x).sum(axis=0)
    return np.where(a < 0, 0.0, a), np.where(a < 0, slope_through_origin, b)
