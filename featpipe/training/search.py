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

from featpipe import heads, splits
from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError
from featpipe.heads import C_GRID, BalancedClassifier, SoftmaxRegressionCV, map_folds, resample, select_best_C
from featpipe.metrics import SELECTION_METRICS, compute_logits, compute_sigmoid_loss
from featpipe.training.dataset import EmbeddingDataset

if TYPE_CHECKING:
    from featpipe.training.fit import HeadConfig

__all__ = [
    "SearchResult",
    "format_params",
    "get_scorer",
    "make_inner_folds",
    "search_grid",
    "select_penalty_strength",
    "subsample",
]

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]

MAX_ROWS_FOR_ALL_FOLDS = 5000  # rows
N_INNER_FOLDS = 5
KEY_BLOCK_ROWS = 1 << 18
SCALER_BLOCK_ROWS = 4096


def get_scorer(task: str, metric: str | None) -> Any:
    """Scikit-learn's scorer for a metric."""
    scorers = SELECTION_METRICS[task]
    if metric is not None and metric not in scorers:
        raise unknown_name_error("metric", metric, scorers)
    name = next(iter(scorers.values())) if metric is None else scorers[metric]
    return _sigmoid_score if name == "log_loss" else name


def _sigmoid_score(head: Any, X: NDArray[Any], y: NDArray[Any]) -> float:
    """What scikit-learn has no scorer for: the log loss of one sigmoid for each label, and larger is better."""
    return -compute_sigmoid_loss(compute_logits(head, X), y)


