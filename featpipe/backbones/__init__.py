"""Backbones: frozen, headless networks with their weights, transform, width and named outputs.

Listing names and identities does not import torch. All other names are imported, with torch, on first access.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from featpipe.backbones.identity import BackboneIdentity, BackboneRequest, IdentityStore
from featpipe.backbones.registry import PACKAGED_BACKBONES, TORCHVISION_BACKBONES, names

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

_LAZY_MODULES = {  # imported when first used: they need torch or scikit-learn
    "Backbone": "backbone",
    "CustomTransform": "transforms",
    "ImageBatch": "resize.matmul",
    "ImageTransform": "transforms",
    "MatmulResizer": "resize.matmul",
    "Output": "outputs",
    "Partition": "partition",
    "PreparedImage": "resize.matmul",
    "Recorder": "outputs",
    "ResizeAxis": "resize.embedding_bag",
    "SampleTransform": "transforms",
    "Stage": "stages",
    "Transform": "transforms",
    "UnresizedImage": "resize.matmul",
    "UpperNetwork": "partition",
    "digest_state": "weights",
    "example_batch": "transforms",
    "find_stages": "stages",
    "image_size": "transforms",
    "imagenet_classifier": "sources.packaged",
    "is_exact": "resize.matmul",
    "is_supported": "resize.matmul",
    "load": "loading",
    "max_resize_batch": "resize.matmul",
    "partition_network": "partition",
    "prove_frozen": "backbone",
    "reload_backbone": "loading",
    "resolve_outputs": "outputs",
    "trace_modules": "stages",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
