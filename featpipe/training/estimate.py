"""How good a head is, from rows that it was not fitted on and that chose none of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.calibration import Calibration, calibration_error, fit_temperature
from featpipe.errors import ConfigError
from featpipe.progress import Progress, Tell
from featpipe.scores import Scores, score
from featpipe.training.fitting import TUNING_ROWS, Fitted, Plan
from featpipe.training.rows import Rows
from featpipe.training.selection import subset
from featpipe.trust import Conformal

__all__ = ["LOWER_IS_BETTER", "Estimate", "calibrated_on_folds", "cross_validate", "main_metric"]

Split = tuple[NDArray[np.int64], NDArray[np.int64]]

CALIBRATION_FOLDS = 3  # for heads without probabilities, where no estimate is asked for

LOWER_IS_BETTER = ("log_loss", "mae", "rmse")


def main_metric(scores: Scores, metric: str | None = None) -> tuple[str, float]:
    """The score that heads are compared by: its name, and its value with the sign that makes larger the better."""
    name = metric if metric is not None and metric in scores.metrics else next(iter(scores.metrics))
    value = float(scores.metrics[name].value)
    return name, -value if name in LOWER_IS_BETTER else value


@dataclass(frozen=True, eq=False)
class Estimate:
    """What cross-validation found.

    Attributes
    ----------
    scores : Scores
        Of the predictions of all folds together.
    folds : tuple of float
        The main score of each fold.
    calibration : Calibration or None
        Fitted on the predictions of all folds.
    errors : tuple of two floats, or None
        The calibration error before and after; after, each fold was calibrated on the others.
    how : str
        For people.
    conformal : Conformal or None
        From the predictions of all folds; None of several labels.
    held, answers : ndarray of shape (h,) and (h, k)
        Positions among the rows, ascending, and what was predicted for them where they were held out.
    """

    scores: Scores
    folds: tuple[float, ...]
    calibration: Calibration | None
    errors: tuple[float, float] | None
    how: str
    conformal: Conformal | None = None
    held: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    answers: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def spread(self) -> float:
        """Standard deviation of the main score over the folds."""
        return float(np.std(self.folds, ddof=1)) if len(self.folds) > 1 else 0.0

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it."""
        found = {"how": self.how, "folds": len(self.folds), "by_fold": list(self.folds), "spread": self.spread}
        if self.calibration is not None and self.errors is not None:
            before, after = self.errors
            found["calibration"] = {
                "temperature": self.calibration.temperature,
                "error_before": before,
                "error_after": after,
            }
        return {**found, **self.scores.to_dict()}


def cross_validate(
    plan: Plan, rows: Rows, k: int, *, calibrate: bool, tell: Tell, metric: str | None = None
) -> Estimate:
    """Fit on all folds but one, k times, with the settings chosen anew each time; or on what came before a time."""
    found = _fitted_folds(plan, rows, rows.splits(plan.task, k), tell)
    calibrate = calibrate or (plan.task != "regression" and not found[0].fitted.gives_probabilities)
    if calibrate and len(found) == 1:
        found = _halves(found[0], rows)
    held = np.concatenate([fold.held for fold in found])
    calibration, errors = None, None
    if calibrate:
        answers, calibration, errors = _calibrated(plan, found, rows.y)
    else:
        answers = [fold.fitted.answers(fold.X) for fold in found]
    truth = _truth(plan.task, rows)
    order = np.argsort(held, kind="stable")
    together = np.concatenate(answers)[order]
    scores = score(plan.task, truth[held[order]], together, rows.classes)
    name, _ = main_metric(scores, metric)
    each = [
        score(plan.task, truth[fold.held], answer, rows.classes, bootstrap=0).metrics
        for fold, answer in zip(found, answers, strict=True)
    ]
    by_fold = tuple(metrics[name].value for metrics in each if name in metrics)
    conformal = None if plan.task == "multilabel" else Conformal.of(np.concatenate(answers), rows.y[held])
    return Estimate(scores, by_fold, calibration, errors, _how(rows, k, len(held)), conformal, held[order], together)


@dataclass(frozen=True, eq=False)
class _Fold:
    """The rows that were held out, their features, and what was fitted on the others."""

    held: NDArray[np.int64]
    X: Any
    fitted: Fitted


def _fitted_folds(plan: Plan, rows: Rows, splits: Sequence[Split], tell: Tell) -> list[_Fold]:
    found = []
    for fit, held in splits:
        found.append(_Fold(held, rows.take(held).X, plan.fit(rows.take(fit))))
        tell(Progress("bar", "cross-validating", len(found), len(splits), "folds"))
    return found


def _halves(fold: _Fold, rows: Rows) -> list[_Fold]:
    """Every other row, so that each can be calibrated on rows that are not its own."""
    halves = (fold.held[::2], fold.held[1::2])
    return [_Fold(held, rows.take(held).X, fold.fitted) for held in halves]


def _calibrated(
    plan: Plan, folds: Sequence[_Fold], y: NDArray[Any]
) -> tuple[list[NDArray[np.float64]], Calibration, tuple[float, float]]:
    """The answers of each fold, calibrated on the others; the calibration by all; and the errors."""
    logits = [fold.fitted.logits(fold.X) for fold in folds]
    truths = [y[fold.held] for fold in folds]
    multilabel = plan.task == "multilabel"

    def fitted(chosen: Sequence[int]) -> Calibration:
        return Calibration(
            fit_temperature(np.concatenate([logits[i] for i in chosen]), np.concatenate([truths[i] for i in chosen]))
        )

    every = list(range(len(folds)))
    answers = [fitted([j for j in every if j != i]).probabilities(logits[i], multilabel) for i in every]
    truth = np.concatenate(truths)
    before = calibration_error(Calibration().probabilities(np.concatenate(logits), multilabel), truth)
    after = calibration_error(np.concatenate(answers), truth)
    return answers, fitted(every), (before, after)


def calibrated_on_folds(plan: Plan, rows: Rows, tell: Tell) -> Calibration:
    """A temperature from cross-validation alone, for a head that has no probabilities of its own."""
    rows = subset(rows, TUNING_ROWS) if rows.streamed else rows  # one number
    for k in (CALIBRATION_FOLDS, 2):
        try:
            splits = rows.folds(plan.task, k)
        except ConfigError:
            continue
        return _calibrated(plan, _fitted_folds(plan, rows, splits, tell), rows.y)[1]
    raise ConfigError(
        f"head {plan.head!r} has scores and no probabilities; they are calibrated on held-out rows, and a class has "
        "one image only: take logistic, or give more images"
    )


def _truth(task: str, rows: Rows) -> NDArray[Any]:
    return np.array(rows.classes, dtype=object)[rows.y] if task == "classification" else rows.y


def _day(moment: Any) -> str:
    """A time for people: a date without its midnight, a number as it is written."""
    if isinstance(moment, np.datetime64):
        return str(moment.astype("datetime64[s]")).removesuffix("T00:00:00")
    return f"{moment:.15g}" if isinstance(moment, float) else str(moment)


def _how(rows: Rows, k: int, held: int) -> str:
    kept = "" if rows.groups is None else f", {len(np.unique(rows.groups)):,} groups kept together"
    if rows.since is not None:
        return f"fitted on what is before {_day(rows.since)}, judged by the {held:,} images since then{kept}"
    if rows.times is not None:
        return f"{k} spans of time, each predicted from earlier ones: {held:,} of {len(rows):,} training images{kept}"
    return f"{k}-fold cross-validation on the {len(rows)} training images{kept}"
