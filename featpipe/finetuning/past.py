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

from featpipe.finetuning.job import Job
from featpipe.finetuning.source import ahead

__all__ = ["Anchor", "Past", "Teacher", "importances"]

READ_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Teacher:
    """What the old model said of the images, as soft targets (Li and Hoiem, "Learning without forgetting", 2016).

    Attributes
    ----------
    scores : Tensor of shape (n, k_old)
        For each row of the archive, of the old classes, which are the first; anything for rows that are not used.
    temperature, strength : float
    """

    scores: Tensor
    temperature: float = 2.0
    strength: float = 1.0

    def each(self, scores: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Strength T² KL(old ‖ new) of each row, both at temperature T and over the old classes: shape (b,).

        Parameters
        ----------
        scores : Tensor of shape (b, k)
        rows : ndarray of shape (b,), int64
        """
        said, T = self.scores[torch.from_numpy(rows)].to(scores), self.temperature
        old = functional.log_softmax(said / T, dim=1)
        new = functional.log_softmax(scores[:, : said.shape[1]] / T, dim=1)
        return self.strength * T**2 * (old.exp() * (old - new)).sum(dim=1)


@dataclass(frozen=True, eq=False)
class Anchor:
    """A pull to the old weights, each by its importance (elastic weight consolidation, Kirkpatrick et al. 2017).

    Attributes
    ----------
    weights, importances : mapping from parameter to Tensor
        By the names of :meth:`featpipe.finetuning.job.Job.parameters`, which are those that are pulled. The importance
        of what belongs to a new class is zero.
    """

    weights: Mapping[str, Tensor]
    importances: Mapping[str, Tensor]

    def pull(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """½ Σ importance (θ - θ_old)²."""
        return torch.stack(list(self._pulls(parameters))).sum()

    def _pulls(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[Tensor]:
        for name, importance in self.importances.items():
            parameter = parameters[name]
            apart = parameter - self.weights[name].to(parameter.device)
            yield 0.5 * (importance.to(parameter.device) * apart.square()).sum()


@dataclass(frozen=True, eq=False)
class Past:
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
    teacher: Teacher | None = None
    anchor: Anchor | None = None
    weights: NDArray[np.float64] | None = None
    adjustment: NDArray[np.float64] | None = None
    facts: Mapping[str, Any] | None = None


def importances(job: Job, rows: NDArray[np.int64]) -> dict[str, Tensor]:
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
    parameters = job.parameters()
    job.thaw(job.tuning.gradual * len(job.unfrozen.stages))  # all of it
    job.network.eval()
    job.head.eval()
    found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    parts = np.array_split(rows, -(-len(rows) // READ_AT_ONCE)) if len(rows) else []
    for _, inputs in ahead(job.watched, parts, 0):
        for image in inputs.to(job.device).split(1):
            with torch.enable_grad():
                logs = functional.log_softmax(job.scores(job.watched, image)[0], dim=0)
            for answer, share in enumerate(logs.detach().exp()):
                last = answer + 1 == len(logs)
                slopes = torch.autograd.grad(logs[answer], list(parameters.values()), retain_graph=not last)
                for name, slope in zip(parameters, slopes, strict=True):
                    found[name].addcmul_(slope, slope, value=float(share) / len(rows))
    return found
