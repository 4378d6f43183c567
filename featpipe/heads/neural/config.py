"""Training settings that all torch heads share, with their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featpipe.config import HEAD_OPTIMIZERS, HEAD_SCHEDULES, check_bool, check_choice, check_integer, check_number

LEARNING_RATE_TIMES_WIDTH, MIN_LEARNING_RATE, MAX_LEARNING_RATE = 0.5, 1e-3, 0.05


@dataclass(kw_only=True, eq=False, repr=False)
class NetworkTrainingConfig:
    """Settings of minibatch training.

    Attributes
    ----------
    optimizer : {"adamw", "adam", "sgd"}
        AdamW, Adam, or stochastic gradient descent with Nesterov momentum.
    learning_rate : float or "auto"
        The peak learning rate. "auto" is 0.5 / d, clipped to [0.001, 0.05], where d is the widest input of a layer: a
        step of Adam changes a score by up to the rate times d, so narrow inputs need larger steps.
    weight_decay : float
        L2 penalty on weights, not on intercepts. "sgd" and "adam" add ½ weight_decay ‖W‖² to the loss; "adamw"
        shrinks weights by learning rate × weight_decay in each step, independent of the gradient.
    l1 : float
        Adds l1 Σ|w| over weights, not intercepts, to the loss by proximal steps: weights become exactly zero.
    momentum : float
        Momentum of "sgd".
    schedule : {"cosine", "constant", "linear", "step", "one-cycle"}
        The learning rate over all steps. "cosine" and "linear" decay to zero; "step" divides by ten after one half and
        three quarters of the steps; "one-cycle" rises from a 25th of the peak and decays to almost zero, both along
        half a cosine (Smith and Topin 2018; torch's ``OneCycleLR`` with constant momentum).
    warmup : float
        Fraction of the steps with linear warm-up from zero; for "one-cycle" the fraction of the rise, where 0 means
        0.3.
    batch_size, epochs : int
    feature_noise : float
        Standard deviation of the Gaussian noise added to the features, which are standardised, in each step.
    mixup : float
        Alpha of mixup (Zhang et al. 2018): each step trains on convex combinations of two rows with a weight drawn from
        Beta(alpha, alpha). A classifier combines the losses of the two targets, which for the cross-entropy equals the
        loss of the combined target.
    early_stopping : bool
        Stop after ``patience`` epochs without a lower validation loss, and keep the weights of the best epoch. Unless
        validation rows are passed to ``fit``, it holds out ``validation_fraction`` of its rows, at most 50,000.
    validation_fraction : float
    patience : int
    """

    optimizer: str = "adamw"
    learning_rate: float | str = "auto"
    weight_decay: float = 0.01
    l1: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float = 0.0
    batch_size: int = 64
    epochs: int = 30
    feature_noise: float = 0.0
    mixup: float = 0.0
    early_stopping: bool = False
    validation_fraction: float = 0.1
    patience: int = 5

    def check(self) -> None:
        """Raise ValueError for settings out of range."""
        check_choice("optimizer", self.optimizer, HEAD_OPTIMIZERS)
        if self.learning_rate != "auto":
            check_number("learning_rate", self.learning_rate, above=0)
        check_number("weight_decay", self.weight_decay, minimum=0)
        check_number("l1", self.l1, minimum=0)
        check_number("momentum", self.momentum, minimum=0, below=1)
        check_choice("schedule", self.schedule, HEAD_SCHEDULES)
        check_number("warmup", self.warmup, minimum=0, below=1)
        check_integer("batch_size", self.batch_size, minimum=1)
        check_integer("epochs", self.epochs, minimum=1)
        check_number("feature_noise", self.feature_noise, minimum=0)
        check_number("mixup", self.mixup, minimum=0)
        check_bool("early_stopping", self.early_stopping)
        check_number("validation_fraction", self.validation_fraction, above=0, below=1)
        check_integer("patience", self.patience, minimum=1)

    def resolve_learning_rate(self, fan_ins: Sequence[int]) -> float:
        """The peak learning rate of a network whose layers have inputs of these widths.

        Examples
        --------
        >>> [NetworkTrainingConfig().resolve_learning_rate([width]) for width in (4, 50, 1280)]
        [0.05, 0.01, 0.001]
        """
        if isinstance(self.learning_rate, str):
            return min(max(LEARNING_RATE_TIMES_WIDTH / max(fan_ins), MIN_LEARNING_RATE), MAX_LEARNING_RATE)
        return float(self.learning_rate)
