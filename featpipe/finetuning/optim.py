"""Optimizer, parameter groups and learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from featpipe.config import FineTuneConfig

ONE_CYCLE_START_FACTOR, ONE_CYCLE_END_FACTOR = 1 / 25, 1e-4  # of the highest rate
ONE_CYCLE_WARMUP_SHARE = 0.3  # of the steps


def make_parameter_groups(
    parameters: Mapping[str, nn.Parameter], depth: Mapping[str, int], tuning: FineTuneConfig
) -> list[dict[str, Any]]:
    """Parameter groups by distance from the head, with norms and biases separate: these have no weight decay.

    Parameters
    ----------
    parameters : mapping from name to Parameter
    depth : mapping from name to int
        Of each backbone parameter: 1 for the stage next to the head. The others, the head's, have the full rate.
    tuning : FineTuneConfig

    Returns
    -------
    list of dict
        ``share`` is the factor of the base rate; ``names`` are those of ``params``.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        distance, has_weight_decay = depth.get(name, 0), parameter.ndim > 1
        group = groups.setdefault((distance, has_weight_decay), {"params": [], "names": []})
        group["share"] = tuning.layer_decay**distance
        group["weight_decay"] = tuning.weight_decay if has_weight_decay else 0.0
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def make_optimizer(parameter_groups: list[dict[str, Any]], tuning: FineTuneConfig) -> torch.optim.Optimizer:
    """The optimizer; the loop sets its rates before each step."""
    if tuning.optimizer == "sgd":
        nesterov = tuning.momentum > 0
        return torch.optim.SGD(parameter_groups, lr=0.0, momentum=tuning.momentum, nesterov=nesterov)
    parameters = [parameter for group in parameter_groups for parameter in group["params"]]
    all_on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return torch.optim.AdamW(parameter_groups, lr=0.0, fused=all_on_cpu or None)  # one pass over each weight


def schedule_factor(step: int, total_steps: int, tuning: FineTuneConfig) -> float:
    """The factor of the learning rate in a step, counted from 0.

    Examples
    --------
    >>> [round(schedule_factor(step, 10, FineTuneConfig(warmup=0.2)), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    one_cycle = tuning.schedule == "one-cycle"
    warmup_steps = round((tuning.warmup or (ONE_CYCLE_WARMUP_SHARE if one_cycle else 0)) * total_steps)
    if step < warmup_steps:
        progress = (step + 1) / warmup_steps
        return (
            ONE_CYCLE_START_FACTOR + (1 - ONE_CYCLE_START_FACTOR) * _compute_cosine_ramp(progress)
            if one_cycle
            else progress
        )
    if tuning.schedule == "constant":
        return 1.0
    decay_factor = 1 - _compute_cosine_ramp((step - warmup_steps) / max(1, total_steps - warmup_steps))
    return ONE_CYCLE_END_FACTOR + (1 - ONE_CYCLE_END_FACTOR) * decay_factor if one_cycle else decay_factor


def _compute_cosine_ramp(fraction: float) -> float:
    """From 0 to 1 along half a cosine."""
    return (1 - math.cos(math.pi * fraction)) / 2
