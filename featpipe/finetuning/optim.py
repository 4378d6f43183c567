"""Which weights learn how fast, and how that changes over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from featpipe.config import FineTuneConfig

__all__ = ["ONE_CYCLE_WARMUP_SHARE", "make_optimizer", "make_parameter_groups", "schedule_factor"]

ONE_CYCLE_START_FACTOR, ONE_CYCLE_END_FACTOR, ONE_CYCLE_WARMUP_SHARE = (
    1 / 25,
    1e-4,
    0.3,
)  # of the highest rate; the share of steps


def make_parameter_groups(
    head_parameters: Mapping[str, nn.Parameter],
    backbone_parameters: Mapping[str, nn.Parameter],
    depth: Mapping[str, int],
    tuning: FineTuneConfig,
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: by their distance from the new layer, norms and biases apart.

    Parameters
    ----------
    head : mapping from name to Parameter
        Of the new layer, which has the whole rate.
    below : mapping from name to Parameter
    depth : mapping from name to int
        Of each of ``below``, 1 for those next to the new layer.
    tuning : FineTuning

    Returns
    -------
    list of dict
        ``share`` is what the base rate is multiplied by; ``names`` are those of ``params``.
    """
    groups_by_key: dict[tuple[int, bool], dict[str, Any]] = {}
    named_parameters = [(name, parameter, 0) for name, parameter in head_parameters.items()]
    named_parameters += [(name, parameter, depth[name]) for name, parameter in backbone_parameters.items()]
    for name, parameter, distance in named_parameters:
        has_weight_decay = parameter.ndim > 1
        group = groups_by_key.setdefault(
            (distance, has_weight_decay),
            {
                "params": [],
                "names": [],
                "share": tuning.layer_decay**distance,
                "weight_decay": tuning.weight_decay if has_weight_decay else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups_by_key[key] for key in sorted(groups_by_key)]


def make_optimizer(parameter_groups: list[dict[str, Any]], tuning: FineTuneConfig) -> torch.optim.Optimizer:
    """The optimizer of some groups; its rates are set in every step."""
    if tuning.optimizer == "sgd":
        nesterov = tuning.momentum > 0
        return torch.optim.SGD(parameter_groups, lr=0.0, momentum=tuning.momentum, nesterov=nesterov)
    parameters = [parameter for group in parameter_groups for parameter in group["params"]]
    all_on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return torch.optim.AdamW(parameter_groups, lr=0.0, fused=all_on_cpu or None)  # in one pass over each weight


def schedule_factor(step: int, total_steps: int, tuning: FineTuneConfig) -> float:
    """What the rates are multiplied by in a step, counted from 0, of so many.

    Examples
    --------
    >>> [round(factor(step, 10, FineTuning(warmup=0.2)), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    one_cycle = tuning.schedule == "one-cycle"
    warmup_steps = round((tuning.warmup or (ONE_CYCLE_WARMUP_SHARE if one_cycle else 0)) * total_steps)
    if step < warmup_steps:
        warmup_progress = (step + 1) / warmup_steps
        return (
            ONE_CYCLE_START_FACTOR + (1 - ONE_CYCLE_START_FACTOR) * _cosine_ramp(warmup_progress)
            if one_cycle
            else warmup_progress
        )
    if tuning.schedule == "constant":
        return 1.0
    decay_factor = 1 - _cosine_ramp((step - warmup_steps) / max(1, total_steps - warmup_steps))
    return ONE_CYCLE_END_FACTOR + (1 - ONE_CYCLE_END_FACTOR) * decay_factor if one_cycle else decay_factor


def _cosine_ramp(fraction: float) -> float:
    """From 0 to 1 along half a cosine."""
    return (1 - math.cos(math.pi * fraction)) / 2
