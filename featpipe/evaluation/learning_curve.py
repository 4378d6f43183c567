"""The learning curve of a model: its errors on the scored rows when its head is trained on fewer images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import splits
from featpipe.config import TrainingConfig
from featpipe.diagnostics import LearningCurve, extrapolate_learning_curve
from featpipe.errors import ConfigError
from featpipe.model import Model
from featpipe.training import (
    EmbeddingDataset,
    FittedHead,
    fit_head,
    get_head_params,
    load_training_data,
    make_head_config,
)

MIN_CURVE_SIZES = 3  # including the full training set
MIN_SUBSET_ROWS = 24
MAX_TRAINING_ROWS = 20_000
SUBSET_DIVISORS = ((16, 8, 4, 2), (16, 8, 4), (16, 8), (32, 16))  # the first whose fits take at most MAX_FIT_SECONDS
MAX_DRAWS = 3
MAX_FIT_SECONDS = 3.0

Floats = NDArray[np.float64]


def compute_learning_curve(
    model: Model,
    reference: EmbeddingDataset | None,
    X: NDArray[np.float32],
    truth: NDArray[Any],
    predicted: Floats,
) -> LearningCurve | None:
    """Measure the learning curve, and extrapolate it to twice the training images.

    Parameters
    ----------
    model : Model
    reference : EmbeddingDataset or None
    X : ndarray of shape (m, d)
        Embeddings of the scored rows.
    truth : ndarray of shape (m,), (m, k) or (m, t)
        Class names, a 0/1 matrix, or targets.
    predicted : ndarray of shape (m, k), (m,) or (m, t)
        Predictions of the model itself.

    Returns
    -------
    LearningCurve or None
        None if the training images are not available, too few, or the head cannot be fitted again with its settings.
    """
    if reference is None or model.history.get("streamed"):
        return None

    def row_errors(predicted: Floats) -> Floats:
        return _compute_row_errors(model.task, truth, predicted, model.classes)

    try:
        sizes, errors = compute_errors_by_size(model, reference, X, row_errors)
    except (ConfigError, ValueError):  # scikit-learn raises ValueError for too few rows
        return None
    if len(sizes) + 1 < MIN_CURVE_SIZES:
        return None
    return extrapolate_learning_curve([*sizes, len(reference)], np.vstack([errors, row_errors(predicted)]))


def _compute_row_errors(task: str, truth: NDArray[Any], predicted: Floats, classes: tuple[str, ...]) -> Floats:
    """One error per row: 0 or 1; the share of wrong labels; or the mean absolute error over targets."""
    if task == "regression":
        shape = (len(truth), -1)
        return np.asarray(abs(np.reshape(truth, shape) - np.reshape(predicted, shape)).mean(axis=1), np.float64)
    if task == "multilabel":
        return np.asarray(((predicted >= 0.5) != (truth > 0)).mean(axis=1), np.float64)
    class_names = np.array(classes, dtype=object)
    return np.asarray(class_names[predicted.argmax(axis=1)] != truth, np.float64)


def compute_errors_by_size(
    model: Model, reference: EmbeddingDataset, X: NDArray[np.float32], compute_errors: Callable[[Floats], Floats]
) -> tuple[list[int], Floats]:
    """Fit the model's head on subsets of its training rows, and compute the errors of each fit.

    Subsets are stratified by class and determined by the digests of the images. The head keeps the model's settings;
    no hyperparameter is searched again.

    Parameters
    ----------
    model : Model
    reference : EmbeddingDataset
    X : ndarray of shape (m, d)
        Embeddings of the test rows.
    compute_errors : callable
        Maps predictions for the test rows, with the model's columns, to one error per row, shape (m,).

    Returns
    -------
    sizes : list of s int
        Subset sizes, without the full training set.
    errors : ndarray of shape (s, m)
        Mean over a few draws of each size.

    Raises
    ------
    ConfigError
        If the head no longer accepts the model's settings, or the training rows have changed.
    """
    assert reference.cache is not None
    dataset = load_training_data(reference.cache, model.output)
    dataset = dataset.take(np.isin(dataset.rows, reference.rows)).subset(MAX_TRAINING_ROWS)
    if dataset.classes != model.classes:
        raise ConfigError("the classes of the training rows differ from the model's")
    params, balance = get_head_params(model), model.history.get("balance")
    config = make_head_config(TrainingConfig(head=model.head_name, params=params, tune=False, balance=balance), dataset)
    divisors, n_draws = _select_affordable_subsets(float(model.history.get("seconds_to_fit") or 0.0))
    min_rows = max(MIN_SUBSET_ROWS, 2 * len(model.classes))
    sizes = [len(dataset) // divisor for divisor in divisors if len(dataset) // divisor >= min_rows]
    errors = np.zeros((len(sizes), len(X)))
    for draw in range(n_draws):
        order = _make_stratified_order(dataset, config.task, draw)
        for i, size in enumerate(sizes):
            fitted = fit_head(config, dataset.take(np.sort(order[:size])))
            errors[i] += compute_errors(_predict(model, fitted, X)) / n_draws
    return sizes, errors


def _select_affordable_subsets(seconds: float) -> tuple[tuple[int, ...], int]:
    """Select divisors and a number of draws that cost a few seconds if a fit to all rows took `seconds`.

    The time is the one recorded when the model was trained, so that the result is the same on every machine.
    """
    for divisors in SUBSET_DIVISORS:
        cost = seconds * sum(1 / divisor for divisor in divisors)
        if cost <= MAX_FIT_SECONDS:
            return divisors, int(min(MAX_DRAWS, MAX_FIT_SECONDS // cost)) if cost else MAX_DRAWS
    return (), 0


def _predict(model: Model, head: FittedHead, X: NDArray[np.float32]) -> Floats:
    if model.calibration is None and head.task != "regression" and not head.has_probabilities:
        return head.compute_logits(X)
    return head.predict(X, model.calibration)


def _make_stratified_order(dataset: EmbeddingDataset, task: str, draw: int) -> NDArray[np.intp]:
    """Order the rows so that every prefix has about the same class proportions."""
    keys = splits.compute_keys(dataset.digests, splits.SplitSeed.LEARNING_CURVE + draw)
    if task != "classification":
        return np.argsort(keys, kind="stable")
    quantiles = np.empty(len(dataset))
    for code in range(len(dataset.classes)):
        class_rows = np.flatnonzero(dataset.y == code)
        ranks = np.argsort(keys[class_rows], kind="stable")
        quantiles[class_rows[ranks]] = (np.arange(len(class_rows)) + 0.5) / len(class_rows)
    return np.argsort(quantiles, kind="stable")
