"""Backbones: frozen, headless networks with their weights, their own transform, their width and named outputs.

Listing the names loads no torch; everything else here does, when it is first touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from featpipe.backbone.catalogue import names

if TYPE_CHECKING:
    from featpipe.backbone.frozen import Backbone, prove_frozen
    from featpipe.backbone.loading import load, reload_backbone
    from featpipe.backbone.output import Output
    from featpipe.backbone.packaged import imagenet_classifier
    from featpipe.backbone.transform import CustomTransform, Transform

__all__ = [
    "Backbone",
    "CustomTransform",
    "Output",
    "Transform",
    "imagenet_classifier",
    "load",
    "names",
    "prove_frozen",
    "reload_backbone",
]

_LAZY_MODULES = {
    "Backbone": "frozen",
    "CustomTransform": "transform",
    "Output": "output",
    "Transform": "transform",
    "imagenet_classifier": "packaged",
    "load": "loading",
    "reload_backbone": "loading",
    "prove_frozen": "frozen",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
