"""One head, fitted on some rows: with its settings chosen, its rows balanced and its features streamed where asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads, splits
from featpipe.errors import ConfigError
from featpipe.heads import draw_row_indices, fit_balanced, resample
from featpipe.metrics import Calibration, compute_logits
from featpipe.training.dataset import EmbeddingDataset
from featpipe.training.search import SearchResult, get_scorer, search_grid, select_penalty_strength, subsample

__all__ = ["FittedHead", "HeadConfig"]

PREDICT_BLOCK_ROWS = 1 << 16
MAX_TUNING_ROWS = 20_000  # the most that settings are tried on where features stay in the file
ABSENT_CLASS_LOGIT = -30.0  # beside the others, of a class that a fold was not fitted on


@dataclass(frozen=True)
class HeadConfig:
    """How a head is to be fitted.

    Attributes
    ----------
    head : str
    task : {"classification", "regression", "multilabel"}
    params : mapping
        Settings of the head; weights of classes by class number.
    grid : mapping from setting to values
        What is tried; the head's own grid where ``tune`` is true and this is empty.
    tune : bool or None
        None tunes the strength of ``logistic`` alone, where it was not set.
    metric : str or None
        What settings are chosen by.
    one_standard_error : bool
        The strongest penalty whose score is within one standard error of the best.
    balance : str or None
        How rows are resampled before the fit, see :func:`featpipe.heads.resampling.resample`.
    random_state : int or None
    jobs : int or None
        Processes for the search.
    """

    head: str
    task: str
    params: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, Sequence[object]] = field(default_factory=dict)
    tune: bool | None = None
    metric: str | None = None
    one_standard_error: bool = False
    balance: str | None = None
    random_state: int | None = 0
    jobs: int | None = None

    def validate(self) -> None:
        """Refuse what cannot be, before any work."""
        heads.build(self.head, self.task, params=self.params, random_state=self.random_state)
        get_scorer(self.task, self.metric)
        if self.one_standard_error and not self.tunes_strength:
            raise ConfigError("one_standard_error is for the strength C of logistic, where C is not set")
        if self.balance and self.task != "classification":
            raise ConfigError(f"balance={self.balance} is for classification, not for {self.task}")
        for key, values in self._resolve_grid().items():
            for value in values:
                heads.build(self.head, self.task, params={**self.params, key: value}, random_state=self.random_state)

    @property
    def tunes_strength(self) -> bool:
        """Whether the strength of ``logistic`` is chosen along its whole path."""
        can_search_path = self.head == "logistic" and not self.grid and self.tune is not False
        return (
            can_search_path and not {"C", "head__C"} & set(self.params) and self.params.get("penalty") in (None, "l2")
        )

    def _resolve_grid(self) -> Mapping[str, Sequence[object]]:
        if self.grid or not self.tune or self.tunes_strength:
            return self.grid
        default_grid = heads.get_spec(self.head).grid
        grid = {key: values for key, values in default_grid.items() if not {key, f"head__{key}"} & set(self.params)}
        if not grid:
            raise ConfigError(f"there is nothing to tune of head {self.head!r}; say what to try: --grid SETTING=A,B")
        return grid

    def fit(self, dataset: EmbeddingDataset) -> FittedHead:
        """Fit on all of some rows.

        Raises
        ------
        ConfigError
            If the head cannot be fitted on them.
        """
        start_time = perf_counter()
        search_result = self._search_settings(dataset)
        params = {**self.params, **(search_result.settings if search_result else {})}
        estimator = heads.build(self.head, self.task, params=params, random_state=self.random_state)
        tuned_time = perf_counter()
        self._fit_estimator(estimator, dataset)
        end_time = perf_counter()
        return FittedHead(
            estimator, self.task, dataset.classes, search_result, tuned_time - start_time, end_time - tuned_time
        )

    def _fit_estimator(self, estimator: Any, dataset: EmbeddingDataset) -> None:
        head = estimator[-1]
        if dataset.is_streamed:
            dataset, weights = self._resample_rows(dataset)
            heads.fit_streamed(estimator, dataset.X, dataset.y, weights)
        elif getattr(head, "early_stopping", False) is True:
            _fit_with_early_stopping(estimator, dataset, self)
        elif self.balance:
            fit_balanced(estimator, np.asarray(dataset.X), dataset.y, self.balance, self.random_state)
        else:
            estimator.fit(np.asarray(dataset.X), dataset.y)

    def _resample_rows(self, dataset: EmbeddingDataset) -> tuple[EmbeddingDataset, NDArray[np.int64] | None]:
        """The rows of a balanced fit, and how often each is drawn, which as a weight has the same effect."""
        if not self.balance:
            return dataset, None
        if self.balance == "smote":
            raise ConfigError("balance=smote needs all rows in memory; take over or class_weight=balanced")
        indices, repeats = np.unique(draw_row_indices(dataset.y, self.balance, self.random_state), return_counts=True)
        return dataset.take(indices), repeats if repeats.max() > 1 else None

    def _search_settings(self, dataset: EmbeddingDataset) -> SearchResult | None:
        grid = self._resolve_grid()
        if not grid and not self.tunes_strength:
            return None
        tuning_dataset = subsample(dataset, MAX_TUNING_ROWS) if dataset.is_streamed else dataset
        if self.tunes_strength:
            return select_penalty_strength(self, tuning_dataset, len(dataset))
        return search_grid(self, tuning_dataset, grid)


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A fitted head.

    Attributes
    ----------
    estimator : Pipeline
    task : str
    classes : tuple of str
    choice : Choice or None
    seconds_to_tune, seconds_to_fit : float
    """

    estimator: Any
    task: str
    classes: tuple[str, ...]
    search_result: SearchResult | None
    seconds_to_tune: float
    seconds_to_fit: float

    @property
    def has_probabilities(self) -> bool:
        return hasattr(self.estimator, "predict_proba")

    def predict(self, X: Any, calibration: Calibration | None = None) -> NDArray[np.float64]:
        """Probabilities of shape (m, k), or numbers; a few rows at a time."""
        if self.task == "regression":
            return _apply_in_blocks(self.estimator.predict, X)
        if calibration is not None:
            return calibration.compute_probabilities(self.compute_logits(X), self.task == "multilabel")
        return self._expand_to_all_classes(_apply_in_blocks(self.estimator.predict_proba, X), 0.0)

    def compute_logits(self, X: Any) -> NDArray[np.float64]:
        """Scores before the softmax or the sigmoids, shape (m, k)."""
        logits = _apply_in_blocks(lambda block: compute_logits(self.estimator, block), X)
        return self._expand_to_all_classes(logits, float(logits.min(initial=0)) + ABSENT_CLASS_LOGIT)

    def _expand_to_all_classes(self, scores: NDArray[np.float64], fill_value: float) -> NDArray[np.float64]:
        if self.task == "multilabel" or scores.shape[1] == len(self.classes):
            return scores
        expanded = np.full((len(scores), len(self.classes)), fill_value)
        expanded[:, self.estimator.classes_] = scores
        return expanded


