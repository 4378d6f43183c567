"""The last layer of a classifier: softmax regression on whatever comes before it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from featpipe.heads.logistic.cv import SoftmaxRegressionCV
from featpipe.heads.logistic.estimator import SoftmaxRegression
from featpipe.heads.neural.estimators import LinearClassifier, MLPClassifier
from featpipe.heads.neural.train import forward

__all__ = [
    "LastLayer",
    "compute_fisher_diagonal",
    "compute_hidden_features",
    "extract_last_layer",
    "get_l2_strength",
    "replace_last_layer",
]

Array = NDArray[np.float64]

BLOCK_ROWS = 8192
_LINEAR_HEADS = (SoftmaxRegression, SoftmaxRegressionCV, LogisticRegression)
_TORCH_HEADS = (LinearClassifier, MLPClassifier)


@dataclass(frozen=True, eq=False)
class LastLayer:
    """Scores W z + b of k classes from p features.

    Attributes
    ----------
    W : ndarray of shape (k, p), float64
    b : ndarray of shape (k,), float64
    """

    W: Array
    b: Array

    def compute_scores(self, Z: NDArray[Any]) -> Array:
        return np.asarray(Z @ self.W.T + self.b)


def extract_last_layer(head: Any) -> LastLayer | None:
    """That of a fitted head; None if it does not end in a softmax of linear scores.

    Of two classes the first has scores of zero, as :func:`featpipe.metrics.calibration.logits_of` gives them.
    """
    if getattr(head, "multilabel_", False):
        return None
    if isinstance(head, _LINEAR_HEADS):
        W, b = np.asarray(head.coef_, np.float64), np.asarray(head.intercept_, np.float64)
    elif isinstance(head, _TORCH_HEADS):
        W, b = np.asarray(head.coefs_[-1].T, np.float64), np.asarray(head.intercepts_[-1], np.float64)
    else:
        return None
    if len(W) == 1:
        W, b = np.vstack([np.zeros_like(W), W]), np.concatenate([[0.0], b])
    return LastLayer(W, b)


def compute_hidden_features(head: Any, X: NDArray[Any]) -> NDArray[Any]:
    """What the last layer sees, shape (n, p): X itself where there is no other layer."""
    if not isinstance(head, MLPClassifier):
        return X
    width = head.coefs_[-1].shape[0]
    dtype = head.coefs_[-1].dtype
    coefs = [*head.coefs_[:-1], np.eye(width, dtype=dtype)]
    intercepts = [*head.intercepts_[:-1], np.zeros(width, dtype)]
    starts = range(0, max(1, len(X)), BLOCK_ROWS)
    return np.concatenate(
        [forward(X[start : start + BLOCK_ROWS], coefs, intercepts, head.activation) for start in starts]
    )


def replace_last_layer(head: Any, layer: LastLayer) -> Any:
    """A copy of a head with another last layer, of classes 0 to k - 1."""
    new_head, n_classes = copy.copy(head), len(layer.b)
    W, b = layer.W, layer.b
    if n_classes == 2:
        W, b = np.diff(W, axis=0), np.diff(b)
    if isinstance(head, _TORCH_HEADS):
        dtype = head.coefs_[-1].dtype
        new_head.coefs_ = [*head.coefs_[:-1], np.ascontiguousarray(W.T, dtype)]
        new_head.intercepts_ = [*head.intercepts_[:-1], b.astype(dtype)]
    else:
        new_head.coef_, new_head.intercept_ = W, b
    new_head.classes_ = np.arange(n_classes)
    return new_head


def get_l2_strength(head: Any) -> float:
    """The strength of the head's own L2 penalty against the summed loss of its rows; 1 for heads that have no such."""
    inverse_strength = (
        getattr(head, "C_", None) or getattr(head, "C", None) if isinstance(head, _LINEAR_HEADS) else None
    )
    return 1.0 / float(inverse_strength or 1.0)


def compute_fisher_diagonal(layer: LastLayer, Z: NDArray[Any]) -> Array:
    """The diagonal of the Fisher information of the last layer, shape (k, p + 1), intercepts last.

    Parameters
    ----------
    layer : LastLayer
    Z : ndarray of shape (n, p)

    Notes
    -----
    The mean over rows, and over the answers that the model itself expects, of the squared gradient of log p(y | z): for
    a softmax p_c (1 - p_c) z_d², in closed form. It is the mean of squares, row by row, and not the square of a mean
    over a batch, which shrinks with the batch.
    """
    from scipy.special import softmax

    fisher_sum = np.zeros((len(layer.b), layer.W.shape[1] + 1))
    for start in range(0, len(Z), BLOCK_ROWS):
        block = np.asarray(Z[start : start + BLOCK_ROWS], np.float64)
        probabilities = softmax(layer.compute_scores(block), axis=1)
        bernoulli_variance = probabilities * (1 - probabilities)
        fisher_sum[:, :-1] += bernoulli_variance.T @ block**2
        fisher_sum[:, -1] += bernoulli_variance.sum(axis=0)
    return fisher_sum / max(1, len(Z))
