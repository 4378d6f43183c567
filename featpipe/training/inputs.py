"""Open the caches that a user names, or extract the archives."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from featpipe.cache import FeatureCache
from featpipe.errors import ConfigError
from featpipe.model import Model
from featpipe.runtime import ProgressCallback


def as_list(data: Any) -> list[Any]:
    """One cache or archive, or several, as a list."""
    return [data] if isinstance(data, (str, os.PathLike, FeatureCache)) else list(data)


def is_cache(item: Any) -> bool:
    """Whether an item is a cache, open or by its path; otherwise it is an archive."""
    return isinstance(item, FeatureCache) or Path(item).suffix in (".h5", ".hdf5")


def open_caches(
    model: Model, items: Iterable[Any], labels: Any, cache_folder: str | os.PathLike[str], progress: ProgressCallback
) -> list[FeatureCache]:
    """Open caches; archives are extracted into one cache, with the model's backbone and settings.

    Parameters
    ----------
    model : Model
    items : iterable of FeatureCache or path-like
        All caches, or all archives.
    labels : path-like or LabelTable, or None
        Of archives.
    cache_folder : path-like
    progress : callable

    Raises
    ------
    ConfigError
        If archives and caches are mixed, or labels are given for caches.
    """
    items = list(items)
    are_caches = [is_cache(item) for item in items]
    if not any(are_caches):
        from featpipe.extraction import extract  # which imports torch

        return [extract(items, labels=labels, cache=cache_folder, progress=progress, **model.extraction())]
    if not all(are_caches):
        raise ConfigError("caches and archives are mixed; extract the archives first, and give the caches")
    if labels is not None:
        raise ConfigError("--labels is for archives; a cache contains its labels: extract again with --labels")
    return [item if isinstance(item, FeatureCache) else FeatureCache(item) for item in items]
