"""Minibatch training of a small fully connected network on features.

The loop is plain torch with its own generator; it does not change torch's global random state, threads or default type.
The result is in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, expit

from featpipe.heads.neural.batches import BatchSource, TrainingBatch
from featpipe.heads.neural.config import NetworkTrainingConfig
from featpipe.heads.neural.losses import LossFunction
from featpipe.runtime import limit_torch_threads

if TYPE_CHECKING:
    import torch

TRAINING_COST_FACTOR = 3


@dataclass(frozen=True, eq=False)
class TrainedLayers:
    """The result of `train_network`.

    Attributes
    ----------
    coefs : list of ndarray of shape (fan_in, fan_out)
    intercepts : list of ndarray of shape (fan_out,)
    losses : list of float
        Mean training loss over the steps of each epoch.
    validation_losses : list of float
        Validation loss after each epoch; empty without validation rows.
    validation_scores : list of float
        Accuracy or R² on the validation rows.
    best_epoch : int
        Counted from 1; the epoch of these weights.
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
) -> TrainedLayers:
    """Train a network.

    Parameters
    ----------
    train_batches : BatchSource
    validation_batches : BatchSource or None
    architecture : NetworkArchitecture
    loss_fn : LossFunction
    config : NetworkTrainingConfig
    seed : int

    Raises
    ------
    ValueError
        If the loss becomes NaN or infinite.
    """
    import torch

    # The caller may be inside no_grad or inference_mode.
    multiplications_per_step = TRAINING_COST_FACTOR * config.batch_size * architecture.multiplications_per_row
    with torch.inference_mode(False), torch.enable_grad(), limit_torch_threads(multiplications_per_step):
        generator = torch.Generator().manual_seed(seed)
        network = Network(architecture, train_batches.dtype, generator)
        optimizer = Optimizer(network.weights, network.biases, config)
        augmentation = _BatchAugmentation(config, generator, np.random.default_rng(seed))
        steps_per_epoch = math.ceil(len(train_batches) / config.batch_size)
        max_learning_rate = config.resolve_learning_rate(architecture.widths[:-1])
        learning_rate = make_schedule(config, max_learning_rate, config.epochs * steps_per_epoch)
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
                raise ValueError(_describe_divergence(train_batches, epoch, max_learning_rate))
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
    return (
        f"training diverged in epoch {epoch + 1}: the loss is not finite; "
        f"lower learning_rate (now {learning_rate:g}) or scale X"
    )


@dataclass(frozen=True, eq=False)
class _BatchAugmentation:
    config: NetworkTrainingConfig
    generator: torch.Generator
    rng: np.random.Generator

    def __call__(self, batch: TrainingBatch) -> tuple[torch.Tensor, TrainingBatch | None, float]:
        """Augmented features, the batch mixed into them, and the weight of the original batch."""
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
    """Weighted mean loss and score of rows, without augmentation and dropout."""
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
    network: Network
    config: NetworkTrainingConfig
    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    validation_scores: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: LayerWeights | None = None

    def record_epoch(self, loss: float, validation_result: tuple[float, float] | None) -> None:
        self.losses.append(loss)
        improved = validation_result is None or validation_result[0] < min(self.validation_losses, default=math.inf)
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

    def to_result(self) -> TrainedLayers:
        coefs, intercepts = self.best_weights or self.network.copy_weights()
        return TrainedLayers(
            coefs, intercepts, self.losses, self.validation_losses, self.validation_scores, self.best_epoch
        )


LayerWeights = tuple[list[NDArray[Any]], list[NDArray[Any]]]

# Named and parametrised as in torch.nn.functional.
ACTIVATIONS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, x * x.dtype.type(0.01)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "gelu": lambda x: x * x.dtype.type(0.5) * (1 + erf(x * x.dtype.type(math.sqrt(0.5)))),
    "silu": lambda x: x * expit(x),
    "tanh": np.tanh,
    "sigmoid": expit,
}
WEIGHT_INITIALIZERS = ("he", "glorot")


