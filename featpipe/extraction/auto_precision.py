"""``--precision auto``: chosen on the first images, and remembered by the cache that came of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featpipe.backbones import Backbone, PreparedImage
from featpipe.cache import FeatureCache
from featpipe.config import PRECISIONS, ExtractionConfig
from featpipe.data import Index
from featpipe.errors import CacheError
from featpipe.extraction.identity import make_facts
from featpipe.extraction.paths import make_cache_path
from featpipe.inference import Engine, Loader, resolve_devices, select_precision
from featpipe.runtime import Progress, ProgressCallback

__all__ = ["PrecisionChoice", "resolve_precision"]

PROBE_IMAGES = 32
MAX_PROBE_ROWS = 256  # that are read at most to find them


@dataclass(frozen=True)
class PrecisionChoice:
    """What was measured to choose a precision, and the engine that was made for it; none where a cache remembers."""

    fidelity: Mapping[str, Any]
    engine: Engine | None = None


def resolve_precision(
    index: Index, backbone: Backbone, settings: ExtractionConfig, progress: ProgressCallback
) -> tuple[ExtractionConfig, PrecisionChoice]:
    """The settings with the fastest precision that is faithful enough.

    Where the cache that would be made is there already and remembers its choice, for a cosine no lower than is wanted
    now, nothing is measured. The choice follows from the images, the network and the device alone.
    """
    cached_choice = _find_cached_choice(index, backbone, settings)
    if cached_choice is not None:
        return cached_choice
    images = _load_probe_images(index, backbone)
    device = resolve_devices(settings.device)[0]
    engine, choice = select_precision(
        backbone, device, images, settings.min_cosine, batch=settings.batch, kind=settings.engine, images=len(index)
    )
    cosine_text = ", ".join(f"{name} {cosine:.6f}" for name, cosine in choice.cosine.items())
    comparison = f": least cosine to fp32 on {choice.images} images: {cosine_text}" if cosine_text else ""
    progress(Progress("note", f"precision {choice.precision}{comparison}"))
    has_several_devices = len(resolve_devices(settings.device)) > 1  # each process makes its own
    return replace(settings, precision=choice.precision), PrecisionChoice(
        choice.to_dict(), None if has_several_devices else engine
    )


def _find_cached_choice(
    index: Index, backbone: Backbone, settings: ExtractionConfig
) -> tuple[ExtractionConfig, PrecisionChoice] | None:
    for precision in PRECISIONS:
        candidate = replace(settings, precision=precision)
        facts = make_facts(backbone, candidate)
        path = make_cache_path(index, backbone, facts, candidate)
        try:
            manifest = FeatureCache(path, salvage=True).manifest if path.exists() else {}
        except CacheError:
            continue
        fidelity = manifest.get("fidelity")
        if fidelity and manifest["facts"] == facts and fidelity.get("min_cosine") == settings.min_cosine:
            return candidate, PrecisionChoice(fidelity)
    return None


def _load_probe_images(index: Index, backbone: Backbone) -> list[PreparedImage]:
    """The first pictures of an archive that can be read."""
    images: list[PreparedImage] = []
    loader = Loader(index, np.arange(min(len(index), MAX_PROBE_ROWS)), backbone.transform.apply_geometry, PROBE_IMAGES)
    with closing(loader):
        for batch in loader.batches():
            images.extend(batch.images if batch.images is not None else ())
            if len(images) >= PROBE_IMAGES:
                break
    return images[:PROBE_IMAGES]
