"""How a network is trained: the settings that all torch heads share, and the one home of their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featpipe.config import check_bool, check_choice, check_integer, check_number

__all__ = ["OPTIMIZERS", "SCHEDULES", "NetworkTrainingConfig"]

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "constant", "linear", "step", "one-cycle")

LEARNING_RATE_TIMES_WIDTH, MIN_LEARNING_RATE, MAX_LEARNING_RATE = 0.5, 1e-3, 0.05


@dataclass(kw_only=True, eq=False, repr=False)
class NetworkTrainingConfig:
    """How to train.

    Attributes
    ----------
    optimizer : {"adamw", "adam", "sgd"}
        AdamW, Adam, or stochastic gradient descent with Nesterov momentum.
    learning_rate : float or "auto"
        The highest step size. "auto" is 0.5 / d, but 0.001 at least and 0.05 at most, d being the widest input of a
        layer: a step of Adam moves a score by up to the rate times d, so few columns need larger steps.
    weight_decay : float
        Strength of L2 on weights, not on intercepts. "sgd" and "adam" add ½ weight_decay ‖W‖² to the loss; "adamw"
        shrinks weights by learning rate × weight_decay in each step, apart from the gradient.
    l1 : float
        Adds l1 Σ|w| to the loss, over weights and not intercepts, by proximal steps: weights become exactly zero.
    momentum : float
        Of "sgd".
    schedule : {"cosine", "constant", "linear", "step", "one-cycle"}
        The learning rate over all steps: it falls to zero along half a cosine, stays, falls to zero along a line, is
        divided by ten after half and after three quarters of the steps, or rises from a 25th along half a cosine and
        falls to almost nothing (Smith and Topin 2018; torch's ``OneCycleLR`` with a steady momentum).
    warmup : float
        Share of the steps in which the rate first rises from zero along a line; for "one-cycle" the share of its rise,
        0.3 where it is 0.
    batch_size, epochs : int
    feature_noise : float
        Standard deviation of the Gaussian noise on the features in each step; they are standardised, so a share of
        theirs.
    mixup : float
        Alpha of Zhang et al. 2018: each step trains on blends of two rows, whose share is drawn from
        Beta(alpha, alpha). A classifier blends the losses of the two answers, which for the cross-entropy is that of
        the blended answer.
    early_stopping : bool
        Stop after ``patience`` epochs without a lower loss on validation rows, and return the weights of the best
        epoch. Those rows are given to fit or, if not, ``validation_fraction`` of its rows, 50,000 at most, held out.
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
        """Refuse settings out of range, with a ValueError."""
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.learning_rate != "auto":
            check_number("learning_rate", self.learning_rate, above=0)
        check_number("weight_decay", self.weight_decay, minimum=0)
        check_number("l1", self.l1, minimum=0)
        check_number("momentum", self.momentum, minimum=0, below=1)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_number("warmup", self.warmup, minimum=0, below=1)
        check_integer("batch_size", self.batch_size, minimum=1)
        check_integer("epochs", self.epochs, minimum=1)
        check_number("feature_noise", self.feature_noise, minimum=0)
        check_number("mixup", self.mixup, minimum=0)
        check_bool("early_stopping", self.early_stopping)
        check_number("validation_fraction", self.validation_fraction, above=0, below=1)
        check_integer("patience", self.patience, minimum=1)

    def resolve_learning_rate(self, fan_ins: Sequence[int]) -> float:
        """The learning rate of a network whose layers have inputs of these widths.

        Examples
        --------
        >>> [NetworkTrainingConfig().resolve_learning_rate([width]) for width in (4, 50, 1280)]
        [0.05, 0.01, 0.001]
        """
        if isinstance(self.learning_rate, str):
            return min(max(LEARNING_RATE_TIMES_WIDTH / max(fan_ins), MIN_LEARNING_RATE), MAX_LEARNING_RATE)
        return float(self.learning_rate)
