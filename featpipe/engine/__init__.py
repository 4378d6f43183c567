"""How a frozen network is run fast on this device, and how faithful that is."""

from featpipe.engine.devices import available_cores, resolve_device, resolve_devices
from featpipe.engine.fidelity import Fidelity, candidates, choose, least_cosine
from featpipe.engine.running import Engine

__all__ = [
    "Engine",
    "Fidelity",
    "available_cores",
    "candidates",
    "choose",
    "least_cosine",
    "resolve_device",
    "resolve_devices",
]
