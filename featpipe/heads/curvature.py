"""Coordinates in which logistic regression is nearly round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cholesky
from scipy.linalg.blas import strsv
from scipy.linalg.lapack import dpotrs, spotrf, spotrs

from featpipe.heads.objective import Problem

__all__ = ["Blocks", "Curvature", "Diagonal", "Metric"]

Array = NDArray[np.float64]

SAMPLED_ROWS = 12_000
ROWS_AT_A_TIME = 1500
# What reading the rows costs, in classes, and what a call does that has next to no rows, in multiplications.
NARROW, SMALL = 9, 5e6
# A block's Gram matrix from 2 (d + 1) rows and a little of everybody's: 4 (d + 1) rows alone save two steps of twelve.
ROWS_OF_A_BLOCK = 2.0
SHRINKAGE = 0.05
# And so many times the penalty: so few rows show too little curvature in the directions that have least of it.
RIDGE_OF_A_BLOCK = 3.0
CANDIDATES = 4e7
NUMBERS_FROM_A_FILE = 3e7
NUMBERS_IN_ALL_BLOCKS = 2e8


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The diagonal of the curvature where nothing is known yet: every class is as likely as the others.

    Attributes
    ----------
    inverse : ndarray of shape (d + 1,)
    """

    inverse: Array

    @classmethod
    def at(cls, problem: Problem) -> Diagonal:
        share = 0.5 if problem.link == "sigmoid" else 1 / problem.k
        weight = share * (1 - share) * float(problem.weights.mean())

        def one(block: slice) -> Array:
            x = problem.rows(block, np.float32)
            return np.einsum("ij,ij->j", x, x, dtype=np.float64)

        squares = sum(problem.workers.map(one, problem.blocks()), np.zeros(problem.d))
        return cls(1 / np.append(problem.ridge + weight * squares, max(weight * problem.n, 1e-12)))

    def solve(self, several: Array) -> Array:
        """M⁻¹ of the rows, shape (c, k, d + 1)."""
        return several * self.inverse


@dataclass(frozen=True, eq=False)
class Metric:
    """One matrix M = S L Lᵀ S of shape (d + 1, d + 1), S diagonal, like the curvature of every row of theta."""

    lower: NDArray[Any]
    scale: Array

    def solve(self, several: Array) -> Array:
        """M⁻¹ of the rows, shape (c, k, d + 1)."""
        scaled = (several / self.scale).astype(self.lower.dtype).reshape(-1, len(self.scale))
        solver = spotrs if self.lower.dtype == np.float32 else dpotrs
        found: NDArray[Any] = solver(self.lower, scaled.T, lower=1, overwrite_b=1)[0]
        return found.T.reshape(several.shape) / self.scale


@dataclass(frozen=True, eq=False)
class Curvature:
    """Gram matrix of the rows, each weighted by its mean curvature p(1 - p) at one theta, without the penalty.

    Attributes
    ----------
    gram : ndarray of shape (d + 1, d + 1)
        The last row and column are the intercept's.
    """

    gram: Array

    @staticmethod
    def evaluations(problem: Problem) -> float:
        """What making it costs, in evaluations of the objective."""
        sampled, n, d, k = min(problem.n, SAMPLED_ROWS), problem.n, float(problem.d), problem.k
        rows = k + NARROW
        own = sampled * d * d / 2 + d**3 / 3 + sampled * d * rows + 3 * SMALL
        return own / (2 * n * d * rows + SMALL)

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
            root = np.sqrt((weights * _curvatures(problem, p, chosen)).mean(axis=1)).astype(dtype)
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

    def metric(self, ridge: float, dtype: Any = np.float64) -> Metric:
        """With a penalty."""
        hessian = self.gram.copy()
        inner = np.arange(len(hessian) - 1)
        hessian[inner, inner] += ridge
        # Where no row has curvature left the intercept has none either, and any positive number will do.
        hessian[-1, -1] += 1e-12 if hessian[-1, -1] > 0 else 1.0
        scale = np.sqrt(hessian.diagonal())
        hessian /= scale
        hessian /= scale[:, None]
        every = np.arange(len(hessian))
        rounding = np.finfo(dtype).eps
        for more in (10 * rounding, 1e-6, 1e-4):
            hessian[every, every] += more
            try:
                return Metric(cholesky(hessian.astype(dtype), lower=True, check_finite=False), scale)
            except LinAlgError:
                continue
        return Metric(np.eye(len(hessian)), scale)


def _curvatures(problem: Problem, p: NDArray[Any], rows: slice | NDArray[np.intp]) -> NDArray[Any]:
    """p(1 - p), or the residual |p - y| where that is more.

    Both have the same size where the model is right about its doubts. A row on the wrong side for certain has no
    curvature and a large gradient: without its residual the first steps on separable data go a hundred times too far.
    """
    curvatures = p * (1 - p)
    if problem.link == "sigmoid":
        return np.maximum(curvatures, np.abs(p - problem.Y[rows]))
    right = p[np.arange(len(p)), problem.Y[rows]]
    means = np.maximum(curvatures.mean(axis=1), (1 - right) / p.shape[1])
    return means[:, None]


