"""Which method, judged on images that were not trained on, and the head that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.errors import ConfigError
from featpipe.expansion.arrivals import Arrivals
from featpipe.expansion.case import Case
from featpipe.expansion.measure import Curves, Judge, Outcome
from featpipe.expansion.memory import bytes_for
from featpipe.expansion.methods import METHODS, regrouped_head
from featpipe.expansion.step import Step
from featpipe.heads.statistics import kind_for
from featpipe.progress import Progress

__all__ = ["Found", "learnt"]

BESIDE = ("joint", "naive")  # what a method is compared with


@dataclass(frozen=True, eq=False)
class Found:
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
    step: Step
    outcomes: tuple[Outcome, ...] = ()
    judge: Judge | None = None
    recommended: str | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)


def learnt(case: Case, method: str | None) -> Found:
    """Judge methods where there is something to judge by, then learn from all rows.

    Raises
    ------
    ConfigError
        If the method lacks what it needs, or there is nothing to compare methods by.
    """
    whole = case.step(case.rows)
    if not len(case.rows.new) and not case.growth.new and method is None:
        return _regrouped(whole)
    if method is None:
        method = _default(whole)
        case.note(f"method: {method}, {METHODS[method].summary}")
    unavailable = {name: why for name in METHODS if (why := METHODS[name].missing(whole)) is not None}
    working = [name for name in METHODS if name not in unavailable]
    if method in unavailable:
        raise ConfigError(f"{method} {unavailable[method]}. What works: {', '.join(working)}")
    judged = case.rows.held_out()
    if not len(judged.test):
        if method == "all":
            raise ConfigError("methods are compared on images to judge by, and there are none: give --test CACHE")
        case.note("there are no images to judge by: give --test CACHE, or labels with a split")
        return Found(method, METHODS[method].fit(whole, None), whole, unavailable=unavailable)
    compared = working if method == "all" else [name for name in (method, *BESIDE) if name in working]
    return _judged(case, method, list(dict.fromkeys(compared)), judged, whole, unavailable)


def _default(step: Step) -> str:
    missing = {name: method.missing(step) for name, method in METHODS.items()}
    if step.whole and missing["joint"] is None:
        return "joint"
    if kind_for(step.pipeline)[1] and missing["statistics"] is None:
        return "statistics"
    if missing["replay"] is None and step.kept is not None and len(step.kept.rows):
        return "replay"
    return next(name for name in ("statistics", "frozen-old", "distill") if missing[name] is None or name == "distill")


def _regrouped(step: Step) -> Found:
    """Classes left out, joined or renamed, and nothing to learn."""
    renamed = np.array_equal(step.growth.place, np.arange(len(step.growth.place)))
    if not renamed and kind_for(step.pipeline)[1] and METHODS["statistics"].missing(step) is None:
        return Found("statistics", METHODS["statistics"].fit(step, None), step)
    return Found("regroup", regrouped_head(step), step)


def _judged(
    case: Case, method: str, names: Sequence[str], judged: Arrivals, whole: Step, unavailable: Mapping[str, str]
) -> Found:
    step = case.step(judged)
    judge = Judge.of(judged.test, step, *case.past())
    rights: dict[str, NDArray[np.bool_]] = {}
    outcomes: dict[str, Outcome] = {}
    fitted: dict[str, Pipeline] = {}
    for name in names:
        curves, started = Curves(), perf_counter()
        fitted[name] = METHODS[name].fit(step, judge.watch(curves))
        seconds = round(perf_counter() - started, 3)
        rights[name] = judge.right(fitted[name])
        thin = vars(curves.thinned()) if curves.epochs else {}
        keeps = bytes_for(name, step)
        outcomes[name] = judge.outcome(name, rights[name], bytes=keeps, seconds=seconds, curves=thin)
        case.tell(Progress("bar", "comparing methods", len(outcomes), len(names), "methods"))
    recommended = _recommended(case.budget, judge, outcomes, rights) if method == "all" else None
    chosen = recommended or method
    rows = (outcomes[chosen], *(outcome for name, outcome in outcomes.items() if name != chosen))
    again = len(judged.new) < len(case.rows.new)  # those that were held out are learnt too
    pipeline = METHODS[chosen].fit(whole, None) if again else fitted[chosen]
    return Found(chosen, pipeline, whole, rows, judge, recommended, unavailable)


def _recommended(
    budget: int | None, judge: Judge, outcomes: Mapping[str, Outcome], rights: Mapping[str, NDArray[np.bool_]]
) -> str:
    """Of the methods that need no old images, the one that keeps least and is not told apart from the best."""
    within = [
        name for name, outcome in outcomes.items() if name not in BESIDE and (budget is None or outcome.bytes <= budget)
    ]
    if not within:
        return "joint" if "joint" in outcomes else next(iter(outcomes))
    best = max(within, key=lambda name: rights[name].mean())
    close = [name for name in within if name == best or judge.difference(rights[best], rights[name]).low <= 0]
    return min(close, key=lambda name: (outcomes[name].bytes, -rights[name].mean()))
