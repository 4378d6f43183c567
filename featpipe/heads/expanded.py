"""A head with added classes that leaves the scores of the old classes unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.base import BaseEstimator

from featpipe.heads.last_layer import LastLayer, compute_hidden_features, extract_last_layer
from featpipe.heads.targets import ScoredClassifier
from featpipe.metrics import compute_logits


class ExpandedClassifier(ScoredClassifier, BaseEstimator):
    """The scores of a fitted head, with classes merged or removed, and linear scores of new classes.

    Created by `make_expanded_head`; it cannot be fitted. A class that was neither merged nor removed keeps its scores
    bit for bit.

    Attributes
    ----------
    old_ : estimator
        The head before it was expanded.
    place_ : ndarray of shape (k_old,), int64
        The new code of each old class; -1 if it was removed. Probabilities of classes with the same code add up.
    coef_ : ndarray of shape (j, p), intercept_ : ndarray of shape (j,)
        The new classes, on the input of the old head's last layer.
    classes_ : ndarray of shape (k,)
    """

    __module__ = "featpipe.heads"

    old_: Any
    place_: NDArray[np.int64]
    coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]
    n_features_in_: int

    def fit(self, X: Any, y: Any) -> Any:
        raise ValueError("an expanded head cannot be fitted; fit its base head old_, or a built-in head")

    def _scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        old_scores = merge_class_scores(
            compute_logits(self.old_, X), self.place_, len(self.classes_) - len(self.intercept_)
        )
        new_scores = (
            np.asarray(compute_hidden_features(get_base_head(self), X), np.float64) @ self.coef_.T + self.intercept_
        )
        scores = np.concatenate([old_scores, new_scores], axis=1)
        return np.diff(scores, axis=1) if scores.shape[1] == 2 else scores


def make_expanded_head(
    base_head: Any, class_mapping: NDArray[np.integer[Any]], new_layer: LastLayer, n_features: int
) -> ExpandedClassifier:
    """Expand a fitted head; see `ExpandedClassifier`."""
    head = ExpandedClassifier()
    head.old_, head.place_ = base_head, np.asarray(class_mapping, np.int64)
    head.coef_, head.intercept_ = new_layer.W, new_layer.b
    head.classes_ = np.arange(int(head.place_.max()) + 1 + len(new_layer.b))
    head.multilabel_, head.n_features_in_ = False, n_features
    return head


def merge_class_scores(
    scores: NDArray[np.float64], class_mapping: NDArray[np.int64], n_classes: int
) -> NDArray[np.float64]:
    """Scores of shape (m, n_classes) after merging classes: the log of the sum of their exponentials."""
    merged = np.empty((len(scores), n_classes))
    for class_code in range(n_classes):
        merged_classes = np.flatnonzero(class_mapping == class_code)
        merged[:, class_code] = (
            scores[:, merged_classes[0]] if len(merged_classes) == 1 else logsumexp(scores[:, merged_classes], axis=1)
        )
    return merged


def get_base_head(head: Any) -> Any:
    """The head before all expansions."""
    while isinstance(head, ExpandedClassifier):
        head = head.old_
    return head


def resolve_last_layer(head: Any) -> LastLayer | None:
    """The last layer of a head as one matrix, also of an expanded head; None if the head has no last layer.

    Merged classes get the mean of their rows, which approximates their scores.
    """
    if not isinstance(head, ExpandedClassifier):
        return extract_last_layer(head)
    old_layer = resolve_last_layer(head.old_)
    if old_layer is None:
        return None
    n_old_classes = len(head.classes_) - len(head.intercept_)
    merged_layer = merge_last_layer_rows(old_layer, head.place_, n_old_classes)
    return LastLayer(np.vstack([merged_layer.W, head.coef_]), np.concatenate([merged_layer.b, head.intercept_]))


def merge_last_layer_rows(layer: LastLayer, class_mapping: NDArray[np.integer[Any]], n_classes: int) -> LastLayer:
    """Merge the rows of classes; see `resolve_last_layer`."""
    W, b = np.zeros((n_classes, layer.W.shape[1])), np.zeros(n_classes)
    for class_code in range(n_classes):
        merged_classes = np.flatnonzero(class_mapping == class_code)
        W[class_code] = layer.W[merged_classes].mean(axis=0)
        b[class_code] = layer.b[merged_classes].mean() + np.log(len(merged_classes))
    return LastLayer(W, b)
