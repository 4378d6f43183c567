"""The second stage of a run: every backbone once over the images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache
from featpipe.engine import resolve_devices
from featpipe.extraction import extract_index, load_backbone, make_facts
from featpipe.extraction.places import make_cache_path
from featpipe.pipeline.outcome import EmbeddingSummary
from featpipe.pipeline.trials import make_backbone_label
from featpipe.progress import Progress, ProgressCallback
from featpipe.recipe import ExtractionConfig

__all__ = ["BackboneCaches", "extract_backbone", "make_run_cache_path"]


@dataclass(frozen=True, eq=False)
class BackboneCaches:
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
    test_cache: FeatureCache | None

    def summarize(self) -> EmbeddingSummary:
        """What is told of it."""
        manifest = self.cache.manifest
        return EmbeddingSummary(
            backbone=self.label,
            cache=self.cache.path,
            scored=self.cache.path if self.test_cache is None else self.test_cache.path,
            fingerprint=self.cache.fingerprint,
            samples=len(self.cache),
            bad=sum(self.cache.bad_rows().values()),
            embedded=manifest.get("embedded"),
            images_per_second=manifest.get("images_per_second") or None,
            network_bytes=_count_bytes(self.backbone.network),
            width=self.backbone.width,
        )


def extract_backbone(
    config: ExtractionConfig, index: Index, test_index: Index | None, max_images: int | None, progress: ProgressCallback
) -> BackboneCaches:
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
    config = replace(config, device=",".join(map(str, resolve_devices(config.device))))
    label = make_backbone_label(config)
    progress(Progress("note", f"{label}: {len(index):,} images"))
    backbone = load_backbone(config)
    out = make_run_cache_path(index, backbone, config, max_images)
    cache = extract_index(index, backbone, replace(config, out=out), progress)
    test_cache = None if test_index is None else extract_index(test_index, backbone, config, progress)
    return BackboneCaches(label, backbone, cache, test_cache)


def make_run_cache_path(index: Index, backbone: Backbone, config: ExtractionConfig, max_images: int | None) -> Path:
    """Where the cache lies; that of some of the images does not take the place of that of all."""
    path = make_cache_path(index, backbone, make_facts(backbone, config), config)
    return path if max_images is None else path.with_name(f"{path.stem}-{max_images}-images{path.suffix}")


def _count_bytes(network: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
