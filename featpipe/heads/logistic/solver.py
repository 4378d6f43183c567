"""Preconditioned L-BFGS for the L2-penalised log loss, to a bounded optimality gap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dtrtrs

from featpipe.heads.logistic.lbfgs import LBFGSHistory, group_dot
from featpipe.heads.logistic.objective import LogisticProblem, Point
from featpipe.heads.logistic.preconditioners import (
    BlockPreconditioner,
    DiagonalPreconditioner,
    GramPreconditioner,
    WeightedGram,
)

Array = NDArray[np.float64]

MIN_PRODUCTS_FOR_FLOAT32 = 1e6
MAX_ROW_SPACE_ROWS_PER_CLASS = 80
# A Gram preconditioner that costs more evaluations than this is not built at the start.
MAX_INITIAL_PRECONDITIONER_COST = 6.0
MAX_STALLED_STEPS = 12
MAX_LINE_SEARCH_TRIALS = 30
# Block preconditioners are built once steps decrease the objective by relative amounts in this range, and rebuilt while
# the predicted decrease is above the minimum.
MAX_DECREASE_FOR_BLOCKS = 0.1
DECREASE_RANGE_FOR_BLOCKS = (0.002, 0.08)
MIN_DECREASE_FOR_BLOCK_UPDATE = 1e-5
MAX_BLOCK_COST = 30.0
ROUNDING_TOLERANCES: dict[type[np.floating[Any]], float] = {np.float32: 1e-6, np.float64: 1e-13}
# A Gram preconditioner is built when the steps so far have cost this multiple of its cost.
PRECONDITIONER_PATIENCE = 1.5
# A search of many rows starts from a rough minimum on a sample of them, if the sample is a small enough fraction, every
# class has enough rows in it, and the loss there is low enough relative to zero weights.
MIN_PRODUCTS_FOR_WARM_START = 1e8
WARM_START_ROWS_PER_FEATURE, MIN_WARM_START_ROWS_PER_CLASS = 6, 8
MAX_WARM_START_FRACTION, MAX_WARM_START_LOSS_RATIO = 0.25, 0.5
WARM_START_TOL, WARM_START_MAX_ITER = 0.1, 30
# In float64 the choice of preconditioner does not depend on n, so that a row of weight two is exactly two rows.
MIN_PRECONDITIONER_COST_IN_FLOAT64 = 3.0


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of `minimize`.

    Attributes
    ----------
    W : ndarray of shape (k, d)
    b : ndarray of shape (k,)
    value : float
        f(W, b), summed over groups.
    gap : float
        Bound on (f(W, b) - min f) / f(W, b), the maximum over groups; an estimate if rounding ended the search.
    steps : int
    converged : bool
    point : Point, optional
        The last point of an estimated search, from which another can start without a pass.
    """

    W: Array
    b: Array
    value: float
    gap: float
    steps: int
    converged: bool
    point: Point | None = None


def minimize(
    problem: LogisticProblem,
    *,
    tol: float,
    max_iter: int,
    start: Point | None = None,
    history: LBFGSHistory | None = None,
    estimate: bool = False,
) -> Solution:
    """Minimise until the relative gap of every group is at most ``tol``, or for ``max_iter`` steps.

    Parameters
    ----------
    problem : LogisticProblem
    tol : float
    max_iter : int
    start : Point, optional
    history : LBFGSHistory, optional
        History of a search on the same rows with another penalty, after `LBFGSHistory.update_penalty`.
    estimate : bool
        End when two consecutive steps predict and achieve little, instead of on the bound.

    Notes
    -----
    f is strongly convex in W once b is minimised out, so ‖∂f/∂W‖² / (2 ridge) bounds the gap in W; the gap in b is
    estimated by its Newton decrement. L-BFGS is preconditioned by the penalised Gram matrix, weighted by the curvature
    p(1 - p) at a recent point; if that matrix costs more than a few passes, by its diagonal at first; near the minimum
    of large problems by a matrix for each class. Groups step independently and share the passes over X.

    Large problems are searched in float32; a pass in float64 verifies the gap, and the search continues in float64 if
    necessary. If rounding ends it before the bound is reached (badly scaled columns, a huge C), the Newton decrement
    estimates the gap. If there are fewer rows than columns, small problems are projected to the row space, which
    contains the optimum. With many rows the search starts from a rough minimum on a sample.
    """
    if start is None and _is_row_space_cheaper(problem):
        return _minimize_in_row_space(problem, tol, max_iter)
    problem = problem.materialize(select_search_dtype(problem))
    if start is None and not estimate:
        start = _find_warm_start(problem)
    search = _LBFGSSearch(problem, tol, LBFGSHistory() if history is None else history, estimate, start)
    steps = search.run(max_iter)
    gaps = search.gaps
    return Solution(
        W=search.theta[:, :-1],
        b=search.theta[:, -1].copy(),
        value=float(search.values.sum()),
        gap=float(gaps.max()),
        steps=max(1, steps),
        converged=bool((gaps <= tol).all()),
        point=search.point if estimate else None,
    )


