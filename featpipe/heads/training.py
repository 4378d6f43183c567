"""Minibatch training of a small fully connected network on features that fit in memory.

The loop is plain torch with its own generator and leaves torch as it was: global random state, threads and default type
are not touched. What comes out is numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featpipe.heads import ranges

if TYPE_CHECKING:
    import torch

__all__ = ["Data", "Plan", "Trained", "train"]

Loss = Literal["softmax", "sigmoid", "squares"]

EVALUATION_ROWS = 4096


@dataclass(frozen=True)
class Plan:
    """How to train; the one home of the defaults.

    Attributes
    ----------
    optimizer : {"adamw", "sgd"}
        AdamW, or stochastic gradient descent with Nesterov momentum.
    learning_rate : float
        Step size at the start.
    weight_decay : float
        Decoupled from the gradient, times the learning rate, on weights and not on intercepts.
    momentum : float
        Of "sgd".
    schedule : {"cosine", "constant"}
        The learning rate falls to zero along a half cosine over all steps, or stays.
    batch_size, epochs : int
    dropout : float
        Share of hidden units that are silenced in a step.
    label_smoothing : float
        Share of the target that is spread over all classes.
    early_stopping : bool
        Hold out ``validation_fraction`` of the rows given to fit, stop after ``patience`` epochs without a lower
        loss there, and return the weights of the best epoch.
    validation_fraction : float
    patience : int
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: str = "cosine"
    batch_size: int = 64
    epochs: int = 30
    dropout: float = 0.0
    label_smoothing: float = 0.0
    early_stopping: bool = False
    validation_fraction: float = 0.1
    patience: int = 5

    def check(self) -> None:
        """Refuse settings out of range, with a ValueError."""
        ranges.choice("optimizer", self.optimizer, ["adamw", "sgd"])
        ranges.number("learning_rate", self.learning_rate, above=0)
        ranges.number("weight_decay", self.weight_decay, least=0)
        ranges.number("momentum", self.momentum, least=0, below=1)
        ranges.choice("schedule", self.schedule, ["cosine", "constant"])
        ranges.whole("batch_size", self.batch_size, least=1)
        ranges.whole("epochs", self.epochs, least=1)
        ranges.number("dropout", self.dropout, least=0, below=1)
        ranges.number("label_smoothing", self.label_smoothing, least=0, below=1)
        ranges.switch("early_stopping", self.early_stopping)
        ranges.number("validation_fraction", self.validation_fraction, above=0, below=1)
        ranges.whole("patience", self.patience, least=1)


@dataclass(frozen=True, eq=False)
class Data:
    """Rows to learn from.

    Attributes
    ----------
    X : ndarray of shape (n, d), float32 or float64
    Y : ndarray
        Class codes (n,) for the softmax, 0 and 1 (n, k) for the sigmoid, numbers (n, t) for squares.
    weights : ndarray of shape (n,) or (n, k), float64
    """

    X: NDArray[Any]
    Y: NDArray[Any]
    weights: NDArray[np.float64]

    def take(self, rows: NDArray[np.intp]) -> Data:
        return Data(self.X[rows], self.Y[rows], self.weights[rows])


@dataclass(frozen=True, eq=False)
class Trained:
    """What `train` learnt.

    Attributes
    ----------
    coefs : list of ndarray of shape (fan_in, fan_out)
    intercepts : list of ndarray of shape (fan_out,)
    losses : list of float
        Mean training loss of each epoch, as the steps saw it.
    validation_losses : list of float
        Loss on the held-out rows after each epoch; empty without early stopping.
    best_epoch : int
        From 1; the one whose weights these are.
    """

    coefs: list[NDArray[Any]]
    intercepts: list[NDArray[Any]]
    losses: list[float]
    validation_losses: list[float]
    best_epoch: int


