"""Settings of a head chosen on inner folds: never on rows that a score is reported for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads, split
from featpipe.errors import ConfigError
from featpipe.names import unknown
from featpipe.heads.balance import Balanced
from featpipe.training.rows import Rows

if TYPE_CHECKING:
    from featpipe.training.fitting import Plan

__all__ = ["METRICS", "Choice", "choose_strength", "inner_folds", "scorer_of", "search", "subset"]

METRICS: dict[str, dict[str, str]] = {  # by task: what people name, and what scikit-learn calls its scorer
    "classification": {
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced_accuracy",
        "macro_f1": "f1_macro",
        "log_loss": "neg_log_loss",
        "roc_auc": "roc_auc_ovr",
    },
    "multilabel": {
        "mean_average_precision": "average_precision",
        "micro_f1": "f1_micro",
        "macro_f1": "f1_macro",
        "exact_match": "accuracy",
    },
    "regression": {
        "r2": "r2",
        "mae": "neg_mean_absolute_error",
        "rmse": "neg_root_mean_squared_error",
    },
}
"""What settings and heads can be chosen by; the first is the default."""

INNER_SEED = 1  # other folds than those that a score is reported for
INNER_FOLDS = 5


def scorer_of(task: str, metric: str | None) -> str:
    """What scikit-learn calls a metric."""
    known = METRICS[task]
    if metric is None:
        return next(iter(known.values()))
    if metric not in known:
        raise unknown("metric", metric, known)
    return known[metric]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and from what.

    Attributes
    ----------
    settings : dict
        The chosen values, by setting.
    metric : str
    tried : list of dict
        For each candidate its ``settings``, and ``score`` and ``spread`` over the inner folds.
    how : str
        For people.
    """

    settings: dict[str, Any]
    metric: str
    tried: list[dict[str, Any]] = field(default_factory=list)
    how: str = ""

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it, once the values are plain."""
        return {"settings": self.settings, "metric": self.metric, "how": self.how, "tried": self.tried}


def inner_folds(rows: Rows, task: str) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]] | None:
    """Five folds, or as many as the rarest class allows; None if there is one image of a class."""
    for k in (INNER_FOLDS, 3, 2):
        try:
            return rows.folds(task, k, INNER_SEED)
        except ConfigError:
            continue
    return None


def search(plan: Plan, rows: Rows, grid: Mapping[str, Sequence[object]]) -> Choice:
    """Try every combination of some settings with scikit-learn's search."""
    from sklearn.model_selection import GridSearchCV

    scoring = scorer_of(plan.task, plan.metric)
    folds = inner_folds(rows, plan.task) or rows.folds(plan.task, 2, INNER_SEED)  # the second says which class is short
    first = {key: values[0] for key, values in grid.items()}
    estimator = heads.build(plan.head, plan.task, params={**plan.params, **first}, random_state=plan.random_state)
    addressed = {_address(estimator, key): list(values) for key, values in grid.items()}
    if plan.balance:
        estimator = Balanced(estimator, plan.balance, plan.random_state)
        addressed = {f"estimator__{key}": values for key, values in addressed.items()}
    found = GridSearchCV(estimator, addressed, scoring=scoring, cv=folds, n_jobs=plan.jobs, refit=False)
    found.set_params(error_score="raise").fit(rows.X, rows.y)
    results = found.cv_results_
    tried = [
        {"settings": {_short(key): value for key, value in candidate.items()}, "score": float(mean), "spread": float(sd)}
        for candidate, mean, sd in zip(
            results["params"], results["mean_test_score"], results["std_test_score"], strict=True
        )
    ]
    best = max(tried, key=lambda one: one["score"])
    return Choice(best["settings"], plan.metric or next(iter(METRICS[plan.task])), tried, _how(rows, len(tried), folds))


def _how(rows: Rows, candidates: int, folds: Sequence[Any]) -> str:
    return f"best of {candidates} on {len(folds)} inner folds of {len(rows):,} rows"


def _short(key: str) -> str:
    return key.removeprefix("estimator__").removeprefix("head__")


def _address(estimator: Any, key: str) -> str:
    return f"head__{key}" if f"head__{key}" in estimator.get_params() else key


def subset(rows: Rows, most: int, seed: int = 0) -> Rows:
    """At most so many of the rows, in memory: those whose keys are smallest."""
    if len(rows) > most:
        rows = rows.take(np.sort(np.argsort(split.key(rows.digests, seed), kind="stable")[:most]))
    return rows.loaded()