def project_to_row_space(problem: LogisticProblem) -> tuple[LogisticProblem, Array]:
    """The same problem in n coordinates instead of d, and the orthonormal basis (d, n) of the row space."""
    basis, upper = np.linalg.qr(problem.read_rows(slice(None), np.float64).T)
    return replace(problem, X=np.ascontiguousarray(upper.T), center=None, scale=None, materialized={}), basis


def _find_warm_start(problem: LogisticProblem) -> Point | None:
    """A rough minimum on a sample of the rows, if the sample is worth its cost.

    From zero weights the first steps on nearly separable rows overshoot. Without this start a fit of 50,000 × 512 such
    rows takes 16 to 26 % more CPU time (``tests/benchmarks/softmax_tricks.py fit``).
    """
    sample_size, products = WARM_START_ROWS_PER_FEATURE * problem.d, float(problem.n) * problem.d * problem.k
    if type(problem.X) is not np.ndarray or problem.link != "softmax" or products < MIN_PRODUCTS_FOR_WARM_START:
        return None
    if sample_size > MAX_WARM_START_FRACTION * problem.n:
        return None
    rows = np.linspace(0, problem.n - 1, sample_size).astype(np.intp)
    Y, weights = problem.Y[rows], problem.weights[rows]
    if np.bincount(Y, minlength=problem.k).min() < MIN_WARM_START_ROWS_PER_CLASS:
        return None
    X = problem.read_rows(rows, select_search_dtype(problem))
    sample = replace(problem, X=X, Y=Y, weights=weights, center=None, scale=None, materialized={})
    rough_solution = minimize(sample, tol=WARM_START_TOL, max_iter=WARM_START_MAX_ITER, estimate=True)
    point = problem.evaluate(np.column_stack([rough_solution.W, rough_solution.b]), select_search_dtype(problem))
    return point if point.values.sum() <= MAX_WARM_START_LOSS_RATIO * problem.initial_loss() else None


def _is_row_space_cheaper(problem: LogisticProblem) -> bool:
    return problem.n < problem.d and problem.n <= MAX_ROW_SPACE_ROWS_PER_CLASS * (problem.k + 9)


def _minimize_in_row_space(problem: LogisticProblem, tol: float, max_iter: int) -> Solution:
    """Minimise by a Cholesky factor of X Xᵀ, or by a QR factorisation if rounding errors show.

    With X Xᵀ = L Lᵀ the rows of L are the rows of X in coordinates of the row space, and W = V L⁻¹ X. In all columns
    fits of 200 to 1,000 rows take 67 % more CPU time, by QR alone 13 % more (``tests/benchmarks/softmax_tricks.py
    row-space``).
    """
    rows = problem.read_rows(slice(None), np.float64)
    gram = rows @ rows.T
    diagonal = np.arange(len(gram))
    gram[diagonal, diagonal] += 1e-13 * gram.trace() / len(gram)
    lower, failed = dpotrf(gram, lower=1, clean=1)
    if not failed:
        reduced = replace(problem, X=np.ascontiguousarray(lower), center=None, scale=None, materialized={})
        solution = minimize(reduced, tol=tol, max_iter=max_iter)
        W = dtrtrs(lower, solution.W.T, lower=1, trans=1)[0].T @ rows
        full_problem = replace(problem, X=rows, center=None, scale=None, materialized={})
        value = full_problem.evaluate(np.column_stack([W, solution.b])).values.sum()
        if abs(value - solution.value) <= 0.1 * tol * value:
            return replace(solution, W=W)
    reduced, basis = project_to_row_space(problem)
    solution = minimize(reduced, tol=tol, max_iter=max_iter)
    return replace(solution, W=solution.W @ basis.T)


