"""Settings of a head chosen on inner folds: never on rows that a score is reported for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import UndefinedMetricWarning

from featpipe import heads, split
from featpipe.calibration import logits_of, sigmoid_loss
from featpipe.errors import ConfigError
from featpipe.heads.balance import Balanced, resample
from featpipe.heads.path import STRENGTHS, SoftmaxRegressionCV, best_strength, of_folds
from featpipe.names import unknown
from featpipe.training.rows import Rows

if TYPE_CHECKING:
    from featpipe.training.fitting import Plan

__all__ = ["METRICS", "Choice", "choose_strength", "inner_folds", "scorer_of", "search", "shown", "subset"]

METRICS: dict[str, dict[str, str]] = {  # by task: what people name, and scikit-learn's name of the scorer
    "classification": {
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced_accuracy",
        "macro_f1": "f1_macro",
        "log_loss": "neg_log_loss",
        "roc_auc": "roc_auc_ovr",
    },
    "multilabel": {
        "mean_average_precision": "average_precision",
        "log_loss": "log_loss",
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

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]

ONE_SPLIT_ABOVE = 5000  # rows
INNER_SEED = 1  # other folds than those that a score is reported for
INNER_FOLDS = 5
KEYS_AT_ONCE = 1 << 18
ROWS_AT_ONCE = 4096


def scorer_of(task: str, metric: str | None) -> Any:
    """Scikit-learn's scorer for a metric."""
    known = METRICS[task]
    if metric is not None and metric not in known:
        raise unknown("metric", metric, known)
    name = next(iter(known.values())) if metric is None else known[metric]
    return _sigmoid_score if name == "log_loss" else name


def _sigmoid_score(head: Any, X: NDArray[Any], y: NDArray[Any]) -> float:
    """What scikit-learn has no scorer for: the log loss of one sigmoid for each label, and larger is better."""
    return -sigmoid_loss(logits_of(head, X), y)


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

    def __str__(self) -> str:
        return shown(self.settings)

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it, once the values are plain."""
        return {"settings": self.settings, "metric": self.metric, "how": self.how, "tried": self.tried}


def shown(settings: Mapping[str, Any]) -> str:
    """Settings for people.

    Examples
    --------
    >>> shown({"C": 0.0316227766, "hidden": 128})
    'C=0.0316, hidden=128'
    """
    return ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def choose_strength(plan: Plan, rows: Rows, of: int) -> Choice:
    """The strength of the penalty of ``logistic``, along the whole path.

    Each inner fold standardises by its own rows. Without a metric the log loss decides: accuracy cannot tell strengths
    apart that get the same rows right, however far their probabilities are from the truth.

    Parameters
    ----------
    of : int
        How many rows the head will be fitted on; a strength is for a sum over rows, and so in proportion to them.
    """
    folds = _folds_of_path(rows, plan)
    metric = plan.metric or "log_loss"
    if folds is None:
        return Choice({"C": 1.0}, metric, how="not tuned: a class has a single image")
    settings = {key: value for key, value in plan.params.items() if key in ("class_weight", "fit_intercept")}
    standardise = plan.params.get("scale") != "passthrough"
    shape = (len(rows), rows.X.shape[1], len(rows.classes))
    on_fold = partial(_path, rows, plan, settings, standardise, scorer_of(plan.task, metric))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)  # of a class that no held-out row is in
        scores = np.array(of_folds(on_fold, folds, shape=shape, jobs=plan.jobs))
    best = best_strength(scores, plan.one_standard_error)
    tried = [
        {"settings": {"C": C}, "score": float(mean), "spread": float(spread)}
        for C, mean, spread in zip(STRENGTHS, scores.mean(axis=0), scores.std(axis=0), strict=True)
    ]
    how = _how(rows, len(tried), folds)
    factor = 1.0
    if of > len(rows):
        factor, how = len(rows) / of, f"{how}, and scaled to {of:,}"
    return Choice({"C": float(STRENGTHS[best] * factor)}, metric, tried, how)


def _path(
    rows: Rows, plan: Plan, settings: Mapping[str, Any], standardise: bool, scoring: Any, fold: Fold
) -> NDArray[np.float64]:
    """The score of each strength on the held-out rows of one fold, shape (s,)."""
    from sklearn.preprocessing import StandardScaler

    fit, held = fold
    # One copy of the features, in the order that makes views of both sides, and scaled where it lies.
    X, y = np.asarray(rows.X)[np.concatenate([fit, held])], rows.y[np.concatenate([fit, held])]
    n = len(fit)
    if standardise:
        scaler = StandardScaler(copy=False)
        for start in range(0, n, ROWS_AT_ONCE):  # its sums take float64 copies of what they are given
            scaler.partial_fit(X[start : min(n, start + ROWS_AT_ONCE)])
        X = scaler.transform(X)
    if plan.balance:
        X_fit, y_fit = resample(X[:n], y[:n], plan.balance, plan.random_state)
        X, y, n = np.concatenate([X_fit, X[n:]]), np.concatenate([y_fit, y[n:]]), len(X_fit)
    split_here = [(np.arange(n), np.arange(n, len(X)))]
    multilabel = plan.task == "multilabel"
    cv = SoftmaxRegressionCV(STRENGTHS, cv=split_here, scoring=scoring, refit=False, multilabel=multilabel, **settings)
    return np.asarray(cv.fit(X, y).scores_[0])


def _folds_of_path(rows: Rows, plan: Plan) -> list[Fold] | None:
    """Five folds; of many rows one held-out fifth, which tells strengths apart as well."""
    folds = inner_folds(rows, plan.task)
    several = len(rows) <= ONE_SPLIT_ABOVE or plan.one_standard_error or rows.times is not None
    return folds if folds is None or several else folds[:1]


def inner_folds(rows: Rows, task: str) -> list[Fold] | None:
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
    tried: list[dict[str, Any]] = [
        {
            "settings": {_short(key): value for key, value in candidate.items()},
            "score": float(mean),
            "spread": float(sd),
        }
        for candidate, mean, sd in zip(
            results["params"], results["mean_test_score"], results["std_test_score"], strict=True
        )
    ]
    best = tried[int(np.argmax(results["mean_test_score"]))]
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
        starts = range(0, len(rows), KEYS_AT_ONCE)
        keys = np.concatenate([split.key(rows.digests[start : start + KEYS_AT_ONCE], seed) for start in starts])
        rows = rows.take(np.sort(np.argpartition(keys, most)[:most]))
    return rows.loaded()
