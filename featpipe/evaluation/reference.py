"""The images that a model was trained on, where their embeddings are still at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import SPLITS, FeatureCache
from featpipe.errors import CacheMismatchError, ConfigError, FeatpipeError
from featpipe.model import Model

__all__ = ["Reference", "reference_of"]


@dataclass(frozen=True, eq=False)
class Reference:
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


def reference_of(
    model: Model, data: FeatureCache, given: FeatureCache | str | os.PathLike[str] | None, folder: Path
) -> Reference | None:
    """The rows that the model was trained on: by their images' bytes, never by a name alone.

    Raises
    ------
    ConfigError
        If the cache that was given holds none of them.
    CacheMismatchError
        If it holds other embeddings.
    """
    if given is not None:
        cache = given if isinstance(given, FeatureCache) else FeatureCache(given)
        model.check_cache(cache)
        found = _trained_rows(model, cache)
        if found is None:
            raise ConfigError(f"{cache.path}: the model was trained on none of its images; give the cache that it was")
        return found
    for cache in _candidates(model, data, folder):
        found = _trained_rows(model, cache)
        if found is not None and 2 * len(found.rows) >= len(model.trained_on):
            return found
    return None


def _candidates(model: Model, data: FeatureCache, folder: Path) -> Iterator[FeatureCache]:
    """The data itself, then what has the name of the cache that the model was trained on."""
    yield data
    name = Path(str(model.history.get("trained_on", {}).get("cache", ""))).name
    places = [data.path.parent, folder, *([model.path.parent] if model.path is not None else [])]
    for place in dict.fromkeys(places) if name else ():
        path: Any = place / name
        if path.is_file() and path != data.path:
            try:
                cache = FeatureCache(path)
                model.check_cache(cache)
            except (CacheMismatchError, FeatpipeError):
                continue  # another cache of the same name
            yield cache


def _trained_rows(model: Model, cache: FeatureCache) -> Reference | None:
    rows = cache.usable
    if cache.split.any():  # a test row may be a copy of a training image
        rows = rows[cache.split[rows] == SPLITS.index("train")]
    rows = rows[model.was_trained_on(cache.digests[rows])]
    return Reference(cache, rows.astype(np.int64)) if len(rows) else None
