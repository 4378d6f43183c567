"""A trained model: backbone, head and classes in one safe file; inference, uncertainty and retained statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featpipe.model.uncertainty import MAX_REFERENCES, ConformalPredictor, NoveltyScorer, Uncertainty, dumps
from featpipe.runtime import lazy_imports

if TYPE_CHECKING:
    from featpipe.model.model import (
        STORED_DIGEST_BYTES,
        Model,
        embed_samples_or_raise,
        load_model,
        open_model,
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
else:
    __getattr__, __dir__ = lazy_imports(__name__)

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
    "open_model",
    "raise_for_failures",
    "read_document",
    "select_by_herding",
    "select_exemplars",
]
