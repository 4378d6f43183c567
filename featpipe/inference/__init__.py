"""Run a frozen network fast on a device: loading, batching, precision and graph optimization."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featpipe.inference.devices import available_cores, keep_freed_memory, resolve_device, resolve_devices
    from featpipe.inference.engine import Engine
    from featpipe.inference.flops import count_multiply_adds
    from featpipe.inference.loader import (
        MAX_MICRO_BATCH,
        DecodedBatch,
        Loader,
        SampleList,
        StageSeconds,
        embed_batches,
        embed_sample_list,
        micro_batch_size,
        run_in_threads,
    )
    from featpipe.inference.optimize import OPENVINO_PRECISIONS, has_openvino
    from featpipe.inference.pinned_transfer import make_worker_transforms
    from featpipe.inference.precision import (
        Fidelity,
        candidate_precisions,
        compute_embeddings,
        compute_min_cosine,
        select_precision,
    )

__all__ = [
    "MAX_MICRO_BATCH",
    "OPENVINO_PRECISIONS",
    "DecodedBatch",
    "Engine",
    "Fidelity",
    "Loader",
    "SampleList",
    "StageSeconds",
    "available_cores",
    "candidate_precisions",
    "compute_embeddings",
    "compute_min_cosine",
    "count_multiply_adds",
    "embed_batches",
    "embed_sample_list",
    "has_openvino",
    "keep_freed_memory",
    "make_worker_transforms",
    "micro_batch_size",
    "resolve_device",
    "resolve_devices",
    "run_in_threads",
    "select_precision",
]

_LAZY_MODULES = {  # imported when first used: they need torch or scikit-learn
    "DecodedBatch": "loader",
    "Engine": "engine",
    "Fidelity": "precision",
    "SampleList": "loader",
    "Loader": "loader",
    "MAX_MICRO_BATCH": "loader",
    "OPENVINO_PRECISIONS": "optimize",
    "StageSeconds": "loader",
    "available_cores": "devices",
    "candidate_precisions": "precision",
    "compute_embeddings": "precision",
    "compute_min_cosine": "precision",
    "count_multiply_adds": "flops",
    "embed_batches": "loader",
    "embed_sample_list": "loader",
    "has_openvino": "optimize",
    "keep_freed_memory": "devices",
    "make_worker_transforms": "pinned_transfer",
    "micro_batch_size": "loader",
    "resolve_device": "devices",
    "resolve_devices": "devices",
    "run_in_threads": "loader",
    "select_precision": "precision",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
