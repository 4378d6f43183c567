"""Compare methods on test images, select one, and fit it on all data."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.errors import ConfigError
from featpipe.heads import BayesianRidgeClassifier, find_statistics_kind, get_base_head
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.dataset import ExpansionData
from featpipe.incremental.methods import METHODS, make_regrouped_head
from featpipe.incremental.metrics import MethodEvaluator, MethodOutcome, TrainingCurves
from featpipe.incremental.problem import IncrementalStep
from featpipe.incremental.retention import compute_memory_bytes
from featpipe.metrics import Note, format_note
from featpipe.model import Model
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
    unavailable : mapping from method to the reason, a note
    """

    method: str
    pipeline: Pipeline
    step: IncrementalStep
    outcomes: tuple[MethodOutcome, ...] = ()
    evaluator: MethodEvaluator | None = None
    recommended: str | None = None
    unavailable: Mapping[str, Note] = field(default_factory=dict)

    def get_head_name(self, model: Model) -> str:
        """The name of the head: ``statistics`` replaces heads of the old model that have no closed form."""
        head = get_base_head(self.pipeline[-1])
        if type(head) is type(get_base_head(model.head[-1])):
            return model.head_name
        return "ridge" if isinstance(head, BayesianRidgeClassifier) else "lda"


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
        raise ConfigError(f"{method} {format_note(unavailable[method])}. Available methods: {', '.join(available)}")
    evaluation_data = context.data.with_holdout()
    if not len(evaluation_data.test):
        if method == "all":
            raise ConfigError("methods are compared on test images, and there are none; give --test CACHE")
        logger.info("there are no test images, so nothing is measured: give --test CACHE, or labels with a split")
        return SelectedMethod(method, METHODS[method].fit(full_step, None), full_step, unavailable=unavailable)
    compared = available if method == "all" else dict.fromkeys((method, *BASELINE_METHODS))
    candidates = [name for name in compared if name in available]
    return _compare_methods(context, method, candidates, evaluation_data, full_step, unavailable)


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
    is_renaming = np.array_equal(step.class_mapping.new_codes, np.arange(len(step.class_mapping.new_codes)))
    statistics = METHODS["statistics"]
    if is_renaming or not find_statistics_kind(step.pipeline)[1] or statistics.missing_requirement(step) is not None:
        return SelectedMethod("regroup", make_regrouped_head(step), step)
    return SelectedMethod("statistics", statistics.fit(step, None), step)


def _compare_methods(
    context: ExpansionContext,
    method: str,
    names: Sequence[str],
    evaluation_data: ExpansionData,
    full_step: IncrementalStep,
    unavailable: Mapping[str, Note],
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
        outcomes[name] = evaluator.make_outcome(
            name,
            correct_by_method[name],
            bytes=compute_memory_bytes(name, step),
            seconds=seconds,
            curves=vars(curves.downsample()) if curves.epochs else {},
        )
        context.progress(Progress("comparing methods", len(outcomes), len(names), "methods"))
    recommended = _recommend_method(context.budget, evaluator, outcomes, correct_by_method) if method == "all" else None
    chosen = recommended or method
    ordered_outcomes = (outcomes[chosen], *(outcome for name, outcome in outcomes.items() if name != chosen))
    needs_refit = len(evaluation_data.new) < len(context.data.new)  # the final fit includes the held-out rows
    pipeline = METHODS[chosen].fit(full_step, None) if needs_refit else pipelines[chosen]
    return SelectedMethod(chosen, pipeline, full_step, ordered_outcomes, evaluator, recommended, unavailable)


def _recommend_method(
    budget: int | None,
    evaluator: MethodEvaluator,
    outcomes: Mapping[str, MethodOutcome],
    correct_by_method: Mapping[str, NDArray[np.bool_]],
) -> str:
    """The method with the least retained data, baselines excepted, that is not significantly worse than the best."""
    max_bytes = math.inf if budget is None else budget
    affordable = [name for name in outcomes if name not in BASELINE_METHODS and outcomes[name].bytes <= max_bytes]
    if not affordable:
        return "joint" if "joint" in outcomes else next(iter(outcomes))
    best = max(affordable, key=lambda name: correct_by_method[name].mean())

    def is_equivalent(name: str) -> bool:
        difference = evaluator.paired_difference(correct_by_method[best], correct_by_method[name])
        return name == best or difference.low <= 0

    equivalent = filter(is_equivalent, affordable)
    return min(equivalent, key=lambda name: (outcomes[name].bytes, -correct_by_method[name].mean()))
