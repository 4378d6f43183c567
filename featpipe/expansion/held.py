"""What heads say of rows that they did not see: from that an expanded model's probabilities and sets are calibrated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import split
from featpipe.calibration import Calibration, fit_temperature, logits_of
from featpipe.expansion.arrivals import Side
from featpipe.expansion.step import Step, Watch
from featpipe.trust import Conformal

__all__ = ["Held", "held_by_folds", "held_in_halves"]

Array = NDArray[np.float64]
Fit = Callable[[Step, Watch | None], Any]

FOLDS = 3
LEAST = 10  # rows, from which a temperature is found


@dataclass(frozen=True, eq=False)
class Held:
    """Scores of rows that were held out, in parts.

    Attributes
    ----------
    logits : tuple of ndarray of shape (m, k)
    truths : tuple of ndarray of shape (m,)
        Class codes.
    k : int
    """

    logits: tuple[Array, ...]
    truths: tuple[NDArray[np.int64], ...]
    k: int

    def __len__(self) -> int:
        return sum(map(len, self.truths))

    @property
    def classes(self) -> NDArray[np.int64]:
        """Those that there is a row of."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *self.truths]))

    @cached_property
    def temperature(self) -> float | None:
        """That with the least log loss; None of too few rows."""
        return self._temperature(range(len(self.truths))) if len(self) >= LEAST else None

    def _temperature(self, parts: Any) -> float:
        return fit_temperature(
            np.concatenate([self.logits[i] for i in parts]), np.concatenate([self.truths[i] for i in parts])
        )

    def conformal(self, calibrate: bool) -> Conformal | None:
        """What sets are made from, each part calibrated on the others; None where a class has no row."""
        if len(self.classes) < self.k or len(self.truths) < 2:
            return None
        every = range(len(self.truths))
        answers = [
            Calibration(self._temperature([j for j in every if j != i]) if calibrate else 1.0).probabilities(logits)
            for i, logits in enumerate(self.logits)
        ]
        return Conformal.of(np.concatenate(answers), np.concatenate(self.truths))


def held_in_halves(pipeline: Any, rows: Side, k: int) -> Held:
    """Rows that no head was fitted on, every other one in a part of its own."""
    halves = [rows.take(np.arange(start, len(rows), 2)) for start in (0, 1) if len(rows) > start]
    return Held(tuple(logits_of(pipeline, half.X) for half in halves), tuple(half.y for half in halves), k)


def held_by_folds(step: Step, fit: Fit, *, old: bool) -> Held:
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
    n = len(step.old) if old else 0
    rows = step.old + step.new if old else step.new
    several = np.flatnonzero(rows.distinct(step.k)[rows.y] >= FOLDS) if len(rows) else np.zeros(0, np.intp)
    if len(several) < LEAST:
        return Held((), (), step.k)
    some, logits, truths = rows.take(several), [], []
    for _, held in split.folds(some.digests, np.unique(some.y, return_inverse=True)[1], k=FOLDS):
        stays = ~np.isin(rows.keys, some.keys[held])
        part = replace(step, old=step.old.take(stays[:n]) if old else step.old, new=step.new.take(stays[n:]))
        logits.append(logits_of(fit(part, None), some.X[held]))
        truths.append(some.y[held])
    return Held(tuple(logits), tuple(truths), step.k)
