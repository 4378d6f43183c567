"""Loss terms that keep a network from forgetting the old classes during training.

Distillation compares with the old model's predictions, elastic weight consolidation with its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from featpipe.finetuning import LossTerm, Trainer, prefetch_batches

FISHER_BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class DistillationLoss(LossTerm):
    """The old model's predictions for the images as soft targets (Li and Hoiem, "Learning without forgetting", 2016).

    Attributes
    ----------
    teacher_scores : Tensor of shape (n, k_old)
        The old model's logits for each row of the archive; old classes are the first. Rows that are not trained on
        may hold any values.
    temperature, strength : float
    """

    teacher_scores: Tensor
    temperature: float = 2.0
    strength: float = 1.0

    def row_losses(self, scores: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Strength T² KL(old ‖ new) of each row, both at temperature T and over the old classes: shape (b,)."""
        teacher_logits, T = self.teacher_scores[torch.from_numpy(rows)].to(scores), self.temperature
        teacher_log_probs = functional.log_softmax(teacher_logits / T, dim=1)
        student_log_probs = functional.log_softmax(scores[:, : teacher_logits.shape[1]] / T, dim=1)
        return self.strength * T**2 * (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum(dim=1)


@dataclass(frozen=True, eq=False)
class EWCPenalty(LossTerm):
    """½ Σ importance (θ - θ_old)², elastic weight consolidation (Kirkpatrick et al. 2017).

    Attributes
    ----------
    reference_weights, importances : mapping from name to Tensor
        Of the parameters that are penalized, as :meth:`featpipe.finetuning.Trainer.trained_parameters` names them. The
        importance of the weights of a new class is zero.
    """

    reference_weights: Mapping[str, Tensor]
    importances: Mapping[str, Tensor]

    def penalty(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """½ Σ importance (θ - θ_old)²."""
        penalties = []
        for name, importance in self.importances.items():
            parameter = parameters[name]
            difference = parameter - self.reference_weights[name].to(parameter.device)
            penalties.append(0.5 * (importance.to(parameter.device) * difference.square()).sum())
        return torch.stack(penalties).sum()


def compute_network_fisher(trainer: Trainer, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of all parameters that a trainer trains, by their names.

    Parameters
    ----------
    trainer : Trainer
    rows : ndarray of shape (m,), int64
        Rows of its ``validation_data``; their labels are not used.

    Notes
    -----
    The mean over images, and over the classes as the model itself expects them, of the squared gradient of
    log p(class | image). Each image goes through the network by itself: the square of a gradient that was averaged over
    a batch would be smaller, and the smaller the larger the batch.
    """
    parameters = trainer.trained_parameters()
    trainer.unfreeze_for_epoch(trainer.tuning.gradual * len(trainer.unfrozen.stages))  # the last epoch: all of them
    trainer.network.eval()
    trainer.head.eval()
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    row_batches = np.array_split(rows, -(-len(rows) // FISHER_BATCH_SIZE)) if len(rows) else []
    for _, inputs in prefetch_batches(trainer.validation_data, row_batches, 0):
        for image in trainer.to_device(inputs).split(1):
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
