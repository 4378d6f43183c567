"""What is trained, on what, and how: everything that stays the same while a network is fine-tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from featpipe.config import FineTuneConfig
from featpipe.finetuning.batches import TrainingDataset
from featpipe.finetuning.distributed import DistributedContext
from featpipe.finetuning.optim import make_optimizer, make_parameter_groups
from featpipe.finetuning.unfreeze import UnfrozenParameters
from featpipe.heads import LossFunction
from featpipe.runtime import ProgressCallback, ignore_progress

if TYPE_CHECKING:
    from featpipe.finetuning.regularizers import Regularizers

__all__ = ["BACKBONE_PREFIX", "HEAD_PREFIX", "EpochRecord", "Trainer", "TrainingState", "TrainingTargets"]

HEAD_PREFIX, BACKBONE_PREFIX = "head.", "backbone."  # before the names of parameters


@dataclass(frozen=True, eq=False)
class TrainingTargets:
    """What is to be answered for each row of an archive.

    Attributes
    ----------
    Y : Tensor
        Class codes of shape (n,), 0 and 1 of shape (n, k), or standardised numbers of shape (n, t); anything, of rows
        that are not labelled.
    weights : Tensor of shape (n,)
        In the loss; 1 on average over the training rows.
    """

    Y: Tensor
    sample_weights: Tensor

    def select(self, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Those of some rows."""
        indices = torch.from_numpy(rows)
        return self.Y[indices].to(device), self.sample_weights[indices].to(device)


