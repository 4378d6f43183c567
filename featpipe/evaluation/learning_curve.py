"""What twice the labels would bring: the learning curve of a model on the rows that it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe import splits
from featpipe.cache import FeatureCache
from featpipe.diagnostics import LearningCurve, extrapolate_learning_curve
from featpipe.errors import ConfigError
from featpipe.model import Model
from featpipe.training import EmbeddingDataset, load_training_data, make_head_config, subsample

if TYPE_CHECKING:
    from featpipe.evaluation.result import Evaluation

__all__ = ["compute_errors_by_size", "compute_learning_curve"]

MIN_CURVE_SIZES = 3  # sizes, the whole included

Floats = NDArray[np.float64]


def compute_learning_curve(evaluation: Evaluation) -> LearningCurve | None:
    """None where the training images are not at hand, too few, or cannot be fitted anew as they were."""
    reference, model = evaluation.reference, evaluation.model
    if reference is None or model.history.get("streamed"):
        return None

    def row_errors(predicted: Floats) -> Floats:
        return _compute_row_errors(model.task, evaluation.truth, predicted, model.classes)

    try:
        sizes, errors = compute_errors_by_size(model, reference.cache, reference.rows, evaluation.features, row_errors)
    except (ConfigError, ValueError):  # scikit-learn's own refusals of few rows are ValueErrors
        return None
    if len(sizes) + 1 < MIN_CURVE_SIZES:
        return None
    full_size_errors = row_errors(evaluation.predicted)
    return extrapolate_learning_curve([*sizes, len(reference.rows)], np.vstack([errors, full_size_errors]))


def _compute_row_errors(task: str, truth: NDArray[Any], predicted: Floats, classes: tuple[str, ...]) -> Floats:
    """One error for each row: 0 or 1; the share of labels that are wrong; or the mean absolute error of the targets."""
    if task == "regression":
        shape = (len(truth), -1)
        return np.asarray(abs(np.reshape(truth, shape) - np.reshape(predicted, shape)).mean(axis=1), np.float64)
    if task == "multilabel":
        return np.asarray(((predicted >= 0.5) != (truth > 0)).mean(axis=1), np.float64)
    class_names = np.array(classes, dtype=object)
    return np.asarray(class_names[predicted.argmax(axis=1)] != truth, np.float64)


PART_DIVISORS = ((16, 8, 4, 2), (16, 8, 4), (16, 8), (32, 16))  # the more, the better; as time allows
MIN_ROWS = 24  # rows
MAX_DRAWS = 3
MAX_SECONDS = 3.0
MAX_ROWS = 20_000  # rows


def compute_errors_by_size(
    model: Model,
    cache: FeatureCache,
    rows: NDArray[np.int64],
    X: NDArray[np.float32],
    compute_errors: Callable[[Floats], Floats],
) -> tuple[list[int], Floats]:
    """The errors of heads trained on parts of the training rows.

    Each part keeps the mix of classes; its rows follow from their images' bytes. The settings of the head are the
    model's own: nothing is chosen anew.

    Parameters
    ----------
    model : Model
    cache : FeatureCache
        It was trained on some of its rows.
    rows : ndarray of shape (n,)
        Those rows.
    X : ndarray of shape (m, d)
        Of the test rows.
    error : callable
        From predictions of the test rows, in the columns of the model, to one error for each, shape (m,).

    Returns
    -------
    sizes : list of s int
        Without the whole.
    errors : ndarray of shape (s, m)
        The mean over a few draws of each part.

    Raises
    ------
    ConfigError
        If the model's settings can no longer be set, or its training rows have changed.
    """
    dataset = load_training_data(cache, model.output)
    dataset = subsample(dataset.take(np.flatnonzero(np.isin(dataset.rows, rows))), MAX_ROWS)
    if dataset.classes != model.classes:
        raise ConfigError("the training rows have other classes than the model")
    config = make_head_config(
        cache, dataset, model.head_name, _get_head_settings(model), tune=False, balance=model.history.get("balance")
    )
    divisors, n_draws = _select_affordable_parts(float(model.history.get("seconds_to_fit") or 0.0))
    sizes = [
        len(dataset) // divisor
        for divisor in divisors
        if len(dataset) // divisor >= max(MIN_ROWS, 2 * len(model.classes))
    ]
    errors = np.zeros((len(sizes), len(X)))
    for draw in range(n_draws):
        order = _make_stratified_order(dataset, config.task, draw)
        for i, size in enumerate(sizes):
            fitted = config.fit(dataset.take(np.sort(order[:size])))
            errors[i] += compute_errors(_predict(model, fitted, X)) / n_draws
    return sizes, errors


def _select_affordable_parts(seconds: float) -> tuple[tuple[int, ...], int]:
    """The parts and the draws of each that take a few seconds, where the whole took so many; none where none do.

    By the time that the model's own fit is known to have taken, so that an evaluation finds the same on every machine.
    """
    for divisors in PART_DIVISORS:
        cost = seconds * sum(1 / divisor for divisor in divisors)
        if cost <= MAX_SECONDS:
            return divisors, int(min(MAX_DRAWS, MAX_SECONDS // cost)) if cost else MAX_DRAWS
    return (), 0


def _predict(model: Model, fitted: Any, X: NDArray[np.float32]) -> Floats:
    if model.calibration is not None:
        return np.asarray(fitted.predict(X, model.calibration))
    return np.asarray(
        fitted.predict(X) if fitted.task == "regression" or fitted.has_probabilities else fitted.compute_logits(X)
    )


def _get_head_settings(model: Model) -> dict[str, Any]:
    """What the head was set to, and what was chosen for it."""
    chosen: Mapping[str, Any] = (model.history.get("chosen") or {}).get("settings", {})
    settings = {**model.history.get("params", {}), **chosen}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _make_stratified_order(dataset: EmbeddingDataset, task: str, draw: int) -> NDArray[np.intp]:
    """The rows in an order of which every beginning has about the same mix of classes."""
    keys = splits.compute_keys(dataset.digests, splits.SplitSeed.LEARNING_CURVE + draw)
    if task != "classification":
        return np.argsort(keys, kind="stable")
    quantiles = np.empty(len(dataset))
    for code in range(len(dataset.classes)):
        class_rows = np.flatnonzero(dataset.y == code)
        quantiles[class_rows[np.argsort(keys[class_rows], kind="stable")]] = (np.arange(len(class_rows)) + 0.5) / len(
            class_rows
        )
    return np.argsort(quantiles, kind="stable")
