"""Minibatch training of a small fully connected network on features.

The loop is plain torch with its own generator and leaves torch as it was: global random state, threads and default
type. What comes out is numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from featpipe.heads.batches import Batch, Rows
from featpipe.heads.losses import Objective
from featpipe.heads.network import Layers, Network, Shape
from featpipe.heads.optimizers import BY_NAME, rates
from featpipe.heads.plan import Plan
from featpipe.heads.threads import threads_for

if TYPE_CHECKING:
    import torch

__all__ = ["Trained", "train"]

FORWARD_AND_BACKWARD = 3


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
        Loss on the validation rows after each epoch; empty without such rows.
    validation_scores : list of float
        The like of accuracy, or of R².
    best_epoch : int
        From 1; the one whose weights these are.
    """

    coefs: list[np.ndarray]
    intercepts: list[np.ndarray]
    losses: list[float]
    validation_losses: list[float]
    validation_scores: list[float]
    best_epoch: int


def train(rows: Rows, validation: Rows | None, *, shape: Shape, objective: Objective, plan: Plan, seed: int) -> Trained:
    """Train a network.

    Parameters
    ----------
    rows : Rows
    validation : Rows or None
        Are not trained on.
    shape : Shape
    objective : Objective
    plan : Plan
    seed : int

    Raises
    ------
    ValueError
        If the loss stops being a number.
    """
    import torch

    # A caller's no_grad or inference_mode would leave nothing to differentiate.
    small = FORWARD_AND_BACKWARD * plan.batch_size * shape.products
    with torch.inference_mode(False), torch.enable_grad(), threads_for(small):
        generator = torch.Generator().manual_seed(seed)
        network = Network(shape, rows.dtype, generator)
        optimizer = BY_NAME[plan.optimizer](network.weights, network.biases, plan)
        disturbance = _Disturbance(plan, generator, np.random.default_rng(seed))
        steps = math.ceil(len(rows) / plan.batch_size)
        rate = rates(plan, plan.highest_rate(shape.widths[:-1]), plan.epochs * steps)
        record = _Record(network, plan)
        for epoch in range(plan.epochs):
            total = 0.0
            for step, batch in enumerate(rows.shuffled(plan.batch_size, generator), epoch * steps):
                X, blended, share = disturbance(batch)
                loss = objective.of_step(network(X, training=True), batch, blended, share)
                gradients = torch.autograd.grad(loss, network.parameters)
                optimizer.step(gradients, rate(step))
                total += loss.item() * len(batch)
            if not math.isfinite(total):
                raise ValueError(_why_no_number(rows, epoch, plan.highest_rate(shape.widths[:-1])))
            record.epoch(total / len(rows), None if validation is None else _quality(network, objective, validation))
            if record.is_over:
                break
        return record.result()


def _why_no_number(rows: Rows, epoch: int, rate: float) -> str:
    row = rows.unreadable()
    if row is not None:
        return f"row {row} of X holds NaN or infinity; leave such rows out"
    return (
        f"training diverged in epoch {epoch + 1}: the loss is no number; lower learning_rate (now {rate:g}) or scale X"
    )


@dataclass(frozen=True, eq=False)
class _Disturbance:
    """Noise on features, and blends of two rows."""

    plan: Plan
    generator: torch.Generator
    random: np.random.Generator

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Batch | None, float]:
        """Features to train on, the rows that are blended into the batch, and the batch's own share."""
        import torch

        X, blended, share = batch.X, None, 1.0
        if self.plan.mixup:
            share = float(self.random.beta(self.plan.mixup, self.plan.mixup))
            blended = batch.take(torch.randperm(len(batch), generator=self.generator))
            X = X.lerp(blended.X, 1 - share)
        if self.plan.feature_noise:
            noise = torch.empty_like(X).normal_(0, self.plan.feature_noise, generator=self.generator)
            X = X + noise
        return X, blended, share


def _quality(network: Network, objective: Objective, rows: Rows) -> tuple[float, float]:
    """Mean loss and score on rows, weighted as they are, of the network as it is used."""
    import torch

    with torch.no_grad():
        loss = score = count = weight = 0.0
        variance = rows.variance() if objective.link == "identity" else None
        for batch in rows.in_order():
            scores = network(batch.X)
            losses = objective.each(scores, batch.Y) * batch.weights
            loss, count = loss + losses.sum(dtype=torch.float64).item(), count + losses.numel()
            right = objective.right(scores, batch.Y, variance) * batch.weights
            score += right.sum(dtype=torch.float64).item()
            weight += batch.weights.sum(dtype=torch.float64).item()
    return loss / count, score / weight


@dataclass(eq=False)
class _Record:
    """The losses so far, and the weights to return."""

    network: Network
    plan: Plan
    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    validation_scores: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best: Layers | None = None

    def epoch(self, loss: float, quality: tuple[float, float] | None) -> None:
        self.losses.append(loss)
        better = quality is None or not self.validation_losses or quality[0] < min(self.validation_losses)
        if better or not self.plan.early_stopping:
            self.best_epoch = len(self.losses)
            self.best = self.network.copy() if quality is not None and self.plan.early_stopping else None
        if quality is not None:
            self.validation_losses.append(quality[0])
            self.validation_scores.append(quality[1])

    @property
    def is_over(self) -> bool:
        return self.plan.early_stopping and len(self.losses) - self.best_epoch >= self.plan.patience

    def result(self) -> Trained:
        coefs, intercepts = self.best or self.network.copy()
        return Trained(coefs, intercepts, self.losses, self.validation_losses, self.validation_scores, self.best_epoch)
