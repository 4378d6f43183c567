"""What the torch heads minimise, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["CLASS_LOSSES", "NUMBER_LOSSES", "Link", "Objective", "log_prior"]

Link = Literal["softmax", "sigmoid", "identity"]
CLASS_LOSSES = ("cross_entropy", "focal")
NUMBER_LOSSES = ("squares", "absolute", "huber")
FEW_CLASSES, MANY_SCORES = 16, 2048


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of scores.

    Attributes
    ----------
    link : {"softmax", "sigmoid", "identity"}
        Of classes, of labels that each stand alone, of numbers.
    loss : str
        "cross_entropy" or "focal" of the first two, "squares" (halved), "absolute" or "huber" of numbers.
    focal_gamma : float
        The cross-entropy is multiplied by (1 - p)^gamma, p being the probability of the true answer (Lin et al. 2017).
    label_smoothing : float
        Share of the target that is spread evenly over all answers.
    adjustment : ndarray of shape (k,) or None
        Is added to the scores (Menon et al. 2021).
    huber_delta : float
        Where squares go over into a line.
    """

    link: Link
    loss: str
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    adjustment: NDArray[np.float64] | None = None
    huber_delta: float = 1.0

    def each(self, scores: torch.Tensor, Y: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """Loss of shape (b,), or (b, k) of labels.

        Parameters
        ----------
        scores : tensor of shape (b, k)
        Y : tensor
            Class codes of shape (b,); 0 and 1, or numbers, of shape (b, k).
        smoothing : float
        """
        from torch.nn import functional

        if self.link == "identity":
            return self._of_numbers(scores, Y)
        if self.adjustment is not None:
            scores = scores + scores.new_tensor(self.adjustment)
        if self.link == "softmax":
            losses = _cross_entropy(scores, Y, smoothing)
        else:
            target = Y * (1 - smoothing) + 0.5 * smoothing if smoothing else Y
            losses = functional.binary_cross_entropy_with_logits(scores, target, reduction="none")
        if self.loss == "focal":
            losses = losses * (self.focal_gamma * self._log_doubt(scores, Y)).exp()
        return losses

    def _log_doubt(self, scores: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
        """Log of one minus the probability of the true answer: from scores, for it must not round to zero."""
        from torch.nn import functional

        if self.link == "sigmoid":
            return functional.logsigmoid(scores * (1 - 2 * Y))
        others = scores.scatter(1, Y[:, None], -np.inf)
        return others.logsumexp(dim=1) - scores.logsumexp(dim=1)

    def _of_numbers(self, answers: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        if self.loss == "huber":
            return functional.huber_loss(answers, Y, reduction="none", delta=self.huber_delta).mean(dim=1)
        error = answers - Y
        return (0.5 * error.square() if self.loss == "squares" else error.abs()).mean(dim=1)

    def of_step(self, scores: torch.Tensor, batch: Any, blended: Any | None, share: float) -> torch.Tensor:
        """Weighted mean loss of a batch, or of its blend with another.

        Parameters
        ----------
        scores : tensor of shape (b, k)
        batch, blended : Batch
            Of b rows each.
        share : float
            Of the first in the blend.
        """
        smoothing = self.label_smoothing
        if blended is None:
            return (self.each(scores, batch.Y, smoothing) * batch.weights).mean()
        if self.link == "identity":
            weights = batch.weights.lerp(blended.weights, 1 - share)
            return (self.each(scores, batch.Y.lerp(blended.Y, 1 - share)) * weights).mean()
        one = (self.each(scores, batch.Y, smoothing) * batch.weights).mean()
        other = (self.each(scores, blended.Y, smoothing) * blended.weights).mean()
        return share * one + (1 - share) * other

    def right(self, scores: torch.Tensor, Y: torch.Tensor, variance: torch.Tensor | None) -> torch.Tensor:
        """What the score is the mean of: is the answer right; of numbers one less the error's share of the variance."""
        if variance is not None:
            return 1 - ((scores - Y).square() / variance).mean(dim=1)
        if self.link == "softmax":
            return (scores.argmax(dim=1) == Y).to(scores.dtype)
        return ((scores > 0) == (Y > 0.5)).to(scores.dtype)


def _cross_entropy(scores: torch.Tensor, Y: torch.Tensor, smoothing: float) -> torch.Tensor:
    from torch.nn import functional

    settings: dict[str, Any] = {"reduction": "none", "label_smoothing": smoothing}
    if scores.is_cpu and scores.shape[1] < FEW_CLASSES and scores.numel() >= MANY_SCORES:
        # Torch takes a softmax over less than a register number by number; of columns it takes sixteen rows at once.
        return functional.cross_entropy(scores.T.contiguous()[None], Y[None], **settings)[0]
    return functional.cross_entropy(scores, Y, **settings)


def log_prior(link: Link, Y: NDArray[np.int64], weights: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Log of the share of each class, log odds of each label, shape (k,), by weight; half a row keeps it finite."""
    if link == "softmax":
        counts = np.bincount(Y, weights, k)
        return np.log(np.maximum(counts, 0.5 * weights.mean()) / weights.sum())
    ones, half = (weights * Y).sum(axis=0), 0.5 * weights.mean(axis=0)
    return np.log(np.maximum(ones, half)) - np.log(np.maximum(weights.sum(axis=0) - ones, half))
