"""What a network's modules do in one forward pass: in which order they run, and what comes out of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from featpipe.backbone.weights import seeded_rng

__all__ = ["BatchShape", "ModuleCall", "eval_mode", "map_leaves", "trace_modules"]


@dataclass(frozen=True)
class BatchShape:
    """A tensor's shape for one image and for two; that for more images lies on the same line.

    Attributes
    ----------
    one, two : tuple of int
    dtype : torch.dtype
    """

    batch_1: tuple[int, ...]
    batch_2: tuple[int, ...]
    dtype: torch.dtype

    def for_batch(self, batch: int) -> tuple[int, ...]:
        """The shape for so many images."""
        return tuple(a + (b - a) * (batch - 1) for a, b in zip(self.batch_1, self.batch_2, strict=True))

    @property
    def per_image(self) -> tuple[int, ...] | None:
        """Without the batch's axis; None where that is not the first and the only one that grows."""
        return self.batch_1[1:] if self.for_batch(3) == (3, *self.batch_1[1:]) else None


@dataclass
class ModuleCall:
    """One module in a forward pass.

    Attributes
    ----------
    name : str
        Dotted; empty for the network itself.
    module : Module
    began, ended : int
        Places among all beginnings and ends of the pass; of the first run, and of the last.
    times : int
        How often it ran.
    value : object
        What came out of the last run, with a :class:`Shape` in the place of each tensor.
    """

    name: str
    module: nn.Module
    start: int
    end: int = 0
    call_count: int = 0
    output: Any = None


def trace_modules(network: nn.Module, size: tuple[int, int]) -> dict[nn.Module, ModuleCall]:
    """The modules that run for an image, in the order in which they begin.

    Parameters
    ----------
    network : Module
        It is afterwards as it was: no hooks are left, and modes and statistics are the same.
    size : (int, int)
        Height and width of an image.
    """
    reference = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    calls_1, calls_2 = (
        _trace(network, torch.zeros(b, 3, *size, dtype=reference.dtype, device=reference.device)) for b in (1, 2)
    )
    for module, call in calls_1.items():
        call.output = map_leaves(_make_batch_shape, call.output, calls_2[module].output) if module in calls_2 else None
    return calls_1


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; every module has its own mode again afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad(), seeded_rng(0):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def map_leaves(function: Callable[..., object], value: Any, *others: Any) -> Any:
    """A value with what its tensors, tuples, lists and mappings hold changed; the others are built alike."""
    if isinstance(value, (tuple, list)):
        items = [map_leaves(function, *leaves) for leaves in zip(value, *others, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_leaves(function, value[key], *(other[key] for other in others)) for key in value}
    return function(value, *others)


@dataclass
class _ModuleTracer:
    """Notes what begins and ends."""

    names: dict[nn.Module, str]
    calls: dict[nn.Module, ModuleCall] = field(default_factory=dict)
    clock: int = 0

    def on_enter(self, module: nn.Module, args: object) -> None:
        self.clock += 1
        self.calls.setdefault(module, ModuleCall(self.names[module], module, self.clock))

    def on_exit(self, module: nn.Module, args: object, value: object) -> None:
        self.clock += 1
        call = self.calls[module]
        call.end, call.call_count, call.output = self.clock, call.call_count + 1, map_leaves(_to_meta, value)


def _trace(network: nn.Module, images: Tensor) -> dict[nn.Module, ModuleCall]:
    tracer = _ModuleTracer({module: name for name, module in network.named_modules()})
    handles = [module.register_forward_pre_hook(tracer.on_enter) for module in tracer.names]
    handles += [module.register_forward_hook(tracer.on_exit) for module in tracer.names]
    try:
        with eval_mode(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return tracer.calls


def _to_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value


def _make_batch_shape(value_1: object, value_2: object) -> object:
    if not isinstance(value_1, Tensor) or not isinstance(value_2, Tensor) or value_1.ndim != value_2.ndim:
        return value_1
    return BatchShape(tuple(value_1.shape), tuple(value_2.shape), value_1.dtype)
