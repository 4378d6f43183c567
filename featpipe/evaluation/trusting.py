"""Whether sets of answers hold the right one as often as they say, and how new the rows look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.scores import Interval, wilson_interval

if TYPE_CHECKING:
    from featpipe.evaluation.result import Evaluation

__all__ = ["NOVELTY_THRESHOLD", "Coverage", "compute_coverage", "summarize_novelty"]

COVERAGE_LEVELS = (0.8, 0.9, 0.95, 0.99)
NOVELTY_THRESHOLD = 0.95
"""From this novelty on, an image is called new: of training-like images one in twenty is."""


@dataclass(frozen=True)
class Coverage:
    """Sets, or intervals of numbers, that were asked to hold the right answer with a certain share.

    Attributes
    ----------
    level : float
        What was asked for.
    coverage : Interval
        The share that holds it; of several targets, on average.
    size : float
        Mean number of classes in a set; of a regression, the mean width.
    single : float
        Share of sets of one class; NaN of a regression.
    """

    level: float
    coverage: Interval
    size: float
    single: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        coverage_dict = {
            "level": self.level,
            "coverage": self.coverage.value,
            "low": self.coverage.low,
            "high": self.coverage.high,
        }
        return {**coverage_dict, "size": self.size, "single": None if np.isnan(self.single) else self.single}


def compute_coverage(evaluation: Evaluation) -> list[Coverage]:
    """At several levels; none where the model has no sets."""
    model = evaluation.model
    conformal = model.trust.conformal
    if conformal is None or model.task == "multilabel":
        return []
    coverages = []
    for level in COVERAGE_LEVELS:
        if not np.isfinite(conformal.score_quantile(level)).all():
            continue  # too few held-out images to say
        if model.task == "regression":
            intervals = conformal.predict_intervals(evaluation.predicted, level)
            truth = np.reshape(evaluation.truth, intervals.shape[:2])
            is_covered = ((intervals[..., 0] <= truth) & (truth <= intervals[..., 1])).mean(axis=1)
            coverages.append(
                _make_coverage(level, is_covered, (intervals[..., 1] - intervals[..., 0]).mean(axis=1), np.nan)
            )
        else:
            prediction_sets = conformal.predict_sets(evaluation.predicted, level)
            set_sizes = prediction_sets.sum(axis=1)
            is_covered = prediction_sets[np.arange(len(prediction_sets)), evaluation.judged.y]
            coverages.append(_make_coverage(level, is_covered.astype(float), set_sizes, float((set_sizes == 1).mean())))
    return coverages


def _make_coverage(
    level: float, is_covered: NDArray[np.float64], sizes: NDArray[Any], singleton_share: float
) -> Coverage:
    low, high = wilson_interval(is_covered.sum(), len(is_covered))
    return Coverage(
        level, Interval(float(is_covered.mean()), float(low), float(high)), float(sizes.mean()), singleton_share
    )


def summarize_novelty(evaluation: Evaluation) -> dict[str, Any] | None:
    """How many rows look new, and how right the model is of them and of the others; None where that is not known."""
    novelty = evaluation.novelty
    if novelty is None:
        return None
    is_novel = novelty >= NOVELTY_THRESHOLD
    summary: dict[str, Any] = {
        "from": NOVELTY_THRESHOLD,
        "share": float(is_novel.mean()),
        "median": float(np.median(novelty)),
    }
    if evaluation.model.task != "regression":
        is_correct = evaluation.judged.is_correct
        for name, rows in (("right_of_new", is_novel), ("right_of_others", ~is_novel)):
            summary[name] = float(is_correct[rows].mean()) if rows.any() else None
    return summary
