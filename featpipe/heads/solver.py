"""The minimiser behind `featpipe.heads.softmax`: L2-penalised log loss, solved to a stated gap.

`minimise` is the whole interface; nothing outside knows how it goes about it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.heads.curvature import Blocks, Curvature, Metric
from featpipe.heads.objective import Point, Problem

__all__ = ["Memory", "Solution", "into_row_space", "minimise"]

Array = NDArray[np.float64]

HISTORY = 30
FLOAT32_FROM_PRODUCTS = 1e6
STALLED_AFTER = 12
TRIALS = 30
# A curvature for each class is worth its price from here on, and again when that much has been gained since.
BLOCKS_BELOW = 0.1
FALL = (0.002, 0.08)
NO_BLOCKS_BELOW = 1e-5
EVALUATIONS_FOR_BLOCKS = 30.0
ROUNDING = {"float32": 1e-6, "float64": 1e-13}


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


@dataclass(eq=False)
class Memory:
    """Steps and changes of the gradient along them: what L-BFGS knows of the curvature."""

    steps: deque[Array] = field(default_factory=lambda: deque(maxlen=HISTORY))
    changes: deque[Array] = field(default_factory=lambda: deque(maxlen=HISTORY))
    inverses: deque[Array] = field(default_factory=lambda: deque(maxlen=HISTORY))
    curvature: Curvature | None = None
    blocks: Blocks | None = None

    def add(self, step: Array, change: Array) -> None:
        products = _dots(step, change)
        with np.errstate(divide="ignore", over="ignore"):
            inverses = np.where(products > 1e-300, 1 / products, 0.0)
        self.steps.append(step)
        self.changes.append(change)
        self.inverses.append(inverses)

    def clear(self) -> None:
        self.steps.clear()
        self.changes.clear()
        self.inverses.clear()

    def only(self, groups: NDArray[np.intp]) -> None:
        """Forget all groups but some."""
        for kept in (self.steps, self.changes, self.inverses):
            kept.extend([kept.popleft()[groups] for _ in range(len(kept))])

    def repenalise(self, more: float) -> None:
        """Go on under a penalty that is stronger by so much: only its share of the changes differs."""
        pairs = list(zip(self.steps, self.changes, strict=True))
        self.clear()
        for step, change in pairs:
            penalty = more * step
            penalty[..., -1] = 0
            self.add(step, change + penalty)

    def direction(self, gradient: Array, metric: Metric | Blocks) -> Array:
        """The quasi-Newton step of each group; arrays have shape (g, rows of theta in a group, d + 1)."""
        step, scales = gradient.copy(), []
        for s, y, inverse in zip(reversed(self.steps), reversed(self.changes), reversed(self.inverses), strict=True):
            scale = inverse * _dots(s, step)
            scales.append(scale)
            step -= scale[:, None, None] * y
        step = _solve(metric, step)
        if self.steps:
            y, inverse = self.changes[-1], self.inverses[-1]
            products = inverse * _dots(y, _solve(metric, y))
            step /= np.where(products > 0, products, 1.0)[:, None, None]
        for s, y, inverse, scale in zip(self.steps, self.changes, self.inverses, reversed(scales), strict=True):
            step += (scale - inverse * _dots(y, step))[:, None, None] * s
        return -step


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
    by the curvature p(1 - p) of a recent point. Groups take their steps side by side and share the passes over X.

    Large problems are searched in float32; the last word has a pass in float64, in which the search goes on if need
    be. Where rounding ends it before the bound is reached (columns of very unequal size, a huge C) the Newton
    decrement decides. With fewer rows than columns the problem is first turned into the span of the rows, where the
    optimum lies.
    """
    if problem.n < problem.d and start is None:
        reduced, basis = into_row_space(problem)
        found = minimise(reduced, tol=tol, max_iter=max_iter)
        return replace(found, W=found.W @ basis.T)
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
    return replace(problem, X=np.ascontiguousarray(triangle.T), center=None, scale=None), basis


