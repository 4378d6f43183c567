"""Rows of a cache on which a model may be scored, their labels in the model's terms, and the model's training rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import SPLIT_NAMES, FeatureCache
from featpipe.errors import CacheError, ConfigError, FeatpipeError
from featpipe.model import Model

__all__ = ["TrainingReference", "find_training_reference", "load_true_labels", "select_rows_to_score"]


def select_rows_to_score(
    models: Sequence[Model], cache: FeatureCache, excluded_rows: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Select the rows to score, and count those left out by reason.

    Parameters
    ----------
    models : sequence of Model
        A row on which any of them was trained is scored for none.
    cache : FeatureCache
    excluded_rows : ndarray of int
        Row numbers that the user excludes.

    Returns
    -------
    rows : ndarray of shape (m,), int64
        Ascending.
    left_out : dict of str to int
        Rows left out, by reason.

    Raises
    ------
    CacheError
        If no row is left.
    """
    rows = cache.usable
    left_out = dict(cache.bad_rows())
    n_unlabeled = int(np.count_nonzero(cache.ok)) - len(rows)
    if cache.split.any():
        is_test_row = cache.split[rows] == SPLIT_NAMES.index("test")
        left_out["not in the test split"] = int(np.count_nonzero(~is_test_row))
        rows = rows[is_test_row]
    is_excluded = np.isin(rows, excluded_rows)
    left_out["named by --without"] = int(np.count_nonzero(is_excluded))
    rows = rows[~is_excluded]
    is_training_row = np.any([model.was_trained_on(cache.digests[rows]) for model in models], axis=0)
    left_out |= {"without a label": n_unlabeled, "trained on": int(np.count_nonzero(is_training_row))}
    rows = rows[~is_training_row]
    left_out = {reason: count for reason, count in left_out.items() if count}
    if not len(rows):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise CacheError(
            f"{cache.path}: no row is left to score ({reasons}); evaluate on other images, "
            "or read the cross-validated scores that `featpipe info MODEL` shows"
        )
    return rows.astype(np.int64), left_out


def load_true_labels(model: Model, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Load the labels of rows in the model's terms: class names, or columns in the order of its labels or targets.

    Raises
    ------
    ConfigError
        If the cache has labels that the model does not know, or lacks a target that the model predicts.
    """
    labels = cache.label_table.take(rows)
    if model.task == "classification":
        _check_known_labels(model, cache, [cache.classes[code] for code in np.unique(labels.values)])
        return labels.y
    if model.task == "multilabel":
        _check_known_labels(
            model, cache, [cache.classes[column] for column in np.flatnonzero(labels.values.any(axis=0))]
        )
        column_by_label = {name: i for i, name in enumerate(cache.classes)}
        zero_column = np.zeros(len(rows), np.int8)
        return np.column_stack(
            [
                labels.values[:, column_by_label[name]] if name in column_by_label else zero_column
                for name in model.classes
            ]
        )
    missing = [name for name in model.classes if name not in cache.classes]
    if missing:
        raise ConfigError(
            f"{cache.path}: has no target {', '.join(map(repr, missing[:3]))}, which the model predicts; "
            f"it has {', '.join(map(repr, cache.classes[:5]))}: give matching labels with --labels"
        )
    y = labels.values[:, [cache.classes.index(name) for name in model.classes]]
    return y[:, 0] if len(model.classes) == 1 else y


def _check_known_labels(model: Model, cache: FeatureCache, label_names: Sequence[str]) -> None:
    unknown_labels = [name for name in label_names if name not in model.classes]
    if unknown_labels:
        text = ", ".join(map(repr, unknown_labels[:3]))
        text += f" and {len(unknown_labels) - 3} more" if len(unknown_labels) > 3 else ""
        raise ConfigError(
            f"{cache.path}: has labels that the model does not know: {text}; leave those images out, or train a model "
            "that has them"
        )


@dataclass(frozen=True, eq=False)
class TrainingReference:
    """The rows of a cache on which a model was trained.

    Attributes
    ----------
    cache : FeatureCache
    rows : ndarray of shape (n,), int64
    output : str
        The backbone output whose embeddings the model uses.
    """

    cache: FeatureCache
    rows: NDArray[np.int64]
    output: str

    def read(self, positions: slice | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Read the embeddings at some positions of `rows`, shape (p, d)."""
        return np.asarray(self.cache.features(self.output)[self.rows[positions]], np.float32)

    def labels(self) -> list[str]:
        """The class of each row; for classification only."""
        return [str(label) for label in self.cache.label_table.take(self.rows).y]


def find_training_reference(
    model: Model,
    evaluated_cache: FeatureCache,
    training_cache: FeatureCache | str | os.PathLike[str] | None,
    cache_folder: Path,
) -> TrainingReference | None:
    """Find the rows on which the model was trained, matched by the digests of their images, never by name alone.

    Parameters
    ----------
    model : Model
    evaluated_cache : FeatureCache
    training_cache : FeatureCache or path of one, or None
        The cache on which the model was trained; if None, it is searched for beside the data, in `cache_folder`
        and beside the model.
    cache_folder : Path

    Returns
    -------
    TrainingReference or None
        None if no cache with at least half of the training images was found.

    Raises
    ------
    ConfigError
        If `training_cache` holds none of the training images.
    CacheMismatchError
        If `training_cache` holds embeddings of another backbone, transform, output or precision.
    """
    if training_cache is not None:
        cache = training_cache if isinstance(training_cache, FeatureCache) else FeatureCache(training_cache)
        model.check_cache(cache)
        reference = _select_trained_rows(model, cache)
        if reference is None:
            raise ConfigError(
                f"{cache.path}: the model was trained on none of its images; give the cache on which it was trained"
            )
        return reference
    for cache in _iter_candidate_caches(model, evaluated_cache, cache_folder):
        reference = _select_trained_rows(model, cache)
        if reference is not None and 2 * len(reference.rows) >= len(model.trained_on):
            return reference
    return None


def _iter_candidate_caches(model: Model, evaluated_cache: FeatureCache, cache_folder: Path) -> Iterator[FeatureCache]:
    """The evaluated cache itself, then files named like the cache on which the model was trained."""
    yield evaluated_cache
    name = Path(str(model.history.get("trained_on", {}).get("cache", ""))).name
    folders = [evaluated_cache.path.parent, cache_folder, *([model.path.parent] if model.path is not None else [])]
    for candidate_folder in dict.fromkeys(folders) if name else ():
        path: Any = candidate_folder / name
        if path.is_file() and path != evaluated_cache.path:
            try:
                cache = FeatureCache(path)
                model.check_cache(cache)
            except FeatpipeError:
                continue  # another cache of the same name
            yield cache


def _select_trained_rows(model: Model, cache: FeatureCache) -> TrainingReference | None:
    rows = cache.usable
    if cache.split.any():  # a test row may be an exact copy of a training image
        rows = rows[cache.split[rows] == SPLIT_NAMES.index("train")]
    rows = rows[model.was_trained_on(cache.digests[rows])]
    return TrainingReference(cache, rows.astype(np.int64), model.output) if len(rows) else None
