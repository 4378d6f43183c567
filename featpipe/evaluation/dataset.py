"""Which rows of a cache a model may be judged by, and what is true of them in the model's terms."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import SPLIT_NAMES, FeatureCache
from featpipe.errors import CacheError, CacheMismatchError, ConfigError, FeatpipeError
from featpipe.model import Model

__all__ = ["TrainingReference", "find_training_reference", "load_true_labels", "select_rows_to_score"]


def select_rows_to_score(
    models: Sequence[Model], cache: FeatureCache, excluded_rows: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The rows to score, and how many are left out for which reason.

    Parameters
    ----------
    models : sequence of Model
        A row that one of them was trained on is scored for none.
    cache : FeatureCache
    without : ndarray of int
        Row numbers that are left out on request.
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
    """The labels of the rows in the model's terms: class names, or columns in the order of its labels or targets."""
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
            f"it has {', '.join(map(repr, cache.classes[:5]))}: give fitting labels with --labels"
        )
    y = labels.values[:, [cache.classes.index(name) for name in model.classes]]
    return y[:, 0] if len(model.classes) == 1 else y


def _check_known_labels(model: Model, cache: FeatureCache, label_names: Sequence[str]) -> None:
    unknown_labels = [name for name in label_names if name not in model.classes]
    if unknown_labels:
        more_text = f" and {len(unknown_labels) - 3} more" if len(unknown_labels) > 3 else ""
        raise ConfigError(
            f"{cache.path}: has labels that the model does not know: {', '.join(map(repr, unknown_labels[:3]))}{more_text}; "
            "leave those images out, or train a model that has them"
        )


@dataclass(frozen=True, eq=False)
class TrainingReference:
    """The rows of a cache that a model was trained on.

    Attributes
    ----------
    cache : FeatureCache
    rows : ndarray of shape (n,), int64
    """

    cache: FeatureCache
    rows: NDArray[np.int64]

    def labels(self) -> list[str]:
        """The class of each row, of a classification."""
        return [str(label) for label in self.cache.label_table.take(self.rows).y]


def find_training_reference(
    model: Model,
    evaluated_cache: FeatureCache,
    training_cache: FeatureCache | str | os.PathLike[str] | None,
    cache_folder: Path,
) -> TrainingReference | None:
    """The rows that the model was trained on: by their images' bytes, never by a name alone.

    Raises
    ------
    ConfigError
        If the cache that was given holds none of them.
    CacheMismatchError
        If it holds other embeddings.
    """
    if training_cache is not None:
        cache = training_cache if isinstance(training_cache, FeatureCache) else FeatureCache(training_cache)
        model.check_cache(cache)
        reference = _select_trained_rows(model, cache)
        if reference is None:
            raise ConfigError(f"{cache.path}: the model was trained on none of its images; give the cache that it was")
        return reference
    for cache in _iter_candidate_caches(model, evaluated_cache, cache_folder):
        reference = _select_trained_rows(model, cache)
        if reference is not None and 2 * len(reference.rows) >= len(model.trained_on):
            return reference
    return None


def _iter_candidate_caches(model: Model, evaluated_cache: FeatureCache, cache_folder: Path) -> Iterator[FeatureCache]:
    """The data itself, then what has the name of the cache that the model was trained on."""
    yield evaluated_cache
    name = Path(str(model.history.get("trained_on", {}).get("cache", ""))).name
    folders = [evaluated_cache.path.parent, cache_folder, *([model.path.parent] if model.path is not None else [])]
    for candidate_folder in dict.fromkeys(folders) if name else ():
        path: Any = candidate_folder / name
        if path.is_file() and path != evaluated_cache.path:
            try:
                cache = FeatureCache(path)
                model.check_cache(cache)
            except (CacheMismatchError, FeatpipeError):
                continue  # another cache of the same name
            yield cache


def _select_trained_rows(model: Model, cache: FeatureCache) -> TrainingReference | None:
    rows = cache.usable
    if cache.split.any():  # a test row may be a copy of a training image
        rows = rows[cache.split[rows] == SPLIT_NAMES.index("train")]
    rows = rows[model.was_trained_on(cache.digests[rows])]
    return TrainingReference(cache, rows.astype(np.int64)) if len(rows) else None
