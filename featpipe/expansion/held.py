"""What heads say of rows that they did not see: from that an expanded model's probabilities and sets are calibrated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import split
from featpipe.calibration import Calibration, compute_logits, fit_temperature
from featpipe.expansion.arrivals import LabeledEmbeddings
from featpipe.expansion.step import EpochCallback, IncrementalStep
from featpipe.trust import ConformalPredictor

__all__ = ["HeldOutScores", "cross_fit_scores", "score_halves"]

Array = NDArray[np.float64]
FitMethod = Callable[[IncrementalStep, EpochCallback | None], Any]

N_FOLDS = 3
MIN_CALIBRATION_ROWS = 10  # rows, from which a temperature is found


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """Scores of rows that were held out, in parts.

    Attributes
    ----------
    logits : tuple of ndarray of shape (m, k)
    truths : tuple of ndarray of shape (m,)
        Class codes.
    k : int
    """

    logits: tuple[Array, ...]
    labels: tuple[NDArray[np.int64], ...]
    k: int

    def __len__(self) -> int:
        return sum(map(len, self.labels))

    @property
    def present_classes(self) -> NDArray[np.int64]:
        """Those that there is a row of."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *self.labels]))

    @cached_property
    def temperature(self) -> float | None:
        """That with the least log loss; None of too few rows."""
        return self._fit_temperature(range(len(self.labels))) if len(self) >= MIN_CALIBRATION_ROWS else None

    def _fit_temperature(self, part_numbers: Any) -> float:
        return fit_temperature(
            np.concatenate([self.logits[i] for i in part_numbers]),
            np.concatenate([self.labels[i] for i in part_numbers]),
        )

    def make_conformal(self, calibrate: bool) -> ConformalPredictor | None:
        """What sets are made from, each part calibrated on the others; None where a class has no row."""
        if len(self.present_classes) < self.k or len(self.labels) < 2:
            return None
        part_numbers = range(len(self.labels))
        probabilities = [
            Calibration(
                self._fit_temperature([j for j in part_numbers if j != i]) if calibrate else 1.0
            ).compute_probabilities(logits)
            for i, logits in enumerate(self.logits)
        ]
        return ConformalPredictor.from_predictions(np.concatenate(probabilities), np.concatenate(self.labels))


def score_halves(pipeline: Any, rows: LabeledEmbeddings, k: int) -> HeldOutScores:
    """Rows that no head was fitted on, every other one in a part of its own."""
    halves = [rows.take(np.arange(start, len(rows), 2)) for start in (0, 1) if len(rows) > start]
    return HeldOutScores(
        tuple(compute_logits(pipeline, half.X) for half in halves), tuple(half.y for half in halves), k
    )


def cross_fit_scores(step: IncrementalStep, fit: FitMethod, *, include_old: bool) -> HeldOutScores:
    """A third of the rows after another is left out of the step, and scored by the head that comes of it.

    Parameters
    ----------
    step : Step
    fit : callable
        Of a method.
    old : bool
        Whether rows that the model was trained on are held out too: of a method that learns nothing from that model.

    Notes
    -----
    Rows of a class of which there are fewer images than folds are never left out: the class would have none.
    """
    n_old = len(step.old) if include_old else 0
    rows = step.old + step.new if include_old else step.new
    eligible = np.flatnonzero(rows.count_distinct(step.k)[rows.y] >= N_FOLDS) if len(rows) else np.zeros(0, np.intp)
    if len(eligible) < MIN_CALIBRATION_ROWS:
        return HeldOutScores((), (), step.k)
    candidates, logits, labels = rows.take(eligible), [], []
    for _, held_out in split.make_folds(candidates.digests, np.unique(candidates.y, return_inverse=True)[1], k=N_FOLDS):
        is_train = ~np.isin(rows.keys, candidates.keys[held_out])
        fold_step = replace(
            step, old=step.old.take(is_train[:n_old]) if include_old else step.old, new=step.new.take(is_train[n_old:])
        )
        logits.append(compute_logits(fit(fold_step, None), candidates.X[held_out]))
        labels.append(candidates.y[held_out])
    return HeldOutScores(tuple(logits), tuple(labels), step.k)
