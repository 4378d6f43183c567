"""Find the stages of a network, from input to output, from its forward pass and its module tree.

A stage is a sequence of blocks at one resolution. The network is split into a chain of modules, none of which halves
the resolution more than once. A stage begins where the resolution decreases and at each ``Sequential`` of blocks. The
modules before the first block form the stem. If this gives fewer than `MIN_STAGES` stages, as in a network of constant
resolution, each block is a stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from featpipe.backbones.outputs import is_channels_last
from featpipe.backbones.weights import seeded_rng

DOWNSAMPLING_RATIO = 0.6  # of the positions; a convolution without padding loses a few, which is not downsampling
DOUBLE_DOWNSAMPLING_RATIO = 0.15  # 0.25 is one halving of height and width
MIN_STAGES = 4  # with fewer, modules of repeated blocks are split


@dataclass(frozen=True)
class Stage:
    """Consecutive modules of a network.

    Attributes
    ----------
    name : str
        Name of its largest block; ``stem`` for the modules before the first block.
    modules : tuple of str
        Dotted names, input first; each includes its children. Parameters that belong directly to a parent of several
        stages are listed too.
    """

    name: str
    modules: tuple[str, ...]

    def __contains__(self, name: object) -> bool:
        """Whether a module or parameter of this dotted name belongs to the stage."""
        return is_within(str(name), self.modules)


def is_within(name: str, modules: Collection[str]) -> bool:
    """Whether a dotted name is one of the names in ``modules`` or a descendant of one.

    Examples
    --------
    >>> is_within("layer4.0.conv1.weight", ["layer3", "layer4"]), is_within("layer40", ["layer4"])
    (True, False)
    """
    parts = name.split(".")
    return any(".".join(parts[: n + 1]) in modules for n in range(len(parts)))


def find_stages(network: nn.Module, size: tuple[int, int]) -> tuple[Stage, ...]:
    """Find the stages of a network; every parameter belongs to exactly one.

    Parameters
    ----------
    network : Module
        Headless, or with a classifier, which then belongs to the last stage.
    size : (int, int)
        Height and width of an image in pixels.

    Examples
    --------
    >>> from torchvision.models import resnet18
    >>> [stage.name for stage in find_stages(resnet18(), (64, 64))]
    ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    calls = trace_modules(network, size)
    chain = _split_by_resolution(_ChainLink(calls[network], ()), calls, prod(size), size)
    groups = _group_links(chain, size)
    if len(groups) < MIN_STAGES:
        chain = _split_by_blocks(chain, calls)
        groups = _group_links(chain, size)
    return tuple(_make_stage(group, first=not n) for n, group in enumerate(groups))


@dataclass(frozen=True, eq=False)
class _ChainLink:
    """A link of the chain: a module that ran, and the names of further parameters assigned to it."""

    call: ModuleCall
    extra_names: tuple[str, ...]
    starts_stage: bool = False  # whether the link always begins a stage

    def split(self, calls: dict[nn.Module, ModuleCall]) -> list[_ChainLink]:
        """Split into child modules; children that did not run, and own parameters, are assigned to the first."""
        child_calls = sorted(_called_children(self.call.module, calls), key=lambda run: run.start)
        if not child_calls:
            return [self]
        parameter_names = [name for name, _ in self.call.module.named_parameters(prefix=self.call.name)]
        unclaimed_names = [name for name in parameter_names if not is_within(name, [call.name for call in child_calls])]
        return [
            _ChainLink(child_calls[0], (*self.extra_names, *unclaimed_names)),
            *(_ChainLink(call, ()) for call in child_calls[1:]),
        ]


def _called_children(module: nn.Module, calls: dict[nn.Module, ModuleCall]) -> Iterator[ModuleCall]:
    for child in module.children():
        if child in calls:
            yield calls[child]
        else:  # a list of modules, or a module of which only parts are called
            yield from _called_children(child, calls)


def _split_by_resolution(
    link: _ChainLink, calls: dict[nn.Module, ModuleCall], positions_before: int, size: tuple[int, int]
) -> list[_ChainLink]:
    """Split a link into a chain in which no link halves the resolution twice, as far as possible."""
    positions_after = _count_positions(link.call, positions_before, size)
    links = link.split(calls) if positions_after < DOUBLE_DOWNSAMPLING_RATIO * positions_before else [link]
    if links == [link]:
        return links
    chain: list[_ChainLink] = []
    for child_link in links:
        chain += _split_by_resolution(child_link, calls, positions_before, size)
        positions_before = _count_positions(child_link.call, positions_before, size)
    return chain


def _split_by_blocks(chain: list[_ChainLink], calls: dict[nn.Module, ModuleCall]) -> list[_ChainLink]:
    """Split a chain so that each repeated block is a link of its own."""
    while any(_has_repeated_blocks(link.call.module, calls) for link in chain):
        chain = [
            child_link
            for link in chain
            for child_link in (link.split(calls) if _has_repeated_blocks(link.call.module, calls) else [link])
        ]
    type_counts = Counter(type(link.call.module) for link in chain if _is_block(link.call.module))
    return [replace(link, starts_stage=type_counts[type(link.call.module)] > 1) for link in chain]


