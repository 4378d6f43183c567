"""Select the parameters of a network to train."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from featpipe.backbones import Backbone, Stage, example_batch, find_stages, image_size, trace_modules
from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError

_SLICE_PATTERN = re.compile(r"layers\[(-?\d*)(?::(-?\d*))?\]")
_STAGES_PATTERN = re.compile(r"(\d+)(?: stages?)?")
_SHARE_PATTERN = re.compile(r"0?\.\d+|1\.0+")


@dataclass(frozen=True)
class UnfrozenParameters:
    """The parameters of the backbone that are trained.

    Attributes
    ----------
    stages : tuple of Stage
        All stages of the network, from the input.
    depth : mapping from parameter name to int
        Distance of each trained parameter's stage from the head: 1 is the last stage.
    """

    stages: tuple[Stage, ...] = ()
    depth: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.depth)

    def active_names(self, epoch: int, gradual: int) -> tuple[str, ...]:
        """The parameters trained in an epoch, from 0: one more stage every ``gradual`` epochs; all if it is 0."""
        n_active_stages = math.inf if not gradual else epoch // gradual
        depths = sorted(set(self.depth.values()))
        return tuple(name for name, depth in self.depth.items() if depths.index(depth) < n_active_stages)

    def describe(self, network: nn.Module) -> str:
        """Describe what is trained in one line."""
        if not self.depth:
            return "only the new layer is trained"
        parameter_counts = {name: parameter.numel() for name, parameter in network.named_parameters()}
        trained_count, total_count = sum(parameter_counts[name] for name in self.depth), sum(parameter_counts.values())
        stage_names = [
            stage.name for n, stage in enumerate(self.stages) if len(self.stages) - n in set(self.depth.values())
        ]
        stages_text = ", ".join(stage_names) if len(stage_names) <= 6 else f"{stage_names[0]} to {stage_names[-1]}"
        return f"trained: the new layer and {trained_count:,} of {total_count:,} weights, in {stages_text}"


def select_unfrozen(backbone: Backbone, unfreeze: str) -> UnfrozenParameters:
    """Select the parameters to train.

    Parameters
    ----------
    backbone : Backbone
        With one output.
    unfreeze : str
        As :class:`featpipe.config.FineTuneConfig` describes it.

    Raises
    ------
    ConfigError
        If no part of the network has this name, or no parameter is selected.

    Examples
    --------
    >>> from featpipe.backbones import load
    >>> len(select_unfrozen(load("resnet18", weights="none"), "last").names)
    15
    """
    network, size = backbone.network, image_size(backbone.transform)
    network_stages = find_stages(network, size)
    reachable_names = _find_reachable_parameters(backbone)
    last_index = max(
        (n for n, stage in enumerate(network_stages) if any(name in stage for name in reachable_names)), default=-1
    )
    network_stages = network_stages[: last_index + 1]
    selected_names: set[str] = set()
    for term in (part.strip() for part in unfreeze.split(",")):
        selected_names |= _select_by_term(network, size, network_stages, term)
    depth = {}
    for name in (name for name in reachable_names if name in selected_names):
        stage_index = next((n for n, stage in enumerate(network_stages) if name in stage), 0)
        depth[name] = len(network_stages) - stage_index
    if selected_names and not depth:
        raise ConfigError(
            f"unfreeze={unfreeze}: output {backbone.outputs[0].name!r} depends on none of these weights; select others"
        )
    if not depth and unfreeze.strip() != "head":
        raise ConfigError(f"unfreeze={unfreeze} selects no weights; give head, last, a number of stages, or all")
    return UnfrozenParameters(network_stages, depth)


def _select_by_term(network: nn.Module, size: tuple[int, int], network_stages: Sequence[Stage], term: str) -> set[str]:
    names = [name for name, _ in network.named_parameters()]
    if term in ("head", "all", "last"):
        return {"head": set(), "all": set(names), "last": _select_last_stages(names, network_stages, 1)}[term]
    if match := _STAGES_PATTERN.fullmatch(term):
        if not 0 < int(match[1]) <= len(network_stages):
            stage_names = ", ".join(stage.name for stage in network_stages)
            n = len(network_stages)
            raise ConfigError(f"unfreeze={term}: the network has {n} stages ({stage_names}); give 1 to {n}")
        return _select_last_stages(names, network_stages, int(match[1]))
    if _SHARE_PATTERN.fullmatch(term):
        return _select_last_stages(names, network_stages, math.ceil(float(term) * len(network_stages)))
    if term.startswith("layers["):
        return _select_layer_slice(network, size, term)
    return _select_by_glob(network, names, network_stages, term)


def _select_last_stages(names: Sequence[str], network_stages: Sequence[Stage], count: int) -> set[str]:
    """The parameters of the last stages; stages without weights do not count."""
    with_weights = [stage for stage in network_stages if any(name in stage for name in names)]
    last_stages = with_weights[len(with_weights) - count :] if count else []
    return {name for name in names if any(name in stage for stage in last_stages)}


def _select_layer_slice(network: nn.Module, size: tuple[int, int], term: str) -> set[str]:
    layers = [
        run.name
        for run in trace_modules(network, size).values()
        if next(run.module.parameters(recurse=False), None) is not None
    ]
    match = _SLICE_PATTERN.fullmatch(term.replace(" ", ""))
    if not match:
        raise ConfigError(
            f"unfreeze={term} is not a slice; write it as in layers[15:] (there are {len(layers)} layers)"
        )
    start = int(match[1]) if match[1] not in ("", "-") else None
    stop = int(match[2]) if match[2] else None
    if ":" not in term:
        stop = None if start in (None, -1) else start + 1
    selected_layers = layers[start:stop]
    if not selected_layers:
        raise ConfigError(
            f"unfreeze={term}: the network has {len(layers)} layers with weights, and the slice selects none"
        )
    return {
        f"{layer}.{name}"
        for layer in selected_layers
        for name, _ in network.get_submodule(layer).named_parameters(recurse=False)
    }


def _select_by_glob(network: nn.Module, names: Sequence[str], network_stages: Sequence[Stage], term: str) -> set[str]:
    """Parameters whose name matches, or the name of a module that contains them."""
    modules = [name for name, _ in network.named_modules() if name]
    matched = [name for name in (*modules, *names) if fnmatchcase(name, term)]
    matched += [module for stage in network_stages if stage.name == term for module in stage.modules]
    if not matched:
        known_names = dict.fromkeys(["head", "last", "all", *(stage.name for stage in network_stages), *modules])
        raise unknown_name_error(
            "part of the network", term, known_names, "(see `--unfreeze` in `featpipe finetune --help`)"
        )
    return {name for name in names if any(name == prefix or name.startswith(prefix + ".") for prefix in matched)}


def _find_reachable_parameters(backbone: Backbone) -> list[str]:
    """The parameters that the output depends on; others never get a gradient."""
    network = backbone.network
    parameters = dict(network.named_parameters())
    reference = next((p for p in parameters.values() if p.is_floating_point()), torch.zeros(()))
    images = example_batch(backbone.transform, 2, reference.dtype, reference.device)
    required_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
    float_parameters = {name: parameter for name, parameter in parameters.items() if parameter.is_floating_point()}
    try:
        for parameter in float_parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            embeddings = backbone.embed(images)[backbone.outputs[0].name]
            gradients = torch.autograd.grad(embeddings.sum(), list(float_parameters.values()), allow_unused=True)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(required_grad[name])
    return [name for name, gradient in zip(float_parameters, gradients, strict=True) if gradient is not None]
