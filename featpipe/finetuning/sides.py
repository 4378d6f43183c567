"""Honest rows: what is trained on, what decides when to stop, and what nothing has seen until the final table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import split
from featpipe.cache import SPLITS, FeatureCache
from featpipe.errors import CacheError, ConfigError
from featpipe.model import Model
from featpipe.recipe import FineTuning

__all__ = ["Sides", "sides_of"]

HELD_SEED, VALIDATION_SEED = 4, 5  # other rows than those of folds; the same whatever --seed is
LISTED = 3


@dataclass(frozen=True, eq=False)
class Sides:
    """Rows of an archive, and what is true of them in the model's terms.

    Attributes
    ----------
    train, validation, held : ndarray of int64
        Row numbers, ascending; no image is on two sides, byte by byte.
    y : ndarray
        For each row of the archive: class code of shape (n,), targets of shape (n, t), or 0 and 1 of shape (n, k).
        Anything for rows that are on no side.
    how : str
        For people.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    held: NDArray[np.int64]
    y: NDArray[Any]
    how: str

    @property
    def seen(self) -> NDArray[np.int64]:
        """Rows that training and stopping looked at."""
        return np.sort(np.concatenate([self.train, self.validation]))


def sides_of(model: Model, cache: FeatureCache, tuning: FineTuning) -> Sides:
    """Divide the labelled, readable rows of a cache.

    By the split that came with the labels; what that lacks is taken from its training rows, and all of it where there
    is none. A row's side follows from its bytes.

    Raises
    ------
    CacheError
        If there are no labels.
    ConfigError
        If the labels are not of the model's classes, all of them, or there are too few images.
    """
    rows, y = cache.usable, _in_models_terms(model, cache)
    if not len(rows):
        raise CacheError(f"{cache.path}: no row is labelled and readable")
    marks = cache.split[rows]
    train, validation, held = (rows[marks == SPLITS.index(name)] for name in ("train", "validation", "test"))
    if not marks.any():
        train = rows
    if not len(train):
        raise CacheError(f"{cache.path}: the labels mark no row for training")
    held = _without_copies(cache, held, np.concatenate([train, validation]))
    validation = _without_copies(cache, validation, train)
    given = [name for name, some in (("validation", validation), ("test", held)) if len(some)]
    if not len(held):
        train, held = _divided(model, cache, train, y, tuning.test, HELD_SEED)
    if not len(validation):
        train, validation = _divided(model, cache, train, y, tuning.validation, VALIDATION_SEED)
    _check_classes(model, cache, y, train)
    how = f"{len(train)} images to train on, {len(validation)} to say when to stop, {len(held)} held out for the table"
    return Sides(train, validation, held, y, f"{how} ({' and '.join(given) or 'neither'} as the labels mark them)")


def _divided(
    model: Model, cache: FeatureCache, rows: NDArray[np.int64], y: NDArray[Any], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if not share:
        raise ConfigError("test and validation are shares above 0: without them nobody could say what it brought")
    of_class = model.task == "classification"
    names = {"names": model.classes} if of_class else {}
    kept, out = split.holdout(cache.digests[rows], y[rows] if of_class else None, test=share, seed=seed, **names)
    return rows[kept], rows[out]


def _without_copies(cache: FeatureCache, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows whose images are not, byte by byte, among others."""
    digests = np.ascontiguousarray(cache.digests).view("V32").ravel()
    return rows[~np.isin(digests[rows], digests[others])]


def _in_models_terms(model: Model, cache: FeatureCache) -> NDArray[Any]:
    if cache.task != model.task:
        found = "no labels" if cache.task == "none" else f"labels for {cache.task}"
        raise CacheError(f"{cache.path}: has {found}, the model does {model.task}; give fitting labels with --labels")
    strange = [name for name in _used(cache) if name not in model.classes]
    absent = [name for name in model.classes if name not in cache.classes]
    if strange:
        raise ConfigError(
            f"{cache.path}: has {_listed('class', strange)}, which the model does not know; teach it with "
            "`featpipe expand` first, or leave those images out"
        )
    if absent:
        raise ConfigError(
            f"{cache.path}: has no image of {_listed('class', absent)}, which the model knows and would forget; give "
            "images of all its classes, or train a model of fewer"
        )
    values = cache.label_table.values
    if model.task == "classification":
        code = np.array(
            [model.classes.index(name) if name in model.classes else -1 for name in cache.classes], np.int64
        )
        return code[values]
    return values[:, [cache.classes.index(name) for name in model.classes]]


def _used(cache: FeatureCache) -> list[str]:
    """The classes that some row has; all targets."""
    values = cache.label_table.values[cache.usable]
    if cache.task == "classification":
        return [cache.classes[code] for code in np.unique(values)]
    used = np.flatnonzero(values.any(axis=0)) if cache.task == "multilabel" else range(values.shape[1])
    return [cache.classes[int(column)] for column in used]


def _check_classes(model: Model, cache: FeatureCache, y: NDArray[Any], train: NDArray[np.int64]) -> None:
    if model.task != "classification":
        return
    absent = [name for code, name in enumerate(model.classes) if not (y[train] == code).any()]
    if absent:
        raise ConfigError(
            f"{cache.path}: no training image is of {_listed('class', absent)}, which the model knows and would "
            "forget; give images of all its classes, or train a model of fewer"
        )


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    plural = what + ("es" if what.endswith("s") else "s") if len(names) > 1 else what
    return f"{plural} {', '.join(map(repr, names[:LISTED]))}{more}"