@dataclass(frozen=True, eq=False)
class Blocks:
    """A curvature for each row of theta, as Cholesky factors of shape (k, d + 1, d + 1).

    Notes
    -----
    The diagonal blocks of the Hessian at one theta. Near the minimum they take a quarter of the steps that the mean
    curvature takes; far from it they bring nothing. A class differs from the others by few rows: a sample of 2 (d + 1)
    for each class, drawn by their curvature p(1 - p), does as well as all. The softmax does not change when all
    classes move alike, which the blocks do not know: such moves are taken out.
    """

    factors: list[NDArray[np.float32]]
    softmax: bool

    @staticmethod
    def evaluations(problem: Problem) -> float:
        """What making them costs, in evaluations of the objective; infinite where they would not fit in memory."""
        width = problem.d + 1
        if problem.k * float(width) ** 2 > NUMBERS_IN_ALL_BLOCKS:
            return np.inf
        return (min(ROWS_OF_A_BLOCK * width, problem.n) * width + width**2) / (4 * problem.n) + 0.5

    @classmethod
    def at(cls, problem: Problem, theta: Array, mean: Curvature) -> Blocks:
        n, k, width = problem.n, problem.k, problem.d + 1
        # Rows of a file are drawn from a sample that is read once.
        in_memory = type(problem.X) is np.ndarray
        most = max(CANDIDATES / k, 4 * width) if in_memory else NUMBERS_FROM_A_FILE / width
        candidates = np.linspace(0, n - 1, int(min(n, most))).astype(np.intp)
        whole = len(candidates) == n
        sampled = None if in_memory else problem.rows(slice(None) if whole else candidates, np.float32)
        curvatures = np.empty((k, len(candidates)), np.float32)

        def fill(start: int) -> None:
            rows = candidates[start : start + ROWS_AT_A_TIME]
            if sampled is None:
                x = problem.rows(slice(rows[0], rows[-1] + 1) if whole else rows, np.float32)
            else:
                x = sampled[start : start + len(rows)]
            p = problem.probabilities(theta, x)
            weights = problem.weights[rows].reshape(len(rows), -1)
            curvatures[:, start : start + len(rows)] = (p * (1 - p) * weights).T

        for _ in problem.workers.map(fill, range(0, len(candidates), ROWS_AT_A_TIME)):
            pass
        totals = curvatures.sum(axis=1, dtype=np.float64)
        # The draws are fixed: a fit is repeatable, and the metric decides how fast the minimum is found, not which.
        spread = (np.arange(len(candidates)) * 0.6180339887498949) % 1
        first = np.random.default_rng(0).random(k)
        everybody = (mean.gram * (SHRINKAGE / max(totals.mean(), 1e-300))).astype(np.float32)
        ridge = np.full(width, RIDGE_OF_A_BLOCK * problem.ridge, np.float32)
        ridge[-1] = 1e-6

        def one(c: int) -> NDArray[np.float32]:
            odds = curvatures[c] * np.float32(ROWS_OF_A_BLOCK * width / max(totals[c], 1e-30))
            taken = np.flatnonzero(odds > (spread + first[c]) % 1)
            kept = np.minimum(odds[taken], 1)
            x = np.empty((len(taken), width), np.float32)
            x[:, :-1] = problem.rows(candidates[taken], np.float32) if sampled is None else sampled[taken]
            x[:, -1] = 1 if problem.fit_intercept else 0
            x *= np.sqrt(curvatures[c, taken] / kept * np.float32(n / len(candidates)))[:, None]
            gram = x.T @ x
            gram *= 1 - SHRINKAGE
            gram += everybody * np.float32(totals[c] * n / len(candidates))
            return _factor(gram, ridge)

        return cls(list(problem.workers.map(one, range(k))), problem.link == "softmax")

    def solve(self, several: Array) -> Array:
        """The quasi-Newton step for the rows, shape (c, k, d + 1)."""
        if self.softmax:
            several = several - several.mean(axis=1, keepdims=True)
        found = np.empty_like(several)
        for c, factor in enumerate(self.factors):
            for right, answer in zip(several[:, c], found[:, c], strict=True):
                # Three times as fast as LAPACK's solver for many right sides, and holds the interpreter: no threads.
                half = strsv(factor, right.astype(np.float32), lower=1)
                answer[:] = strsv(factor, half, lower=1, trans=1)
        return found - found.mean(axis=1, keepdims=True) if self.softmax else found

    def only(self, groups: NDArray[np.intp]) -> Blocks:
        """Of some of the groups."""
        return replace(self, factors=[self.factors[group] for group in groups])


def _factor(hessian: NDArray[np.float32], ridge: NDArray[np.float32]) -> NDArray[np.float32]:
    every = np.arange(len(ridge))
    hessian[every, every] += ridge
    level = np.float32(hessian[every, every].max())
    for more in (0.0, 1e-6, 1e-4, 1e-2):
        hessian[every, every] += level * np.float32(more)
        # The transpose, being in LAPACK's order, needs no copy; the last attempt may spoil it.
        factor, failed = spotrf(hessian.T, lower=1, clean=0)
        if not failed:
            found: NDArray[np.float32] = factor
            return found
    return np.sqrt(level) * np.eye(len(ridge), dtype=np.float32)
