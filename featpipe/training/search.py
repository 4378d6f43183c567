"""Search the settings of a head on inner folds: never on rows that a score is reported for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import UndefinedMetricWarning

from featpipe import heads
from featpipe.errors import ConfigError
from featpipe.heads import C_GRID, BalancedClassifier, SoftmaxRegressionCV, map_folds, resample, select_best_C
from featpipe.metrics import SELECTION_METRICS, compute_logits, compute_sigmoid_loss
from featpipe.splits import SplitSeed
from featpipe.training.dataset import EmbeddingDataset, Split
from featpipe.training.head_config import HeadConfig

MAX_TUNING_ROWS = 20_000  # for the search of settings, if features stay in the file
MAX_ROWS_FOR_ALL_FOLDS = 5000  # with more, one held-out fifth ranks penalty strengths as well as five folds
N_INNER_FOLDS = 5
SCALER_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class SearchResult:
    """The selected settings and all candidates.

    Attributes
    ----------
    settings : dict
        The selected values, by setting.
    metric : str
    candidates : list of dict
        For each candidate its ``settings``, and mean ``score`` and standard deviation ``spread`` over the inner folds.
    protocol : dict
        How they were compared, see :func:`featpipe.metrics.format_protocol`.
    """

    settings: dict[str, Any]
    metric: str
    candidates: list[dict[str, Any]] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return format_params(self.settings)

    def to_dict(self) -> dict[str, Any]:
        return {"settings": self.settings, "metric": self.metric, "how": self.protocol, "tried": self.candidates}


def format_params(settings: Mapping[str, Any]) -> str:
    """Format settings for a terminal or a table.

    Examples
    --------
    >>> format_params({"C": 0.0316227766, "hidden": 128})
    'C=0.0316, hidden=128'
    """
    return ", ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def search_settings(config: HeadConfig, dataset: EmbeddingDataset) -> SearchResult | None:
    """Search the settings that a configuration leaves open; None if it leaves none.

    Parameters
    ----------
    config : HeadConfig
    dataset : EmbeddingDataset
        The rows that the head will be fitted on. If features stay in the file, a subset of them is searched on.
    """
    grid = config.resolve_grid()
    if not grid and not config.searches_path:
        return None
    tuning_dataset = dataset.subset(MAX_TUNING_ROWS) if dataset.is_streamed else dataset
    if config.searches_path:
        return _search_path(config, tuning_dataset, len(dataset))
    return _search_grid(config, tuning_dataset, grid)


def _search_path(config: HeadConfig, dataset: EmbeddingDataset, n_rows: int) -> SearchResult:
    """Select the penalty strength of ``logistic`` along the whole regularization path.

    Each inner fold is standardized by its own training rows. The default metric is the log loss: accuracy cannot rank
    strengths that classify the same rows correctly but differ in how well their probabilities are calibrated.

    Parameters
    ----------
    config : HeadConfig
    dataset : EmbeddingDataset
    n_rows : int
        Number of rows that the head will be fitted on. C weighs a sum over rows, so it scales with their number.
    """
    folds = _make_path_folds(dataset, config)
    metric = config.metric or "log_loss"
    if folds is None:
        return SearchResult({"C": 1.0}, metric, protocol={"kind": "not_tuned"})
    shape = (len(dataset), dataset.X.shape[1], len(dataset.classes))
    score_fold = partial(_score_path, dataset, config, _get_scorer(config.task, metric))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)  # for a class that no held-out row has
        scores: NDArray[np.float64] = np.array(map_folds(score_fold, folds, shape=shape, n_jobs=config.jobs))
    best = select_best_C(scores, config.one_standard_error)
    candidates = [
        {"settings": {"C": C}, "score": float(mean), "spread": float(spread)}
        for C, mean, spread in zip(C_GRID, scores.mean(axis=0), scores.std(axis=0), strict=True)
    ]
    protocol, factor = _make_protocol(dataset, candidates, folds), 1.0
    if n_rows > len(dataset):
        factor, protocol["scaled_to"] = len(dataset) / n_rows, n_rows
    return SearchResult({"C": float(C_GRID[best] * factor)}, metric, candidates, protocol)


def _score_path(dataset: EmbeddingDataset, config: HeadConfig, scoring: Any, fold: Split) -> NDArray[np.float64]:
    """The score of each strength on the held-out rows of one fold, shape (s,)."""
    from sklearn.preprocessing import StandardScaler

    order = np.concatenate(fold)  # one copy of the features, scaled in place, of which both sides are views
    X, y, n = np.asarray(dataset.X)[order], dataset.y[order], len(fold[0])
    if config.params.get("scale") != "passthrough":
        scaler = StandardScaler(copy=False)
        for start in range(0, n, SCALER_BLOCK_ROWS):  # in blocks, because it copies its input to float64
            scaler.partial_fit(X[start : min(n, start + SCALER_BLOCK_ROWS)])
        X = scaler.transform(X)
    if config.balance:
        X_fit, y_fit = resample(X[:n], y[:n], config.balance, config.random_state)
        X, y, n = np.concatenate([X_fit, X[n:]]), np.concatenate([y_fit, y[n:]]), len(X_fit)
    settings: dict[str, Any] = {
        key: config.params[key] for key in ("class_weight", "fit_intercept") if key in config.params
    }
    cv = SoftmaxRegressionCV(
        C_GRID,
        cv=[(np.arange(n), np.arange(n, len(X)))],
        scoring=scoring,
        refit=False,
        multilabel=config.task == "multilabel",
        **settings,
    )
    return np.asarray(cv.fit(X, y).scores_[0])


def _make_path_folds(dataset: EmbeddingDataset, config: HeadConfig) -> list[Split] | None:
    """Five folds; only the first of them if there are many rows."""
    folds = make_inner_folds(dataset)
    needs_all_folds = len(dataset) <= MAX_ROWS_FOR_ALL_FOLDS or config.one_standard_error or dataset.times is not None
    return folds if folds is None or needs_all_folds else folds[:1]


def make_inner_folds(dataset: EmbeddingDataset) -> list[Split] | None:
    """Five folds, or as many as the rarest class allows; None if a class has a single image."""
    for k in (N_INNER_FOLDS, 3, 2):
        try:
            return dataset.make_folds(k, SplitSeed.INNER_FOLDS)
        except ConfigError:
            continue
    return None


def _search_grid(config: HeadConfig, dataset: EmbeddingDataset, grid: Mapping[str, Sequence[object]]) -> SearchResult:
    """Try every combination of some settings with scikit-learn's grid search."""
    from sklearn.model_selection import GridSearchCV

    folds = make_inner_folds(dataset)
    if folds is None:
        folds = dataset.make_folds(2, SplitSeed.INNER_FOLDS)  # raises, and names the class that has too few images
    first_values = {key: values[0] for key, values in grid.items()}
    estimator = heads.build(
        config.head, config.task, params={**config.params, **first_values}, random_state=config.random_state
    )
    param_names = estimator.get_params()
    param_grid = {
        f"head__{key}" if f"head__{key}" in param_names else key: list(values) for key, values in grid.items()
    }
    if config.balance:
        estimator = BalancedClassifier(estimator, config.balance, config.random_state)
        param_grid = {f"estimator__{key}": values for key, values in param_grid.items()}
    scoring = _get_scorer(config.task, config.metric)
    grid_search = GridSearchCV(estimator, param_grid, scoring=scoring, cv=folds, n_jobs=config.jobs, refit=False)
    grid_search.set_params(error_score="raise").fit(dataset.X, dataset.y)
    results = grid_search.cv_results_
    candidates: list[dict[str, Any]] = [
        {
            "settings": {
                key.removeprefix("estimator__").removeprefix("head__"): value for key, value in candidate.items()
            },
            "score": float(mean),
            "spread": float(spread),
        }
        for candidate, mean, spread in zip(
            results["params"], results["mean_test_score"], results["std_test_score"], strict=True
        )
    ]
    best = candidates[int(np.argmax(results["mean_test_score"]))]
    metric = config.metric or next(iter(SELECTION_METRICS[config.task]))
    return SearchResult(best["settings"], metric, candidates, _make_protocol(dataset, candidates, folds))


def _get_scorer(task: str, metric: str | None) -> Any:
    scorers = SELECTION_METRICS[task]
    name = next(iter(scorers.values())) if metric is None else scorers[metric]
    return _score_sigmoid_loss if name == "log_loss" else name


def _score_sigmoid_loss(head: Any, X: NDArray[Any], y: NDArray[Any]) -> float:
    """The negative log loss with one sigmoid per label, which scikit-learn does not have."""
    return -compute_sigmoid_loss(compute_logits(head, X), y)


def _make_protocol(dataset: EmbeddingDataset, candidates: Sequence[Any], folds: Sequence[Any]) -> dict[str, Any]:
    return {"kind": "inner_folds", "candidates": len(candidates), "folds": len(folds), "n": len(dataset)}
