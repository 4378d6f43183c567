"""Coordinates in which logistic regression is nearly round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky

from featpipe.heads.objective import Problem

__all__ = ["Curvature", "Metric"]

Array = NDArray[np.float64]

SAMPLED_ROWS = 12_000
ROWS_AT_A_TIME = 1500


@dataclass(frozen=True, eq=False)
class Metric:
    """One matrix M = S L Lᵀ S of shape (d + 1, d + 1), S diagonal, like the curvature of every row of theta."""

    lower: Array
    scale: Array

    def solve(self, rows: Array) -> Array:
        """M⁻¹ of each row, shape (k, d + 1)."""
        return cho_solve((self.lower, True), (rows / self.scale).T, check_finite=False).T / self.scale


@dataclass(frozen=True, eq=False)
class Curvature:
    """Gram matrix of the rows, each weighted by its mean curvature p(1 - p) at one theta, without the penalty.

    Attributes
    ----------
    gram : ndarray of shape (d + 1, d + 1)
        The last row and column are the intercept's.
    """

    gram: Array

    @classmethod
    def at(cls, problem: Problem, theta: Array, dtype: Any = np.float64) -> Curvature:
        """From evenly spaced rows, 12,000 at most."""
        n, d = problem.n, problem.d
        rows = np.linspace(0, n - 1, min(n, SAMPLED_ROWS)).astype(np.intp)

        def one(block: slice) -> NDArray[Any]:
            chosen = slice(rows[block][0], rows[block][-1] + 1) if len(rows) == n else rows[block]
            x = problem.rows(chosen, dtype)
            p = problem.probabilities(theta, x)
            weights = problem.weights[chosen].reshape(len(x), -1)
            root = np.sqrt((weights * p * (1 - p)).mean(axis=1)).astype(dtype)
            scaled = np.empty((len(x), d + 1), dtype)
            np.multiply(x, root[:, None], out=scaled[:, :-1])
            scaled[:, -1] = root if problem.fit_intercept else 0
            return scaled.T @ scaled

        starts = range(0, len(rows), ROWS_AT_A_TIME)
        gram = np.zeros((d + 1, d + 1))
        for part in problem.workers.map(one, [slice(start, start + ROWS_AT_A_TIME) for start in starts]):
            gram += part
        gram *= problem.weights.sum() / problem.weights[rows].sum()
        return cls(gram)

    def metric(self, ridge: float, times: float = 1.0) -> Metric:
        """With a penalty, and the weights of all rows multiplied."""
        hessian = self.gram * times
        inner = np.arange(len(hessian) - 1)
        hessian[inner, inner] += ridge
        # Where no row has curvature left the intercept has none either, and any positive number will do.
        hessian[-1, -1] += 1e-12 if hessian[-1, -1] > 0 else 1.0
        scale = np.sqrt(hessian.diagonal())
        hessian /= scale
        hessian /= scale[:, None]
        every = np.arange(len(hessian))
        for more in (1e-12, 1e-8, 1e-4):
            hessian[every, every] += more
            try:
                return Metric(cholesky(hessian, lower=True, check_finite=False), scale)
            except LinAlgError:
                continue
        return Metric(np.eye(len(hessian)), scale)
