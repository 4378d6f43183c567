"""The trainer, which is constant during fine-tuning, and the training state, which changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from featpipe.config import FineTuneConfig
from featpipe.finetuning.batches import TrainingDataset
from featpipe.finetuning.distributed import DistributedContext
from featpipe.finetuning.loss_terms import LossTerm
from featpipe.finetuning.optim import make_optimizer, make_parameter_groups
from featpipe.finetuning.unfreeze import UnfrozenParameters
from featpipe.heads import LossFunction
from featpipe.runtime import ProgressCallback, ignore_progress, nan_to_none

HEAD_PREFIX, BACKBONE_PREFIX = "head.", "backbone."  # before the names of parameters


@dataclass(frozen=True, eq=False)
class TrainingTargets:
    """Targets of each row of an archive.

    Attributes
    ----------
    Y : Tensor
        Class codes of shape (n,), 0 and 1 of shape (n, k), or standardized numbers of shape (n, t); arbitrary for rows
        without labels.
    sample_weights : Tensor of shape (n,)
        In the loss; 1 on average over the training rows.
    """

    Y: Tensor
    sample_weights: Tensor

    def select(self, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Targets and weights of some rows."""
        indices = torch.from_numpy(rows)
        return self.Y[indices].to(device), self.sample_weights[indices].to(device)


