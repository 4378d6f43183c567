"""The minimiser behind `featpipe.heads.softmax`: L2-penalised log loss, solved to a stated gap.

`minimise` is the whole interface; nothing outside knows how it goes about it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import expit, logsumexp, softmax

__all__ = ["Problem", "Solution", "minimise"]

Array = NDArray[np.float64]

CURVATURE_ROWS = 12_000
STEPS_PER_ROUND = 40
HISTORY = 20


@dataclass(frozen=True, eq=False)
class Problem:
    """f(W, b) = Σ w_i loss(y_i, W x_i + b) + ½‖W‖², to be minimised over W of shape (k, d) and b of shape (k,).

    Attributes
    ----------
    X : ndarray of shape (n, d), float64
    Y : ndarray of shape (n, k), float64
        One-hot rows for the softmax; one column of 0 and 1 for the sigmoid.
    weights : ndarray of shape (n,), float64
        Weight of each row's loss, the inverse penalty C included.
    link : {"softmax", "sigmoid"}
        The sigmoid takes k = 1.
    fit_intercept : bool
        Without it b stays zero.
    """

    X: Array
    Y: Array
    weights: Array
    link: Literal["softmax", "sigmoid"]
    fit_intercept: bool = True

    def probabilities(self, scores: Array) -> Array:
        return softmax(scores, axis=1) if self.link == "softmax" else expit(scores)

    def value_and_gradient(self, W: Array, b: Array) -> tuple[float, Array, Array]:
        """f, its gradient in W (k, d) and in b (k,)."""
        scores = self.X @ W.T + b
        if self.link == "softmax":
            losses = logsumexp(scores, axis=1) - (self.Y * scores).sum(axis=1)
        else:
            losses = (np.logaddexp(0.0, scores) - self.Y * scores)[:, 0]
        residuals = (self.probabilities(scores) - self.Y) * self.weights[:, None]
        value = float(self.weights @ losses + 0.5 * (W * W).sum())
        slope = residuals.sum(axis=0) if self.fit_intercept else np.zeros_like(b)
        return value, residuals.T @ self.X + W, slope


@dataclass(frozen=True, eq=False)
class Solution:
    """What `minimise` found.

    Attributes
    ----------
    W : ndarray of shape (k, d)
    b : ndarray of shape (k,)
    value : float
        f(W, b).
    gap : float
        Bound on (f(W, b) - min f) / f(W, b); an estimate where rounding ended the search.
    steps : int
    converged : bool
    """

    W: Array
    b: Array
    value: float
    gap: float
    steps: int
    converged: bool


def minimise(problem: Problem, *, tol: float, max_iter: int) -> Solution:
    """Minimise until the relative gap is at most ``tol``, or for ``max_iter`` steps.

    Notes
    -----
    f is 1-strongly convex in W once b is minimised out, so that ½‖∂f/∂W‖² bounds the gap there; what b still has to
    gain is estimated by its Newton decrement. L-BFGS runs in the coordinates in which the penalised Gram matrix,
    weighted by the curvature p(1 - p) of the present point, is the identity; that point is renewed round by round,
    since on separable data the curvature falls by orders of magnitude. Where rounding ends the search before the
    bound is reached (columns of very unequal size, a huge C) the Newton decrement in these coordinates decides. With
    fewer rows than columns the problem is first turned into the span of the rows, where the optimum lies.
    """
    n, d = problem.X.shape
    k = problem.Y.shape[1]
    reduced, basis = _into_row_space(problem) if n < d else (problem, None)
    search = _Search(reduced, tol, np.zeros((k, reduced.X.shape[1] + 1)))
    steps = 0
    gap, stalled = search.gap(), False
    while gap > tol and steps < max_iter and not stalled:
        before, taken = search.value, search.run(min(STEPS_PER_ROUND, max_iter - steps))
        steps += taken
        stalled = taken == 0 or not search.value < before
        gap = search.newton_gap() if stalled else search.gap()
    W = search.theta[:, :-1]
    return Solution(
        W=W if basis is None else W @ basis.T,
        b=search.theta[:, -1].copy(),
        value=search.value,
        gap=gap,
        steps=max(1, steps),
        converged=gap <= tol,
    )


def _into_row_space(problem: Problem) -> tuple[Problem, Array]:
    """The same problem in n coordinates instead of d, and the orthonormal basis (d, n) that leads back."""
    basis, triangle = np.linalg.qr(problem.X.T)
    return Problem(
        np.ascontiguousarray(triangle.T), problem.Y, problem.weights, problem.link, problem.fit_intercept
    ), basis


@dataclass(eq=False)
class _Search:
    """The present point, theta = [W, b] of shape (k, d + 1), with value and gradient there."""

    problem: Problem
    tol: float
    theta: Array
    value: float = field(init=False)
    gradient: Array = field(init=False)

    def __post_init__(self) -> None:
        self.value, self.gradient = self.evaluate(self.theta)

    def evaluate(self, theta: Array) -> tuple[float, Array]:
        value, in_W, in_b = self.problem.value_and_gradient(theta[:, :-1], theta[:, -1])
        return value, np.column_stack([in_W, in_b])

    def gap(self) -> float:
        """Bound on the relative gap at the present point."""
        if self.value <= 0:
            return 0.0
        in_W = 0.5 * float((self.gradient[:, :-1] ** 2).sum())
        if in_W > self.tol * self.value or not self.problem.fit_intercept:
            return in_W / self.value
        return (in_W + self._intercept_decrement()) / self.value

    def newton_gap(self) -> float:
        """Estimate of the relative gap from the curvature, for a gradient that is down to rounding errors."""
        decrement = 0.5 * float((_Metric.at(self.problem, self.theta).of_gradient(self.gradient) ** 2).sum())
        return min(self.gap(), decrement / self.value)

    def _intercept_decrement(self) -> float:
        slope = self.gradient[:, -1]
        p = self.problem.probabilities(self.problem.X @ self.theta[:, :-1].T + self.theta[:, -1])
        weighted = p * self.problem.weights[:, None]
        curvature = np.diag(weighted.sum(axis=0)) - p.T @ weighted
        return 0.5 * abs(float(slope @ np.linalg.lstsq(curvature, slope, rcond=1e-12)[0]))

    def run(self, max_steps: int) -> int:
        """L-BFGS in the coordinates of the present point's curvature; how many steps it took."""
        metric = _Metric.at(self.problem, self.theta)
        origin, shape = self.theta, self.theta.shape
        latest: dict[bytes, tuple[float, Array, Array]] = {}

        def objective(flat: Array) -> tuple[float, Array]:
            theta = origin + metric.to_theta(flat.reshape(shape))
            value, gradient = self.evaluate(theta)
            latest.clear()
            latest[flat.tobytes()] = value, gradient, theta
            return value, metric.of_gradient(gradient).ravel()

        def after_step(flat: Array) -> None:
            if flat.tobytes() not in latest:
                objective(flat)
            self.value, self.gradient, self.theta = latest[flat.tobytes()]
            if self.gap() <= self.tol:
                raise StopIteration

        result = minimize(
            objective,
            np.zeros(self.theta.size),
            jac=True,
            method="L-BFGS-B",
            callback=after_step,
            options={"maxiter": max_steps, "maxcor": HISTORY, "ftol": 0.0, "gtol": 0.0, "maxls": 40},
        )
        return int(result.nit)


