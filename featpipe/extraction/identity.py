"""The facts that decide an embedding besides the image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from featpipe import backbones
from featpipe.config import ExtractionConfig

if TYPE_CHECKING:
    from featpipe.backbones import Backbone

__all__ = ["EXTRACTION_VERSION", "load_backbone", "make_facts"]

EXTRACTION_VERSION = 2  # raised by any change of this code that changes an embedding


def load_backbone(settings: ExtractionConfig) -> Backbone:
    """The backbone that the settings name."""
    if not isinstance(settings.backbone, str) and isinstance(settings.backbone, backbones.Backbone):
        return settings.backbone
    return backbones.load(
        settings.backbone,
        weights=None if settings.weights is None else os.fspath(settings.weights),
        outputs=tuple(settings.outputs),
        transform=settings.transform,
        seed=settings.seed,
    )


def make_facts(backbone: Backbone, settings: ExtractionConfig) -> dict[str, Any]:
    """The facts that decide the embeddings: equal facts and equal image bytes mean equal embeddings."""
    return {
        "backbone": backbone.to_dict(),
        "precision": settings.precision,
        "storage": settings.storage,
        "extraction": EXTRACTION_VERSION,
    }
