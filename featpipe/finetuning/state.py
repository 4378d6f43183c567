"""What changes while a network is fine-tuned: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featpipe.finetuning.job import Job
from featpipe.finetuning.rates import groups, optimizer_of

__all__ = ["Epoch", "State"]


@dataclass(frozen=True)
class Epoch:
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

    def facts(self) -> dict[str, float | int | None]:
        """As JSON can hold it."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        found = {name: value if math.isfinite(value) else None for name, value in known.items()}
        return {**found, "number": self.number}

    @classmethod
    def of(cls, facts: dict[str, float | int | None]) -> Epoch:
        values = {name: math.nan if value is None else float(value) for name, value in facts.items()}
        return cls(**{**values, "number": int(values["number"])})  # type: ignore[arg-type]


@dataclass(eq=False)
class State:
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
    curve: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    monitor: str = "score"

    @classmethod
    def begun(cls, job: Job, rate: float) -> State:
        """Before the first step."""
        below = {name: parameter for name, parameter in job.parameters().items() if name in job.depth()}
        head = {name: parameter for name, parameter in job.parameters().items() if name not in below}
        optimizer = optimizer_of(groups(head, below, job.depth(), job.tuning), job.tuning)
        scaler = torch.amp.GradScaler(job.device.type, enabled=job.tuning.precision == "fp16")
        state = cls(optimizer, scaler, rate, pieces=job.tuning.accumulate, monitor=job.tuning.monitor)
        if job.tuning.ema:
            state.average = copied(job.kept())
        return state

    @property
    def best_epoch(self) -> Epoch:
        def order(epoch: Epoch) -> tuple[float, float, int]:
            score = -epoch.validation_score if self.monitor == "score" else 0.0
            return score, epoch.validation_loss, epoch.number

        return min(self.curve, key=order)

    @property
    def waited(self) -> int:
        """Epochs since the best one."""
        return self.curve[-1].number - self.best_epoch.number

    def record(self, epoch: Epoch, job: Job) -> None:
        """Note an epoch, and its weights if it is the best one."""
        self.curve.append(epoch)
        if self.best_epoch is epoch:
            self.best = copied(self.average or job.kept())

    def follow(self, job: Job, steps: int) -> None:
        """Move the average towards the weights, faster in the first steps."""
        decay = min(job.tuning.ema, (1 + steps) / (10 + steps))
        for name, value in job.kept().items():
            average = self.average[name]
            if value.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)

    @contextmanager
    def averaged(self, job: Job) -> Iterator[None]:
        """With the average in the place of the weights, if there is one."""
        if not self.average:
            yield
            return
        now = copied(job.kept())
        put(job, self.average)
        try:
            yield
        finally:
            put(job, now)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def put(job: Job, values: dict[str, Tensor]) -> None:
    """Set what training changes."""
    for name, tensor in job.kept().items():
        tensor.copy_(values[name])
