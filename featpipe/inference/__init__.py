"""Run a frozen network fast on a device: loading, batching, precision and graph optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featpipe.runtime import lazy_imports

if TYPE_CHECKING:
    from featpipe.inference.devices import (
        available_cores,
        inspect_cuda,
        keep_freed_memory,
        resolve_device,
        resolve_devices,
    )
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
else:
    __getattr__, __dir__ = lazy_imports(__name__)

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
    "inspect_cuda",
    "keep_freed_memory",
    "make_worker_transforms",
    "micro_batch_size",
    "resolve_device",
    "resolve_devices",
    "run_in_threads",
    "select_precision",
]
