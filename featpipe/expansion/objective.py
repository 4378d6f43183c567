"""What the last layer is trained on when it grows: the loss on some rows, and what ties it to what it was.

Everything is in float64 and in closed form, so that the same rows give the same layer on any machine and in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

from featpipe.heads.layer import LastLayer

__all__ = ["Anchor", "Objective", "Teacher", "minimise"]

Array = NDArray[np.float64]
Watch = Callable[[LastLayer, float], None]


@dataclass(frozen=True, eq=False)
class Teacher:
    """What the old model says of the rows, as soft targets (Li and Hoiem, "Learning without forgetting", 2016).

    Attributes
    ----------
    scores : ndarray of shape (n, k_old)
        Of the old classes, which are the first.
    temperature : float
    strength : float
    """

    scores: Array
    temperature: float = 2.0
    strength: float = 1.0

    def loss(self, scores: Array, weights: Array) -> tuple[float, Array]:
        """Strength T² Σ w KL(old ‖ new), both at temperature T and over the old classes; and its gradient."""
        k, T = self.scores.shape[1], self.temperature
        old, new = log_softmax(self.scores / T, axis=1), log_softmax(scores[:, :k] / T, axis=1)
        p = np.exp(old)
        gradient = np.zeros_like(scores)
        gradient[:, :k] = self.strength * T * weights[:, None] * (np.exp(new) - p)
        return self.strength * T**2 * float(weights @ (p * (old - new)).sum(axis=1)), gradient


@dataclass(frozen=True, eq=False)
class Anchor:
    """A pull to the old weights, each by its importance (elastic weight consolidation, Kirkpatrick et al. 2017).

    Attributes
    ----------
    theta : ndarray of shape (k_old, p + 1)
        Weights and, last, intercepts of the old classes.
    importances : ndarray of shape (k, p + 1)
        Zero for classes that are new.
    """

    theta: Array
    importances: Array

    def loss(self, theta: Array) -> tuple[float, Array]:
        """½ Σ importance (θ - θ_old)², and its gradient."""
        apart = theta.copy()
        apart[: len(self.theta)] -= self.theta
        pull = self.importances * apart
        return 0.5 * float((pull * apart).sum()), pull


@dataclass(frozen=True, eq=False)
class Objective:
    """Σ w_i loss(y_i, W z_i + b) + ½ Σ ridge W², and what is added to it.

    Attributes
    ----------
    Z : ndarray of shape (n, p)
        What the last layer sees.
    y : ndarray of shape (n,)
        Class codes.
    weights : ndarray of shape (n,)
    ridge : float, or ndarray of shape (k, 1)
        The same for all classes, or for each.
    fixed : ndarray of shape (n, k_fixed) or None
        Scores of the first classes, where these are not trained: the layer is then that of the others alone.
    offsets : ndarray of shape (k,) or None
        Added to the scores in the loss alone: the layer is for rows among which classes are not as frequent as here.
    teacher : Teacher or None
    anchor : Anchor or None
    """

    Z: Array
    y: NDArray[np.integer]
    weights: Array
    ridge: float | Array = 0.0
    fixed: Array | None = None
    offsets: Array | None = None
    teacher: Teacher | None = None
    anchor: Anchor | None = None

    def value(self, theta: Array) -> tuple[float, Array]:
        """The value and the gradient at weights and intercepts of shape (k, p + 1)."""
        own = self.Z @ theta[:, :-1].T + theta[:, -1]
        scores = own if self.fixed is None else np.concatenate([self.fixed, own], axis=1)
        rows = np.arange(len(self.y))
        judged = scores if self.offsets is None else scores + self.offsets
        value = float(self.weights @ (logsumexp(judged, axis=1) - judged[rows, self.y]))
        by_score = softmax(judged, axis=1)
        by_score[rows, self.y] -= 1
        by_score *= self.weights[:, None]
        if self.teacher is not None:
            more, gradient = self.teacher.loss(scores, self.weights)
            value, by_score = value + more, by_score + gradient
        by_own = by_score if self.fixed is None else by_score[:, self.fixed.shape[1] :]
        by_theta = np.empty_like(theta)
        by_theta[:, :-1] = by_own.T @ self.Z + self.ridge * theta[:, :-1]
        by_theta[:, -1] = by_own.sum(axis=0)
        value += 0.5 * float((self.ridge * theta[:, :-1] ** 2).sum())
        if self.anchor is not None:
            more, gradient = self.anchor.loss(theta)
            value, by_theta = value + more, by_theta + gradient
        return value, by_theta


def minimise(objective: Objective, start: LastLayer, epochs: int, watch: Watch | None = None) -> LastLayer:
    """The layer with the least value, or the one after so many epochs: steps of L-BFGS, each of which sees all rows.

    Parameters
    ----------
    objective : Objective
    start : LastLayer
    epochs : int
    watch : callable, optional
        Told the layer and the mean loss after each epoch, and before the first.
    """
    total = float(objective.weights.sum()) or 1.0
    shape = (len(start.b), start.W.shape[1] + 1)

    def mean_value(flat: Array) -> tuple[float, Array]:
        value, gradient = objective.value(flat.reshape(shape))
        return value / total, gradient.ravel() / total

    def told(flat: Array) -> None:
        if watch is not None:
            watch(_layer(flat.reshape(shape)), mean_value(flat)[0])

    first = np.column_stack([start.W, start.b]).ravel()
    told(first)
    options = {"maxiter": epochs, "maxfun": 4 * epochs, "gtol": 1e-8, "ftol": 1e-14}
    found = minimize(mean_value, first, jac=True, method="L-BFGS-B", callback=told, options=options)
    return _layer(found.x.reshape(shape))


def _layer(theta: Array) -> LastLayer:
    return LastLayer(theta[:, :-1].copy(), theta[:, -1].copy())
