"""Compare methods on test images, select one, and fit it on all data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe import splits
from featpipe.errors import ConfigError
from featpipe.heads import find_statistics_kind
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.dataset import ExpansionData, LabeledEmbeddings
from featpipe.incremental.methods import METHODS, make_regrouped_head
from featpipe.incremental.metrics import MethodEvaluator, MethodOutcome, TrainingCurves
from featpipe.incremental.problem import EpochCallback, IncrementalStep
from featpipe.incremental.retention import compute_memory_bytes
from featpipe.metrics import Calibration, compute_logits, fit_temperature
from featpipe.model import ConformalPredictor
from featpipe.runtime import Progress

logger = logging.getLogger(__name__)

BASELINE_METHODS = ("joint", "naive")  # upper and lower baseline


@dataclass(frozen=True, eq=False)
class SelectedMethod:
    """The selected method, its head, and the comparison.

    Attributes
    ----------
    method : str
    pipeline : Pipeline
    step : IncrementalStep
        With all rows; the head was fitted on it.
    outcomes : tuple of MethodOutcome
        The selected method first.
    evaluator : MethodEvaluator or None
        None without test images.
    recommended : str or None
        The method that ``all`` recommends.
    unavailable : mapping from method to the reason
    """

    method: str
    pipeline: Pipeline
    step: IncrementalStep
    outcomes: tuple[MethodOutcome, ...] = ()
    evaluator: MethodEvaluator | None = None
    recommended: str | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)


def select_and_fit(context: ExpansionContext, method: str | None) -> SelectedMethod:
    """Compare methods if there are test images, then fit the selected one on all rows.

    Raises
    ------
    ConfigError
        If the method lacks what it needs, or ``all`` has no test images.
    """
    full_step = context.make_step(context.data)
    if not len(context.data.new) and not context.class_mapping.new_classes and method is None:
        return _fit_regrouped(full_step)
    if method is None:
        method = _select_default_method(full_step)
        logger.info(f"method: {method}, {METHODS[method].summary}")
    unavailable = {
        name: reason for name in METHODS if (reason := METHODS[name].missing_requirement(full_step)) is not None
    }
    available = [name for name in METHODS if name not in unavailable]
    if method in unavailable:
        raise ConfigError(f"{method} {unavailable[method]}. What works: {', '.join(available)}")
    evaluation_data = context.data.with_holdout()
    if not len(evaluation_data.test):
        if method == "all":
            raise ConfigError("methods are compared on test images, and there are none: give --test CACHE")
        logger.info("there are no test images, so nothing is measured: give --test CACHE, or labels with a split")
        return SelectedMethod(method, METHODS[method].fit(full_step, None), full_step, unavailable=unavailable)
    candidates = available if method == "all" else [name for name in (method, *BASELINE_METHODS) if name in available]
    return _compare_methods(context, method, list(dict.fromkeys(candidates)), evaluation_data, full_step, unavailable)


def _select_default_method(step: IncrementalStep) -> str:
    missing = {name: method.missing_requirement(step) for name, method in METHODS.items()}
    if step.has_all_old_rows and missing["joint"] is None:
        return "joint"
    if find_statistics_kind(step.pipeline)[1] and missing["statistics"] is None:
        return "statistics"
    if missing["replay"] is None and step.replay_memory is not None and len(step.replay_memory.rows):
        return "replay"
    return next(name for name in ("statistics", "frozen-old", "distill") if missing[name] is None or name == "distill")


def _fit_regrouped(step: IncrementalStep) -> SelectedMethod:
    """Drop, merge or rename classes without new images."""
    is_renaming = np.array_equal(step.class_mapping.new_codes, np.arange(len(step.class_mapping.new_codes)))
    if (
        not is_renaming
        and find_statistics_kind(step.pipeline)[1]
        and METHODS["statistics"].missing_requirement(step) is None
    ):
        return SelectedMethod("statistics", METHODS["statistics"].fit(step, None), step)
    return SelectedMethod("regroup", make_regrouped_head(step), step)


def _compare_methods(
    context: ExpansionContext,
    method: str,
    names: Sequence[str],
    evaluation_data: ExpansionData,
    full_step: IncrementalStep,
    unavailable: Mapping[str, str],
) -> SelectedMethod:
    step = context.make_step(evaluation_data)
    evaluator = MethodEvaluator.from_step(evaluation_data.test, step, *context.get_past_steps())
    correct_by_method: dict[str, NDArray[np.bool_]] = {}
    outcomes: dict[str, MethodOutcome] = {}
    pipelines: dict[str, Pipeline] = {}
    for name in names:
        curves, started = TrainingCurves(), perf_counter()
        pipelines[name] = METHODS[name].fit(step, evaluator.make_epoch_callback(curves))
        seconds = round(perf_counter() - started, 3)
        correct_by_method[name] = evaluator.predict_correct(pipelines[name])
        curve_points = vars(curves.downsample()) if curves.epochs else {}
        memory_bytes = compute_memory_bytes(name, step)
        outcomes[name] = evaluator.make_outcome(
            name, correct_by_method[name], bytes=memory_bytes, seconds=seconds, curves=curve_points
        )
        context.progress(Progress("comparing methods", len(outcomes), len(names), "methods"))
    recommended = _recommend_method(context.budget, evaluator, outcomes, correct_by_method) if method == "all" else None
    chosen = recommended or method
    ordered_outcomes = (outcomes[chosen], *(outcome for name, outcome in outcomes.items() if name != chosen))
    needs_refit = len(evaluation_data.new) < len(context.data.new)  # held-out rows are learnt too
    pipeline = METHODS[chosen].fit(full_step, None) if needs_refit else pipelines[chosen]
    return SelectedMethod(chosen, pipeline, full_step, ordered_outcomes, evaluator, recommended, unavailable)


def _recommend_method(
    budget: int | None,
    evaluator: MethodEvaluator,
    outcomes: Mapping[str, MethodOutcome],
    correct_by_method: Mapping[str, NDArray[np.bool_]],
) -> str:
    """Of the methods without old images, the one with the least retained data that is not worse beyond chance."""
    affordable = [
        name
        for name, outcome in outcomes.items()
        if name not in BASELINE_METHODS and (budget is None or outcome.bytes <= budget)
    ]
    if not affordable:
        return "joint" if "joint" in outcomes else next(iter(outcomes))
    best = max(affordable, key=lambda name: correct_by_method[name].mean())
    equivalent = [
        name
        for name in affordable
        if name == best or evaluator.paired_difference(correct_by_method[best], correct_by_method[name]).low <= 0
    ]
    return min(equivalent, key=lambda name: (outcomes[name].bytes, -correct_by_method[name].mean()))


Array = NDArray[np.float64]
FitMethod = Callable[[IncrementalStep, EpochCallback | None], Any]

N_FOLDS = 3
MIN_CALIBRATION_ROWS = 10  # to fit a temperature


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """Logits of held-out rows, in parts.

    Attributes
    ----------
    logits : tuple of ndarray of shape (m, k)
    labels : tuple of ndarray of shape (m,)
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
        """Codes of the classes that have a row."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *self.labels]))

    @cached_property
    def temperature(self) -> float | None:
        """The temperature with the lowest log loss; None for too few rows."""
        return self._fit_temperature(range(len(self.labels))) if len(self) >= MIN_CALIBRATION_ROWS else None

    def _fit_temperature(self, part_numbers: Any) -> float:
        return fit_temperature(
            np.concatenate([self.logits[i] for i in part_numbers]),
            np.concatenate([self.labels[i] for i in part_numbers]),
        )

    def make_conformal(self, calibrate: bool) -> ConformalPredictor | None:
        """The predictor of prediction sets, each part calibrated on the others; None if a class has no row."""
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
    """Logits of rows that the head was not fitted on, in two parts of every other row."""
    halves = [rows.take(np.arange(start, len(rows), 2)) for start in (0, 1) if len(rows) > start]
    return HeldOutScores(
        tuple(compute_logits(pipeline, half.X) for half in halves), tuple(half.y for half in halves), k
    )


def cross_fit_scores(step: IncrementalStep, fit: FitMethod, *, include_old: bool) -> HeldOutScores:
    """Logits by cross-fitting: each third of the rows is scored by a head that was fitted on the rest.

    Parameters
    ----------
    step : IncrementalStep
    fit : callable
        Of a method.
    include_old : bool
        Whether to hold out old rows too; only for a method that takes nothing from the old head.

    Notes
    -----
    Rows of classes with fewer images than folds are never held out, since no training image might remain.
    """
    n_old = len(step.old) if include_old else 0
    rows = step.old + step.new if include_old else step.new
    eligible = np.flatnonzero(rows.count_distinct(step.k)[rows.y] >= N_FOLDS) if len(rows) else np.zeros(0, np.intp)
    if len(eligible) < MIN_CALIBRATION_ROWS:
        return HeldOutScores((), (), step.k)
    candidates, logits, labels = rows.take(eligible), [], []
    for _, held_out in splits.make_folds(
        candidates.digests, np.unique(candidates.y, return_inverse=True)[1], k=N_FOLDS
    ):
        is_train = ~np.isin(rows.keys, candidates.keys[held_out])
        fold_step = replace(
            step, old=step.old.take(is_train[:n_old]) if include_old else step.old, new=step.new.take(is_train[n_old:])
        )
        logits.append(compute_logits(fit(fold_step, None), candidates.X[held_out]))
        labels.append(candidates.y[held_out])
    return HeldOutScores(tuple(logits), tuple(labels), step.k)