def select_search_dtype(problem: LogisticProblem) -> type[np.floating[Any]]:
    """The type of the passes until the last."""
    return np.float32 if float(problem.n) * problem.d * problem.k >= MIN_PRODUCTS_FOR_FLOAT32 else np.float64


class _LBFGSSearch:
    """The current point of the groups that have not converged, and the results of all groups."""

    preconditioner: DiagonalPreconditioner | GramPreconditioner | BlockPreconditioner

    def __init__(
        self, problem: LogisticProblem, tol: float, history: LBFGSHistory, estimate: bool, start: Point | None
    ) -> None:
        self.problem, self.tol, self.history, self.estimate = problem, tol, history, estimate
        self.dtype = self.search_dtype = select_search_dtype(problem)
        self.point = problem.evaluate(problem.initial_theta(), self.dtype) if start is None else start
        self.history.dtype = self.dtype
        self.predicted_decrease, self.actual_decrease, self.previous_step_small = np.inf, 1.0, False
        self.preconditioner_step = self.blocks_step = 0
        if history.blocks is not None and self.dtype == np.float32:
            self.preconditioner, self.blocks_step, self.preconditioner_step = history.blocks, 1, 1
        self.active_groups = np.arange(problem.groups)
        self.converged = np.zeros(problem.groups, bool)
        self.theta, self.values = self.point.theta.copy(), self.point.values.copy()
        self.gaps = np.zeros(problem.groups)

    def run(self, max_iter: int) -> int:
        """Step until all groups have converged; return the number of steps."""
        best_gap, stalled_steps = np.inf, 0
        self._record_progress()
        for steps in range(max_iter):
            if self._is_converged():
                return steps
            if self._should_build_blocks(steps):
                self._build_block_preconditioner(steps)
            elif self._should_update_preconditioner(steps):
                self._update_preconditioner(steps)
            previous_value = self.point.values.sum()
            is_step_accepted = self._step()
            if self.estimate and is_step_accepted and self._are_last_steps_small():
                return steps + 1
            gap, decrease = float(self.gaps[self.active_groups].mean()), previous_value - self.point.values.sum()
            stalled_steps = (
                0
                if gap < 0.9 * best_gap or decrease > ROUNDING_TOLERANCES[self.dtype] * previous_value
                else stalled_steps + 1
            )
            best_gap = min(best_gap, gap)
            if is_step_accepted and stalled_steps < MAX_STALLED_STEPS:
                continue
            if not self._restart_in_float64():
                self._stop_at_rounding()
                return steps + 1
            best_gap, stalled_steps = np.inf, 0
        if not self.estimate:
            self._drop_converged_groups()
        return max_iter

    def _reshape_by_group(self, rows: Array) -> Array:
        return rows.reshape(self.problem.groups, -1, rows.shape[1])

    def _record_progress(self) -> None:
        """Store the parameters and values of the active groups, and bound their gaps."""
        rows = self.active_groups if self.problem.link == "sigmoid" else slice(None)
        self.theta[rows] = self.point.theta
        self.values[self.active_groups] = self.point.values
        squared_norms = group_dot(*2 * (self._reshape_by_group(self.point.gradient)[..., :-1],))
        self.gaps[self.active_groups] = squared_norms / (2 * self.problem.ridge) / np.maximum(self.point.values, 1e-300)

    def _drop_converged_groups(self) -> bool:
        """Drop converged groups, verified in float64; return whether all have converged."""
        is_converged = self.gaps[self.active_groups] <= self.tol
        self.converged = self.gaps[self.active_groups] <= self.tol / 2
        if not is_converged.any():
            return False
        if self.dtype == np.float32 and is_converged.all():
            self.dtype = np.float64
            self.point = self.problem.evaluate(self.point.theta)
            self._record_progress()
            is_converged = self.gaps[self.active_groups] <= self.tol
        if self.dtype == np.float32:
            return False
        if self.problem.fit_intercept and is_converged.any():
            self.gaps[self.active_groups] += self.problem.intercept_decrements(
                self.point, self.search_dtype
            ) / np.maximum(self.point.values, 1e-300)
            is_converged = self.gaps[self.active_groups] <= self.tol
        self.converged = is_converged
        if is_converged.all():
            return True
        # Restricting copies the history: worthwhile for a quarter of the groups.
        if is_converged.sum() * 4 >= len(is_converged) and self.problem.link == "sigmoid":
            self._restrict_to_groups(np.flatnonzero(~is_converged))
            self.converged = np.zeros(len(self.active_groups), bool)
        return False

    def _restrict_to_groups(self, groups: NDArray[np.intp]) -> None:
        self.problem, self.active_groups = self.problem.select_groups(groups), self.active_groups[groups]
        self.history.select_groups(groups)
        if isinstance(self.preconditioner, BlockPreconditioner):
            self.preconditioner = self.preconditioner.select_groups(groups)
        self.point = Point(
            self.point.theta[groups], self.point.losses[groups], self.point.values[groups], self.point.gradient[groups]
        )

    def _update_preconditioner(self, steps: int) -> None:
        weighted_gram = self.history.curvature
        if not steps and weighted_gram is None and self._preconditioner_cost > MAX_INITIAL_PRECONDITIONER_COST:
            self.preconditioner = DiagonalPreconditioner.from_problem(self.problem)
            return
        if steps or weighted_gram is None:
            weighted_gram = self.history.curvature = WeightedGram.from_problem(
                self.problem, self.point.theta, self.dtype
            )
        self.preconditioner = weighted_gram.preconditioner(self.problem.ridge, self.dtype)
        self.preconditioner_step = max(self.preconditioner_step, steps)

    @property
    def _preconditioner_cost(self) -> float:
        """The cost of a Gram preconditioner, in evaluations."""
        cost = WeightedGram.cost_in_evaluations(self.problem)
        return cost if self.search_dtype == np.float32 else max(cost, MIN_PRECONDITIONER_COST_IN_FLOAT64)

    def _is_converged(self) -> bool:
        """Whether the search has converged. Groups stay together in an estimated search, which shares its history."""
        if not self.estimate:
            return self._drop_converged_groups()
        self.converged = self.gaps <= self.tol
        return bool(self.converged.all())

    def _are_last_steps_small(self) -> bool:
        """Whether two consecutive steps predicted and achieved little."""
        step_small = max(self.predicted_decrease, self.actual_decrease) <= self.tol
        both_small, self.previous_step_small = step_small and self.previous_step_small, step_small
        if both_small:
            self.gaps[:] = self.predicted_decrease
        return both_small

    def _should_update_preconditioner(self, steps: int) -> bool:
        """At the start, and again when the steps since the last update have cost as much, at growing intervals."""
        if steps == 0 or self.blocks_step:
            return not self.blocks_step
        if isinstance(self.preconditioner, DiagonalPreconditioner):
            return self.history.n_steps >= PRECONDITIONER_PATIENCE * self._preconditioner_cost
        return steps - self.preconditioner_step >= max(2, 0.4 * steps, 2 * self._preconditioner_cost)

    def _should_build_blocks(self, steps: int) -> bool:
        cost, steps_since_blocks = BlockPreconditioner.cost_in_evaluations(self.problem), steps - self.blocks_step
        if self.dtype != np.float32 or cost > MAX_BLOCK_COST:
            return False
        if self.blocks_step:
            return steps_since_blocks >= cost + 4 and self.predicted_decrease > MIN_DECREASE_FOR_BLOCK_UPDATE
        return (
            steps > 2
            and self.predicted_decrease < MAX_DECREASE_FOR_BLOCKS
            and DECREASE_RANGE_FOR_BLOCKS[0] < self.actual_decrease < DECREASE_RANGE_FOR_BLOCKS[1]
        )

    def _build_block_preconditioner(self, steps: int) -> None:
        self.history.curvature = WeightedGram.from_problem(self.problem, self.point.theta, self.dtype)
        self.preconditioner = self.history.blocks = BlockPreconditioner.from_problem(
            self.problem, self.point.theta, self.history.curvature
        )
        self.blocks_step = steps

    def _step(self) -> bool:
        """Take one step of every active group; return whether it was accepted."""
        current = self.point
        gradient = self._reshape_by_group(current.gradient)
        direction = self.history.direction(gradient, self._apply_preconditioner)
        slopes = group_dot(direction, gradient)
        if not (slopes < 0).all():
            self.history.clear()
            direction = -self._apply_preconditioner(gradient[None])[0]
            slopes = group_dot(direction, gradient)
        direction[self.converged] = 0.0
        candidate = self._line_search(direction, slopes)
        if candidate is None:
            return False
        self.history.add(
            self._reshape_by_group(candidate.theta - current.theta),
            self._reshape_by_group(candidate.gradient - current.gradient),
        )
        self.history.n_steps += 1
        self.predicted_decrease = -0.5 * float(slopes.sum() / current.values.sum())
        self.actual_decrease = 1.0 - float(candidate.values.sum() / current.values.sum())
        self.point = candidate
        self._record_progress()
        return True

    def _apply_preconditioner(self, vectors: Array) -> Array:
        """Apply the inverse preconditioner to arrays of shape (c, g, rows of theta in a group, d + 1)."""
        return self.preconditioner.solve(vectors.reshape(len(vectors), -1, vectors.shape[-1])).reshape(vectors.shape)

    def _line_search(self, direction: Array, slopes: Array) -> Point | None:
        """Backtrack along the direction with one step length per group; None if no point is better."""
        current, lengths = self.point, np.ones(len(slopes))
        slack = ROUNDING_TOLERANCES[self.dtype] * np.abs(current.values)
        for _ in range(MAX_LINE_SEARCH_TRIALS):
            candidate = self._evaluate_step(direction, lengths)
            increase = candidate.values - current.values
            accepted = increase <= 1e-4 * lengths * slopes
            if not accepted.all():
                # Near the optimum values differ only by rounding, but slopes are still accurate.
                new_slopes = group_dot(direction, self._reshape_by_group(candidate.gradient))
                accepted |= (increase <= slack) & (np.abs(new_slopes) <= 0.8 * np.abs(slopes))
            if accepted.all():
                return candidate if len(self.history) else self._shrink_first_step(candidate, direction, lengths)
            with np.errstate(all="ignore"):
                factors = -slopes * lengths / (2 * (increase - lengths * slopes))
            factors = np.clip(np.where(np.isfinite(factors), factors, 0.1), 0.1, 0.5)
            lengths = np.where(accepted, lengths, lengths * factors)
        return None

    def _shrink_first_step(self, candidate: Point, direction: Array, lengths: Array) -> Point:
        """Halve the step while that is much better: on separable rows the first step overshoots."""
        while True:
            lengths = lengths / 2
            shorter = self._evaluate_step(direction, lengths)
            if shorter.values.sum() >= 0.8 * candidate.values.sum():
                return candidate
            candidate = shorter

    def _evaluate_step(self, direction: Array, lengths: Array) -> Point:
        step = (lengths[:, None, None] * direction).reshape(self.point.theta.shape)
        return self.problem.evaluate(self.point.theta + step, self.dtype)

    def _restart_in_float64(self) -> bool:
        """After a stall change to float64, then clear the history; False if both were done."""
        if self.dtype == np.float32:
            self.dtype = np.float64
            self.point = self.problem.evaluate(self.point.theta)
        elif len(self.history):
            self.history.clear()
        else:
            return False
        self._update_preconditioner(1)
        self._record_progress()
        return True

    def _stop_at_rounding(self) -> None:
        """Estimate the gap by the Newton decrement when the gradient consists of rounding errors."""
        self._update_preconditioner(1)
        gradient = self._reshape_by_group(self.point.gradient)
        decrements = 0.5 * group_dot(gradient, self._apply_preconditioner(gradient[None])[0])
        bounds = self.gaps[self.active_groups] * self.point.values
        if self.problem.fit_intercept:
            bounds += self.problem.intercept_decrements(self.point, self.search_dtype)
        self.gaps[self.active_groups] = np.minimum(bounds, decrements) / np.maximum(self.point.values, 1e-300)