def train(
    data: Data, held_out: Data | None, *, hidden: Sequence[int], outputs: int, loss: Loss, plan: Plan, seed: int
) -> Trained:
    """Train a network with rectified hidden layers.

    Parameters
    ----------
    data : Data
    held_out : Data or None
        Rows for early stopping.
    hidden : sequence of int
        Widths of the hidden layers; empty for a linear one.
    outputs : int
    loss : {"softmax", "sigmoid", "squares"}
    plan : Plan
    seed : int

    Raises
    ------
    ValueError
        If the loss stops being a number.
    """
    import torch

    # A caller's no_grad or inference_mode would leave nothing to differentiate.
    with torch.inference_mode(False), torch.enable_grad():
        generator = torch.Generator().manual_seed(seed)
        rows = _Tensors.of(data)
        network = _Network.random([data.X.shape[1], *hidden, outputs], rows.X.dtype, generator)
        objective = _Objective(loss, plan.label_smoothing)
        optimizer = _OPTIMIZERS[plan.optimizer](network.weights, network.biases, plan)
        steps = math.ceil(len(rows.X) / plan.batch_size)
        record = _Record(network, plan.patience)
        for epoch in range(plan.epochs):
            total = 0.0
            for step, chosen in enumerate(torch.randperm(len(rows.X), generator=generator).split(plan.batch_size)):
                batch = rows.take(chosen)
                value = objective(network.forward(batch.X, plan.dropout, generator), batch, plan.label_smoothing)
                gradients = torch.autograd.grad(value, network.parameters)
                optimizer.step(gradients, _rate(plan, epoch * steps + step, plan.epochs * steps))
                total += value.item() * len(chosen)
            record.epoch(total / len(rows.X), None if held_out is None else objective.on(network, held_out))
            if not math.isfinite(total):
                raise ValueError(
                    f"training diverged in epoch {epoch + 1}: the loss is no number; lower learning_rate "
                    f"(now {plan.learning_rate:g}) or scale X"
                )
            if record.is_over:
                break
        return record.result()


def _rate(plan: Plan, step: int, steps: int) -> float:
    if plan.schedule == "constant":
        return plan.learning_rate
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True, eq=False)
class _Tensors:
    X: torch.Tensor
    Y: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, data: Data) -> _Tensors:
        import torch

        # torch shares the array's memory and warns about one that it could not write to.
        X = torch.from_numpy(np.require(data.X, requirements=["C", "W"]))
        Y = torch.from_numpy(np.require(data.Y, requirements=["C", "W"]))
        # Mean one, so that only the ratios of the weights count.
        weights = torch.from_numpy(data.weights / data.weights.mean()).to(X.dtype)
        return cls(X, Y if data.Y.ndim == 1 else Y.to(X.dtype), weights)

    def take(self, rows: torch.Tensor) -> _Tensors:
        return _Tensors(self.X.index_select(0, rows), self.Y.index_select(0, rows), self.weights.index_select(0, rows))


@dataclass(frozen=True, eq=False)
class _Network:
    """Layer i: ``x @ weights[i] + biases[i]``, rectified but for the last."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]

    @classmethod
    def random(cls, widths: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> _Network:
        """He's uniform initialisation for hidden layers; zeros for the last, so that training starts at no opinion."""
        import torch

        weights = []
        for fan_in, fan_out in pairwise(widths[:-1]):
            bound = math.sqrt(6 / fan_in)
            weights.append(torch.empty(fan_in, fan_out, dtype=dtype).uniform_(-bound, bound, generator=generator))
        weights.append(torch.zeros(widths[-2], widths[-1], dtype=dtype))
        biases = [torch.zeros(width, dtype=dtype) for width in widths[1:]]
        for parameter in [*weights, *biases]:
            parameter.requires_grad_(True)
        return cls(weights, biases)

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [*self.weights, *self.biases]

    def forward(self, x: torch.Tensor, dropout: float = 0.0, generator: torch.Generator | None = None) -> torch.Tensor:
        import torch

        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.addmm(bias, x, weight).relu()
            if dropout:
                # torch's own dropout draws from the global generator.
                x = x * torch.empty_like(x).bernoulli_(1 - dropout, generator=generator) / (1 - dropout)
        return torch.addmm(self.biases[-1], x, self.weights[-1])

    def copy(self) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
        return (
            [weight.detach().numpy().copy() for weight in self.weights],
            [bias.detach().numpy().copy() for bias in self.biases],
        )


