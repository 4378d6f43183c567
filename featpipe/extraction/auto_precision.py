"""``--precision auto``: the precision is chosen on the first images and recorded in the cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from featpipe import inference
from featpipe.cache import FeatureCache
from featpipe.config import PRECISIONS, ExtractionConfig
from featpipe.data import Index
from featpipe.errors import CacheError
from featpipe.extraction.identity import make_facts
from featpipe.extraction.paths import make_cache_path

if TYPE_CHECKING:
    from featpipe.backbones import Backbone, BackboneIdentity, PreparedImage
    from featpipe.inference import Engine

logger = logging.getLogger(__name__)

PROBE_IMAGES = 32
MAX_PROBE_ROWS = 256  # the maximum number of rows read to collect them


@dataclass(frozen=True)
class PrecisionChoice:
    """The fidelity measured to choose a precision, and the measured engine; None if a cache recorded the choice."""

    fidelity: Mapping[str, Any]
    engine: Engine | None = None


def resolve_precision(
    index: Index, backbone: Backbone, settings: ExtractionConfig
) -> tuple[ExtractionConfig, PrecisionChoice]:
    """Set the fastest precision whose embeddings are close enough to fp32.

    Nothing is measured if the target cache exists and records a choice for the same ``min_cosine``. The choice depends
    only on the images, the network and the device.
    """
    cached_choice = find_cached_choice(index, backbone, settings)
    if cached_choice is not None:
        return cached_choice
    images = _load_probe_images(index, backbone)
    device = inference.resolve_devices(settings.device)[0]
    engine, choice = inference.select_precision(
        backbone, device, images, settings.min_cosine, batch=settings.batch, kind=settings.engine, images=len(index)
    )
    cosine_text = ", ".join(f"{name} {cosine:.6f}" for name, cosine in choice.cosine.items())
    comparison = f": minimum cosine to fp32 on {choice.images} images: {cosine_text}" if cosine_text else ""
    logger.info(f"precision {choice.precision}{comparison}")
    has_several_devices = len(inference.resolve_devices(settings.device)) > 1  # each process creates its own
    return replace(settings, precision=choice.precision), PrecisionChoice(
        choice.to_dict(), None if has_several_devices else engine
    )


def find_cached_choice(
    index: Index, backbone: Backbone | BackboneIdentity, settings: ExtractionConfig
) -> tuple[ExtractionConfig, PrecisionChoice] | None:
    """Find the settings and the choice that the target cache records; None if it records none."""
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
    """Load the first readable images of an archive."""
    images: list[PreparedImage] = []
    loader = inference.Loader(
        index, np.arange(min(len(index), MAX_PROBE_ROWS)), backbone.transform.prepare, PROBE_IMAGES
    )
    with closing(loader):
        for batch in loader.batches():
            images.extend(batch.images if batch.images is not None else ())
            if len(images) >= PROBE_IMAGES:
                break
    return images[:PROBE_IMAGES]
