"""The settings that determine an embedding, besides the image."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Any

from featpipe import backbones
from featpipe.backbones import BackboneIdentity, BackboneRequest, IdentityStore
from featpipe.config import ExtractionConfig
from featpipe.data import DEFAULT_MODALITY

if TYPE_CHECKING:
    from featpipe.backbones import Backbone

EXTRACTION_VERSION = 2  # incremented by every change of this code that changes an embedding


def load_backbone(settings: ExtractionConfig) -> Backbone:
    """Load the backbone that the settings name."""
    if not isinstance(settings.backbone, str) and isinstance(settings.backbone, backbones.Backbone):
        return settings.backbone
    return backbones.load(
        settings.backbone,
        weights=None if settings.weights is None else os.fspath(settings.weights),
        outputs=tuple(settings.outputs),
        transform=settings.transform,
        seed=settings.seed,
    )


def find_modality(backbone: str | Backbone) -> str:
    """Find the modality of a backbone; networks of the registry take images, so they are not loaded."""
    return DEFAULT_MODALITY if isinstance(backbone, str) else backbone.modality


def recall_backbone_identity(settings: ExtractionConfig) -> BackboneIdentity | None:
    """Read the stored identity of the backbone, without importing torch; None if the backbone must be loaded.

    If the process has already imported torch, the result is None: nothing would be saved, and torch may be configured
    to use other weights.
    """
    request = _make_backbone_request(settings)
    if request is None or "torch" in sys.modules:
        return None
    return _get_identity_store(settings).find(request)


def load_and_remember_backbone(settings: ExtractionConfig) -> Backbone:
    """Load the backbone that the settings name, and store its identity beside the caches."""
    load_start_ns = time_ns()
    backbone = load_backbone(settings)
    request = _make_backbone_request(settings)
    if request is not None:
        _get_identity_store(settings).write(request, backbone, load_start_ns)
    return backbone


def _make_backbone_request(settings: ExtractionConfig) -> BackboneRequest | None:
    """Make the request that identifies the backbone; None if the identity depends on custom code."""
    if not isinstance(settings.backbone, str) or ":" in settings.backbone or settings.transform is not None:
        return None
    return BackboneRequest(settings.backbone, settings.weights, tuple(settings.outputs), settings.seed)


def _get_identity_store(settings: ExtractionConfig) -> IdentityStore:
    return IdentityStore(Path(settings.cache) if settings.out is None else Path(settings.out).parent)


def make_facts(backbone: Backbone | BackboneIdentity, settings: ExtractionConfig) -> dict[str, Any]:
    """Make the facts, which determine the embeddings: equal facts and equal image bytes give equal embeddings."""
    return {
        "backbone": backbone.to_dict(),
        "precision": settings.precision,
        "storage": settings.storage,
        "extraction": EXTRACTION_VERSION,
    }
