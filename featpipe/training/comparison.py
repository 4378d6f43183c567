"""Several heads on the same folds: one table, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from featpipe import heads
from featpipe.cache import FeatureCache
from featpipe.errors import ConfigError
from featpipe.model import Model
from featpipe.progress import Progress, Tell, quiet
from featpipe.training.estimate import main_metric
from featpipe.training.rows import Rows, training_rows
from featpipe.training.verb import Trained, keeping, plan_of, train_on

__all__ = ["Compared", "Comparison", "compare"]

PREDICTED = 1000


@dataclass(frozen=True)
class Compared:
    """One head of a comparison.

    Attributes
    ----------
    head : str
    metric : str
    score, spread : float
        Cross-validated, and its standard deviation over the folds.
    scores : dict from metric to value
    seconds_to_fit : float
        On all training rows, the choice of settings included.
    seconds_to_predict : float
        For 1,000 rows.
    bytes : int
        Of the head as it is saved.
    chosen : dict
        The settings that were tuned.
    """

    head: str
    metric: str
    score: float
    spread: float
    scores: dict[str, float]
    seconds_to_fit: float
    seconds_to_predict: float
    bytes: int
    chosen: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several heads on the same folds, the best first.

    Attributes
    ----------
    rows : list of Compared
    model : Model
        Of the best head.
    how : str
        How the scores were measured.
    """

    rows: list[Compared]
    model: Model
    how: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"how": self.how, "heads": [dict(vars(row)) for row in self.rows]}


def compare(
    cache: FeatureCache,
    names: Sequence[str] | str = "all",
    *,
    cv: int = 5,
    params: Mapping[str, Mapping[str, object]] | None = None,
    output: str | None = None,
    metric: str | None = None,
    calibrate: bool = False,
    prior: Mapping[str, float] | None = None,
    memory: int | None = None,
    keep: str | None = None,
    groups: Any = None,
    times: Any = None,
    since: Any = None,
    without: Any = None,
    progress: Tell = quiet,
    **how: Any,
) -> Comparison:
    """Train several heads on one cache, and keep the best.

    Parameters
    ----------
    cache : FeatureCache
    names : sequence of str, or "all"
        The heads; all that do the cache's task.
    cv : int
        Folds, the same ones for all heads.
    params : mapping from head to settings, optional
    metric : str, optional
        What the best is chosen by; the first of the task if not given.
    output, calibrate, prior, memory, keep, groups, times, since, without, progress
        As for :func:`featpipe.training.train`.
    **how
        ``tune``, ``grid``, ``balance``, ``jobs``, ``one_standard_error``, ``random_state`` likewise.

    Returns
    -------
    Comparison

    Raises
    ------
    ConfigError
        If a head is unknown or there are fewer than two folds: without an estimate there is nothing to compare.
    """
    if cv < 2 and since is None:
        raise ConfigError(f"cv is {cv}; heads are compared on 2 folds or more")
    kept = keeping(keep)
    rows = training_rows(cache, output, groups=groups, times=times, since=since, without=without, memory=memory)
    wanted = heads.names(cache.task) if names == "all" or list(names) == ["all"] else list(dict.fromkeys(names))
    given = params or {}
    plans = [plan_of(cache, rows, name, given.get(name, {}), metric=metric, **how) for name in wanted]
    found: list[tuple[Compared, Trained]] = []
    for plan in plans:
        progress(Progress("note", plan.head if since is not None else f"{plan.head}: {cv} folds"))
        trained = train_on(cache, rows, plan, cv, calibrate=calibrate, prior=prior, progress=progress)
        found.append((_compared(trained, rows, metric), trained))
    found.sort(key=lambda pair: -_goodness(pair[0], pair[1]))
    table, best = [row for row, _ in found], found[0][1]
    assert best.estimate is not None
    model = best.model(cache, rows, output, given.get(best.plan.head, {}), kept)
    comparison = Comparison(table, model, best.estimate.how)
    comparison.model.scores["comparison"] = comparison.to_dict()["heads"]
    return comparison


def _goodness(row: Compared, trained: Trained) -> float:
    assert trained.estimate is not None
    return main_metric(trained.estimate.scores, row.metric)[1]


def _compared(trained: Trained, rows: Rows, metric: str | None) -> Compared:
    estimate, fitted = trained.estimate, trained.fitted
    assert estimate is not None
    name, _ = main_metric(estimate.scores, metric)
    few = np.asarray(rows.X[: min(len(rows), PREDICTED)], np.float32)
    many = np.resize(few, (PREDICTED, few.shape[1]))
    started = perf_counter()
    fitted.estimator.predict(many)
    seconds = perf_counter() - started
    return Compared(
        head=trained.plan.head,
        metric=name,
        score=estimate.scores.metrics[name].value,
        spread=estimate.spread,
        scores={key: interval.value for key, interval in estimate.scores.metrics.items()},
        seconds_to_fit=fitted.seconds_to_fit + fitted.seconds_to_tune,
        seconds_to_predict=seconds,
        bytes=len(heads.dumps(fitted.estimator)),
        chosen={} if fitted.choice is None else dict(fitted.choice.settings),
    )
