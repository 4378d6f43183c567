"""What a network in training is held by, so that it does not forget the classes that it knew.

Both ties are to the model before: to its answers, and to its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from featpipe.finetuning.batches import prefetch_batches
from featpipe.finetuning.trainer import Trainer

__all__ = ["DistillationLoss", "EWCPenalty", "Regularizers", "compute_network_fisher"]

FISHER_BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class DistillationLoss:
    """What the old model said of the images, as soft targets (Li and Hoiem, "Learning without forgetting", 2016).

    Attributes
    ----------
    scores : Tensor of shape (n, k_old)
        For each row of the archive, of the old classes, which are the first; anything for rows that are not used.
    temperature, strength : float
    """

    teacher_scores: Tensor
    temperature: float = 2.0
    strength: float = 1.0

    def row_losses(self, scores: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Strength T² KL(old ‖ new) of each row, both at temperature T and over the old classes: shape (b,).

        Parameters
        ----------
        scores : Tensor of shape (b, k)
        rows : ndarray of shape (b,), int64
        """
        teacher_logits, T = self.teacher_scores[torch.from_numpy(rows)].to(scores), self.temperature
        teacher_log_probs = functional.log_softmax(teacher_logits / T, dim=1)
        student_log_probs = functional.log_softmax(scores[:, : teacher_logits.shape[1]] / T, dim=1)
        return self.strength * T**2 * (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum(dim=1)


@dataclass(frozen=True, eq=False)
class EWCPenalty:
    """A pull to the old weights, each by its importance (elastic weight consolidation, Kirkpatrick et al. 2017).

    Attributes
    ----------
    weights, importances : mapping from parameter to Tensor
        By the names of :meth:`featpipe.finetuning.trainer.Job.parameters`, which are those that are pulled. The importance
        of what belongs to a new class is zero.
    """

    reference_weights: Mapping[str, Tensor]
    importances: Mapping[str, Tensor]

    def compute(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """½ Σ importance (θ - θ_old)²."""
        return torch.stack(list(self._parameter_penalties(parameters))).sum()

    def _parameter_penalties(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[Tensor]:
        for name, importance in self.importances.items():
            parameter = parameters[name]
            difference = parameter - self.reference_weights[name].to(parameter.device)
            yield 0.5 * (importance.to(parameter.device) * difference.square()).sum()


@dataclass(frozen=True, eq=False)
class Regularizers:
    """The classes that a model knew before others came, and what holds the network to them.

    Attributes
    ----------
    k_old : int
        How many; they are the first. Both sides are watched after each epoch, on rows that decide nothing.
    teacher : Teacher or None
    anchor : Anchor or None
    weights : ndarray of shape (n,) or None
        Of the rows of the archive in the loss, where some stand for others that are not there.
    adjustment : ndarray of shape (k,) or None
        Added to the scores in the loss alone, for the same reason.
    facts : mapping
        What all of it follows from, as JSON can hold it.
    """

    k_old: int
    distillation: DistillationLoss | None = None
    ewc: EWCPenalty | None = None
    sample_weights: NDArray[np.float64] | None = None
    logit_adjustment: NDArray[np.float64] | None = None
    provenance: Mapping[str, Any] | None = None


def compute_network_fisher(trainer: Trainer, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of all that a job trains, by the names of its parameters.

    Parameters
    ----------
    job : Job
    rows : ndarray of shape (m,), int64
        That its ``watched`` source knows; their labels are not used.

    Notes
    -----
    The mean over images, and over the answers that the model itself expects, of the squared gradient of log p(answer |
    image). Each image goes through the network by itself: the square of a gradient that was averaged over a batch would
    be smaller, and the smaller the larger the batch.
    """
    parameters = trainer.trained_parameters()
    trainer.unfreeze_for_epoch(trainer.tuning.gradual * len(trainer.unfrozen.stages))  # all of it
    trainer.network.eval()
    trainer.head.eval()
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    row_batches = np.array_split(rows, -(-len(rows) // FISHER_BATCH_SIZE)) if len(rows) else []
    for _, inputs in prefetch_batches(trainer.validation_data, row_batches, 0):
        for image in inputs.to(trainer.device).split(1):
            with torch.enable_grad():
                log_probs = functional.log_softmax(trainer.compute_scores(trainer.validation_data, image)[0], dim=0)
            for class_index, probability in enumerate(log_probs.detach().exp()):
                is_last = class_index + 1 == len(log_probs)
                gradients = torch.autograd.grad(
                    log_probs[class_index], list(parameters.values()), retain_graph=not is_last
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    fisher[name].addcmul_(gradient, gradient, value=float(probability) / len(rows))
    return fisher
