"""Which weights learn how fast, and how that changes over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from featpipe.recipe import FineTuning

__all__ = ["ONE_CYCLE_RISE", "factor", "groups", "optimizer_of"]

ONE_CYCLE_START, ONE_CYCLE_END, ONE_CYCLE_RISE = 1 / 25, 1e-4, 0.3  # of the highest rate; the share of steps


def groups(
    head: Mapping[str, nn.Parameter], below: Mapping[str, nn.Parameter], depth: Mapping[str, int], tuning: FineTuning
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
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    named = [(name, parameter, 0) for name, parameter in head.items()]
    named += [(name, parameter, depth[name]) for name, parameter in below.items()]
    for name, parameter, distance in named:
        decays = parameter.ndim > 1
        group = found.setdefault(
            (distance, decays),
            {
                "params": [],
                "names": [],
                "share": tuning.layer_decay**distance,
                "weight_decay": tuning.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [found[key] for key in sorted(found)]


def optimizer_of(parameter_groups: list[dict[str, Any]], tuning: FineTuning) -> torch.optim.Optimizer:
    """The optimizer of some groups; its rates are set in every step."""
    if tuning.optimizer == "sgd":
        nesterov = tuning.momentum > 0
        return torch.optim.SGD(parameter_groups, lr=0.0, momentum=tuning.momentum, nesterov=nesterov)
    parameters = [parameter for group in parameter_groups for parameter in group["params"]]
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return torch.optim.AdamW(parameter_groups, lr=0.0, fused=on_cpu or None)  # in one pass over each weight


def factor(step: int, steps: int, tuning: FineTuning) -> float:
    """What the rates are multiplied by in a step, counted from 0, of so many.

    Examples
    --------
    >>> [round(factor(step, 10, FineTuning(warmup=0.2)), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    one_cycle = tuning.schedule == "one-cycle"
    rising = round((tuning.warmup or (ONE_CYCLE_RISE if one_cycle else 0)) * steps)
    if step < rising:
        risen = (step + 1) / rising
        return ONE_CYCLE_START + (1 - ONE_CYCLE_START) * _eased(risen) if one_cycle else risen
    if tuning.schedule == "constant":
        return 1.0
    left = 1 - _eased((step - rising) / max(1, steps - rising))
    return ONE_CYCLE_END + (1 - ONE_CYCLE_END) * left if one_cycle else left


def _eased(share: float) -> float:
    """From 0 to 1 along half a cosine."""
    return (1 - math.cos(math.pi * share)) / 2