@dataclass(frozen=True)
class _Objective:
    loss: Loss
    label_smoothing: float

    def __call__(self, scores: torch.Tensor, batch: _Tensors, smoothing: float = 0.0) -> torch.Tensor:
        """Weighted mean loss of a batch."""
        from torch.nn import functional

        if self.loss == "softmax":
            each = functional.cross_entropy(scores, batch.Y, reduction="none", label_smoothing=smoothing)
        elif self.loss == "sigmoid":
            target = batch.Y * (1 - smoothing) + 0.5 * smoothing
            each = functional.binary_cross_entropy_with_logits(scores, target, reduction="none")
        else:
            each = 0.5 * (scores - batch.Y).square().mean(dim=1)
        return (each * batch.weights).mean()

    def on(self, network: _Network, data: Data) -> float:
        """Mean loss on rows that are not trained on, without smoothing and dropout."""
        import torch

        rows = _Tensors.of(data)
        with torch.no_grad():
            total = 0.0
            for chosen in torch.arange(len(rows.X)).split(EVALUATION_ROWS):
                batch = rows.take(chosen)
                total += self(network.forward(batch.X), batch).item() * len(chosen)
        return total / len(rows.X)


class _AdamW:
    """AdamW with the usual constants (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019).

    Not torch's own, whose first use takes about as long as all of a small fit.
    """

    decay_first, decay_second, epsilon = 0.9, 0.999, 1e-8

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor], plan: Plan) -> None:
        import torch

        self.parameters = [*weights, *biases]
        self.weight_decays = [plan.weight_decay] * len(weights) + [0.0] * len(biases)
        self.first = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.second = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.steps = 0

    def step(self, gradients: Sequence[torch.Tensor], rate: float) -> None:
        import torch

        self.steps += 1
        bias_first = 1 - self.decay_first**self.steps
        bias_second = math.sqrt(1 - self.decay_second**self.steps)
        with torch.no_grad():
            for parameter, gradient, first, second, decay in zip(
                self.parameters, gradients, self.first, self.second, self.weight_decays, strict=True
            ):
                parameter.mul_(1 - rate * decay)
                first.lerp_(gradient, 1 - self.decay_first)
                second.mul_(self.decay_second).addcmul_(gradient, gradient, value=1 - self.decay_second)
                parameter.addcdiv_(first, second.sqrt().div_(bias_second).add_(self.epsilon), value=-rate / bias_first)


class _Sgd:
    """Nesterov momentum with decoupled weight decay."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor], plan: Plan) -> None:
        import torch

        self.parameters = [*weights, *biases]
        self.weight_decays = [plan.weight_decay] * len(weights) + [0.0] * len(biases)
        self.momentum = plan.momentum
        self.velocity = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    def step(self, gradients: Sequence[torch.Tensor], rate: float) -> None:
        import torch

        with torch.no_grad():
            for parameter, gradient, velocity, decay in zip(
                self.parameters, gradients, self.velocity, self.weight_decays, strict=True
            ):
                parameter.mul_(1 - rate * decay)
                velocity.mul_(self.momentum).add_(gradient)
                parameter.add_(gradient.add(velocity, alpha=self.momentum), alpha=-rate)


_OPTIMIZERS: dict[str, type[_AdamW] | type[_Sgd]] = {"adamw": _AdamW, "sgd": _Sgd}


@dataclass(eq=False)
class _Record:
    """The losses so far, and the weights to return."""

    network: _Network
    patience: int
    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best: tuple[list[NDArray[Any]], list[NDArray[Any]]] | None = None

    def epoch(self, loss: float, validation_loss: float | None) -> None:
        self.losses.append(loss)
        if validation_loss is None:
            self.best_epoch = len(self.losses)
            return
        if not self.validation_losses or validation_loss < min(self.validation_losses):
            self.best_epoch, self.best = len(self.losses), self.network.copy()
        self.validation_losses.append(validation_loss)

    @property
    def is_over(self) -> bool:
        return len(self.losses) - self.best_epoch >= self.patience

    def result(self) -> Trained:
        coefs, intercepts = self.best or self.network.copy()
        return Trained(coefs, intercepts, self.losses, self.validation_losses, self.best_epoch)
