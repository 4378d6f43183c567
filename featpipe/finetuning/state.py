"""What changes while a network is fine-tuned: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featpipe.finetuning.job import Trainer
from featpipe.finetuning.rates import make_optimizer, make_parameter_groups

__all__ = ["EpochRecord", "TrainingState"]


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