@dataclass(frozen=True, eq=False)
class _Metric:
    """Coordinates in which the curvature H of one point is nearly the identity: H = S L Lᵀ S, S diagonal."""

    lower: Array
    scale: Array

    @classmethod
    def at(cls, problem: Problem, theta: Array) -> _Metric:
        n, d = problem.X.shape
        rows: slice | Array = slice(None)
        if n > CURVATURE_ROWS:
            rows = np.linspace(0, n - 1, CURVATURE_ROWS).astype(np.intp)
        X, weights = problem.X[rows], problem.weights[rows]
        p = problem.probabilities(X @ theta[:, :-1].T + theta[:, -1])
        root = np.sqrt(weights * (p * (1 - p)).mean(axis=1) * (problem.weights.sum() / weights.sum()))
        ones = root if problem.fit_intercept else np.zeros_like(root)
        scaled = np.column_stack([X * root[:, None], ones])
        hessian = scaled.T @ scaled
        hessian[np.arange(d), np.arange(d)] += 1.0
        # Where no row has curvature left the intercept has none either, and any positive number will do.
        hessian[d, d] += 1e-12 if hessian[d, d] > 0 else 1.0
        scale = np.sqrt(hessian.diagonal())
        hessian /= scale
        hessian /= scale[:, None]
        for ridge in (1e-12, 1e-8, 1e-4):
            hessian[np.arange(d + 1), np.arange(d + 1)] += ridge
            try:
                return cls(cholesky(hessian, lower=True, check_finite=False), scale)
            except LinAlgError:
                continue
        return cls(np.eye(d + 1), scale)

    def to_theta(self, coordinates: Array) -> Array:
        return solve_triangular(self.lower, coordinates.T, lower=True, trans="T", check_finite=False).T / self.scale

    def of_gradient(self, gradient: Array) -> Array:
        return solve_triangular(self.lower, (gradient / self.scale).T, lower=True, check_finite=False).T
