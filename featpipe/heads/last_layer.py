"""The last layer of a classifier, which is softmax regression on hidden features."""

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

Array = NDArray[np.float64]

FEATURE_BLOCK_ROWS = 8192
_LINEAR_HEADS = (SoftmaxRegression, SoftmaxRegressionCV, LogisticRegression)
_TORCH_CLASSIFIERS = (LinearClassifier, MLPClassifier)


@dataclass(frozen=True, eq=False)
class LastLayer:
    """Linear scores W z + b of k classes from p features.

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
    """The last layer of a fitted head; None if the head is not a softmax of linear scores.

    With two classes the first has scores of zero, as in :func:`featpipe.metrics.compute_logits`.
    """
    if getattr(head, "multilabel_", False):
        return None
    if isinstance(head, _LINEAR_HEADS):
        W, b = np.asarray(head.coef_, np.float64), np.asarray(head.intercept_, np.float64)
    elif isinstance(head, _TORCH_CLASSIFIERS):
        W, b = np.asarray(head.coefs_[-1].T, np.float64), np.asarray(head.intercepts_[-1], np.float64)
    else:
        return None
    if len(W) == 1:
        W, b = np.vstack([np.zeros_like(W), W]), np.concatenate([[0.0], b])
    return LastLayer(W, b)


def compute_hidden_features(head: Any, X: NDArray[Any]) -> NDArray[Any]:
    """The input of the last layer, shape (n, p); X itself if there is no hidden layer."""
    if not isinstance(head, MLPClassifier):
        return X
    width = head.coefs_[-1].shape[0]
    dtype = head.coefs_[-1].dtype
    coefs = [*head.coefs_[:-1], np.eye(width, dtype=dtype)]
    intercepts = [*head.intercepts_[:-1], np.zeros(width, dtype)]
    starts = range(0, max(1, len(X)), FEATURE_BLOCK_ROWS)
    return np.concatenate(
        [forward(X[start : start + FEATURE_BLOCK_ROWS], coefs, intercepts, head.activation) for start in starts]
    )


def replace_last_layer(head: Any, layer: LastLayer) -> Any:
    """Copy a head with another last layer; its classes are 0 to k - 1."""
    new_head, n_classes = copy.copy(head), len(layer.b)
    W, b = layer.W, layer.b
    if n_classes == 2:
        W, b = np.diff(W, axis=0), np.diff(b)
    if isinstance(head, _TORCH_CLASSIFIERS):
        dtype = head.coefs_[-1].dtype
        new_head.coefs_ = [*head.coefs_[:-1], np.ascontiguousarray(W.T, dtype)]
        new_head.intercepts_ = [*head.intercepts_[:-1], b.astype(dtype)]
    else:
        new_head.coef_, new_head.intercept_ = W, b
    new_head.classes_ = np.arange(n_classes)
    return new_head


def get_l2_strength(head: Any) -> float:
    """The L2 penalty of the head relative to the summed loss, 1 / C; 1 for heads without C."""
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
    The mean of the squared gradient of log p(y | z) over rows, with y drawn from the model's own distribution: for a
    softmax p_c (1 - p_c) z_d², in closed form. Squares are averaged row by row; the square of a batch's mean gradient
    would shrink with the batch size.
    """
    from scipy.special import softmax

    fisher_sum = np.zeros((len(layer.b), layer.W.shape[1] + 1))
    for start in range(0, len(Z), FEATURE_BLOCK_ROWS):
        block = np.asarray(Z[start : start + FEATURE_BLOCK_ROWS], np.float64)
        probabilities = softmax(layer.compute_scores(block), axis=1)
        bernoulli_variance = probabilities * (1 - probabilities)
        fisher_sum[:, :-1] += bernoulli_variance.T @ block**2
        fisher_sum[:, -1] += bernoulli_variance.sum(axis=0)
    return fisher_sum / max(1, len(Z))
