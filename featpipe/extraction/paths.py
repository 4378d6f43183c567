"""Paths of caches, and which existing caches can be reused."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featpipe.cache import FeatureCache, SampleTable, can_reuse
from featpipe.config import ExtractionConfig
from featpipe.data import Index
from featpipe.errors import CacheError, CacheMismatchError, ConfigError
from featpipe.storage import compute_fingerprint, describe_differences

if TYPE_CHECKING:
    from featpipe.backbones import Backbone, BackboneIdentity


def make_cache_path(
    index: Index, backbone: Backbone | BackboneIdentity, facts: Mapping[str, Any], settings: ExtractionConfig
) -> Path:
    """Make the path of the cache: ``out``, or a name made from archive, backbone and facts."""
    if settings.out is not None:
        out = Path(settings.out)
        if out.suffix != ".h5":
            raise ConfigError(f"--out {out}: a cache is one HDF5 file; give it a name that ends in .h5")
        return out
    archive_paths = list_archive_paths(index)
    labels_path = getattr(settings.labels, "path", settings.labels)
    # Each label table has its own cache.
    label_parts = [] if labels_path is None else ["labels", os.path.abspath(labels_path)]
    identity_hash = hashlib.sha256(
        "\n".join([compute_fingerprint(facts), *archive_paths, *label_parts]).encode("utf-8", "replace")
    )
    stem = Path(archive_paths[0]).name.split(".")[0] or "images"
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-") for text in (stem, backbone.name))
    return Path(settings.cache) / f"{name[:100]}-{identity_hash.hexdigest()[:8]}.h5"


def list_archive_paths(index: Index) -> list[str]:
    """List the absolute paths of the archives."""
    return [os.path.abspath(source.path) for source in index.sources]


def find_finished_cache(
    path: Path, facts: Mapping[str, Any], index: Index, settings: ExtractionConfig
) -> FeatureCache | None:
    """Open the cache at ``path`` if it has the same archives and facts; None if there is no cache.

    Raises
    ------
    CacheMismatchError
        If the cache has other archives or other facts.
    """
    if not path.exists() or settings.overwrite:
        return None
    cache = FeatureCache(path, salvage=True)
    fact_differences = describe_differences(cache.facts, facts)[:4]
    archive_paths = cache.manifest.get("archives")
    if not fact_differences and archive_paths == list_archive_paths(index):
        return cache
    mismatch = "; ".join(fact_differences) or f"from {archive_paths}, asked for {list_archive_paths(index)}"
    raise CacheMismatchError(
        f"{path}: exists and differs from the request ({mismatch}); choose another --out, or pass --overwrite"
    )


def is_up_to_date(cache: FeatureCache, table: SampleTable, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a cache already contains exactly these samples and outputs."""
    if cache.lost_shards or cache.outputs != tuple(shapes):
        return False
    return cache.table().same_as(table)


def find_compatible_caches(folder: Path, facts: Mapping[str, Any]) -> list[FeatureCache]:
    """Find the caches of a folder with the same facts and at least the outputs of ``facts``."""
    caches = []
    for path in sorted(folder.glob("*.h5")):
        try:
            cache = FeatureCache(path, salvage=True)
        except CacheError:
            continue  # not a readable cache
        if can_reuse(cache.facts, facts):
            caches.append(cache)
    return caches
