"""Steps of a training: which way, and how far.

Not torch's own optimizers, whose first use takes about as long as all of a small fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from featpipe.heads.plan import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["BY_NAME", "Adam", "AdamW", "Sgd", "rates"]

ONE_CYCLE_RISE, ONE_CYCLE_FIRST, ONE_CYCLE_LAST = 0.3, 25.0, 25e4


def rates(plan: Plan, highest: float, steps: int) -> Callable[[int], float]:
    """The learning rate of each of so many steps, counted from zero."""
    if plan.schedule == "one-cycle":
        return _one_cycle(highest, (plan.warmup or ONE_CYCLE_RISE) * steps - 1, steps - 1)
    warm = plan.warmup * steps

    def rate(step: int) -> float:
        if step < warm:
            return highest * (step + 1) / (math.floor(warm) + 1)
        done = (step - warm) / (steps - warm)
        if plan.schedule == "cosine":
            return highest * 0.5 * (1 + math.cos(math.pi * done))
        if plan.schedule == "linear":
            return highest * (1 - done)
        if plan.schedule == "step":
            return highest * 10.0 ** -((done >= 0.5) + (done >= 0.75))
        return highest

    return rate


def _one_cycle(highest: float, top: float, last: float) -> Callable[[int], float]:
    first, end = highest / ONE_CYCLE_FIRST, highest / ONE_CYCLE_LAST

    def rate(step: int) -> float:
        start, goal, done = (first, highest, step / top) if step < top else (highest, end, (step - top) / (last - top))
        return goal + (start - goal) * 0.5 * (1 + math.cos(math.pi * done))

    return rate


class _Steps:
    """What the optimizers have in common: parameters, and the penalties, which are of weights alone."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor], plan: Plan) -> None:
        import torch

        self.plan = plan
        self.parameters = [*weights, *biases]
        self.penalised = [True] * len(weights) + [False] * len(biases)
        self.first = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    def step(self, gradients: Sequence[torch.Tensor], rate: float) -> None:
        """Move the parameters once."""
        import torch

        with torch.no_grad():
            self.begin()
            for number, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
                l1 = self.plan.l1 if self.penalised[number] else 0.0
                self.move(number, parameter, gradient, rate, self.plan.weight_decay * self.penalised[number], l1)

    def begin(self) -> None:
        """Before the parameters of a step."""

    def move(
        self, number: int, parameter: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float, l1: float
    ) -> None:
        raise NotImplementedError


def _shrink(parameter: torch.Tensor, by: torch.Tensor | float) -> None:
    """The proximal step of an L1 penalty."""
    size = parameter.abs().sub_(by).clamp_(min=0)
    parameter.sign_().mul_(size)


class AdamW(_Steps):
    """AdamW with the usual constants (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019).

    Notes
    -----
    The proximal step of L1 is in the metric of the step, weight by weight, so that it ends where the gradient balances
    the penalty (Yun, Lozano and Yang, "Adaptive proximal gradient methods", 2021).
    """

    decay_first, decay_second, epsilon = 0.9, 0.999, 1e-8
    decoupled = True

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor], plan: Plan) -> None:
        import torch

        super().__init__(weights, biases, plan)
        self.second = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.steps = 0

    def begin(self) -> None:
        self.steps += 1

    def move(
        self, number: int, parameter: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float, l1: float
    ) -> None:
        bias_first = 1 - self.decay_first**self.steps
        bias_second = math.sqrt(1 - self.decay_second**self.steps)
        if decay and self.decoupled:
            parameter.mul_(1 - rate * decay)
        elif decay:
            gradient = gradient.add(parameter, alpha=decay)
        first, second = self.first[number], self.second[number]
        first.lerp_(gradient, 1 - self.decay_first)
        second.mul_(self.decay_second).addcmul_(gradient, gradient, value=1 - self.decay_second)
        metric = second.sqrt().div_(bias_second).add_(self.epsilon)
        parameter.addcdiv_(first, metric, value=-rate / bias_first)
        if l1:
            _shrink(parameter, metric.reciprocal_().mul_(rate * l1))


class Adam(AdamW):
    """Adam (Kingma and Ba 2015), with weight decay in the gradient."""

    decoupled = False


class Sgd(_Steps):
    """Nesterov momentum, with weight decay in the gradient."""

    def move(
        self, number: int, parameter: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float, l1: float
    ) -> None:
        momentum = self.plan.momentum
        if decay:
            gradient = gradient.add(parameter, alpha=decay)
        velocity = self.first[number].mul_(momentum).add_(gradient)
        parameter.add_(gradient.add(velocity, alpha=momentum), alpha=-rate)
        if l1:
            # A steady gradient moves the parameter by this much.
            _shrink(parameter, rate * l1 / (1 - momentum))


BY_NAME: dict[str, type[AdamW] | type[Sgd]] = {"adamw": AdamW, "adam": Adam, "sgd": Sgd}
