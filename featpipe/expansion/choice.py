"""Which method, judged on images that were not trained on, and the head that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.errors import ConfigError
from featpipe.expansion.arrivals import ExpansionData
from featpipe.expansion.case import ExpansionContext
from featpipe.expansion.measure import MethodEvaluator, MethodOutcome, TrainingCurves
from featpipe.expansion.memory import compute_memory_bytes
from featpipe.expansion.methods import METHODS, make_regrouped_head
from featpipe.expansion.step import IncrementalStep
from featpipe.heads.statistics import find_statistics_kind
from featpipe.progress import Progress

__all__ = ["SelectedMethod", "select_and_fit"]

BASELINE_METHODS = ("joint", "naive")  # what a method is compared with


@dataclass(frozen=True, eq=False)
class SelectedMethod:
    """The chosen method, its head, and how all compared.

    Attributes
    ----------
    method : str
    pipeline : Pipeline
    step : Step
        With all rows, of which the head was made.
    outcomes : tuple of Outcome
        The chosen method first.
    judge : Judge or None
    recommended : str or None
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
    """Judge methods where there is something to judge by, then learn from all rows.

    Raises
    ------
    ConfigError
        If the method lacks what it needs, or there is nothing to compare methods by.
    """
    full_step = context.make_step(context.data)
    if not len(context.data.new) and not context.class_mapping.new_classes and method is None:
        return _fit_regrouped(full_step)
    if method is None:
        method = _select_default_method(full_step)
        context.note(f"method: {method}, {METHODS[method].summary}")
    unavailable = {
        name: reason for name in METHODS if (reason := METHODS[name].missing_requirement(full_step)) is not None
    }
    available = [name for name in METHODS if name not in unavailable]
    if method in unavailable:
        raise ConfigError(f"{method} {unavailable[method]}. What works: {', '.join(available)}")
    evaluation_data = context.data.with_holdout()
    if not len(evaluation_data.test):
        if method == "all":
            raise ConfigError("methods are compared on images to judge by, and there are none: give --test CACHE")
        context.note("there are no images to judge by: give --test CACHE, or labels with a split")
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
    """Classes left out, joined or renamed, and nothing to learn."""
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
        context.progress(Progress("bar", "comparing methods", len(outcomes), len(names), "methods"))
    recommended = _recommend_method(context.budget, evaluator, outcomes, correct_by_method) if method == "all" else None
    chosen = recommended or method
    ordered_outcomes = (outcomes[chosen], *(outcome for name, outcome in outcomes.items() if name != chosen))
    needs_refit = len(evaluation_data.new) < len(context.data.new)  # those that were held out are learnt too
    pipeline = METHODS[chosen].fit(full_step, None) if needs_refit else pipelines[chosen]
    return SelectedMethod(chosen, pipeline, full_step, ordered_outcomes, evaluator, recommended, unavailable)


def _recommend_method(
    budget: int | None,
    evaluator: MethodEvaluator,
    outcomes: Mapping[str, MethodOutcome],
    correct_by_method: Mapping[str, NDArray[np.bool_]],
) -> str:
    """Of the methods that need no old images, the one that keeps least and is not told apart from the best."""
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
