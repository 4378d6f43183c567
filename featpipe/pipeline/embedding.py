"""The second stage of a run: every backbone once over the images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache
from featpipe.engine import resolve_devices
from featpipe.extraction import extract_index, facts_of, load_backbone
from featpipe.extraction.places import path_of
from featpipe.pipeline.outcome import Embedded
from featpipe.pipeline.trials import label_of
from featpipe.progress import Progress, Tell
from featpipe.recipe import Extraction

__all__ = ["Caches", "cache_path", "embedded"]


@dataclass(frozen=True, eq=False)
class Caches:
    """The embeddings of one backbone.

    Attributes
    ----------
    label : str
    backbone : Backbone
    cache : FeatureCache
    scored : FeatureCache or None
        Of other images, that the models are scored on.
    """

    label: str
    backbone: Backbone
    cache: FeatureCache
    scored: FeatureCache | None

    def told(self) -> Embedded:
        """What is told of it."""
        manifest = self.cache.manifest
        return Embedded(
            backbone=self.label,
            cache=self.cache.path,
            scored=self.cache.path if self.scored is None else self.scored.path,
            fingerprint=self.cache.fingerprint,
            samples=len(self.cache),
            bad=sum(self.cache.bad_rows().values()),
            embedded=manifest.get("embedded"),
            images_per_second=manifest.get("images_per_second") or None,
            network_bytes=_bytes_of(self.backbone.network),
            width=self.backbone.width,
        )


def embedded(settings: Extraction, index: Index, scored: Index | None, images: int | None, tell: Tell) -> Caches:
    """The caches of one backbone: from what is known already, and a forward pass for the rest.

    Parameters
    ----------
    settings : Extraction
    index : Index
    scored : Index or None
        Other images, that the models are scored on.
    images : int or None
        So many were taken of the archive.
    tell : callable
    """
    settings = replace(settings, device=",".join(map(str, resolve_devices(settings.device))))
    label = label_of(settings)
    tell(Progress("note", f"{label}: {len(index):,} images"))
    backbone = load_backbone(settings)
    out = cache_path(index, backbone, settings, images)
    cache = extract_index(index, backbone, replace(settings, out=out), tell)
    other = None if scored is None else extract_index(scored, backbone, settings, tell)
    return Caches(label, backbone, cache, other)


def cache_path(index: Index, backbone: Backbone, settings: Extraction, images: int | None) -> Path:
    """Where the cache lies; that of some of the images does not take the place of that of all."""
    path = path_of(index, backbone, facts_of(backbone, settings), settings)
    return path if images is None else path.with_name(f"{path.stem}-{images}-images{path.suffix}")


def _bytes_of(network: Any) -> int:
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())