@dataclass(frozen=True, eq=False)
class Trainer:
    """A network and a head, the data to train them on, and the settings.

    Attributes
    ----------
    network : Module
        A copy of the backbone's network, which is trained.
    head : Sequential
        The head's layer or layers.
    unfrozen : UnfrozenParameters
    train_data, validation_data : TrainingDataset
        With augmentation, and without.
    train_rows, validation_rows : ndarray of shape (m,), int64
        Rows of the archive.
    targets : TrainingTargets
    loss_function : LossFunction
    tuning : FineTuneConfig
    sample_ids : sequence of str
        Of all rows of the archive, for messages.
    device : torch.device
    distributed : DistributedContext
    progress : callable
    epoch_callback : callable or None
        Called with each :class:`EpochRecord`.
    loss_terms : sequence of LossTerm
        Added to the loss, in training and on the validation rows.
    monitors : mapping from name to ndarray of int64
        Rows of ``validation_data`` whose loss and score are recorded after each epoch; they do not influence training.
    memory_format : torch.memory_format
        Of the network's weights and of batches of images or feature maps.
    """

    network: nn.Module
    head: nn.Sequential
    unfrozen: UnfrozenParameters
    train_data: TrainingDataset
    validation_data: TrainingDataset
    train_rows: NDArray[np.int64]
    validation_rows: NDArray[np.int64]
    targets: TrainingTargets
    loss_function: LossFunction
    tuning: FineTuneConfig
    sample_ids: Any
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    distributed: DistributedContext = field(default_factory=DistributedContext)
    progress: ProgressCallback = ignore_progress
    epoch_callback: Callable[[Any], None] | None = None
    loss_terms: Sequence[LossTerm] = ()
    monitors: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    memory_format: torch.memory_format = torch.channels_last
    _modules_in_training: list[nn.Module] = field(default_factory=list, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimizer in an epoch."""
        return -(-len(self.train_rows) // self.tuning.batch)

    @property
    def n_outputs(self) -> int:
        """Width of the output."""
        return len(list(self.head.parameters())[-1])

    def epoch_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each step of an epoch; they depend on the seed and the epoch alone."""
        rng = np.random.default_rng((self.tuning.seed, epoch))
        if self.tuning.sampling is None:
            order = rng.permutation(self.train_rows)
        else:
            codes = self.targets.Y[torch.from_numpy(self.train_rows)].numpy()
            inverse_frequencies = 1 / np.bincount(codes)[codes]
            order = rng.choice(self.train_rows, len(self.train_rows), p=inverse_frequencies / inverse_frequencies.sum())
        return [batch.astype(np.int64) for batch in np.array_split(order, self.steps_per_epoch)]

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that are trained in some epoch, the head's first."""
        backbone_parameters = dict(self.network.named_parameters())
        head_parameters = {HEAD_PREFIX + name: parameter for name, parameter in self.head.named_parameters()}
        return head_parameters | {BACKBONE_PREFIX + name: backbone_parameters[name] for name in self.unfrozen.names}

    def trained_tensors(self) -> dict[str, Tensor]:
        """Everything that training changes: parameters, and statistics of batch norms that follow the batches."""
        tensors: dict[str, Tensor] = {name: parameter.data for name, parameter in self.trained_parameters().items()}
        for module_name, module in self.network.named_modules():
            if isinstance(module, _NormBase) and self._updates_statistics(module):
                for name, buffer in module.named_buffers(recurse=False):
                    tensors[f"{BACKBONE_PREFIX}{module_name}.{name}"] = buffer
        return tensors

    def penalty(self) -> Tensor | None:
        """The sum of the penalties of all loss terms; None if there is none."""
        if not self.loss_terms:
            return None
        parameters = self.trained_parameters()
        penalties = [p for term in self.loss_terms if (p := term.penalty(parameters)) is not None]
        return torch.stack(penalties).sum() if penalties else None

    def unfreeze_for_epoch(self, epoch: int) -> tuple[nn.Parameter, ...]:
        """Enable gradients for the parameters that are trained in an epoch, and return these."""
        active_names = set(self.unfrozen.active_names(epoch, self.tuning.gradual))
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in active_names)
            if name not in active_names:
                parameter.grad = None
        self.head.requires_grad_(True)
        self.network.eval()
        self._modules_in_training[:] = self._find_training_modules()
        return tuple(p for p in (*self.head.parameters(), *self.network.parameters()) if p.requires_grad)

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Enable dropout in the trained part; batch norms follow the batches if ``batch_norm`` is "trained"."""
        for module in self._modules_in_training:
            module.training = True
        try:
            yield
        finally:
            for module in self._modules_in_training:
                module.training = False

    def _find_training_modules(self) -> list[nn.Module]:
        """The modules that belong in training mode, while the rest of the network stays in eval mode."""
        is_training = {module: any(p.requires_grad for p in module.parameters()) for module in self.network.modules()}
        for module in self.network.modules():
            if isinstance(module, _NormBase):
                is_training[module] &= self._updates_statistics(module)
        for parent in self.network.modules():
            for child in parent.children():  # modules without parameters, such as dropout
                if next(child.parameters(), None) is None:
                    is_training |= dict.fromkeys(child.modules(), is_training[parent])
        return [*self.head.modules(), *(module for module, trains in is_training.items() if trains)]

    @cached_property
    def _trained_parameter_ids(self) -> set[int]:
        return {id(parameter) for parameter in self.trained_parameters().values()}

    @property
    def updates_batch_norm(self) -> bool:
        """Whether the statistics of any batch norm follow the batches."""
        return any(
            isinstance(module, _NormBase) and self._updates_statistics(module) for module in self.network.modules()
        )

    def _updates_statistics(self, module: nn.Module) -> bool:
        """Whether the statistics of a batch norm follow the batches once it is unfrozen."""
        return self.tuning.batch_norm == "trained" and any(
            id(p) in self._trained_parameter_ids for p in module.parameters()
        )

    def to_device(self, inputs: Tensor) -> Tensor:
        """A batch on the device, in the trainer's memory format."""
        return inputs.to(self.device, memory_format=self.memory_format if inputs.ndim == 4 else torch.preserve_format)

    def compute_scores(self, dataset: TrainingDataset, inputs: Tensor) -> Tensor:
        """Logits, or standardized numbers, of shape (b, k), float32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.tuning.precision)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            scores = self.head(dataset.network(inputs))
        return torch.as_tensor(scores.float())


@dataclass(frozen=True)
class EpochRecord:
    """The metrics of an epoch; number 0 is before the first step.

    Attributes
    ----------
    number : int
    loss : float
        Running mean over the training rows; NaN for number 0.
    validation_loss, validation_score : float
        The score is accuracy, or R² in regression.
    rate : float
        The highest learning rate of its last step.
    metrics : dict
        For each of the trainer's ``monitors`` its ``loss`` and ``score``; NaN for a monitor without rows.
    """

    number: int
    loss: float
    validation_loss: float
    validation_score: float
    rate: float = 0.0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """With None for NaN and infinity, and without ``metrics`` if there are none."""
        return {name: nan_to_none(value) for name, value in vars(self).items() if name != "metrics" or value}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> EpochRecord:
        def restore_nan(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: math.nan if value is None else value for name, value in values.items()}

        metrics = {name: restore_nan(values) for name, values in document.get("metrics", {}).items()}
        return cls(**{**restore_nan(document), "metrics": metrics})


@dataclass(eq=False)
class TrainingState:
    """Everything that changes from step to step.

    Attributes
    ----------
    optimizer : Optimizer
    scaler : GradScaler
        For float16 gradients; otherwise disabled.
    rate : float
        The highest learning rate.
    epoch, step : int
        Finished epochs, and finished steps of the current one.
    loss, seen : float, int
        Sum of the losses of the rows of those steps, and their number.
    pieces : int
        How many pieces a batch is divided into.
    curve : list of EpochRecord
    best_weights : dict of str to Tensor
        The trained tensors after the best epoch.
    ema_weights : dict of str to Tensor
        Exponential moving average of the trained tensors; empty if disabled.
    monitor : {"score", "loss"}
        The validation metric that defines the best epoch.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rate: float
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seen: int = 0
    pieces: int = 1
    curve: list[EpochRecord] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    ema_weights: dict[str, Tensor] = field(default_factory=dict)
    monitor: str = "score"

    @classmethod
    def init(cls, trainer: Trainer, rate: float) -> TrainingState:
        """The state before the first step."""
        depths = {BACKBONE_PREFIX + name: depth for name, depth in trainer.unfrozen.depth.items()}
        parameter_groups = make_parameter_groups(trainer.trained_parameters(), depths, trainer.tuning)
        optimizer = make_optimizer(parameter_groups, trainer.tuning)
        scaler = torch.amp.GradScaler(trainer.device.type, enabled=trainer.tuning.precision == "fp16")
        state = cls(optimizer, scaler, rate, pieces=trainer.tuning.accumulate, monitor=trainer.tuning.monitor)
        if trainer.tuning.ema:
            state.ema_weights = clone_tensors(trainer.trained_tensors())
        return state

    @property
    def best_epoch(self) -> EpochRecord:
        def sort_key(epoch: EpochRecord) -> tuple[float, float, int]:
            negative_score = -epoch.validation_score if self.monitor == "score" else 0.0
            return negative_score, epoch.validation_loss, epoch.number

        return min(self.curve, key=sort_key)

    @property
    def epochs_without_improvement(self) -> int:
        """Epochs since the best one."""
        return self.curve[-1].number - self.best_epoch.number

    def record_epoch(self, epoch: EpochRecord, trainer: Trainer) -> None:
        """Add an epoch to the curve, and keep its weights if it is the best one."""
        self.curve.append(epoch)
        if self.best_epoch is epoch:
            self.best_weights = clone_tensors(self.ema_weights or trainer.trained_tensors())

    def update_ema(self, trainer: Trainer, steps_done: int) -> None:
        """Update the moving average; it moves faster in the first steps."""
        decay = min(trainer.tuning.ema, (1 + steps_done) / (10 + steps_done))
        for name, value in trainer.trained_tensors().items():
            ema_tensor = self.ema_weights[name]
            if value.is_floating_point():
                ema_tensor.lerp_(value, 1 - decay)
            else:
                ema_tensor.copy_(value)

    @contextmanager
    def use_ema_weights(self, trainer: Trainer) -> Iterator[None]:
        """Use the moving average in place of the weights, if there is one."""
        if not self.ema_weights:
            yield
            return
        current_weights = clone_tensors(trainer.trained_tensors())
        load_weights(trainer, self.ema_weights)
        try:
            yield
        finally:
            load_weights(trainer, current_weights)


def clone_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return detached copies."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def load_weights(trainer: Trainer, values: dict[str, Tensor]) -> None:
    """Set the trained tensors."""
    for name, tensor in trainer.trained_tensors().items():
        tensor.copy_(values[name])