@dataclass(eq=False)
class _Search:
    """The present point of the groups that are still open, and what was found for all of them."""

    problem: Problem
    tol: float
    memory: Memory
    estimate: bool = False
    point: Point = field(init=False)
    metric: Metric | Blocks = field(init=False)
    decrement: float = field(init=False, default=np.inf)
    fall: float = field(init=False, default=1.0)
    was_small: bool = field(init=False, default=False)
    metric_at: int = field(init=False, default=0)
    blocks_at: int = field(init=False, default=0)
    dtype: type[np.floating[Any]] = field(init=False)
    first_dtype: type[np.floating[Any]] = field(init=False)
    open: NDArray[np.intp] = field(init=False)
    resting: NDArray[np.bool_] = field(init=False)
    found: Array = field(init=False)
    values: Array = field(init=False)
    gaps: Array = field(init=False)

    def begin(self, start: Point | None) -> None:
        products = float(self.problem.n) * self.problem.d * self.problem.k
        self.dtype = self.first_dtype = np.float32 if products >= FLOAT32_FROM_PRODUCTS else np.float64
        self.point = self.problem.at(self.problem.start(), self.dtype) if start is None else start
        theta = self.point.theta
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
                self._renew_metric(steps > 0)
                self.metric_at = steps
            before = self.point.values.sum()
            moved = self._step()
            if self.estimate and moved and self._is_near():
                return steps + 1
            gap, fell = float(self.gaps[self.open].mean()), before - self.point.values.sum()
            since = 0 if gap < 0.9 * best or fell > ROUNDING[self._precision] * before else since + 1
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

    @property
    def _precision(self) -> str:
        return np.dtype(self.dtype).name

    def _grouped(self, rows: Array) -> Array:
        return rows.reshape(self.problem.groups, -1, rows.shape[1])

    def _note(self) -> None:
        """Keep what the open groups have come to, and bound their gaps."""
        rows = self.open if self.problem.link == "sigmoid" else slice(None)
        self.found[rows] = self.point.theta
        self.values[self.open] = self.point.values
        squares = _dots(*2 * (self._grouped(self.point.gradient)[..., :-1],))
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

    def _renew_metric(self, curvature_too: bool) -> None:
        if curvature_too or self.memory.curvature is None:
            self.memory.curvature = Curvature.at(self.problem, self.point.theta, self.dtype)
        self.metric = self.memory.curvature.metric(self.problem.ridge, self.dtype)

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
        if steps == 0:
            return not self.blocks_at
        # The steps of a small problem do not depend on its size: a row of weight two is two rows, to the last digits.
        price = Curvature.evaluations(self.problem) if self.first_dtype == np.float32 else 0.0
        return not self.blocks_at and steps - self.metric_at >= max(2, 0.4 * steps, 2 * price)

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
        direction = self.memory.direction(gradient, self.metric)
        slopes = _dots(direction, gradient)
        if not (slopes < 0).all():
            self.memory.clear()
            direction = -_solve(self.metric, gradient)
            slopes = _dots(direction, gradient)
        direction[self.resting] = 0.0
        there = self._along(direction, slopes)
        if there is None:
            return False
        self.memory.add(self._grouped(there.theta - here.theta), self._grouped(there.gradient - here.gradient))
        self.decrement = -0.5 * float(slopes.sum() / here.values.sum())
        self.fall = 1.0 - float(there.values.sum() / here.values.sum())
        self.point = there
        self._note()
        return True

    def _along(self, direction: Array, slopes: Array) -> Point | None:
        """A point along the direction, with a length of its own for each group; None if none is better."""
        here, lengths = self.point, np.ones(len(slopes))
        slack = ROUNDING[self._precision] * np.abs(here.values)
        for _ in range(TRIALS):
            there = self._moved(direction, lengths)
            rise = there.values - here.values
            new_slopes = _dots(direction, self._grouped(there.gradient))
            # Near the optimum values are equal but for rounding, and slopes still tell.
            fine = (rise <= 1e-4 * lengths * slopes) | ((rise <= slack) & (np.abs(new_slopes) <= 0.8 * np.abs(slopes)))
            if fine.all():
                return there if self.memory.steps else self._shorter(there, direction, lengths)
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
        elif self.memory.steps:
            self.memory.clear()
        else:
            return False
        self._renew_metric(True)
        self._note()
        return True

    def _settle(self) -> None:
        """Where only rounding errors are left of the gradient, the Newton decrement estimates the gap."""
        self._renew_metric(True)
        gradient = self._grouped(self.point.gradient)
        decrements = 0.5 * _dots(gradient, _solve(self.metric, gradient))
        bounds = self.gaps[self.open] * self.point.values
        if self.problem.fit_intercept:
            bounds += self.problem.intercept_decrements(self.point, self.first_dtype)
        self.gaps[self.open] = np.minimum(bounds, decrements) / np.maximum(self.point.values, 1e-300)


def _dots(a: Array, b: Array) -> Array:
    """Inner product of each group."""
    if len(a) == 1:
        return np.array([np.vdot(a, b)])
    return np.einsum("gkd,gkd->g", a, b)


def _solve(metric: Metric | Blocks, grouped: Array) -> Array:
    return metric.solve(grouped.reshape(-1, grouped.shape[-1])).reshape(grouped.shape)
