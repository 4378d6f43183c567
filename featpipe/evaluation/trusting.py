"""Whether sets of answers hold the right one as often as they say, and how new the rows look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.scores import Interval, share_interval

if TYPE_CHECKING:
    from featpipe.evaluation.result import Evaluation

__all__ = ["NEW", "Coverage", "coverage_of", "novelty_summary"]

LEVELS = (0.8, 0.9, 0.95, 0.99)
NEW = 0.95
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
        found = {
            "level": self.level,
            "coverage": self.coverage.value,
            "low": self.coverage.low,
            "high": self.coverage.high,
        }
        return {**found, "size": self.size, "single": None if np.isnan(self.single) else self.single}


def coverage_of(evaluation: Evaluation) -> list[Coverage]:
    """At several levels; none where the model has no sets."""
    model = evaluation.model
    conformal = model.trust.conformal
    if conformal is None or model.task == "multilabel":
        return []
    found = []
    for level in LEVELS:
        if not np.isfinite(conformal.reach(level)).all():
            continue  # too few held-out images to say
        if model.task == "regression":
            ends = conformal.intervals(evaluation.predicted, level)
            truth = np.reshape(evaluation.truth, ends.shape[:2])
            holds = ((ends[..., 0] <= truth) & (truth <= ends[..., 1])).mean(axis=1)
            found.append(_coverage(level, holds, (ends[..., 1] - ends[..., 0]).mean(axis=1), np.nan))
        else:
            sets = conformal.sets(evaluation.predicted, level)
            size = sets.sum(axis=1)
            holds = sets[np.arange(len(sets)), evaluation.judged.y]
            found.append(_coverage(level, holds.astype(float), size, float((size == 1).mean())))
    return found


def _coverage(level: float, holds: NDArray[np.float64], size: NDArray[Any], single: float) -> Coverage:
    low, high = share_interval(holds.sum(), len(holds))
    return Coverage(level, Interval(float(holds.mean()), float(low), float(high)), float(size.mean()), single)


def novelty_summary(evaluation: Evaluation) -> dict[str, Any] | None:
    """How many rows look new, and how right the model is of them and of the others; None where that is not known."""
    novelty = evaluation.novelty
    if novelty is None:
        return None
    new = novelty >= NEW
    found: dict[str, Any] = {"from": NEW, "share": float(new.mean()), "median": float(np.median(novelty))}
    if evaluation.model.task != "regression":
        right = evaluation.judged.right
        for name, rows in (("right_of_new", new), ("right_of_others", ~new)):
            found[name] = float(right[rows].mean()) if rows.any() else None
    return found
