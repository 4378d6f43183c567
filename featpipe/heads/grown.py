"""A head that got more classes and left the scores of its old ones as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.base import BaseEstimator

from featpipe.calibration import logits_of
from featpipe.heads.classes import ScoredClassifier
from featpipe.heads.layer import LastLayer, hidden, last_layer

__all__ = ["GrownClassifier", "grown", "innermost", "joined", "layer_of", "regrouped"]


class GrownClassifier(ScoredClassifier, BaseEstimator):
    """The scores of a fitted head, some of them taken together or left out, and of new classes beside them.

    It is made by `grown` and cannot be fitted. A class that was neither joined with another nor left out keeps its
    scores bit for bit.

    Attributes
    ----------
    old_ : estimator
        The head as it was.
    place_ : ndarray of shape (k_old,), int64
        The class that each of its classes is now; those of one class add up as probabilities do; -1 is none.
    coef_ : ndarray of shape (j, p), intercept_ : ndarray of shape (j,)
        Of the new classes, on what the old head's last layer sees.
    classes_ : ndarray of shape (k,)
    """

    old_: Any
    place_: NDArray[np.int64]
    coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]
    n_features_in_: int

    def fit(self, X: Any, y: Any) -> Any:
        raise ValueError("a head that grew is not fitted again; fit its old_, or one of the table")

    def _scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        old = regrouped(logits_of(self.old_, X), self.place_, len(self.classes_) - len(self.intercept_))
        new = np.asarray(hidden(innermost(self), X), np.float64) @ self.coef_.T + self.intercept_
        scores = np.concatenate([old, new], axis=1)
        return np.diff(scores, axis=1) if scores.shape[1] == 2 else scores


def grown(old: Any, place: NDArray[np.integer[Any]], new: LastLayer, d: int) -> GrownClassifier:
    """A head that grew out of a fitted one; of inputs of width d."""
    head = GrownClassifier()
    head.old_, head.place_ = old, np.asarray(place, np.int64)
    head.coef_, head.intercept_ = new.W, new.b
    head.classes_ = np.arange(int(head.place_.max()) + 1 + len(new.b))
    head.multilabel_, head.n_features_in_ = False, d
    return head


def regrouped(scores: NDArray[np.float64], place: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """Scores of shape (m, k) from those of other classes: of several that become one, the sum of probabilities."""
    found = np.empty((len(scores), k))
    for code in range(k):
        members = np.flatnonzero(place == code)
        found[:, code] = scores[:, members[0]] if len(members) == 1 else logsumexp(scores[:, members], axis=1)
    return found


def innermost(head: Any) -> Any:
    """The head that was trained first."""
    while isinstance(head, GrownClassifier):
        head = head.old_
    return head


def layer_of(head: Any) -> LastLayer | None:
    """The last layer of a head, as one, also if it grew; None if it has none.

    Classes that were joined get the mean of their rows, which is near their scores and not equal to them.
    """
    if not isinstance(head, GrownClassifier):
        return last_layer(head)
    old = layer_of(head.old_)
    if old is None:
        return None
    k = len(head.classes_) - len(head.intercept_)
    layer = joined(old, head.place_, k)
    return LastLayer(np.vstack([layer.W, head.coef_]), np.concatenate([layer.b, head.intercept_]))


def joined(layer: LastLayer, place: NDArray[np.integer[Any]], k: int) -> LastLayer:
    """The rows of k classes from those of others; see `layer_of`."""
    W, b = np.zeros((k, layer.W.shape[1])), np.zeros(k)
    for code in range(k):
        members = np.flatnonzero(place == code)
        W[code], b[code] = layer.W[members].mean(axis=0), layer.b[members].mean() + np.log(len(members))
    return LastLayer(W, b)