@dataclass(frozen=True, eq=False)
class Trainer:
    """What is trained, on what, and how.

    Attributes
    ----------
    network : Module
        The backbone's, a copy that is trained.
    head : Sequential
        The new layer or layers.
    unfrozen : Unfrozen
    source, watched : Source
        Of the training rows, and of those without augmentation by which it is judged when to stop.
    train, validation : ndarray of shape (m,), int64
        Rows of the archive.
    ids : sequence of str
        What people call them.
    board : callable or None
        Told each :class:`featpipe.finetuning.trainer.Epoch` that is done.
    past : Past or None
        Where classes have come to those that the model knew.
    beside : ndarray of shape (t,), int64
        Rows by which both sides are then watched, of ``watched``; they decide nothing.
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
    regularizers: Regularizers | None = None
    monitor_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _modules_in_training: list[nn.Module] = field(default_factory=list, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimizer in an epoch."""
        return -(-len(self.train_rows) // self.tuning.batch)

    @property
    def n_outputs(self) -> int:
        """Numbers that the new layer answers with."""
        return len(list(self.head.parameters())[-1])

    def epoch_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each step of an epoch: they depend on the seed and the epoch, and on nothing before."""
        rng = np.random.default_rng((self.tuning.seed, epoch))
        if self.tuning.sampling is None:
            order = rng.permutation(self.train_rows)
        else:
            codes = self.targets.Y[torch.from_numpy(self.train_rows)].numpy()
            inverse_frequencies = 1 / np.bincount(codes)[codes]
            order = rng.choice(self.train_rows, len(self.train_rows), p=inverse_frequencies / inverse_frequencies.sum())
        return [batch.astype(np.int64) for batch in np.array_split(order, self.steps_per_epoch)]

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained in the end, the new layer first."""
        backbone_parameters = dict(self.network.named_parameters())
        head_parameters = {HEAD_PREFIX + name: parameter for name, parameter in self.head.named_parameters()}
        return head_parameters | {BACKBONE_PREFIX + name: backbone_parameters[name] for name in self.unfrozen.names}

    def trained_tensors(self) -> dict[str, Tensor]:
        """All that training changes: the parameters, and the statistics of the batch norms that follow the batches."""
        tensors: dict[str, Tensor] = {name: parameter.data for name, parameter in self.trained_parameters().items()}
        for module_name, module in self.network.named_modules():
            if isinstance(module, _NormBase) and self._updates_statistics(module):
                for name, buffer in module.named_buffers(recurse=False):
                    tensors[f"{BACKBONE_PREFIX}{module_name}.{name}"] = buffer
        return tensors

    def ewc_penalty(self) -> Tensor | None:
        """What draws the weights to those of the model before, as part of the loss; None where nothing does."""
        ewc = None if self.regularizers is None else self.regularizers.ewc
        return None if ewc is None else ewc.compute(self.trained_parameters())

    def parameter_depths(self) -> Mapping[str, int]:
        return {BACKBONE_PREFIX + name: depth for name, depth in self.unfrozen.depth.items()}

    def unfreeze_for_epoch(self, epoch: int) -> tuple[nn.Parameter, ...]:
        """Let gradients reach what is trained in an epoch, and nothing else; what that is."""
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
        """Dropout and its like are on in what is trained; batch norms follow the batches where that was asked for."""
        for module in self._modules_in_training:
            module.training = True
        try:
            yield
        finally:
            for module in self._modules_in_training:
                module.training = False

    def _find_training_modules(self) -> list[nn.Module]:
        """The modules that are in training mode while what is thawed now is trained; the network is in eval mode."""
        is_training = {module: any(p.requires_grad for p in module.parameters()) for module in self.network.modules()}
        for module in self.network.modules():
            if isinstance(module, _NormBase):
                is_training[module] &= self._updates_statistics(module)
        for parent in self.network.modules():
            for child in parent.children():  # dropout and its like have no parameters of their own
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
        """Whether a batch norm's statistics follow the batches, once it is thawed."""
        return self.tuning.batch_norm == "trained" and any(
            id(p) in self._trained_parameter_ids for p in module.parameters()
        )

    def compute_scores(self, dataset: TrainingDataset, inputs: Tensor) -> Tensor:
        """Logits, or standardised numbers, of shape (b, k), float32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.tuning.precision)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            scores = self.head(dataset.network(inputs))
        return torch.as_tensor(scores.float())


@dataclass(frozen=True)
class EpochRecord:
    """What is recorded of an epoch; of number 0 what was true before the first step.

    Attributes
    ----------
    number : int
    loss : float
        Mean over the training rows, as they were seen; NaN of number 0.
    validation_loss, validation_score : float
        The score: the share of right answers, or R² of numbers.
    rate : float
        The highest learning rate of its last step.
    old_loss, new_loss, old_score, new_score : float or None
        Of rows of old and of new classes that decide nothing; NaN of a side without rows, None where no class came.
    """

    number: int
    loss: float
    validation_loss: float
    validation_score: float
    rate: float = 0.0
    old_loss: float | None = None
    new_loss: float | None = None
    old_score: float | None = None
    new_score: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON can hold it."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        finite_values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {**finite_values, "number": self.number}

    @classmethod
    def from_dict(cls, document: dict[str, float | int | None]) -> EpochRecord:
        values = {name: math.nan if value is None else float(value) for name, value in document.items()}
        return cls(**{**values, "number": int(values["number"])})  # type: ignore[arg-type]


@dataclass(eq=False)
class TrainingState:
    """What changes from step to step.

    Attributes
    ----------
    optimizer : Optimizer
    scaler : GradScaler
        Of float16 gradients; else it does nothing.
    rate : float
        The highest learning rate.
    epoch, step : int
        Epochs that are done, and steps of the one under way.
    loss, seen : float, int
        Summed over the rows of those steps, and how many these are.
    pieces : int
        Into how many a batch is divided.
    curve : list of Epoch
    best : dict of str to Tensor
        What training changes, as it was after the best epoch.
    average : dict of str to Tensor
        The same, averaged over the steps; empty without averaging.
    monitor : {"score", "loss"}
        What the best epoch is the best by.
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
        """Before the first step."""
        backbone_parameters = {
            name: parameter
            for name, parameter in trainer.trained_parameters().items()
            if name in trainer.parameter_depths()
        }
        head_parameters = {
            name: parameter
            for name, parameter in trainer.trained_parameters().items()
            if name not in backbone_parameters
        }
        optimizer = make_optimizer(
            make_parameter_groups(head_parameters, backbone_parameters, trainer.parameter_depths(), trainer.tuning),
            trainer.tuning,
        )
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
        """Note an epoch, and its weights if it is the best one."""
        self.curve.append(epoch)
        if self.best_epoch is epoch:
            self.best_weights = clone_tensors(self.ema_weights or trainer.trained_tensors())

    def update_ema(self, trainer: Trainer, steps_done: int) -> None:
        """Move the average towards the weights, faster in the first steps."""
        decay = min(trainer.tuning.ema, (1 + steps_done) / (10 + steps_done))
        for name, value in trainer.trained_tensors().items():
            ema_tensor = self.ema_weights[name]
            if value.is_floating_point():
                ema_tensor.lerp_(value, 1 - decay)
            else:
                ema_tensor.copy_(value)

    @contextmanager
    def use_ema_weights(self, trainer: Trainer) -> Iterator[None]:
        """With the average in the place of the weights, if there is one."""
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
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def load_weights(trainer: Trainer, values: dict[str, Tensor]) -> None:
    """Set what training changes."""
    for name, tensor in trainer.trained_tensors().items():
        tensor.copy_(values[name])
