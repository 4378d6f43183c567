"""Check a model's uncertainty estimates on the scored rows: coverage of prediction sets, and novelty scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.diagnostics import LabeledPredictions
from featpipe.metrics import Interval, wilson_interval
from featpipe.model import ConformalPredictor

COVERAGE_LEVELS = (0.8, 0.9, 0.95, 0.99)
NOVELTY_THRESHOLD = 0.95
"""An image counts as novel from this novelty on; 5 % of images like those of training do."""


@dataclass(frozen=True)
class Coverage:
    """Empirical coverage of conformal prediction sets, or of prediction intervals, at one level.

    Attributes
    ----------
    level : float
        The nominal coverage.
    coverage : Interval
        The share of rows whose set contains the true label; with several targets, the mean over targets.
    size : float
        Mean number of classes in a set; mean width of the intervals of a regression.
    single : float
        Share of sets with exactly one class; NaN for a regression.
    """

    level: float
    coverage: Interval
    size: float
    single: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "coverage": self.coverage.value,
            "low": self.coverage.low,
            "high": self.coverage.high,
            "size": self.size,
            "single": None if np.isnan(self.single) else self.single,
        }


def compute_coverage(conformal: ConformalPredictor | None, predictions: LabeledPredictions) -> list[Coverage]:
    """Measure coverage at several levels.

    Parameters
    ----------
    conformal : ConformalPredictor or None
        The list is empty if the model has none, and for multi-label tasks.
    predictions : LabeledPredictions
    """
    if conformal is None or predictions.task == "multilabel":
        return []
    # A quantile is infinite where the model had too few held-out images for a level.
    levels = [level for level in COVERAGE_LEVELS if np.isfinite(conformal.score_quantile(level)).all()]
    measure = _measure_intervals if predictions.task == "regression" else _measure_sets
    return [measure(conformal, predictions, level) for level in levels]


def _measure_intervals(conformal: ConformalPredictor, predictions: LabeledPredictions, level: float) -> Coverage:
    intervals = conformal.predict_intervals(predictions.predicted, level)
    y = np.reshape(predictions.y, intervals.shape[:2])
    is_covered = ((intervals[..., 0] <= y) & (y <= intervals[..., 1])).mean(axis=1)
    return _make_coverage(level, is_covered, (intervals[..., 1] - intervals[..., 0]).mean(axis=1), np.nan)


def _measure_sets(conformal: ConformalPredictor, predictions: LabeledPredictions, level: float) -> Coverage:
    prediction_sets = conformal.predict_sets(predictions.predicted, level)
    sizes = prediction_sets.sum(axis=1)
    is_covered = prediction_sets[np.arange(len(prediction_sets)), predictions.y]
    return _make_coverage(level, is_covered.astype(float), sizes, float((sizes == 1).mean()))


def _make_coverage(level: float, is_covered: NDArray[np.float64], sizes: NDArray[Any], single: float) -> Coverage:
    low, high = wilson_interval(is_covered.sum(), len(is_covered))
    return Coverage(level, Interval(float(is_covered.mean()), float(low), float(high)), float(sizes.mean()), single)


def summarize_novelty(novelty: NDArray[np.float64] | None, predictions: LabeledPredictions) -> dict[str, Any] | None:
    """Summarize novelty scores of shape (m,): share of novel rows, median, and accuracy on novel and on other rows.

    None if the model gives no novelty scores; without accuracies for a regression.
    """
    if novelty is None:
        return None
    is_novel = novelty >= NOVELTY_THRESHOLD
    summary: dict[str, Any] = {
        "from": NOVELTY_THRESHOLD,
        "share": float(is_novel.mean()),
        "median": float(np.median(novelty)),
    }
    if predictions.task != "regression":
        for name, rows in (("right_of_new", is_novel), ("right_of_others", ~is_novel)):
            summary[name] = float(predictions.is_correct[rows].mean()) if rows.any() else None
    return summary