def forward(X: NDArray[Any], coefs: Sequence[NDArray[Any]], intercepts: Sequence[NDArray[Any]], activation: str) -> Any:
    """Scores of shape (m, outputs); each layer is computed in the type of its weights."""
    for coef, intercept in zip(coefs[:-1], intercepts[:-1], strict=True):
        X = ACTIVATIONS[activation](X.astype(coef.dtype, copy=False) @ coef + intercept)
    return X.astype(coefs[-1].dtype, copy=False) @ coefs[-1] + intercepts[-1]


@dataclass(frozen=True)
class NetworkArchitecture:
    """The shape of a network.

    Attributes
    ----------
    widths : tuple of int
        Widths of the input, the hidden layers and the output.
    activation : str
        One of ``ACTIVATIONS``, after every layer but the last.
    dropout : float
        Fraction of hidden units that a step sets to zero.
    initial_weights : {"he", "glorot"}
        "he": uniform (He et al. 2015) for hidden layers and zeros for the last, so that initial scores are zero.
        "glorot": uniform (Glorot and Bengio 2010) for all layers, as in Keras. Intercepts start at zero.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    dropout: float = 0.0
    initial_weights: str = "he"

    @property
    def multiplications_per_row(self) -> int:
        """Multiplications of a forward pass for one row."""
        return sum(fan_in * fan_out for fan_in, fan_out in pairwise(self.widths))

    def init_bound(self, layer: int) -> float:
        """Initial weights of a layer are uniform in [-bound, bound]."""
        if self.initial_weights == "glorot":
            return math.sqrt(6 / (self.widths[layer] + self.widths[layer + 1]))
        return 0.0 if layer == len(self.widths) - 2 else math.sqrt(6 / self.widths[layer])


class Network:
    """Layers ``x @ weights[i] + biases[i]``, each followed by the activation except the last.

    Parameters
    ----------
    architecture : NetworkArchitecture
    dtype : torch.dtype
    generator : torch.Generator
        Source of the initial weights and of dropout.
    """

    def __init__(self, architecture: NetworkArchitecture, dtype: torch.dtype, generator: torch.Generator) -> None:
        import torch
        from torch.nn import functional

        self.architecture, self.generator = architecture, generator
        self.activation = getattr(functional, architecture.activation)
        self.weights = []
        for layer, (fan_in, fan_out) in enumerate(pairwise(architecture.widths)):
            bound = architecture.init_bound(layer)
            weight = torch.empty(fan_in, fan_out, dtype=dtype).uniform_(-bound, bound, generator=generator)
            # Column-major: products with ten columns, and their gradients, take a quarter of the time.
            self.weights.append(weight.t().contiguous().t())
        self.biases = [torch.zeros(width, dtype=dtype) for width in architecture.widths[1:]]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [*self.weights, *self.biases]

    def __call__(self, x: torch.Tensor, *, training: bool = False) -> torch.Tensor:
        """Scores of shape (b, outputs) of rows of shape (b, d)."""
        import torch

        keep_probability = 1 - self.architecture.dropout
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = self.activation(torch.addmm(bias, x, weight))
            if training and keep_probability < 1:
                # torch's dropout uses the global generator.
                x = x * torch.empty_like(x).bernoulli_(keep_probability, generator=self.generator).div_(
                    keep_probability
                )
        return torch.addmm(self.biases[-1], x, self.weights[-1])

    def copy_weights(self) -> LayerWeights:
        return (
            [weight.detach().numpy().copy() for weight in self.weights],
            [bias.detach().numpy().copy() for bias in self.biases],
        )


ONE_CYCLE_WARMUP_FRACTION, ONE_CYCLE_INITIAL_DIVISOR, ONE_CYCLE_FINAL_DIVISOR = 0.3, 25.0, 25e4


def make_schedule(config: NetworkTrainingConfig, max_learning_rate: float, n_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, from 0 to ``n_steps`` - 1."""
    if config.schedule == "one-cycle":
        return _make_one_cycle_schedule(
            max_learning_rate, (config.warmup or ONE_CYCLE_WARMUP_FRACTION) * n_steps - 1, n_steps - 1
        )
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


