"""A trained model: backbone, head and classes in one safe file; inference, uncertainty and retained statistics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from featpipe.model.uncertainty import MAX_REFERENCES, ConformalPredictor, NoveltyScorer, Uncertainty, dumps

if TYPE_CHECKING:
    from featpipe.model.model import (
        STORED_DIGEST_BYTES,
        Model,
        embed_samples_or_raise,
        load_model,
        raise_for_failures,
        read_document,
    )
    from featpipe.model.retained import (
        DEFAULT_RETENTION,
        EXEMPLAR_SELECTORS,
        ReplayMemory,
        RetentionPolicy,
        collect_replay_memory,
        compute_penultimate_features,
        select_by_herding,
        select_exemplars,
    )

__all__ = [
    "DEFAULT_RETENTION",
    "EXEMPLAR_SELECTORS",
    "MAX_REFERENCES",
    "STORED_DIGEST_BYTES",
    "ConformalPredictor",
    "Model",
    "NoveltyScorer",
    "ReplayMemory",
    "RetentionPolicy",
    "Uncertainty",
    "collect_replay_memory",
    "compute_penultimate_features",
    "dumps",
    "embed_samples_or_raise",
    "load_model",
    "raise_for_failures",
    "read_document",
    "select_by_herding",
    "select_exemplars",
]

_LAZY_MODULES = {  # imported when first used: they need torch or scikit-learn
    "DEFAULT_RETENTION": "retained",
    "EXEMPLAR_SELECTORS": "retained",
    "Model": "model",
    "ReplayMemory": "retained",
    "RetentionPolicy": "retained",
    "STORED_DIGEST_BYTES": "model",
    "collect_replay_memory": "retained",
    "compute_penultimate_features": "retained",
    "embed_samples_or_raise": "model",
    "load_model": "model",
    "raise_for_failures": "model",
    "read_document": "model",
    "select_by_herding": "retained",
    "select_exemplars": "retained",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
