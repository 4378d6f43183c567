"""Logistic regression with an L1 share in its penalty, solved to a duality gap."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import xlogy

from featpipe.heads.objective import Problem
from featpipe.heads.solver import Solution, dtype_of

__all__ = ["minimise_sparse"]

Array = NDArray[np.float64]

STEPS_BETWEEN_BOUNDS = 10
HISTORY = 30
RESTARTS = 20
FLOAT32_DOWN_TO = 1e-3


def minimise_sparse(problem: Problem, l1: float, *, tol: float, max_iter: int) -> Solution:
    """Minimise f(W, b) + l1 Σ|W| until the relative gap of every group is at most ``tol``, or for ``max_iter`` steps.

    Notes
    -----
    W is the difference of two arrays that are not negative, so that the objective is smooth and L-BFGS-B takes the
    steps, in columns scaled to equal length. Fenchel duality bounds the gap: the residuals at a point, shrunk until no
    column has a slope beyond l1, are a point of the dual. What b has to gain is estimated by its Newton decrement.
    Large problems take their first steps in float32; bounds are in float64 always.
    """
    search = _Search(problem.ready_in(np.float64), l1, tol)
    start = search.flat(problem.start())
    bounds = [(0.0, None)] * (2 * problem.k * problem.d) + [(None, None)] * problem.k
    options = {"maxiter": max_iter, "maxfun": 10 * max_iter, "maxcor": HISTORY, "ftol": 0.0, "gtol": 0.0, "maxls": 40}
    steps = 0
    # A search that rounding has ended often goes on from a clean start.
    for _ in range(RESTARTS):
        options["maxiter"] = max_iter - steps
        found = minimize(
            search.value, start, jac=True, method="L-BFGS-B", bounds=bounds, callback=search.after, options=options
        )
        start, steps = found.x, steps + int(found.nit)
        search.dtype = np.float64
        gaps = search.bound(start)
        if (gaps <= tol).all() or steps >= max_iter:
            break
    else:
        gaps = np.minimum(gaps, search.bound(start, shrink=False))
    theta = search.theta(start)
    return Solution(
        W=theta[:, :-1],
        b=theta[:, -1].copy(),
        value=float(found.fun),
        gap=float(gaps.max()),
        steps=max(1, steps),
        converged=bool((gaps <= tol).all()),
    )


@dataclass(eq=False)
class _Search:
    problem: Problem
    l1: float
    tol: float
    scale: Array = field(init=False)
    steps: int = field(init=False, default=0)
    dtype: type[np.floating[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = dtype_of(self.problem)
        squares = sum((x * x).sum(axis=0) for x in map(self._rows, self.problem.blocks()))
        lengths = np.sqrt(squares / self.problem.n)
        # As long as the intercept's column; one without a length has no slope either.
        self.scale = 1 / np.where(lengths > 0, lengths, 1.0)

    def _rows(self, block: slice) -> Array:
        return self.problem.rows(block, np.float64)

    def flat(self, theta: Array) -> Array:
        W = theta[:, :-1] / self.scale
        return np.concatenate([np.maximum(W, 0).ravel(), np.maximum(-W, 0).ravel(), theta[:, -1]])

    def theta(self, flat: Array) -> Array:
        k, d = self.problem.k, self.problem.d
        more, less = flat[: 2 * k * d].reshape(2, k, d)
        return np.column_stack([(more - less) * self.scale, flat[2 * k * d :]])

    def value(self, flat: Array) -> tuple[float, Array]:
        k, d = self.problem.k, self.problem.d
        point = self.problem.at(self.theta(flat), self.dtype)
        both = flat[: 2 * k * d].reshape(2, k, d).sum(axis=0) * self.scale
        slopes = point.gradient[:, :-1]
        gradient = [((self.l1 + slopes) * self.scale).ravel(), ((self.l1 - slopes) * self.scale).ravel()]
        return float(point.values.sum() + self.l1 * both.sum()), np.concatenate([*gradient, point.gradient[:, -1]])

    def after(self, flat: Array) -> None:
        self.steps += 1
        if self.steps % STEPS_BETWEEN_BOUNDS:
            return
        gaps = self.bound(flat)
        if (gaps <= self.tol).all():
            raise StopIteration
        if (gaps <= FLOAT32_DOWN_TO).all():
            self.dtype = np.float64

    def bound(self, flat: Array, shrink: bool = True) -> Array:
        """Of each group's relative gap; without shrinking an estimate, for slopes that are beyond l1 by rounding."""
        problem, theta = self.problem, self.theta(flat)
        W, point, groups = theta[:, :-1], problem.at(theta), problem.groups
        primal = point.values + self.l1 * np.abs(W).reshape(groups, -1).sum(axis=1)
        slopes = np.abs(point.gradient[:, :-1] - problem.ridge * W).reshape(groups, -1)
        excess = np.maximum(slopes - self.l1, 0)
        # The dual asks for residuals that add up to zero; to first order theirs costs what b is worth to it.
        of_b = (theta[:, -1] * point.gradient[:, -1]).reshape(groups, -1).sum(axis=1)
        whole = primal - self._entropies(theta, np.ones(groups)) - of_b
        if not shrink:
            gaps = whole + (excess * np.abs(W).reshape(groups, -1)).sum(axis=1)
        else:
            shares = np.minimum(1, self.l1 / np.maximum(slopes.max(axis=1), 1e-300))
            gaps = primal - self._entropies(theta, shares) - shares * of_b
            if problem.ridge > 0:
                gaps = np.minimum(gaps, whole + (excess**2).sum(axis=1) / (2 * problem.ridge))
        if problem.fit_intercept:
            gaps += problem.intercept_decrements(point, np.float64)
        return np.maximum(gaps, 0) / np.maximum(primal, 1e-300)

    def _entropies(self, theta: Array, shares: Array) -> Array:
        """Σ w_i H(q_i) of each group, q between what is true and what the model says."""
        problem = self.problem

        def one(block: slice) -> Array:
            p: NDArray[Any] = problem.probabilities(theta, problem.rows(block, np.float64))
            Y, weights = problem.Y[block], problem.weights[block]
            if problem.link == "sigmoid":
                q = shares * p + (1 - shares) * Y
                entropies: Array = -(weights * (xlogy(q, q) + xlogy(1 - q, 1 - q))).sum(axis=0)
                return entropies
            q = shares[0] * p
            q[np.arange(len(Y)), Y] += 1 - shares[0]
            return np.array([-(weights @ xlogy(q, q).sum(axis=1))])

        return sum(problem.workers.map(one, problem.blocks()), np.zeros(problem.groups))
