"""What is trained of a network, said in the words that people use for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from featpipe.backbone import Backbone
from featpipe.backbone.passes import runs
from featpipe.backbone.stages import Stage, stages
from featpipe.errors import ConfigError
from featpipe.names import unknown

__all__ = ["Unfrozen", "unfrozen"]

_SLICE = re.compile(r"layers\[(-?\d*)(?::(-?\d*))?\]")
_STAGES = re.compile(r"(\d+)(?: stages?)?")
_SHARE = re.compile(r"0?\.\d+|1\.0+")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Unfrozen:
    """What is trained below the new layer.

    Attributes
    ----------
    stages : tuple of Stage
        All of the network, input first.
    depth : mapping from parameter to int
        For each that is trained how far its stage is from the new layer: 1 is the last stage.
    """

    stages: tuple[Stage, ...] = ()
    depth: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.depth)

    @property
    def frozen_stages(self) -> tuple[Stage, ...]:
        """The stages before the first that is trained, input first."""
        deepest = max(self.depth.values(), default=0)
        return self.stages[: len(self.stages) - deepest]

    def thawed(self, epoch: int, gradual: int) -> tuple[str, ...]:
        """The parameters that are trained in an epoch, counted from 0: one more stage every ``gradual`` epochs."""
        reached = math.inf if not gradual else epoch // gradual
        return tuple(name for name, depth in self.depth.items() if self._turn(depth) <= reached)

    def _turn(self, depth: int) -> int:
        """Which of the trained stages it is, from 1 for the one next to the new layer."""
        return sorted(set(self.depth.values())).index(depth) + 1

    def told(self, network: nn.Module) -> str:
        """For people."""
        if not self.depth:
            return "the new layer alone is trained"
        numbers = {name: parameter.numel() for name, parameter in network.named_parameters()}
        some, all_ = sum(numbers[name] for name in self.depth), sum(numbers.values())
        names = [stage.name for n, stage in enumerate(self.stages) if len(self.stages) - n in set(self.depth.values())]
        listed = ", ".join(names) if len(names) <= 6 else f"{names[0]} to {names[-1]}"
        return f"trained: the new layer and {some:,} of {all_:,} weights, in {listed}"


def unfrozen(backbone: Backbone, what: str) -> Unfrozen:
    """Find what is to be trained.

    Parameters
    ----------
    backbone : Backbone
        Of one output.
    what : str
        As :class:`featpipe.recipe.FineTuning` describes ``unfreeze``.

    Raises
    ------
    ConfigError
        If nothing is called so, or nothing of it is left to train.

    Examples
    --------
    >>> from featpipe.backbone import load
    >>> len(unfrozen(load("resnet18", weights="none"), "last").names)
    15
    """
    network, size = backbone.network, backbone.transform.size
    order = stages(network, size)
    reached = _reached(backbone)
    last = max((n for n, stage in enumerate(order) if any(name in stage for name in reached)), default=-1)
    order = order[: last + 1]
    wanted: set[str] = set()
    for words in (part.strip() for part in what.split(",")):
        wanted |= _named(network, size, order, words)
    depth = {}
    for name in (name for name in reached if name in wanted):
        at = next((n for n, stage in enumerate(order) if name in stage), 0)
        depth[name] = len(order) - at
    if wanted and not depth:
        raise ConfigError(
            f"unfreeze={what}: none of its weights has a part in output {backbone.outputs[0].name!r}; take others"
        )
    if not depth and what.strip() != "head":
        raise ConfigError(f"unfreeze={what}: nothing is left to train; give head, last, a number of stages, or all")
    return Unfrozen(order, depth)


def _named(network: nn.Module, size: tuple[int, int], order: Sequence[Stage], words: str) -> set[str]:
    """The parameters that some words name."""
    names = [name for name, _ in network.named_parameters()]
    if words in ("head", "all", "last"):
        return {"head": set(), "all": set(names), "last": _of_stages(names, order, 1)}[words]
    if found := _STAGES.fullmatch(words):
        if not 0 < int(found[1]) <= len(order):
            shown = ", ".join(stage.name for stage in order)
            raise ConfigError(
                f"unfreeze={words}: the network has {len(order)} stages ({shown}); give 1 to {len(order)}"
            )
        return _of_stages(names, order, int(found[1]))
    if _SHARE.fullmatch(words):
        return _of_stages(names, order, math.ceil(float(words) * len(order)))
    if words.startswith("layers["):
        return _sliced(network, size, words)
    return _globbed(network, names, order, words)


def _of_stages(names: Sequence[str], order: Sequence[Stage], count: int) -> set[str]:
    """Those of the last stages; a stage without weights does not count."""
    with_weights = [stage for stage in order if any(name in stage for name in names)]
    chosen = with_weights[len(with_weights) - count :] if count else []
    return {name for name in names if any(name in stage for stage in chosen)}


def _sliced(network: nn.Module, size: tuple[int, int], words: str) -> set[str]:
    layers = [
        run.name for run in runs(network, size).values() if next(run.module.parameters(recurse=False), None) is not None
    ]
    found = _SLICE.fullmatch(words.replace(" ", ""))
    if not found:
        raise ConfigError(f"unfreeze={words} is no slice; write it as in layers[15:] (there are {len(layers)} layers)")
    start = int(found[1]) if found[1] not in ("", "-") else None
    stop = int(found[2]) if found[2] else None
    if ":" not in words:
        stop = None if start in (None, -1) else start + 1
    chosen = layers[start:stop]
    if not chosen:
        raise ConfigError(
            f"unfreeze={words}: the network has {len(layers)} layers with weights, and none of them is in it"
        )
    return {
        f"{layer}.{name}"
        for layer in chosen
        for name, _ in network.get_submodule(layer).named_parameters(recurse=False)
    }


def _globbed(network: nn.Module, names: Sequence[str], order: Sequence[Stage], words: str) -> set[str]:
    """Whatever has the name itself, or lies below a module that has it."""
    modules = [name for name, _ in network.named_modules() if name]
    matched = [name for name in (*modules, *names) if fnmatchcase(name, words)]
    matched += [module for stage in order if stage.name == words for module in stage.modules]
    if not matched:
        known = dict.fromkeys(["head", "last", "all", *(stage.name for stage in order), *modules])
        raise unknown("part of the network", words, known, "(see `--unfreeze` in `featpipe finetune --help`)")
    return {name for name in names if any(name == one or name.startswith(one + ".") for one in matched)}


def _reached(backbone: Backbone) -> list[str]:
    """The parameters that the output depends on: others would never get a gradient."""
    network = backbone.network
    parameters = dict(network.named_parameters())
    like = next((p for p in parameters.values() if p.is_floating_point()), torch.zeros(()))
    images = torch.zeros(2, 3, *backbone.transform.size, dtype=like.dtype, device=like.device)
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    floating = {name: parameter for name, parameter in parameters.items() if parameter.is_floating_point()}
    try:
        for parameter in floating.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            answer = backbone.embed(images)[backbone.outputs[0].name]
            found = torch.autograd.grad(answer.sum(), list(floating.values()), allow_unused=True)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
    return [name for name, gradient in zip(floating, found, strict=True) if gradient is not None]
