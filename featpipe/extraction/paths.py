"""Where the caches of some archives lie, and which of them can be used."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featpipe.backbones import Backbone
from featpipe.cache import FeatureCache, SampleTable, can_reuse
from featpipe.config import ExtractionConfig
from featpipe.data import Index
from featpipe.errors import CacheError, CacheMismatchError, ConfigError
from featpipe.storage import compute_fingerprint, describe_differences

__all__ = ["find_compatible_caches", "find_finished_cache", "is_up_to_date", "list_archive_paths", "make_cache_path"]


def make_cache_path(index: Index, backbone: Backbone, facts: Mapping[str, Any], settings: ExtractionConfig) -> Path:
    """The cache's own file: what was asked for, or a name made from archive, backbone and facts."""
    if settings.out is not None:
        out = Path(settings.out)
        if out.suffix != ".h5":
            raise ConfigError(f"--out {out}: a cache is one HDF5 file; give it a name that ends in .h5")
        return out
    archive_paths = list_archive_paths(index)
    labels_path = getattr(settings.labels, "path", settings.labels)
    label_parts = (
        [] if labels_path is None else ["labels", os.path.abspath(labels_path)]
    )  # another table is another cache
    identity_hash = hashlib.sha256(
        "\n".join([compute_fingerprint(facts), *archive_paths, *label_parts]).encode("utf-8", "replace")
    )
    stem = Path(archive_paths[0]).name.split(".")[0] or "images"
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-") for text in (stem, backbone.name))
    return Path(settings.cache) / f"{name[:100]}-{identity_hash.hexdigest()[:8]}.h5"


def list_archive_paths(index: Index) -> list[str]:
    """Where the archives lie, as absolute paths."""
    return [os.path.abspath(source.path) for source in index.sources]


def find_finished_cache(
    path: Path, facts: Mapping[str, Any], index: Index, settings: ExtractionConfig
) -> FeatureCache | None:
    """The finished cache of this name, if it was made of the same archives under the same facts."""
    if not path.exists() or settings.overwrite:
        return None
    cache = FeatureCache(path, salvage=True)
    fact_differences = describe_differences(cache.facts, facts)[:4]
    archive_paths = cache.manifest.get("archives")
    if not fact_differences and archive_paths == list_archive_paths(index):
        return cache
    mismatch = (
        "; ".join(fact_differences)
        if fact_differences
        else f"from {archive_paths}, asked for {list_archive_paths(index)}"
    )
    raise CacheMismatchError(f"{path}: was made otherwise ({mismatch}); choose another --out, or pass --overwrite")


def is_up_to_date(cache: FeatureCache, table: SampleTable, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a cache is already what would be written."""
    if cache.lost_shards or cache.outputs != tuple(shapes):
        return False
    return cache.table().same_as(table)


def find_compatible_caches(folder: Path, facts: Mapping[str, Any]) -> list[FeatureCache]:
    """The caches of a folder that hold the wanted outputs under the same facts, whatever others they hold."""
    caches = []
    for path in sorted(folder.glob("*.h5")):
        try:
            cache = FeatureCache(path, salvage=True)
        except CacheError:
            continue  # not ours to judge here: a file that is no cache has nothing to copy
        if can_reuse(cache.facts, facts):
            caches.append(cache)
    return caches
