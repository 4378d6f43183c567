"""How a frozen network is run fast on this device, and how faithful that is."""

from featpipe.engine.devices import available_cores, resolve_device
from featpipe.engine.fidelity import Fidelity, choose
from featpipe.engine.running import Engine

__all__ = ["Engine", "Fidelity", "available_cores", "choose", "resolve_device"]
