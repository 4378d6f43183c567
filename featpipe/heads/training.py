"""Minibatch training of a small fully connected network on features.

The loop is plain torch with its own generator and leaves torch as it was: global random state, threads and default
type. What comes out is numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from featpipe.heads.batches import BatchSource, TrainingBatch
from featpipe.heads.losses import LossFunction
from featpipe.heads.network import LayerWeights, Network, NetworkArchitecture
from featpipe.heads.optimizers import OPTIMIZER_CLASSES, make_schedule
from featpipe.heads.plan import NetworkTrainingConfig
from featpipe.heads.threads import limit_torch_threads

if TYPE_CHECKING:
    import torch

__all__ = ["TrainedNetwork", "train_network"]

TRAINING_COST_FACTOR = 3


@dataclass(frozen=True, eq=False)
class TrainedNetwork:
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


def train_network(
    train_batches: BatchSource,
    validation_batches: BatchSource | None,
    *,
    architecture: NetworkArchitecture,
    loss_fn: LossFunction,
    config: NetworkTrainingConfig,
    seed: int,
) -> TrainedNetwork:
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
    multiplications_per_step = TRAINING_COST_FACTOR * config.batch_size * architecture.multiplications_per_row
    with torch.inference_mode(False), torch.enable_grad(), limit_torch_threads(multiplications_per_step):
        generator = torch.Generator().manual_seed(seed)
        network = Network(architecture, train_batches.dtype, generator)
        optimizer = OPTIMIZER_CLASSES[config.optimizer](network.weights, network.biases, config)
        augmentation = _BatchAugmentation(config, generator, np.random.default_rng(seed))
        steps_per_epoch = math.ceil(len(train_batches) / config.batch_size)
        learning_rate = make_schedule(
            config, config.resolve_learning_rate(architecture.widths[:-1]), config.epochs * steps_per_epoch
        )
        history = _TrainingHistory(network, config)
        for epoch in range(config.epochs):
            epoch_loss = 0.0
            for step, batch in enumerate(
                train_batches.iter_shuffled(config.batch_size, generator), epoch * steps_per_epoch
            ):
                X, mixup_batch, mixup_weight = augmentation(batch)
                loss = loss_fn.batch_loss(network(X, training=True), batch, mixup_batch, mixup_weight)
                gradients = torch.autograd.grad(loss, network.parameters)
                optimizer.step(gradients, learning_rate(step))
                epoch_loss += loss.item() * len(batch)
            if not math.isfinite(epoch_loss):
                raise ValueError(
                    _describe_divergence(train_batches, epoch, config.resolve_learning_rate(architecture.widths[:-1]))
                )
            history.record_epoch(
                epoch_loss / len(train_batches),
                None if validation_batches is None else _evaluate(network, loss_fn, validation_batches),
            )
            if history.should_stop:
                break
        return history.to_result()


def _describe_divergence(batches: BatchSource, epoch: int, learning_rate: float) -> str:
    invalid_row = batches.find_nonfinite_row()
    if invalid_row is not None:
        return f"row {invalid_row} of X holds NaN or infinity; leave such rows out"
    return f"training diverged in epoch {epoch + 1}: the loss is no number; lower learning_rate (now {learning_rate:g}) or scale X"


@dataclass(frozen=True, eq=False)
class _BatchAugmentation:
    """Noise on features, and blends of two rows."""

    config: NetworkTrainingConfig
    generator: torch.Generator
    rng: np.random.Generator

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, TrainingBatch | None, float]:
        """Features to train on, the rows that are blended into the batch, and the batch's own share."""
        import torch

        X, mixup_batch, mixup_weight = batch.X, None, 1.0
        if self.config.mixup:
            mixup_weight = float(self.rng.beta(self.config.mixup, self.config.mixup))
            mixup_batch = batch.take(torch.randperm(len(batch), generator=self.generator))
            X = X.lerp(mixup_batch.X, 1 - mixup_weight)
        if self.config.feature_noise:
            noise = torch.empty_like(X).normal_(0, self.config.feature_noise, generator=self.generator)
            X = X + noise
        return X, mixup_batch, mixup_weight


def _evaluate(network: Network, loss_fn: LossFunction, batches: BatchSource) -> tuple[float, float]:
    """Mean loss and score on rows, weighted as they are, of the network as it is used."""
    import torch

    with torch.no_grad():
        loss = score = count = weight = 0.0
        variance = batches.variance() if loss_fn.link == "identity" else None
        for batch in batches.iter_in_order():
            scores = network(batch.X)
            losses = loss_fn.per_row_loss(scores, batch.Y) * batch.weights
            loss, count = loss + losses.sum(dtype=torch.float64).item(), count + losses.numel()
            row_scores = loss_fn.row_scores(scores, batch.Y, variance) * batch.weights
            score += row_scores.sum(dtype=torch.float64).item()
            weight += batch.weights.sum(dtype=torch.float64).item()
    return loss / count, score / weight


@dataclass(eq=False)
class _TrainingHistory:
    """The losses so far, and the weights to return."""

    network: Network
    config: NetworkTrainingConfig
    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    validation_scores: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: LayerWeights | None = None

    def record_epoch(self, loss: float, validation_result: tuple[float, float] | None) -> None:
        self.losses.append(loss)
        improved = (
            validation_result is None
            or not self.validation_losses
            or validation_result[0] < min(self.validation_losses)
        )
        if improved or not self.config.early_stopping:
            self.best_epoch = len(self.losses)
            self.best_weights = (
                self.network.copy_weights() if validation_result is not None and self.config.early_stopping else None
            )
        if validation_result is not None:
            self.validation_losses.append(validation_result[0])
            self.validation_scores.append(validation_result[1])

    @property
    def should_stop(self) -> bool:
        return self.config.early_stopping and len(self.losses) - self.best_epoch >= self.config.patience

    def to_result(self) -> TrainedNetwork:
        coefs, intercepts = self.best_weights or self.network.copy_weights()
        return TrainedNetwork(
            coefs, intercepts, self.losses, self.validation_losses, self.validation_scores, self.best_epoch
        )
