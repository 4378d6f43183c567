"""Fit one head on a dataset: search its settings, resample its rows, and stream features that exceed the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads
from featpipe.errors import ConfigError
from featpipe.heads import draw_row_indices, fit_balanced, resample
from featpipe.metrics import Calibration, compute_logits
from featpipe.splits import SplitSeed
from featpipe.training.dataset import EmbeddingDataset
from featpipe.training.head_config import HeadConfig
from featpipe.training.search import SearchResult, search_settings

PREDICT_BLOCK_ROWS = 1 << 16
ABSENT_CLASS_LOGIT = -30.0  # relative to the smallest logit, for a class without rows in a fold


def fit_head(config: HeadConfig, dataset: EmbeddingDataset) -> FittedHead:
    """Fit a head on all rows of a dataset.

    Raises
    ------
    ConfigError
        If the head cannot be fitted on them.
    """
    if dataset.is_streamed and config.balance == "smote":
        raise ConfigError("balance=smote needs all rows in memory; use balance=over or class_weight=balanced")
    start_time = perf_counter()
    search_result = search_settings(config, dataset)
    params = {**config.params, **(search_result.settings if search_result else {})}
    pipeline = heads.build(config.head, config.task, params=params, random_state=config.random_state)
    tuned_time = perf_counter()
    if dataset.is_streamed:
        _fit_streamed(pipeline, dataset, config)
    elif getattr(pipeline[-1], "early_stopping", False) is True:
        _fit_with_early_stopping(pipeline, dataset, config)
    elif config.balance:
        fit_balanced(pipeline, np.asarray(dataset.X), dataset.y, config.balance, config.random_state)
    else:
        pipeline.fit(np.asarray(dataset.X), dataset.y)
    fitted_time = perf_counter()
    return FittedHead(
        pipeline, config.task, dataset.classes, search_result, tuned_time - start_time, fitted_time - tuned_time
    )


def _fit_streamed(pipeline: Any, dataset: EmbeddingDataset, config: HeadConfig) -> None:
    """Fit while features stay in the file; a row that resampling draws several times gets a weight instead."""
    weights = None
    if config.balance:
        indices, counts = np.unique(
            draw_row_indices(dataset.y, config.balance, config.random_state), return_counts=True
        )
        dataset, weights = dataset.take(indices), counts if counts.max() > 1 else None
    heads.fit_streamed(pipeline, dataset.X, dataset.y, weights)


def _fit_with_early_stopping(pipeline: Any, dataset: EmbeddingDataset, config: HeadConfig) -> None:
    """Fit with a validation set that shares no image and no group with the training rows."""
    scaler, head = pipeline[0], pipeline[-1]
    train_rows, validation_rows = dataset.make_holdout(head.validation_fraction, seed=SplitSeed.EARLY_STOPPING)
    X, y, X_validation = dataset.X[train_rows], dataset.y[train_rows], dataset.X[validation_rows]
    if scaler != "passthrough":
        X, X_validation = scaler.fit_transform(X), scaler.transform(X_validation)
    if config.balance:
        X, y = resample(X, y, config.balance, config.random_state)
    head.fit(X, y, validation=(X_validation, dataset.y[validation_rows]))


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A fitted head.

    Attributes
    ----------
    estimator : Pipeline
        With the steps ``scale`` and ``head``.
    task : str
    classes : tuple of str
    search_result : SearchResult or None
        The settings that were searched.
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
        """Predict probabilities of shape (m, k), or targets of a regression, in blocks of rows."""
        if self.task == "regression":
            return _apply_in_blocks(self.estimator.predict, X)
        if calibration is not None:
            return calibration.compute_probabilities(self.compute_logits(X), self.task == "multilabel")
        return self._expand_to_all_classes(_apply_in_blocks(self.estimator.predict_proba, X), 0.0)

    def compute_logits(self, X: Any) -> NDArray[np.float64]:
        """The scores before softmax or sigmoid, shape (m, k)."""
        logits = _apply_in_blocks(lambda block: compute_logits(self.estimator, block), X)
        return self._expand_to_all_classes(logits, float(logits.min(initial=0)) + ABSENT_CLASS_LOGIT)

    def _expand_to_all_classes(self, scores: NDArray[np.float64], fill_value: float) -> NDArray[np.float64]:
        if self.task == "multilabel" or scores.shape[1] == len(self.classes):
            return scores
        expanded = np.full((len(scores), len(self.classes)), fill_value)
        expanded[:, self.estimator.classes_] = scores
        return expanded


def _apply_in_blocks(function: Callable[[NDArray[Any]], Any], X: Any) -> NDArray[np.float64]:
    if isinstance(X, np.ndarray):
        return np.asarray(function(X), np.float64)
    starts = range(0, len(X), PREDICT_BLOCK_ROWS)
    blocks = [function(np.asarray(X[start : start + PREDICT_BLOCK_ROWS], np.float32)) for start in starts]
    return np.concatenate(blocks).astype(np.float64)
