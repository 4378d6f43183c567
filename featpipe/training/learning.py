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
from featpipe.training.rows import Rows, training_rows
from featpipe.training.selection import subset
from featpipe.training.verb import plan_of

__all__ = ["errors_by_size"]

PARTS = ((16, 8, 4, 2), (16, 8, 4), (16, 8), (32, 16))  # the more, the better; as time allows
LEAST = 24  # rows
DRAWS = 3
SECONDS = 3.0
MOST = 20_000  # rows

Floats = NDArray[np.float64]


def errors_by_size(
    model: Model,
    cache: FeatureCache,
    rows: NDArray[np.int64],
    X: NDArray[np.float32],
    error: Callable[[Floats], Floats],
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
    every = training_rows(cache, model.output)
    every = subset(every.take(np.flatnonzero(np.isin(every.rows, rows))), MOST)
    if every.classes != model.classes:
        raise ConfigError("the training rows have other classes than the model")
    plan = plan_of(cache, every, model.head_name, _settings(model), tune=False, balance=model.history.get("balance"))
    parts, draws = _affordable(float(model.history.get("seconds_to_fit") or 0.0))
    sizes = [len(every) // part for part in parts if len(every) // part >= max(LEAST, 2 * len(model.classes))]
    found = np.zeros((len(sizes), len(X)))
    for draw in range(draws):
        order = _in_proportion(every, plan.task, draw)
        for i, size in enumerate(sizes):
            fitted = plan.fit(every.take(np.sort(order[:size])))
            found[i] += error(_answers(model, fitted, X)) / draws
    return sizes, found


def _affordable(seconds: float) -> tuple[tuple[int, ...], int]:
    """The parts and the draws of each that take a few seconds, where the whole took so many; none where none do.

    By the time that the model's own fit is known to have taken, so that an evaluation finds the same on every machine.
    """
    for parts in PARTS:
        cost = seconds * sum(1 / part for part in parts)
        if cost <= SECONDS:
            return parts, int(min(DRAWS, SECONDS // cost)) if cost else DRAWS
    return (), 0


def _answers(model: Model, fitted: Any, X: NDArray[np.float32]) -> Floats:
    if model.calibration is not None:
        return np.asarray(fitted.answers(X, model.calibration))
    return np.asarray(
        fitted.answers(X) if fitted.task == "regression" or fitted.gives_probabilities else fitted.logits(X)
    )


def _settings(model: Model) -> dict[str, Any]:
    """What the head was set to, and what was chosen for it."""
    chosen: Mapping[str, Any] = (model.history.get("chosen") or {}).get("settings", {})
    given = {**model.history.get("params", {}), **chosen}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _in_proportion(rows: Rows, task: str, seed: int) -> NDArray[np.intp]:
    """The rows in an order of which every beginning has about the same mix of classes."""
    keys = split.key(rows.digests, seed + 1)
    if task != "classification":
        return np.argsort(keys, kind="stable")
    within = np.empty(len(rows))
    for code in range(len(rows.classes)):
        own = np.flatnonzero(rows.y == code)
        within[own[np.argsort(keys[own], kind="stable")]] = (np.arange(len(own)) + 0.5) / len(own)
    return np.argsort(within, kind="stable")