def _fit_with_early_stopping(estimator: Any, dataset: EmbeddingDataset, config: HeadConfig) -> None:
    """Fit with rows held out for early stopping that share no image and no group with the others."""
    head, scaler = estimator[-1], estimator[0]
    y, names = (dataset.y, dataset.classes) if config.task == "classification" else (None, None)
    train_rows, validation_rows = splits.make_holdout(
        dataset.digests,
        y,
        test=head.validation_fraction,
        seed=splits.SplitSeed.EARLY_STOPPING,
        groups=dataset.groups,
        times=dataset.times,
        names=names,
    )
    X, y_train, X_validation = dataset.X[train_rows], dataset.y[train_rows], dataset.X[validation_rows]
    if scaler != "passthrough":
        X, X_validation = scaler.fit_transform(X), scaler.transform(X_validation)
    if config.balance:
        X, y_train = resample(X, y_train, config.balance, config.random_state)
    head.fit(X, y_train, validation=(X_validation, dataset.y[validation_rows]))


def _apply_in_blocks(function: Any, X: Any) -> NDArray[np.float64]:
    if isinstance(X, np.ndarray):
        return np.asarray(function(X), np.float64)
    starts = range(0, len(X), PREDICT_BLOCK_ROWS)
    blocks = [function(np.asarray(X[start : start + PREDICT_BLOCK_ROWS], np.float32)) for start in starts]
    return np.concatenate(blocks).astype(np.float64)
