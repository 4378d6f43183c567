"""``--precision auto``: chosen on the first images, and remembered by the cache that came of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.backbone.products import Picture
from featpipe.cache import FeatureCache
from featpipe.engine import Engine, choose, resolve_devices
from featpipe.errors import CacheError
from featpipe.extraction.facts import facts_of
from featpipe.extraction.places import path_of
from featpipe.loader import Loader
from featpipe.progress import Progress, Tell
from featpipe.recipe import PRECISIONS, Extraction

__all__ = ["Chosen", "with_precision"]

IMAGES = 32
ROWS = 256  # that are read at most to find them


@dataclass(frozen=True)
class Chosen:
    """What was measured to choose a precision, and the engine that was made for it; none where a cache remembers."""

    facts: Mapping[str, Any]
    engine: Engine | None = None


def with_precision(index: Index, backbone: Backbone, settings: Extraction, progress: Tell) -> tuple[Extraction, Chosen]:
    """The settings with the fastest precision that is faithful enough.

    Where the cache that would be made is there already and remembers its choice, for a cosine no lower than is wanted
    now, nothing is measured. The choice follows from the images, the network and the device alone.
    """
    remembered = _remembered(index, backbone, settings)
    if remembered is not None:
        return remembered
    pictures = _first(index, backbone)
    device = resolve_devices(settings.device)[0]
    engine, found = choose(
        backbone, device, pictures, settings.min_cosine, batch=settings.batch, kind=settings.engine, images=len(index)
    )
    measured = ", ".join(f"{name} {cosine:.6f}" for name, cosine in found.cosine.items())
    compared = f": least cosine to fp32 on {found.images} images: {measured}" if measured else ""
    progress(Progress("note", f"precision {found.precision}{compared}"))
    several = len(resolve_devices(settings.device)) > 1  # each process makes its own
    return replace(settings, precision=found.precision), Chosen(found.facts(), None if several else engine)


def _remembered(index: Index, backbone: Backbone, settings: Extraction) -> tuple[Extraction, Chosen] | None:
    for precision in PRECISIONS:
        wanted = replace(settings, precision=precision)
        facts = facts_of(backbone, wanted)
        path = path_of(index, backbone, facts, wanted)
        try:
            manifest = FeatureCache(path, salvage=True).manifest if path.exists() else {}
        except CacheError:
            continue
        fidelity = manifest.get("fidelity")
        if fidelity and manifest["facts"] == facts and fidelity.get("min_cosine") == settings.min_cosine:
            return wanted, Chosen(fidelity)
    return None


def _first(index: Index, backbone: Backbone) -> list[Picture]:
    """The first pictures of an archive that can be read."""
    pictures: list[Picture] = []
    loader = Loader(index, np.arange(min(len(index), ROWS)), backbone.transform.picture, IMAGES)
    with closing(loader):
        for batch in loader.batches():
            pictures.extend(batch.images if batch.images is not None else ())
            if len(pictures) >= IMAGES:
                break
    return pictures[:IMAGES]
