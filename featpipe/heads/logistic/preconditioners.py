"""Preconditioners of logistic regression: approximations of its Hessian that are cheap to invert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cholesky
from scipy.linalg.blas import strsv
from scipy.linalg.lapack import dpotrs, spotrf, spotrs

from featpipe.heads.logistic.objective import LogisticProblem

Array = NDArray[np.float64]

MAX_SAMPLED_ROWS = 12_000
ROWS_PER_CHUNK = 1500
# Cost model: reading a row costs as much as this many classes, and a call as much as this many multiplications.
READ_COST_IN_CLASSES, CALL_COST_IN_PRODUCTS = 9, 5e6
# The Gram matrix of a class uses 2 (d + 1) rows, shrunk towards that of all classes. Without shrinkage, 4 (d + 1) rows
# save two steps of twelve.
BLOCK_ROWS_PER_COLUMN = 2.0
BLOCK_SHRINKAGE = 0.05
# Factor on the penalty: so few rows underestimate the smallest eigenvalues.
BLOCK_RIDGE_FACTOR = 3.0
MAX_CANDIDATE_VALUES = 4e7
MAX_VALUES_FROM_FILE = 3e7
MAX_VALUES_IN_BLOCKS = 2e8


@dataclass(frozen=True, eq=False)
class DiagonalPreconditioner:
    """The diagonal of the Hessian where all classes have the same probability.

    Attributes
    ----------
    inverse : ndarray of shape (d + 1,)
    """

    inverse: Array

    @classmethod
    def from_problem(cls, problem: LogisticProblem) -> DiagonalPreconditioner:
        mean_probability = 0.5 if problem.link == "sigmoid" else 1 / problem.k
        weight = mean_probability * (1 - mean_probability) * float(problem.weights.mean())

        def sum_of_squares(block: slice) -> Array:
            x = problem.read_rows(block, np.float32)
            return np.einsum("ij,ij->j", x, x, dtype=np.float64)

        squares = sum(problem.workers.map(sum_of_squares, problem.row_blocks()), np.zeros(problem.d))
        return cls(1 / np.append(problem.ridge + weight * squares, max(weight * problem.n, 1e-12)))

    def solve(self, vectors: Array) -> Array:
        """M⁻¹ of the rows, shape (c, k, d + 1)."""
        return vectors * self.inverse


@dataclass(frozen=True, eq=False)
class GramPreconditioner:
    """One matrix M = S L Lᵀ S of shape (d + 1, d + 1), S diagonal, for every row of theta."""

    lower: NDArray[Any]
    scale: Array

    def solve(self, vectors: Array) -> Array:
        """M⁻¹ of the rows, shape (c, k, d + 1)."""
        scaled = (vectors / self.scale).astype(self.lower.dtype).reshape(-1, len(self.scale))
        solver = spotrs if self.lower.dtype == np.float32 else dpotrs
        solution: NDArray[Any] = solver(self.lower, scaled.T, lower=1, overwrite_b=1)[0]
        return solution.T.reshape(vectors.shape) / self.scale


@dataclass(frozen=True, eq=False)
class WeightedGram:
    """Gram matrix of the rows, weighted by the mean of p(1 - p) over classes at one theta, without the penalty.

    Attributes
    ----------
    gram : ndarray of shape (d + 1, d + 1)
        The last row and column belong to the intercept.
    """

    gram: Array

    @staticmethod
    def cost_in_evaluations(problem: LogisticProblem) -> float:
        """The cost of construction, in evaluations of the objective."""
        sampled, n, d, k = min(problem.n, MAX_SAMPLED_ROWS), problem.n, float(problem.d), problem.k
        pass_cost = k + READ_COST_IN_CLASSES
        cost = sampled * d * d / 2 + d**3 / 3 + sampled * d * pass_cost + 3 * CALL_COST_IN_PRODUCTS
        return cost / (2 * n * d * pass_cost + CALL_COST_IN_PRODUCTS)

    @classmethod
    def from_problem(cls, problem: LogisticProblem, theta: Array, dtype: Any = np.float64) -> WeightedGram:
        """Compute it from evenly spaced rows, at most 12,000."""
        n, d = problem.n, problem.d
        rows = np.linspace(0, n - 1, min(n, MAX_SAMPLED_ROWS)).astype(np.intp)

        def chunk_gram(chunk: slice) -> NDArray[Any]:
            selection = slice(rows[chunk][0], rows[chunk][-1] + 1) if len(rows) == n else rows[chunk]
            x = problem.read_rows(selection, dtype)
            p = problem.probabilities(theta, x)
            weights = problem.weights[selection].reshape(len(x), -1)
            root = np.sqrt((weights * _compute_curvatures(problem, p, selection)).mean(axis=1)).astype(dtype)
            scaled = np.empty((len(x), d + 1), dtype)
            np.multiply(x, root[:, None], out=scaled[:, :-1])
            scaled[:, -1] = root if problem.fit_intercept else 0
            return scaled.T @ scaled

        starts = range(0, len(rows), ROWS_PER_CHUNK)
        gram = np.zeros((d + 1, d + 1))
        for partial_gram in problem.workers.map(chunk_gram, [slice(start, start + ROWS_PER_CHUNK) for start in starts]):
            gram += partial_gram
        gram *= problem.weights.sum() / problem.weights[rows].sum()
        return cls(gram)

    def preconditioner(self, ridge: float, dtype: Any = np.float64) -> GramPreconditioner:
        """Add the penalty and factorise."""
        hessian = self.gram.copy()
        feature_indices = np.arange(len(hessian) - 1)
        hessian[feature_indices, feature_indices] += ridge
        # If no row has curvature, the intercept has none either, and any positive value will do.
        hessian[-1, -1] += 1e-12 if hessian[-1, -1] > 0 else 1.0
        scale = np.sqrt(hessian.diagonal())
        hessian /= scale
        hessian /= scale[:, None]
        diagonal = np.arange(len(hessian))
        eps = np.finfo(dtype).eps
        for jitter in (10 * eps, 1e-6, 1e-4):
            hessian[diagonal, diagonal] += jitter
            try:
                return GramPreconditioner(cholesky(hessian.astype(dtype), lower=True, check_finite=False), scale)
            except LinAlgError:
                continue
        return GramPreconditioner(np.eye(len(hessian)), scale)


def _compute_curvatures(problem: LogisticProblem, p: NDArray[Any], rows: slice | NDArray[np.intp]) -> NDArray[Any]:
    """p(1 - p), or the residual |p - y| where that is larger.

    For a calibrated model both have the same expectation. A row that is misclassified with certainty has no curvature
    and a large gradient: without its residual the first steps on separable data are a hundred times too long.
    """
    curvatures = p * (1 - p)
    if problem.link == "sigmoid":
        return np.maximum(curvatures, np.abs(p - problem.Y[rows]))
    true_class_probabilities = p[np.arange(len(p)), problem.Y[rows]]
    means = np.maximum(curvatures.mean(axis=1), (1 - true_class_probabilities) / p.shape[1])
    return means[:, None]


@dataclass(frozen=True, eq=False)
class BlockPreconditioner:
    """The diagonal blocks of the Hessian, one per row of theta, as Cholesky factors of shape (k, d + 1, d + 1).

    Notes
    -----
    Near the minimum they need a quarter of the steps of the mean curvature; far from it they do not help. Without them
    a fit of 13,000 × 512 rows takes 40 to 170 % more CPU time (``tests/benchmarks/softmax_tricks.py fit``). A sample of
    2 (d + 1) rows for each class, drawn by their curvature p(1 - p), does as well as all rows. The softmax is invariant
    to a common shift of all classes, which the blocks do not represent, so this component is projected out.
    """

    factors: list[NDArray[np.float32]]
    softmax: bool

    @staticmethod
    def cost_in_evaluations(problem: LogisticProblem) -> float:
        """The cost of construction, in evaluations of the objective; infinite if the blocks need too much memory."""
        width = problem.d + 1
        if problem.k * float(width) ** 2 > MAX_VALUES_IN_BLOCKS:
            return np.inf
        return (min(BLOCK_ROWS_PER_COLUMN * width, problem.n) * width + width**2) / (4 * problem.n) + 0.5

    @classmethod
    def from_problem(cls, problem: LogisticProblem, theta: Array, mean_gram: WeightedGram) -> BlockPreconditioner:
        n, k, width = problem.n, problem.k, problem.d + 1
        # From a file a sample of candidate rows is read once.
        in_memory = type(problem.X) is np.ndarray
        max_candidates = max(MAX_CANDIDATE_VALUES / k, 4 * width) if in_memory else MAX_VALUES_FROM_FILE / width
        candidates = np.linspace(0, n - 1, int(min(n, max_candidates))).astype(np.intp)
        uses_all_rows = len(candidates) == n
        candidate_rows = (
            None if in_memory else problem.read_rows(slice(None) if uses_all_rows else candidates, np.float32)
        )
        curvatures = np.empty((k, len(candidates)), np.float32)

        def fill_curvatures(start: int) -> None:
            rows = candidates[start : start + ROWS_PER_CHUNK]
            if candidate_rows is None:
                x = problem.read_rows(slice(rows[0], rows[-1] + 1) if uses_all_rows else rows, np.float32)
            else:
                x = candidate_rows[start : start + len(rows)]
            p = problem.probabilities(theta, x)
            weights = problem.weights[rows].reshape(len(rows), -1)
            curvatures[:, start : start + len(rows)] = (p * (1 - p) * weights).T

        for _ in problem.workers.map(fill_curvatures, range(0, len(candidates), ROWS_PER_CHUNK)):
            pass
        totals = curvatures.sum(axis=1, dtype=np.float64)
        # Fixed draws make fits repeatable; the preconditioner affects the speed, not the minimum.
        thresholds = (np.arange(len(candidates)) * 0.6180339887498949) % 1
        class_offsets = np.random.default_rng(0).random(k)
        shared_gram = (mean_gram.gram * (BLOCK_SHRINKAGE / max(totals.mean(), 1e-300))).astype(np.float32)
        ridge = np.full(width, BLOCK_RIDGE_FACTOR * problem.ridge, np.float32)
        ridge[-1] = 1e-6

        def factorize_class(c: int) -> NDArray[np.float32]:
            expected_counts = curvatures[c] * np.float32(BLOCK_ROWS_PER_COLUMN * width / max(totals[c], 1e-30))
            selected = np.flatnonzero(expected_counts > (thresholds + class_offsets[c]) % 1)
            inclusion_probabilities = np.minimum(expected_counts[selected], 1)
            x = np.empty((len(selected), width), np.float32)
            x[:, :-1] = (
                problem.read_rows(candidates[selected], np.float32)
                if candidate_rows is None
                else candidate_rows[selected]
            )
            x[:, -1] = 1 if problem.fit_intercept else 0
            x *= np.sqrt(curvatures[c, selected] / inclusion_probabilities * np.float32(n / len(candidates)))[:, None]
            gram = x.T @ x
            gram *= 1 - BLOCK_SHRINKAGE
            gram += shared_gram * np.float32(totals[c] * n / len(candidates))
            return _factorize_cholesky(gram, ridge)

        return cls(list(problem.workers.map(factorize_class, range(k))), problem.link == "softmax")

    def solve(self, vectors: Array) -> Array:
        """M⁻¹ of the rows, shape (c, k, d + 1)."""
        if self.softmax:
            vectors = vectors - vectors.mean(axis=1, keepdims=True)
        solution = np.empty_like(vectors)
        for c, factor in enumerate(self.factors):
            for right_side, out in zip(vectors[:, c], solution[:, c], strict=True):
                # Three times as fast as LAPACK's solver for several right-hand sides; it holds the GIL, so no threads.
                intermediate = strsv(factor, right_side.astype(np.float32), lower=1)
                out[:] = strsv(factor, intermediate, lower=1, trans=1)
        return solution - solution.mean(axis=1, keepdims=True) if self.softmax else solution

    def select_groups(self, groups: NDArray[np.intp]) -> BlockPreconditioner:
        """Restrict to some groups."""
        return replace(self, factors=[self.factors[group] for group in groups])


def _factorize_cholesky(hessian: NDArray[np.float32], ridge: NDArray[np.float32]) -> NDArray[np.float32]:
    diagonal = np.arange(len(ridge))
    hessian[diagonal, diagonal] += ridge
    max_diagonal = np.float32(hessian[diagonal, diagonal].max())
    for jitter in (0.0, 1e-6, 1e-4, 1e-2):
        hessian[diagonal, diagonal] += max_diagonal * np.float32(jitter)
        # The transpose is in LAPACK's order and needs no copy; a failed attempt overwrites it.
        factor, failed = spotrf(hessian.T, lower=1, clean=0)
        if not failed:
            result: NDArray[np.float32] = factor
            return result
    return np.sqrt(max_diagonal) * np.eye(len(ridge), dtype=np.float32)
