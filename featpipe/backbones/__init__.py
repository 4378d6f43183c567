"""Backbones: frozen, headless networks with their weights, transform, width and named outputs.

Listing names and identities does not import torch. All other names are imported, with torch, on first access.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featpipe.backbones.identity import BackboneIdentity, BackboneRequest, IdentityStore
from featpipe.backbones.registry import PACKAGED_BACKBONES, TORCHVISION_BACKBONES, names
from featpipe.runtime import lazy_imports

if TYPE_CHECKING:
    from featpipe.backbones.backbone import Backbone, prove_frozen
    from featpipe.backbones.loading import load, reload_backbone
    from featpipe.backbones.outputs import Output, Recorder, resolve_outputs
    from featpipe.backbones.partition import Partition, UpperNetwork, partition_network
    from featpipe.backbones.resize.embedding_bag import ResizeAxis
    from featpipe.backbones.resize.matmul import (
        ImageBatch,
        MatmulResizer,
        PreparedImage,
        UnresizedImage,
        is_exact,
        is_supported,
        max_resize_batch,
    )
    from featpipe.backbones.sources.packaged import imagenet_classifier
    from featpipe.backbones.stages import Stage, find_stages, trace_modules
    from featpipe.backbones.transforms import (
        CustomTransform,
        ImageTransform,
        SampleTransform,
        Transform,
        example_batch,
        image_size,
    )
    from featpipe.backbones.weights import digest_state
else:
    __getattr__, __dir__ = lazy_imports(__name__)

__all__ = [
    "PACKAGED_BACKBONES",
    "TORCHVISION_BACKBONES",
    "Backbone",
    "BackboneIdentity",
    "BackboneRequest",
    "CustomTransform",
    "IdentityStore",
    "ImageBatch",
    "ImageTransform",
    "MatmulResizer",
    "Output",
    "Partition",
    "PreparedImage",
    "Recorder",
    "ResizeAxis",
    "SampleTransform",
    "Stage",
    "Transform",
    "UnresizedImage",
    "UpperNetwork",
    "digest_state",
    "example_batch",
    "find_stages",
    "image_size",
    "imagenet_classifier",
    "is_exact",
    "is_supported",
    "load",
    "max_resize_batch",
    "names",
    "partition_network",
    "prove_frozen",
    "reload_backbone",
    "resolve_outputs",
    "trace_modules",
]
