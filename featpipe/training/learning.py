"""How much fewer training images cost: the head of a model, fitted anew on parts of what it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import split
from featpipe.cache import FeatureCache
from featpipe.errors import ConfigError
from featpipe.model import Model
from featpipe.training.rows import EmbeddingDataset, load_training_data
from featpipe.training.selection import subsample
from featpipe.training.verb import make_head_config

__all__ = ["compute_errors_by_size"]

PART_DIVISORS = ((16, 8, 4, 2), (16, 8, 4), (16, 8), (32, 16))  # the more, the better; as time allows
MIN_ROWS = 24  # rows
MAX_DRAWS = 3
MAX_SECONDS = 3.0
MAX_ROWS = 20_000  # rows

Floats = NDArray[np.float64]


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
        return np.asarray(fitted.answers(X, model.calibration))
    return np.asarray(
        fitted.answers(X) if fitted.task == "regression" or fitted.gives_probabilities else fitted.logits(X)
    )


def _get_head_settings(model: Model) -> dict[str, Any]:
    """What the head was set to, and what was chosen for it."""
    chosen: Mapping[str, Any] = (model.history.get("chosen") or {}).get("settings", {})
    settings = {**model.history.get("params", {}), **chosen}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _make_stratified_order(dataset: EmbeddingDataset, task: str, seed: int) -> NDArray[np.intp]:
    """The rows in an order of which every beginning has about the same mix of classes."""
    keys = split.compute_keys(dataset.digests, seed + 1)
    if task != "classification":
        return np.argsort(keys, kind="stable")
    quantiles = np.empty(len(dataset))
    for code in range(len(dataset.classes)):
        class_rows = np.flatnonzero(dataset.y == code)
        quantiles[class_rows[np.argsort(keys[class_rows], kind="stable")]] = (np.arange(len(class_rows)) + 0.5) / len(
            class_rows
        )
    return np.argsort(quantiles, kind="stable")