def _group_links(chain: list[_ChainLink], size: tuple[int, int]) -> list[list[_ChainLink]]:
    groups: list[list[_ChainLink]] = [[]]
    positions_before = prod(size)
    for link in chain:
        positions_after = _count_positions(link.call, positions_before, size)
        is_downsampled, positions_before = positions_after < DOWNSAMPLING_RATIO * positions_before, positions_after
        is_first_block = _is_block(link.call.module) and not any(map(_has_block, groups))
        is_block_sequence = type(link.call.module) is nn.Sequential and any(map(_is_block, link.call.module))
        begins_stage = link.starts_stage or is_block_sequence or is_downsampled
        if groups[-1] and (is_first_block or (begins_stage and _has_block(groups[-1]))):
            groups.append([])
        groups[-1].append(link)
    if len(groups) > 1 and not _has_block(groups[-1]):
        last = groups.pop()
        groups[-1] += last
    return groups


def _count_positions(call: ModuleCall, positions_before: int, size: tuple[int, int]) -> int:
    """Number of spatial positions of a module's output; ``positions_before`` if the layout is unknown."""
    value = call.output[0] if isinstance(call.output, (tuple, list)) and call.output else call.output
    shape = value.per_image if isinstance(value, BatchShape) else None
    if shape is None or 0 in shape or len(shape) not in (1, 2, 3):
        return positions_before
    if len(shape) < 3:
        return 1 if len(shape) == 1 else shape[0]
    return prod(shape[:2] if is_channels_last(shape, size) else shape[1:])


def _count_weight_layers(module: nn.Module) -> int:
    """Number of layers that mix channels or positions; scales and shifts do not count."""
    return sum(sum(size > 1 for size in parameter.shape) > 1 for parameter in module.parameters())


def _is_block(module: nn.Module) -> bool:
    return _count_weight_layers(module) > 1


def _has_block(group: list[_ChainLink]) -> bool:
    return sum(_count_weight_layers(link.call.module) for link in group) > 1


def _has_repeated_blocks(module: nn.Module, calls: dict[nn.Module, ModuleCall]) -> bool:
    """Whether a module contains, at any level that can be split, several blocks of the same type."""
    blocks = [call.module for call in _called_children(module, calls) if _is_block(call.module)]
    block_types = [type(block) for block in blocks]
    return len(set(block_types)) < len(block_types) or any(_has_repeated_blocks(block, calls) for block in blocks)


def _make_stage(group: list[_ChainLink], *, first: bool) -> Stage:
    modules = tuple(name for link in group for name in (*link.extra_names, link.call.name))
    blocks = [link for link in group if _is_block(link.call.module)]
    if first and not blocks:
        return Stage("stem", modules)
    largest = max(blocks or group, key=lambda link: sum(p.numel() for p in link.call.module.parameters()))
    return Stage(largest.call.name, modules)


@dataclass(frozen=True)
class BatchShape:
    """A tensor's shape for batches of one and two images; shapes of larger batches are extrapolated linearly.

    Attributes
    ----------
    batch_1, batch_2 : tuple of int
    dtype : torch.dtype
    """

    batch_1: tuple[int, ...]
    batch_2: tuple[int, ...]
    dtype: torch.dtype

    def for_batch(self, batch: int) -> tuple[int, ...]:
        """The shape for a batch of this size."""
        return tuple(a + (b - a) * (batch - 1) for a, b in zip(self.batch_1, self.batch_2, strict=True))

    @property
    def per_image(self) -> tuple[int, ...] | None:
        """The shape without the batch axis; None unless the first axis, and no other, is the batch axis."""
        return self.batch_1[1:] if self.for_batch(3) == (3, *self.batch_1[1:]) else None


@dataclass
class ModuleCall:
    """The calls of one module in a forward pass.

    Attributes
    ----------
    name : str
        Dotted name; empty for the network itself.
    module : Module
    start, end : int
        Logical times of the start of the first call and of the end of the last one.
    call_count : int
        Number of calls.
    output : object
        Output of the last call, with a :class:`BatchShape` in place of each tensor.
    """

    name: str
    module: nn.Module
    start: int
    end: int = 0
    call_count: int = 0
    output: Any = None


def trace_modules(network: nn.Module, size: tuple[int, int]) -> dict[nn.Module, ModuleCall]:
    """Record the modules that run for an image, in the order of their first calls.

    Parameters
    ----------
    network : Module
        It is left unchanged: hooks are removed, and modes and statistics are restored.
    size : (int, int)
        Height and width of an image in pixels.
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
    """Switch to eval mode without gradients within the context; restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad(), seeded_rng(0):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def map_leaves(function: Callable[..., object], value: Any, *others: Any) -> Any:
    """Apply a function to the leaves of nested tuples, lists and mappings; ``others`` have the same structure."""
    if isinstance(value, (tuple, list)):
        items = [map_leaves(function, *leaves) for leaves in zip(value, *others, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_leaves(function, value[key], *(other[key] for other in others)) for key in value}
    return function(value, *others)


def _trace(network: nn.Module, images: Tensor) -> dict[nn.Module, ModuleCall]:
    names = {module: name for name, module in network.named_modules()}
    calls: dict[nn.Module, ModuleCall] = {}
    clock = count(1)

    def on_enter(module: nn.Module, args: object) -> None:
        calls.setdefault(module, ModuleCall(names[module], module, next(clock)))

    def on_exit(module: nn.Module, args: object, value: object) -> None:
        call = calls[module]
        call.end, call.call_count = next(clock), call.call_count + 1
        call.output = map_leaves(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, value)

    handles = [module.register_forward_pre_hook(on_enter) for module in names]
    handles += [module.register_forward_hook(on_exit) for module in names]
    try:
        with eval_mode(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _make_batch_shape(value_1: object, value_2: object) -> object:
    if not isinstance(value_1, Tensor) or not isinstance(value_2, Tensor) or value_1.ndim != value_2.ndim:
        return value_1
    return BatchShape(tuple(value_1.shape), tuple(value_2.shape), value_1.dtype)