@dataclass(frozen=True)
class SearchResult:
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
    candidates: list[dict[str, Any]] = field(default_factory=list)
    description: str = ""

    def __str__(self) -> str:
        return format_params(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, once the values are plain."""
        return {"settings": self.settings, "metric": self.metric, "how": self.description, "tried": self.candidates}


def format_params(settings: Mapping[str, Any]) -> str:
    """Settings for people.

    Examples
    --------
    >>> shown({"C": 0.0316227766, "hidden": 128})
    'C=0.0316, hidden=128'
    """
    return ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def select_penalty_strength(config: HeadConfig, dataset: EmbeddingDataset, n_rows: int) -> SearchResult:
    """The strength of the penalty of ``logistic``, along the whole path.

    Each inner fold standardises by its own rows. Without a metric the log loss decides: accuracy cannot tell strengths
    apart that get the same rows right, however far their probabilities are from the truth.

    Parameters
    ----------
    of : int
        How many rows the head will be fitted on; a strength is for a sum over rows, and so in proportion to them.
    """
    folds = _make_path_folds(dataset, config)
    metric = config.metric or "log_loss"
    if folds is None:
        return SearchResult({"C": 1.0}, metric, description="not tuned: a class has a single image")
    settings = {key: value for key, value in config.params.items() if key in ("class_weight", "fit_intercept")}
    standardize = config.params.get("scale") != "passthrough"
    shape = (len(dataset), dataset.X.shape[1], len(dataset.classes))
    score_fold = partial(_score_path, dataset, config, settings, standardize, get_scorer(config.task, metric))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)  # of a class that no held-out row is in
        scores: NDArray[np.float64] = np.array(map_folds(score_fold, folds, shape=shape, n_jobs=config.jobs))
    best = select_best_C(scores, config.one_standard_error)
    candidates = [
        {"settings": {"C": C}, "score": float(mean), "spread": float(spread)}
        for C, mean, spread in zip(C_GRID, scores.mean(axis=0), scores.std(axis=0), strict=True)
    ]
    description = _describe_search(dataset, len(candidates), folds)
    factor = 1.0
    if n_rows > len(dataset):
        factor, description = len(dataset) / n_rows, f"{description}, and scaled to {n_rows:,}"
    return SearchResult({"C": float(C_GRID[best] * factor)}, metric, candidates, description)


def _score_path(
    dataset: EmbeddingDataset,
    config: HeadConfig,
    settings: Mapping[str, Any],
    standardize: bool,
    scoring: Any,
    fold: Fold,
) -> NDArray[np.float64]:
    """The score of each strength on the held-out rows of one fold, shape (s,)."""
    from sklearn.preprocessing import StandardScaler

    train_rows, validation_rows = fold
    # One copy of the features, in the order that makes views of both sides, and scaled where it lies.
    X, y = (
        np.asarray(dataset.X)[np.concatenate([train_rows, validation_rows])],
        dataset.y[np.concatenate([train_rows, validation_rows])],
    )
    n = len(train_rows)
    if standardize:
        scaler = StandardScaler(copy=False)
        for start in range(0, n, SCALER_BLOCK_ROWS):  # its sums take float64 copies of what they are given
            scaler.partial_fit(X[start : min(n, start + SCALER_BLOCK_ROWS)])
        X = scaler.transform(X)
    if config.balance:
        X_fit, y_fit = resample(X[:n], y[:n], config.balance, config.random_state)
        X, y, n = np.concatenate([X_fit, X[n:]]), np.concatenate([y_fit, y[n:]]), len(X_fit)
    single_split = [(np.arange(n), np.arange(n, len(X)))]
    multilabel = config.task == "multilabel"
    cv = SoftmaxRegressionCV(C_GRID, cv=single_split, scoring=scoring, refit=False, multilabel=multilabel, **settings)
    return np.asarray(cv.fit(X, y).scores_[0])


def _make_path_folds(dataset: EmbeddingDataset, config: HeadConfig) -> list[Fold] | None:
    """Five folds; of many rows one held-out fifth, which tells strengths apart as well."""
    folds = make_inner_folds(dataset, config.task)
    needs_all_folds = len(dataset) <= MAX_ROWS_FOR_ALL_FOLDS or config.one_standard_error or dataset.times is not None
    return folds if folds is None or needs_all_folds else folds[:1]


def make_inner_folds(dataset: EmbeddingDataset, task: str) -> list[Fold] | None:
    """Five folds, or as many as the rarest class allows; None if there is one image of a class."""
    for k in (N_INNER_FOLDS, 3, 2):
        try:
            return dataset.make_folds(task, k, splits.SplitSeed.INNER_FOLDS)
        except ConfigError:
            continue
    return None


def search_grid(config: HeadConfig, dataset: EmbeddingDataset, grid: Mapping[str, Sequence[object]]) -> SearchResult:
    """Try every combination of some settings with scikit-learn's search."""
    from sklearn.model_selection import GridSearchCV

    scoring = get_scorer(config.task, config.metric)
    folds = make_inner_folds(dataset, config.task) or dataset.make_folds(
        config.task, 2, splits.SplitSeed.INNER_FOLDS
    )  # the second says which class is short
    first_values = {key: values[0] for key, values in grid.items()}
    estimator = heads.build(
        config.head, config.task, params={**config.params, **first_values}, random_state=config.random_state
    )
    param_grid = {_add_prefix(estimator, key): list(values) for key, values in grid.items()}
    if config.balance:
        estimator = BalancedClassifier(estimator, config.balance, config.random_state)
        param_grid = {f"estimator__{key}": values for key, values in param_grid.items()}
    grid_search = GridSearchCV(estimator, param_grid, scoring=scoring, cv=folds, n_jobs=config.jobs, refit=False)
    grid_search.set_params(error_score="raise").fit(dataset.X, dataset.y)
    results = grid_search.cv_results_
    candidates: list[dict[str, Any]] = [
        {
            "settings": {_remove_prefix(key): value for key, value in candidate.items()},
            "score": float(mean),
            "spread": float(sd),
        }
        for candidate, mean, sd in zip(
            results["params"], results["mean_test_score"], results["std_test_score"], strict=True
        )
    ]
    best = candidates[int(np.argmax(results["mean_test_score"]))]
    return SearchResult(
        best["settings"],
        config.metric or next(iter(SELECTION_METRICS[config.task])),
        candidates,
        _describe_search(dataset, len(candidates), folds),
    )


def _describe_search(dataset: EmbeddingDataset, n_candidates: int, folds: Sequence[Any]) -> str:
    return f"best of {n_candidates} on {len(folds)} inner folds of {len(dataset):,} rows"


def _remove_prefix(key: str) -> str:
    return key.removeprefix("estimator__").removeprefix("head__")


def _add_prefix(estimator: Any, key: str) -> str:
    return f"head__{key}" if f"head__{key}" in estimator.get_params() else key


def subsample(dataset: EmbeddingDataset, max_rows: int, seed: int = 0) -> EmbeddingDataset:
    """At most so many of the rows, in memory: those whose keys are smallest."""
    if len(dataset) > max_rows:
        starts = range(0, len(dataset), KEY_BLOCK_ROWS)
        keys = np.concatenate(
            [splits.compute_keys(dataset.digests[start : start + KEY_BLOCK_ROWS], seed) for start in starts]
        )
        dataset = dataset.take(np.sort(np.argpartition(keys, max_rows)[:max_rows]))
    return dataset.to_memory()
