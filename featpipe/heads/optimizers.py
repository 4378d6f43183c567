"""Steps of a training: which way, and how far.

Not torch's own optimizers, whose first use takes about as long as all of a small fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from featpipe.heads.plan import NetworkTrainingConfig

if TYPE_CHECKING:
    import torch

__all__ = ["OPTIMIZER_CLASSES", "SGD", "Adam", "AdamW", "make_schedule"]

ONE_CYCLE_WARMUP_FRACTION, ONE_CYCLE_INITIAL_DIVISOR, ONE_CYCLE_FINAL_DIVISOR = 0.3, 25.0, 25e4


def make_schedule(config: NetworkTrainingConfig, max_learning_rate: float, n_steps: int) -> Callable[[int], float]:
    """The learning rate of each of so many steps, counted from zero."""
    if config.schedule == "one-cycle":
        return _one_cycle(max_learning_rate, (config.warmup or ONE_CYCLE_WARMUP_FRACTION) * n_steps - 1, n_steps - 1)
    warmup_steps = config.warmup * n_steps

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return max_learning_rate * (step + 1) / (math.floor(warmup_steps) + 1)
        progress = (step - warmup_steps) / (n_steps - warmup_steps)
        if config.schedule == "cosine":
            return max_learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        if config.schedule == "linear":
            return max_learning_rate * (1 - progress)
        if config.schedule == "step":
            return max_learning_rate * 10.0 ** -((progress >= 0.5) + (progress >= 0.75))
        return max_learning_rate

    return learning_rate


def _one_cycle(max_learning_rate: float, peak_step: float, last_step: float) -> Callable[[int], float]:
    initial_rate, final_rate = (
        max_learning_rate / ONE_CYCLE_INITIAL_DIVISOR,
        max_learning_rate / ONE_CYCLE_FINAL_DIVISOR,
    )

    def learning_rate(step: int) -> float:
        start_rate, end_rate, progress = (
            (initial_rate, max_learning_rate, step / peak_step)
            if step < peak_step
            else (max_learning_rate, final_rate, (step - peak_step) / (last_step - peak_step))
        )
        return end_rate + (start_rate - end_rate) * 0.5 * (1 + math.cos(math.pi * progress))

    return learning_rate


class _Optimizer:
    """What the optimizers have in common: parameters, and the penalties, which are of weights alone."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor], config: NetworkTrainingConfig) -> None:
        import torch

        self.config = config
        self.parameters = [*weights, *biases]
        self.is_penalized = [True] * len(weights) + [False] * len(biases)
        self.first_moments = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]

    def step(self, gradients: Sequence[torch.Tensor], learning_rate: float) -> None:
        """Move the parameters once."""
        import torch

        with torch.no_grad():
            self.start_step()
            for index, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
                l1 = self.config.l1 if self.is_penalized[index] else 0.0
                self.update_parameter(
                    index, parameter, gradient, learning_rate, self.config.weight_decay * self.is_penalized[index], l1
                )

    def start_step(self) -> None:
        """Before the parameters of a step."""

    def update_parameter(
        self,
        index: int,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        learning_rate: float,
        weight_decay: float,
        l1: float,
    ) -> None:
        raise NotImplementedError


def _soft_threshold(parameter: torch.Tensor, threshold: torch.Tensor | float) -> None:
    """The proximal step of an L1 penalty."""
    magnitude = parameter.abs().sub_(threshold).clamp_(min=0)
    parameter.sign_().mul_(magnitude)


class AdamW(_Optimizer):
    """AdamW with the usual constants (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019).

    Notes
    -----
    The proximal step of L1 is in the metric of the step, weight by weight, so that it ends where the gradient balances
    the penalty (Yun, Lozano and Yang, "Adaptive proximal gradient methods", 2021).
    """

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    decoupled = True

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor], config: NetworkTrainingConfig) -> None:
        import torch

        super().__init__(weights, biases, config)
        self.second_moments = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
        self.n_steps = 0

    def start_step(self) -> None:
        self.n_steps += 1

    def update_parameter(
        self,
        index: int,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        learning_rate: float,
        weight_decay: float,
        l1: float,
    ) -> None:
        bias_correction1 = 1 - self.beta1**self.n_steps
        bias_correction2 = math.sqrt(1 - self.beta2**self.n_steps)
        if weight_decay and self.decoupled:
            parameter.mul_(1 - learning_rate * weight_decay)
        elif weight_decay:
            gradient = gradient.add(parameter, alpha=weight_decay)
        first_moment, second_moment = self.first_moments[index], self.second_moments[index]
        first_moment.lerp_(gradient, 1 - self.beta1)
        second_moment.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = second_moment.sqrt().div_(bias_correction2).add_(self.epsilon)
        parameter.addcdiv_(first_moment, denominator, value=-learning_rate / bias_correction1)
        if l1:
            _soft_threshold(parameter, denominator.reciprocal_().mul_(learning_rate * l1))


class Adam(AdamW):
    """Adam (Kingma and Ba 2015), with weight decay in the gradient."""

    decoupled = False


class SGD(_Optimizer):
    """Nesterov momentum, with weight decay in the gradient."""

    def update_parameter(
        self,
        index: int,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        learning_rate: float,
        weight_decay: float,
        l1: float,
    ) -> None:
        momentum = self.config.momentum
        if weight_decay:
            gradient = gradient.add(parameter, alpha=weight_decay)
        velocity = self.first_moments[index].mul_(momentum).add_(gradient)
        parameter.add_(gradient.add(velocity, alpha=momentum), alpha=-learning_rate)
        if l1:
            # A steady gradient moves the parameter by this much.
            _soft_threshold(parameter, learning_rate * l1 / (1 - momentum))


OPTIMIZER_CLASSES: dict[str, type[AdamW] | type[SGD]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD}
