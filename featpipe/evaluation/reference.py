"""The images that a model was trained on, where their embeddings are still at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import SPLIT_NAMES, FeatureCache
from featpipe.errors import CacheMismatchError, ConfigError, FeatpipeError
from featpipe.model import Model

__all__ = ["TrainingReference", "find_training_reference"]


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