def _make_one_cycle_schedule(max_learning_rate: float, peak_step: float, last_step: float) -> Callable[[int], float]:
    initial_rate = max_learning_rate / ONE_CYCLE_INITIAL_DIVISOR
    final_rate = max_learning_rate / ONE_CYCLE_FINAL_DIVISOR

    def learning_rate(step: int) -> float:
        if step < peak_step:
            start_rate, end_rate, progress = initial_rate, max_learning_rate, step / peak_step
        else:
            start_rate, end_rate = max_learning_rate, final_rate
            progress = (step - peak_step) / (last_step - peak_step)
        return end_rate + (start_rate - end_rate) * 0.5 * (1 + math.cos(math.pi * progress))

    return learning_rate


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019), Adam (Kingma and Ba 2015), or SGD with Nesterov momentum.

    Weight decay and the L1 penalty apply to weights, not to biases.

    Notes
    -----
    The update rules are those of torch.optim, which is not used itself: its first optimizer imports
    torch._dynamo, which takes 2.4 s of CPU time where a fit of 300 × 1280 rows takes 0.2 to 0.3 s, and a step takes
    300 µs instead of 120 (``tests/benchmarks/torch_heads.py optimizers``).

    The proximal step of the L1 penalty uses the step size of each weight, so that its fixed points are those where the
    gradient balances the penalty (Yun, Lozano and Yang, "Adaptive proximal gradient methods", 2021).
    """

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor], config: NetworkTrainingConfig) -> None:
        import torch

        self.config, self.n_steps = config, 0
        self.parameters, self.n_weights = [*weights, *biases], len(weights)
        self.first_moments = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
        self.second_moments = [torch.zeros_like(moment) for moment in self.first_moments]

    def step(self, gradients: Sequence[torch.Tensor], learning_rate: float) -> None:
        """Update all parameters."""
        import torch

        config, update = self.config, self._update_sgd if self.config.optimizer == "sgd" else self._update_adam
        self.n_steps += 1
        with torch.no_grad():
            for index, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
                weight_decay, l1 = (config.weight_decay, config.l1) if index < self.n_weights else (0.0, 0.0)
                if weight_decay and config.optimizer == "adamw":
                    parameter.mul_(1 - learning_rate * weight_decay)
                elif weight_decay:
                    gradient = gradient.add(parameter, alpha=weight_decay)
                update(index, parameter, gradient, learning_rate, l1)

    def _update_adam(
        self, index: int, parameter: torch.Tensor, gradient: torch.Tensor, learning_rate: float, l1: float
    ) -> None:
        bias_correction1 = 1 - self.beta1**self.n_steps
        bias_correction2 = math.sqrt(1 - self.beta2**self.n_steps)
        first_moment, second_moment = self.first_moments[index], self.second_moments[index]
        first_moment.lerp_(gradient, 1 - self.beta1)
        second_moment.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = second_moment.sqrt().div_(bias_correction2).add_(self.epsilon)
        parameter.addcdiv_(first_moment, denominator, value=-learning_rate / bias_correction1)
        if l1:
            _soft_threshold(parameter, denominator.reciprocal_().mul_(learning_rate * l1))

    def _update_sgd(
        self, index: int, parameter: torch.Tensor, gradient: torch.Tensor, learning_rate: float, l1: float
    ) -> None:
        momentum = self.config.momentum
        velocity = self.first_moments[index].mul_(momentum).add_(gradient)
        parameter.add_(gradient.add(velocity, alpha=momentum), alpha=-learning_rate)
        if l1:
            # Momentum multiplies the step of a constant gradient by 1 / (1 - momentum).
            _soft_threshold(parameter, learning_rate * l1 / (1 - momentum))


def _soft_threshold(parameter: torch.Tensor, threshold: torch.Tensor | float) -> None:
    """Apply the proximal operator of an L1 penalty in place."""
    magnitude = parameter.abs().sub_(threshold).clamp_(min=0)
    parameter.sign_().mul_(magnitude)
