"""What a network's modules do in one forward pass: in which order they run, and what comes out of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from featpipe.backbone.weights import seeded

__all__ = ["Run", "Shape", "evaluating", "mapped", "runs"]


@dataclass(frozen=True)
class Shape:
    """A tensor's shape for one image and for two; that for more images lies on the same line.

    Attributes
    ----------
    one, two : tuple of int
    dtype : torch.dtype
    """

    one: tuple[int, ...]
    two: tuple[int, ...]
    dtype: torch.dtype

    def of(self, batch: int) -> tuple[int, ...]:
        """The shape for so many images."""
        return tuple(a + (b - a) * (batch - 1) for a, b in zip(self.one, self.two, strict=True))

    @property
    def of_an_image(self) -> tuple[int, ...] | None:
        """Without the batch's axis; None where that is not the first and the only one that grows."""
        return self.one[1:] if self.of(3) == (3, *self.one[1:]) else None


@dataclass
class Run:
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
    began: int
    ended: int = 0
    times: int = 0
    value: Any = None


def runs(network: nn.Module, size: tuple[int, int]) -> dict[nn.Module, Run]:
    """The modules that run for an image, in the order in which they begin.

    Parameters
    ----------
    network : Module
        It is afterwards as it was: no hooks are left, and modes and statistics are the same.
    size : (int, int)
        Height and width of an image.
    """
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    one, two = (_watch(network, torch.zeros(b, 3, *size, dtype=like.dtype, device=like.device)) for b in (1, 2))
    for module, run in one.items():
        run.value = mapped(_shape, run.value, two[module].value) if module in two else None
    return one


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; every module has its own mode again afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad(), seeded(0):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def mapped(change: Callable[..., object], value: Any, *others: Any) -> Any:
    """A value with what its tensors, tuples, lists and mappings hold changed; the others are built alike."""
    if isinstance(value, (tuple, list)):
        items = [mapped(change, *same) for same in zip(value, *others, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: mapped(change, value[key], *(other[key] for other in others)) for key in value}
    return change(value, *others)


@dataclass
class _Watch:
    """Notes what begins and ends."""

    names: dict[nn.Module, str]
    found: dict[nn.Module, Run] = field(default_factory=dict)
    clock: int = 0

    def begin(self, module: nn.Module, args: object) -> None:
        self.clock += 1
        self.found.setdefault(module, Run(self.names[module], module, self.clock))

    def end(self, module: nn.Module, args: object, value: object) -> None:
        self.clock += 1
        run = self.found[module]
        run.ended, run.times, run.value = self.clock, run.times + 1, mapped(_without_values, value)


def _watch(network: nn.Module, images: Tensor) -> dict[nn.Module, Run]:
    watch = _Watch({module: name for name, module in network.named_modules()})
    handles = [module.register_forward_pre_hook(watch.begin) for module in watch.names]
    handles += [module.register_forward_hook(watch.end) for module in watch.names]
    try:
        with evaluating(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return watch.found


def _without_values(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value


def _shape(one: object, two: object) -> object:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.ndim != two.ndim:
        return one
    return Shape(tuple(one.shape), tuple(two.shape), one.dtype)
