"""The minimiser behind `featpipe.heads.softmax`: L2-penalised log loss, solved to a stated gap.

`minimise` is the whole interface; nothing outside knows how it goes about it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dtrtrs

from featpipe.heads.curvature import Blocks, Curvature, Diagonal, Metric
from featpipe.heads.objective import Point, Problem
from featpipe.heads.quasi_newton import Memory, dots

__all__ = ["Solution", "dtype_of", "into_row_space", "minimise"]

Array = NDArray[np.float64]

FLOAT32_FROM_PRODUCTS = 1e6
ROWS_FOR_EACH_CLASS = 80
# A metric that costs more evaluations than this waits until as many have been spent.
EVALUATIONS_AT_THE_START = 6.0
STALLED_AFTER = 12
TRIALS = 30
# A curvature for each class is worth its price from here on, and again when that much has been gained since.
BLOCKS_BELOW = 0.1
FALL = (0.002, 0.08)
NO_BLOCKS_BELOW = 1e-5
EVALUATIONS_FOR_BLOCKS = 30.0
ROUNDING: dict[type[np.floating[Any]], float] = {np.float32: 1e-6, np.float64: 1e-13}
# A metric is worth making when so many times its price has been spent without one.
PATIENCE = 1.5
# Weights that are all too large, or too small, are scaled where that promises more than a step: their curvature in that
# direction, in squares of their length, the most that they change by, and the steps in between.
SCALE_CURVATURE, SCALE_MOST, STEPS_BETWEEN_SCALES = 4.0, 0.1, 8
# A search of many rows begins at a rough minimum on some of them: so many for each column, and of each class at least;
# if they are at most such a share of all, and if f is by that factor lower there than at zero.
SAMPLED_FROM_PRODUCTS = 1e8
SAMPLE_FOR_A_COLUMN, SAMPLE_OF_A_CLASS, SAMPLE_SHARE, SAMPLE_FALL = 6, 8, 0.25, 0.5
SAMPLE_TOL, SAMPLE_STEPS = 0.1, 30
# The steps of a small problem do not depend on its size: a row of weight two is two rows, to the last digits.
EVALUATIONS_OF_SMALL = 3.0


@dataclass(frozen=True, eq=False)
class Solution:
    """What `minimise` found.

    Attributes
    ----------
    W : ndarray of shape (k, d)
    b : ndarray of shape (k,)
    value : float
        f(W, b), all groups together.
    gap : float
        Bound on (f(W, b) - min f) / f(W, b), the worst of any group; an estimate where rounding ended the search.
    steps : int
    converged : bool
    point : Point, optional
        The end of a search on an estimate, from which the next can start without a pass.
    """

    W: Array
    b: Array
    value: float
    gap: float
    steps: int
    converged: bool
    point: Point | None = None


def minimise(
    problem: Problem,
    *,
    tol: float,
    max_iter: int,
    start: Point | None = None,
    memory: Memory | None = None,
    estimate: bool = False,
) -> Solution:
    """Minimise until the relative gap of every group is at most ``tol``, or for ``max_iter`` steps.

    Parameters
    ----------
    problem : Problem
    tol : float
    max_iter : int
    start : Point, optional
        Where to begin.
    memory : Memory, optional
        Of a search on the same rows with another penalty, brought up to date by `Memory.repenalise`.
    estimate : bool
        End on what two steps running promised and brought, and not on the bound.

    Notes
    -----
    f is strongly convex in W once b is minimised out, so that ‖∂f/∂W‖² / (2 ridge) bounds the gap there; what b still
    has to gain is estimated by its Newton decrement. L-BFGS starts each step from the penalised Gram matrix, weighted
    by the curvature p(1 - p) of a recent point; where that matrix costs more than a few passes, from its diagonal until
    as much has been spent. Groups take their steps side by side and share the passes over X.

    Large problems are searched in float32; the last word has a pass in float64, in which the search goes on if need
    be. Where rounding ends it before the bound is reached (columns of very unequal size, a huge C) the Newton
    decrement decides. With few rows, and fewer than columns, the problem is first turned into the span of the rows,
    where the optimum lies. With many rows the search begins at a rough minimum on a sample of them, where f is a good
    deal lower than at zero.
    """
    if start is None and _fits_its_rows(problem):
        return _in_row_space(problem, tol, max_iter)
    problem = problem.ready_in(dtype_of(problem))
    if start is None and not estimate:
        start = _from_a_sample(problem)
    search = _Search(problem, tol, Memory() if memory is None else memory, estimate)
    search.begin(start)
    steps = search.run(max_iter)
    gaps = search.gaps
    return Solution(
        W=search.found[:, :-1],
        b=search.found[:, -1].copy(),
        value=float(search.values.sum()),
        gap=float(gaps.max()),
        steps=max(1, steps),
        converged=bool((gaps <= tol).all()),
        point=search.point if estimate else None,
    )


def into_row_space(problem: Problem) -> tuple[Problem, Array]:
    """The same problem in n coordinates instead of d, and the orthonormal basis (d, n) that leads back."""
    basis, triangle = np.linalg.qr(problem.rows(slice(None), np.float64).T)
    return replace(problem, X=np.ascontiguousarray(triangle.T), center=None, scale=None, ready={}), basis


def _from_a_sample(problem: Problem) -> Point | None:
    """A point to begin at, where some of the rows in memory tell of one that is worth its price.

    From zero weights the first steps on nearly separable rows go far beyond the minimum, and many lead back.
    """
    size, products = SAMPLE_FOR_A_COLUMN * problem.d, float(problem.n) * problem.d * problem.k
    if type(problem.X) is not np.ndarray or problem.link != "softmax" or products < SAMPLED_FROM_PRODUCTS:
        return None
    if size > SAMPLE_SHARE * problem.n:
        return None
    rows = np.linspace(0, problem.n - 1, size).astype(np.intp)
    Y, weights = problem.Y[rows], problem.weights[rows]
    if np.bincount(Y, minlength=problem.k).min() < SAMPLE_OF_A_CLASS:
        return None
    X = problem.rows(rows, dtype_of(problem))
    sample = replace(problem, X=X, Y=Y, weights=weights, center=None, scale=None, ready={})
    found = minimise(sample, tol=SAMPLE_TOL, max_iter=SAMPLE_STEPS, estimate=True)
    point = problem.at(np.column_stack([found.W, found.b]), dtype_of(problem))
    return point if point.values.sum() <= SAMPLE_FALL * problem.loss_at_start() else None


def _fits_its_rows(problem: Problem) -> bool:
    """Whether there are fewer rows than columns, and their inner products cost no more than a search."""
    return problem.n < problem.d and problem.n <= ROWS_FOR_EACH_CLASS * (problem.k + 9)


def _in_row_space(problem: Problem, tol: float, max_iter: int) -> Solution:
    """By a Cholesky factor of the inner products of the rows; by their QR factors where rounding shows.

    With X Xᵀ = L Lᵀ the rows of L are X in coordinates of its row space, and W = V L⁻¹ X leads back.
    """
    rows = problem.rows(slice(None), np.float64)
    products = rows @ rows.T
    every = np.arange(len(products))
    products[every, every] += 1e-13 * products.trace() / len(products)
    lower, failed = dpotrf(products, lower=1, clean=1)
    if not failed:
        reduced = replace(problem, X=np.ascontiguousarray(lower), center=None, scale=None, ready={})
        found = minimise(reduced, tol=tol, max_iter=max_iter)
        W = dtrtrs(lower, found.W.T, lower=1, trans=1)[0].T @ rows
        whole = replace(problem, X=rows, center=None, scale=None, ready={})
        value = whole.at(np.column_stack([W, found.b])).values.sum()
        if abs(value - found.value) <= 0.1 * tol * value:
            return replace(found, W=W)
    reduced, basis = into_row_space(problem)
    found = minimise(reduced, tol=tol, max_iter=max_iter)
    return replace(found, W=found.W @ basis.T)


def dtype_of(problem: Problem) -> type[np.floating[Any]]:
    """What its passes are in until the last."""
    return np.float32 if float(problem.n) * problem.d * problem.k >= FLOAT32_FROM_PRODUCTS else np.float64


@dataclass(eq=False)
class _Search:
    """The present point of the groups that are still open, and what was found for all of them."""

    problem: Problem
    tol: float
    memory: Memory
    estimate: bool = False
    point: Point = field(init=False)
    metric: Diagonal | Metric | Blocks = field(init=False)
    decrement: float = field(init=False, default=np.inf)
    fall: float = field(init=False, default=1.0)
    was_small: bool = field(init=False, default=False)
    metric_at: int = field(init=False, default=0)
    blocks_at: int = field(init=False, default=0)
    scaled_at: int = field(init=False, default=0)
    dtype: type[np.floating[Any]] = field(init=False)
    first_dtype: type[np.floating[Any]] = field(init=False)
    open: NDArray[np.intp] = field(init=False)
    resting: NDArray[np.bool_] = field(init=False)
    found: Array = field(init=False)
    values: Array = field(init=False)
    gaps: Array = field(init=False)

    def begin(self, start: Point | None) -> None:
        self.dtype = self.first_dtype = dtype_of(self.problem)
        self.point = self.problem.at(self.problem.start(), self.dtype) if start is None else start
        theta = self.point.theta
        self.memory.dtype = self.dtype
        self.open = np.arange(self.problem.groups)
        if self.memory.blocks is not None and self.dtype == np.float32:
            self.metric, self.blocks_at, self.metric_at = self.memory.blocks, 1, 1
        self.found, self.values, self.gaps = theta.copy(), self.point.values.copy(), np.zeros(len(self.open))

    def run(self, max_iter: int) -> int:
        """Step until all groups are closed; how many steps it took."""
        best, since = np.inf, 0
        self._note()
        for steps in range(max_iter):
            if self._is_done():
                return steps
            if self._worth_blocks(steps):
                self._make_blocks(steps)
            elif self._worth_metric(steps):
                self._renew_metric(steps)
            before = self.point.values.sum()
            if steps - self.scaled_at >= STEPS_BETWEEN_SCALES:
                self._rescale(steps)
            moved = self._step()
            if self.estimate and moved and self._is_near():
                return steps + 1
            gap, fell = float(self.gaps[self.open].mean()), before - self.point.values.sum()
            since = 0 if gap < 0.9 * best or fell > ROUNDING[self.dtype] * before else since + 1
            best = min(best, gap)
            if moved and since < STALLED_AFTER:
                continue
            if not self._recover():
                self._settle()
                return steps + 1
            best, since = np.inf, 0
        if not self.estimate:
            self._close()
        return max_iter

    def _grouped(self, rows: Array) -> Array:
        return rows.reshape(self.problem.groups, -1, rows.shape[1])

    def _note(self) -> None:
        """Keep what the open groups have come to, and bound their gaps."""
        rows = self.open if self.problem.link == "sigmoid" else slice(None)
        self.found[rows] = self.point.theta
        self.values[self.open] = self.point.values
        squares = dots(*2 * (self._grouped(self.point.gradient)[..., :-1],))
        self.gaps[self.open] = squares / (2 * self.problem.ridge) / np.maximum(self.point.values, 1e-300)

    def _close(self) -> bool:
        """Drop the groups that are done; whether all are. None is before a pass in float64 says so."""
        done = self.gaps[self.open] <= self.tol
        self.resting = self.gaps[self.open] <= self.tol / 2
        if not done.any():
            return False
        if self.dtype == np.float32 and done.all():
            self.dtype = np.float64
            self.point = self.problem.at(self.point.theta)
            self._note()
            done = self.gaps[self.open] <= self.tol
        if self.dtype == np.float32:
            return False
        if self.problem.fit_intercept and done.any():
            self.gaps[self.open] += self.problem.intercept_decrements(self.point, self.first_dtype) / np.maximum(
                self.point.values, 1e-300
            )
            done = self.gaps[self.open] <= self.tol
        self.resting = done
        if done.all():
            return True
        # Narrowing costs a copy of the memory: worth it for a quarter of the groups.
        if done.sum() * 4 >= len(done) and self.problem.link == "sigmoid":
            self._narrow(np.flatnonzero(~done))
            self.resting = np.zeros(len(self.open), bool)
        return False

    def _narrow(self, keep: NDArray[np.intp]) -> None:
        self.problem, self.open = self.problem.only(keep), self.open[keep]
        self.memory.only(keep)
        if isinstance(self.metric, Blocks):
            self.metric = self.metric.only(keep)
        self.point = Point(
            self.point.theta[keep], self.point.losses[keep], self.point.values[keep], self.point.gradient[keep]
        )

    def _renew_metric(self, steps: int) -> None:
        known = self.memory.curvature
        if not steps and known is None and self._price > EVALUATIONS_AT_THE_START:
            self.metric = Diagonal.at(self.problem)
            return
        if steps or known is None:
            known = self.memory.curvature = Curvature.at(self.problem, self.point.theta, self.dtype)
        self.metric = known.metric(self.problem.ridge, self.dtype)
        self.metric_at = max(self.metric_at, steps)

    @property
    def _price(self) -> float:
        """Of a new metric, in evaluations."""
        price = Curvature.evaluations(self.problem)
        return price if self.first_dtype == np.float32 else max(price, EVALUATIONS_OF_SMALL)

    def _is_done(self) -> bool:
        """Groups share the steps of an estimated search to its end, so that what was learnt is of all of them."""
        if not self.estimate:
            return self._close()
        self.resting = self.gaps <= self.tol
        return bool(self.resting.all())

    def _is_near(self) -> bool:
        """Whether two steps running promised and brought little."""
        small = max(self.decrement, self.fall) <= self.tol
        near, self.was_small = small and self.was_small, small
        if near:
            self.gaps[:] = self.decrement
        return near

    def _worth_metric(self, steps: int) -> bool:
        """At the start, and when as much has been spent on steps as a new one costs, ever more rarely."""
        if steps == 0 or self.blocks_at:
            return not self.blocks_at
        if isinstance(self.metric, Diagonal):
            return self.memory.taken >= PATIENCE * self._price
        return steps - self.metric_at >= max(2, 0.4 * steps, 2 * self._price)

    def _worth_blocks(self, steps: int) -> bool:
        price, since = Blocks.evaluations(self.problem), steps - self.blocks_at
        if self.dtype != np.float32 or price > EVALUATIONS_FOR_BLOCKS:
            return False
        if self.blocks_at:
            return since >= price + 4 and self.decrement > NO_BLOCKS_BELOW
        return steps > 2 and self.decrement < BLOCKS_BELOW and FALL[0] < self.fall < FALL[1]

    def _make_blocks(self, steps: int) -> None:
        self.memory.curvature = Curvature.at(self.problem, self.point.theta, self.dtype)
        self.metric = self.memory.blocks = Blocks.at(self.problem, self.point.theta, self.memory.curvature)
        self.blocks_at = steps

    def _step(self) -> bool:
        """One step of every open group; whether any moved."""
        here = self.point
        gradient = self._grouped(here.gradient)
        direction = self.memory.direction(gradient, self._solve)
        slopes = dots(direction, gradient)
        if not (slopes < 0).all():
            self.memory.clear()
            direction = -self._solve(gradient[None])[0]
            slopes = dots(direction, gradient)
        direction[self.resting] = 0.0
        there = self._along(direction, slopes)
        if there is None:
            return False
        self.memory.add(self._grouped(there.theta - here.theta), self._grouped(there.gradient - here.gradient))
        self.memory.taken += 1
        self.decrement = -0.5 * float(slopes.sum() / here.values.sum())
        self.fall = 1.0 - float(there.values.sum() / here.values.sum())
        self.point = there
        self._note()
        return True

    def _rescale(self, steps: int) -> None:
        """Scale the weights, or learn at least how f curves along them.

        On nearly separable rows the first steps leave weights that are too large. A metric is of each class alone, and
        takes f for much steeper than it is where all of them shrink together. What is learnt stays in the memory.
        """
        here, W = self.point, self._grouped(self.point.theta).copy()
        W[..., -1] = 0
        slopes, sizes = dots(W, self._grouped(here.gradient)), dots(W, W)
        lengths = np.clip(slopes / (SCALE_CURVATURE * np.maximum(sizes, 1e-300)), -SCALE_MOST, SCALE_MOST)
        lengths[self.resting] = 0.0
        if 0.5 * float(slopes @ lengths) <= self.decrement * here.values.sum():
            return
        there = self._moved(-W, lengths)
        self.memory.add(self._grouped(there.theta - here.theta), self._grouped(there.gradient - here.gradient))
        self.scaled_at = steps
        if (there.values < here.values).all():
            self.point = there
            self._note()

    def _solve(self, several: Array) -> Array:
        """The inverse of the metric on arrays of shape (c, g, rows of theta in a group, d + 1)."""
        return self.metric.solve(several.reshape(len(several), -1, several.shape[-1])).reshape(several.shape)

    def _along(self, direction: Array, slopes: Array) -> Point | None:
        """A point along the direction, with a length of its own for each group; None if none is better."""
        here, lengths = self.point, np.ones(len(slopes))
        slack = ROUNDING[self.dtype] * np.abs(here.values)
        for _ in range(TRIALS):
            there = self._moved(direction, lengths)
            rise = there.values - here.values
            fine = rise <= 1e-4 * lengths * slopes
            if not fine.all():
                # Near the optimum values are equal but for rounding, and slopes still tell.
                new_slopes = dots(direction, self._grouped(there.gradient))
                fine |= (rise <= slack) & (np.abs(new_slopes) <= 0.8 * np.abs(slopes))
            if fine.all():
                return there if len(self.memory) else self._shorter(there, direction, lengths)
            with np.errstate(all="ignore"):
                shorter = -slopes * lengths / (2 * (rise - lengths * slopes))
            shorter = np.clip(np.where(np.isfinite(shorter), shorter, 0.1), 0.1, 0.5)
            lengths = np.where(fine, lengths, lengths * shorter)
        return None

    def _shorter(self, there: Point, direction: Array, lengths: Array) -> Point:
        """Half as far as often as that is much better: a first step on separable rows goes far beyond the minimum."""
        while True:
            lengths = lengths / 2
            nearer = self._moved(direction, lengths)
            if nearer.values.sum() >= 0.8 * there.values.sum():
                return there
            there = nearer

    def _moved(self, direction: Array, lengths: Array) -> Point:
        steps = (lengths[:, None, None] * direction).reshape(self.point.theta.shape)
        return self.problem.at(self.point.theta + steps, self.dtype)

    def _recover(self) -> bool:
        """After a stall: float64, then a fresh start from here; False when both are used up."""
        if self.dtype == np.float32:
            self.dtype = np.float64
            self.point = self.problem.at(self.point.theta)
        elif len(self.memory):
            self.memory.clear()
        else:
            return False
        self._renew_metric(1)
        self._note()
        return True

    def _settle(self) -> None:
        """Where only rounding errors are left of the gradient, the Newton decrement estimates the gap."""
        self._renew_metric(1)
        gradient = self._grouped(self.point.gradient)
        decrements = 0.5 * dots(gradient, self._solve(gradient[None])[0])
        bounds = self.gaps[self.open] * self.point.values
        if self.problem.fit_intercept:
            bounds += self.problem.intercept_decrements(self.point, self.first_dtype)
        self.gaps[self.open] = np.minimum(bounds, decrements) / np.maximum(self.point.values, 1e-300)
