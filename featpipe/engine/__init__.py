"""How a frozen network is run fast on this device, and how faithful that is."""

from featpipe.engine.devices import available_cores, resolve_device, resolve_devices
from featpipe.engine.fidelity import Fidelity, candidates, choose, embeddings_of, least_cosine
from featpipe.engine.handover import for_workers
from featpipe.engine.preparing import OPENVINO_PRECISIONS, has_openvino
from featpipe.engine.running import Engine

__all__ = [
    "OPENVINO_PRECISIONS",
    "Engine",
    "Fidelity",
    "available_cores",
    "candidates",
    "choose",
    "embeddings_of",
    "for_workers",
    "has_openvino",
    "least_cosine",
    "resolve_device",
    "resolve_devices",
]
