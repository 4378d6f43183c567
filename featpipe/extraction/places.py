"""Where the caches of some archives lie, and which of them can be used."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache, Table, serves
from featpipe.errors import CacheError, CacheMismatchError, ConfigError
from featpipe.fingerprint import differences, fingerprint
from featpipe.recipe import Extraction

__all__ = ["caches_for", "existing_at", "is_cache_of", "path_of", "places_of"]


def path_of(index: Index, backbone: Backbone, facts: Mapping[str, Any], settings: Extraction) -> Path:
    """The cache's own file: what was asked for, or a name made from archive, backbone and facts."""
    if settings.out is not None:
        out = Path(settings.out)
        if out.suffix != ".h5":
            raise ConfigError(f"--out {out}: a cache is one HDF5 file; give it a name that ends in .h5")
        return out
    places = places_of(index)
    table = getattr(settings.labels, "path", settings.labels)
    labels = [] if table is None else ["labels", os.path.abspath(table)]  # another table is another cache
    made_from = hashlib.sha256("\n".join([fingerprint(facts), *places, *labels]).encode("utf-8", "replace"))
    stem = Path(places[0]).name.split(".")[0] or "images"
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-") for text in (stem, backbone.name))
    return Path(settings.cache) / f"{name[:100]}-{made_from.hexdigest()[:8]}.h5"


def places_of(index: Index) -> list[str]:
    """Where the archives lie, as absolute paths."""
    return [os.path.abspath(source.path) for source in index.sources]


def existing_at(path: Path, facts: Mapping[str, Any], index: Index, settings: Extraction) -> FeatureCache | None:
    """The finished cache of this name, if it was made of the same archives under the same facts."""
    if not path.exists() or settings.overwrite:
        return None
    cache = FeatureCache(path, salvage=True)
    differ = differences(cache.facts, facts)[:4]
    places = cache.manifest.get("archives")
    if not differ and places == places_of(index):
        return cache
    what = "; ".join(differ) if differ else f"from {places}, asked for {places_of(index)}"
    raise CacheMismatchError(f"{path}: was made otherwise ({what}); choose another --out, or pass --overwrite")


def is_cache_of(cache: FeatureCache, table: Table, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a cache is already what would be written."""
    if cache.lost_shards or cache.outputs != tuple(shapes):
        return False
    return cache.table().same_as(table)


def caches_for(folder: Path, facts: Mapping[str, Any]) -> list[FeatureCache]:
    """The caches of a folder that hold the wanted outputs under the same facts, whatever others they hold."""
    found = []
    for path in sorted(folder.glob("*.h5")):
        try:
            cache = FeatureCache(path, salvage=True)
        except CacheError:
            continue  # not ours to judge here: a file that is no cache has nothing to copy
        if serves(cache.facts, facts):
            found.append(cache)
    return found
