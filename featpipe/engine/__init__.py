"""How a frozen network is run fast on this device, and how faithful that is."""

from featpipe.engine.devices import available_cores, resolve_device, resolve_devices
from featpipe.engine.fidelity import (
    Fidelity,
    candidate_precisions,
    compute_embeddings,
    compute_min_cosine,
    select_precision,
)
from featpipe.engine.handover import make_worker_transforms
from featpipe.engine.preparing import OPENVINO_PRECISIONS, has_openvino
from featpipe.engine.running import Engine

__all__ = [
    "OPENVINO_PRECISIONS",
    "Engine",
    "Fidelity",
    "available_cores",
    "candidate_precisions",
    "compute_embeddings",
    "compute_min_cosine",
    "has_openvino",
    "make_worker_transforms",
    "resolve_device",
    "resolve_devices",
    "select_precision",
]
