"""Loss functions of the torch heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Link = Literal["softmax", "sigmoid", "identity"]
CLASSIFICATION_LOSSES = ("cross_entropy", "focal")
REGRESSION_LOSSES = ("squares", "absolute", "huber")
MAX_TRANSPOSED_CLASSES, MIN_TRANSPOSED_SCORES = 16, 2048


@dataclass(frozen=True, eq=False)
class LossFunction:
    """A loss of scores and targets.

    Attributes
    ----------
    link : {"softmax", "sigmoid", "identity"}
        For classes, for independent labels, and for numbers.
    loss : str
        "cross_entropy" or "focal" for the first two; "squares" (halved), "absolute" or "huber" for numbers.
    focal_gamma : float
        The cross-entropy is multiplied by (1 - p)^gamma, p being the probability of the true class (Lin et al. 2017).
    label_smoothing : float
        Fraction of the target that is spread evenly over all classes.
    adjustment : ndarray of shape (k,) or None
        Added to the scores (logit adjustment, Menon et al. 2021).
    huber_delta : float
        Error at which the loss changes from quadratic to linear.
    """

    link: Link
    loss: str
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    adjustment: NDArray[np.float64] | None = None
    huber_delta: float = 1.0

    def per_row_loss(self, scores: torch.Tensor, Y: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """Loss of shape (b,), or (b, k) for labels.

        Parameters
        ----------
        scores : tensor of shape (b, k)
        Y : tensor
            Class codes of shape (b,); 0 and 1, or numbers, of shape (b, k).
        smoothing : float
        """
        from torch.nn import functional

        if self.link == "identity":
            return self._compute_regression_loss(scores, Y)
        if self.adjustment is not None:
            scores = scores + scores.new_tensor(self.adjustment)
        if self.link == "softmax":
            losses = _cross_entropy(scores, Y, smoothing)
        else:
            target = Y * (1 - smoothing) + 0.5 * smoothing if smoothing else Y
            losses = functional.binary_cross_entropy_with_logits(scores, target, reduction="none")
        if self.loss == "focal":
            losses = losses * (self.focal_gamma * self._compute_log_error_probability(scores, Y)).exp()
        return losses

    def _compute_log_error_probability(self, scores: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
        """log(1 - p) of the true class, computed from scores because 1 - p may round to zero."""
        from torch.nn import functional

        if self.link == "sigmoid":
            return functional.logsigmoid(scores * (1 - 2 * Y))
        other_scores = scores.scatter(1, Y[:, None], -np.inf)
        return other_scores.logsumexp(dim=1) - scores.logsumexp(dim=1)

    def _compute_regression_loss(self, predictions: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        if self.loss == "huber":
            return functional.huber_loss(predictions, Y, reduction="none", delta=self.huber_delta).mean(dim=1)
        error = predictions - Y
        return (0.5 * error.square() if self.loss == "squares" else error.abs()).mean(dim=1)

    def batch_loss(
        self, scores: torch.Tensor, batch: Any, mixup_batch: Any | None, mixup_weight: float
    ) -> torch.Tensor:
        """Weighted mean loss of a batch, or of its mixup with another.

        Parameters
        ----------
        scores : tensor of shape (b, k)
        batch, mixup_batch : TrainingBatch
            b rows each.
        mixup_weight : float
            Weight of ``batch``.
        """
        smoothing = self.label_smoothing
        if mixup_batch is None:
            return (self.per_row_loss(scores, batch.Y, smoothing) * batch.weights).mean()
        if self.link == "identity":
            weights = batch.weights.lerp(mixup_batch.weights, 1 - mixup_weight)
            return (self.per_row_loss(scores, batch.Y.lerp(mixup_batch.Y, 1 - mixup_weight)) * weights).mean()
        batch_mean = (self.per_row_loss(scores, batch.Y, smoothing) * batch.weights).mean()
        mixup_mean = (self.per_row_loss(scores, mixup_batch.Y, smoothing) * mixup_batch.weights).mean()
        return mixup_weight * batch_mean + (1 - mixup_weight) * mixup_mean

    def row_scores(self, scores: torch.Tensor, Y: torch.Tensor, variance: torch.Tensor | None) -> torch.Tensor:
        """Scores whose mean is the accuracy, or R² for numbers."""
        if variance is not None:
            return 1 - ((scores - Y).square() / variance).mean(dim=1)
        if self.link == "softmax":
            return (scores.argmax(dim=1) == Y).to(scores.dtype)
        return ((scores > 0) == (Y > 0.5)).to(scores.dtype)


def _cross_entropy(scores: torch.Tensor, Y: torch.Tensor, smoothing: float) -> torch.Tensor:
    from torch.nn import functional

    options: dict[str, Any] = {"reduction": "none", "label_smoothing": smoothing}
    if scores.is_cpu and scores.shape[1] < MAX_TRANSPOSED_CLASSES and scores.numel() >= MIN_TRANSPOSED_SCORES:
        # torch vectorises a softmax over few classes only along the other axis, sixteen rows at a time.
        return functional.cross_entropy(scores.T.contiguous()[None], Y[None], **options)[0]
    return functional.cross_entropy(scores, Y, **options)


def compute_log_prior(
    link: Link, Y: NDArray[np.int64], weights: NDArray[np.float64], n_classes: int
) -> NDArray[np.float64]:
    """Weighted log frequency of each class, or log odds of each label, shape (k,), kept finite by half a row."""
    if link == "softmax":
        counts = np.bincount(Y, weights, n_classes)
        return np.log(np.maximum(counts, 0.5 * weights.mean()) / weights.sum())
    positive_weight, half_row_weight = (weights * Y).sum(axis=0), 0.5 * weights.mean(axis=0)
    return np.log(np.maximum(positive_weight, half_row_weight)) - np.log(
        np.maximum(weights.sum(axis=0) - positive_weight, half_row_weight)
    )
