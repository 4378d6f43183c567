"""A network's stages, from its input to its output, as its forward pass and the tree of its modules show them.

What people call a stage is a run of blocks at one resolution. So the network is taken apart into a chain of modules of
which none halves the resolution more than once. A stage begins where the resolution falls and, where the network itself
says so by putting blocks together in a ``Sequential``, at each of these. What comes before the first block is the stem.
A network that has hardly any stages by that, as one that stays at one resolution, has one for each block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import log, prod

from torch import nn

from featpipe.backbone.passes import Run, Shape, runs

__all__ = ["Stage", "belongs", "stages"]

FALLS = 0.6  # of the positions; a convolution without padding loses a few and stays at its resolution
FALLS_TWICE = 0.15  # 0.25 is one halving of height and width
STAGES_MIN = 4  # where there are fewer, what repeats blocks is taken apart


@dataclass(frozen=True)
class Stage:
    """Some modules that follow each other.

    Attributes
    ----------
    name : str
        Of its largest block; ``stem`` for what comes before the first block.
    modules : tuple of str
        Dotted names, input first, each with all that is below it. Parameters that a module around several stages
        holds itself are named too.
    """

    name: str
    modules: tuple[str, ...]

    def __contains__(self, name: object) -> bool:
        """Whether a module or parameter of this dotted name belongs to the stage."""
        return belongs(str(name), self.modules)


def belongs(name: str, modules: Collection[str]) -> bool:
    """Whether a dotted name is one of some names, or below one.

    Examples
    --------
    >>> belongs("layer4.0.conv1.weight", ["layer3", "layer4"]), belongs("layer40", ["layer4"])
    (True, False)
    """
    parts = name.split(".")
    return any(".".join(parts[: n + 1]) in modules for n in range(len(parts)))


def stages(network: nn.Module, size: tuple[int, int]) -> tuple[Stage, ...]:
    """The stages of a network; every parameter belongs to exactly one.

    Parameters
    ----------
    network : Module
        Headless, or with a classifier, which then belongs to the last stage.
    size : (int, int)
        Height and width of an image.

    Examples
    --------
    >>> from torchvision.models import resnet18
    >>> [stage.name for stage in stages(resnet18(), (64, 64))]
    ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    ran = runs(network, size)
    chain = _by_resolution(_Unit(ran[network], ()), ran, prod(size), size)
    groups = _grouped(chain, size)
    if len(groups) < STAGES_MIN:
        chain = _by_blocks(chain, ran)
        groups = _grouped(chain, size)
    return tuple(Stage(_name(group, first=not n), _names(group)) for n, group in enumerate(groups))


@dataclass(frozen=True, eq=False)
class _Unit:
    """A link of the chain: a module that ran, and names of what goes with it."""

    run: Run
    with_it: tuple[str, ...]
    alone: bool = False  # begins a stage

    def apart(self, ran: dict[nn.Module, Run]) -> list[_Unit]:
        """The modules that it consists of; what did not run of it, and its own parameters, go with the first."""
        pieces = sorted(_pieces(self.run.module, ran), key=lambda run: run.began)
        if not pieces:
            return [self]
        held = [name for name, _ in self.run.module.named_parameters(prefix=self.run.name)]
        left = [name for name in held if not belongs(name, [run.name for run in pieces])]
        return [_Unit(pieces[0], (*self.with_it, *left)), *(_Unit(run, ()) for run in pieces[1:])]


def _pieces(module: nn.Module, ran: dict[nn.Module, Run]) -> Iterator[Run]:
    for child in module.children():
        if child in ran:
            yield ran[child]
        else:  # a list of modules, or a module of which only parts are called
            yield from _pieces(child, ran)


def _by_resolution(unit: _Unit, ran: dict[nn.Module, Run], before: int, size: tuple[int, int]) -> list[_Unit]:
    """A chain of which no link halves the resolution twice, if it can be taken apart."""
    after = _positions(unit.run, before, size)
    pieces = unit.apart(ran) if after < FALLS_TWICE * before else [unit]
    if pieces == [unit]:
        return pieces
    chain: list[_Unit] = []
    for piece in pieces:
        chain += _by_resolution(piece, ran, before, size)
        before = _positions(piece.run, before, size)
    return chain


def _by_blocks(chain: list[_Unit], ran: dict[nn.Module, Run]) -> list[_Unit]:
    """A chain in which each block that is one of several of its kind stands alone."""
    while any(_repeats(unit.run.module, ran) for unit in chain):
        chain = [piece for unit in chain for piece in (unit.apart(ran) if _repeats(unit.run.module, ran) else [unit])]
    kinds = Counter(type(unit.run.module) for unit in chain if _is_body(unit.run.module))
    return [replace(unit, alone=kinds[type(unit.run.module)] > 1) for unit in chain]


def _grouped(chain: list[_Unit], size: tuple[int, int]) -> list[list[_Unit]]:
    groups: list[list[_Unit]] = [[]]
    before = prod(size)
    for unit in chain:
        after = _positions(unit.run, before, size)
        falls, before = after < FALLS * before, after
        is_first_body = _is_body(unit.run.module) and not any(map(_has_body, groups))
        begins = unit.alone or _is_stage(unit.run.module) or falls
        if groups[-1] and (is_first_body or (begins and _has_body(groups[-1]))):
            groups.append([])
        groups[-1].append(unit)
    if len(groups) > 1 and not _has_body(groups[-1]):
        last = groups.pop()
        groups[-1] += last
    return groups


def _positions(run: Run, before: int, size: tuple[int, int]) -> int:
    """At how many places of the image a module's value says something; as before, where that cannot be told."""
    value = run.value[0] if isinstance(run.value, (tuple, list)) and run.value else run.value
    shape = value.of_an_image if isinstance(value, Shape) else None
    if shape is None or 0 in shape or len(shape) not in (1, 2, 3):
        return before
    if len(shape) < 3:
        return 1 if len(shape) == 1 else shape[0]
    first, last = shape[1:], shape[:2]  # of channels first, and channels last: what looks like the image is its places
    return prod(last if _stretch(last, size) < _stretch(first, size) else first)


def _stretch(axes: tuple[int, ...], size: tuple[int, int]) -> float:
    """How far two axes are from having the image's aspect ratio: 0 is the same."""
    return abs(log(axes[0] / axes[1]) - log(size[0] / size[1]))


def _weights(module: nn.Module) -> int:
    """Layers that mix channels or positions: scales and shifts are not counted."""
    return sum(sum(side > 1 for side in parameter.shape) > 1 for parameter in module.parameters())


def _is_body(module: nn.Module) -> bool:
    return _weights(module) > 1


def _has_body(group: list[_Unit]) -> bool:
    return sum(_weights(unit.run.module) for unit in group) > 1


def _is_stage(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and any(map(_is_body, module.children()))


def _repeats(module: nn.Module, ran: dict[nn.Module, Run]) -> bool:
    """Whether blocks of one kind follow each other somewhere in a module that can be taken apart."""
    pieces = [run.module for run in _pieces(module, ran) if _is_body(run.module)]
    kinds = [type(piece) for piece in pieces]
    return len(set(kinds)) < len(kinds) or any(_repeats(piece, ran) for piece in pieces)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _name(group: list[_Unit], *, first: bool) -> str:
    bodies = [unit for unit in group if _is_body(unit.run.module)]
    return "stem" if first and not bodies else max(bodies or group, key=lambda unit: _size(unit.run.module)).run.name


def _names(group: list[_Unit]) -> tuple[str, ...]:
    return tuple(name for unit in group for name in (*unit.with_it, unit.run.name))
