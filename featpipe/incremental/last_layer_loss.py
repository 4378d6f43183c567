"""The training loss of a last layer with more classes, and its terms against forgetting old classes.

Losses and gradients are closed forms in float64, so the same rows give the same layer on any machine and in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

from featpipe.heads import LastLayer

Array = NDArray[np.float64]
EpochCallback = Callable[[LastLayer, float], None]


@dataclass(frozen=True, eq=False)
class DistillationTerm:
    """The old model's predictions as soft targets (Li and Hoiem, "Learning without forgetting", 2016).

    Attributes
    ----------
    teacher_scores : ndarray of shape (n, k_old)
        Logits of the old classes, which are the first.
    temperature : float
    strength : float
    """

    teacher_scores: Array
    temperature: float = 2.0
    strength: float = 1.0

    def loss_and_gradient(self, scores: Array, weights: Array) -> tuple[float, Array]:
        """Strength T² Σ w KL(old ‖ new), both at temperature T and over the old classes; and its gradient."""
        k, T = self.teacher_scores.shape[1], self.temperature
        log_p, log_q = log_softmax(self.teacher_scores / T, axis=1), log_softmax(scores[:, :k] / T, axis=1)
        p, gradient = np.exp(log_p), np.zeros_like(scores)
        gradient[:, :k] = self.strength * T * weights[:, None] * (np.exp(log_q) - p)
        return self.strength * T**2 * float(weights @ (p * (log_p - log_q)).sum(axis=1)), gradient


@dataclass(frozen=True, eq=False)
class QuadraticPenalty:
    """½ Σ importance (θ - θ_old)² (elastic weight consolidation, Kirkpatrick et al. 2017).

    Attributes
    ----------
    old_theta : ndarray of shape (k_old, p + 1)
        Weights and, last, intercepts of the old classes.
    importances : ndarray of shape (k, p + 1)
        Zero for new classes.
    """

    old_theta: Array
    importances: Array

    @classmethod
    def from_layer(
        cls, layer: LastLayer, k: int, ridge: float, importances: NDArray[np.floating] | float = 0.0
    ) -> QuadraticPenalty:
        """Pull the weights of an old layer by ``ridge``, and weights and intercepts by ``importances`` too."""
        theta = stack_weights(layer)
        strengths = np.zeros((k, theta.shape[1]))
        strengths[: len(theta), :-1] = ridge
        strengths[: len(theta)] += importances
        return cls(theta, strengths)

    def loss_and_gradient(self, theta: Array) -> tuple[float, Array]:
        """½ Σ importance (θ - θ_old)², and its gradient."""
        difference = theta.copy()
        difference[: len(self.old_theta)] -= self.old_theta
        gradient = self.importances * difference
        return 0.5 * float((gradient * difference).sum()), gradient


@dataclass(frozen=True, eq=False)
class LastLayerObjective:
    """Σ w_i loss(y_i, W z_i + b) + ½ Σ ridge W² + distillation + quadratic penalty.

    Attributes
    ----------
    Z : ndarray of shape (n, p)
        Input of the last layer.
    y : ndarray of shape (n,)
        Class codes.
    weights : ndarray of shape (n,)
    ridge : float, or ndarray of shape (k, 1)
        For all classes, or for each.
    fixed_scores : ndarray of shape (n, k_fixed) or None
        Logits of the first classes if these are not trained: the layer is then for the other classes.
    offsets : ndarray of shape (k,) or None
        Added to the logits in the loss alone, where class frequencies here differ from those in use.
    distillation : DistillationTerm or None
    quadratic_penalty : QuadraticPenalty or None
    """

    Z: Array
    y: NDArray[np.integer]
    weights: Array
    ridge: float | Array = 0.0
    fixed_scores: Array | None = None
    offsets: Array | None = None
    distillation: DistillationTerm | None = None
    quadratic_penalty: QuadraticPenalty | None = None

    def value_and_gradient(self, theta: Array) -> tuple[float, Array]:
        """Value and gradient at weights and intercepts ``theta`` of shape (k, p + 1)."""
        k_fixed = 0 if self.fixed_scores is None else self.fixed_scores.shape[1]
        scores, rows = self.Z @ theta[:, :-1].T + theta[:, -1], np.arange(len(self.y))
        if self.fixed_scores is not None:
            scores = np.concatenate([self.fixed_scores, scores], axis=1)
        adjusted_scores = scores if self.offsets is None else scores + self.offsets
        value = float(self.weights @ (logsumexp(adjusted_scores, axis=1) - adjusted_scores[rows, self.y]))
        score_gradient = softmax(adjusted_scores, axis=1)
        score_gradient[rows, self.y] -= 1
        score_gradient *= self.weights[:, None]
        if self.distillation is not None:
            term_value, term_gradient = self.distillation.loss_and_gradient(scores, self.weights)
            value, score_gradient = value + term_value, score_gradient + term_gradient
        trained_gradient = score_gradient[:, k_fixed:]
        theta_gradient = np.empty_like(theta)
        theta_gradient[:, :-1] = trained_gradient.T @ self.Z + self.ridge * theta[:, :-1]
        theta_gradient[:, -1] = trained_gradient.sum(axis=0)
        value += 0.5 * float((self.ridge * theta[:, :-1] ** 2).sum())
        if self.quadratic_penalty is not None:
            term_value, term_gradient = self.quadratic_penalty.loss_and_gradient(theta)
            value, theta_gradient = value + term_value, theta_gradient + term_gradient
        return value, theta_gradient


def fit_last_layer(
    objective: LastLayerObjective, initial_layer: LastLayer, epochs: int, on_epoch: EpochCallback | None = None
) -> LastLayer:
    """Minimize an objective by L-BFGS; a step, which uses all rows, is an epoch.

    Parameters
    ----------
    objective : LastLayerObjective
    initial_layer : LastLayer
    epochs : int
        At most.
    on_epoch : callable, optional
        Called with the layer and the mean loss before the first epoch and after each.
    """
    total_weight = float(objective.weights.sum()) or 1.0
    shape = (len(initial_layer.b), initial_layer.W.shape[1] + 1)

    def mean_loss(flat: Array) -> tuple[float, Array]:
        value, gradient = objective.value_and_gradient(flat.reshape(shape))
        return value / total_weight, gradient.ravel() / total_weight

    def report_epoch(flat: Array) -> None:
        if on_epoch is not None:
            on_epoch(_to_layer(flat.reshape(shape)), mean_loss(flat)[0])

    initial_theta = stack_weights(initial_layer).ravel()
    report_epoch(initial_theta)
    options = {"maxiter": epochs, "maxfun": 4 * epochs, "gtol": 1e-8, "ftol": 1e-14}
    result = minimize(mean_loss, initial_theta, jac=True, method="L-BFGS-B", callback=report_epoch, options=options)
    return _to_layer(result.x.reshape(shape))


def stack_weights(layer: LastLayer) -> Array:
    """Weights and, last, intercepts: shape (k, p + 1)."""
    return np.column_stack([layer.W, layer.b])


def _to_layer(theta: Array) -> LastLayer:
    return LastLayer(theta[:, :-1].copy(), theta[:, -1].copy())
