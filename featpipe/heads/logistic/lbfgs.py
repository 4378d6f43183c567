"""The L-BFGS history and the search directions computed from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dtrtrs

from featpipe.heads.logistic.preconditioners import BlockPreconditioner, WeightedGram

Array = NDArray[np.float64]

HISTORY_SIZE = 30


@dataclass(eq=False)
class LBFGSHistory:
    """Steps and gradient changes of g independent groups.

    Attributes
    ----------
    steps, gradient_changes : ndarray of shape (g, 30, p)
        Each pair has a slot; a new pair replaces the oldest.
    inner_products : ndarray of shape (g, 30, 30)
        Of step i and gradient change j, where j is not older than i.
    slots : list of int
        Slots in use, from the oldest to the newest.
    dtype : type
        Type of the stored arrays.
    n_steps : int
        Number of steps in total.
    curvature, blocks : optional
        The latest preconditioners.

    Notes
    -----
    The two loops of L-BFGS (Nocedal and Wright, Numerical Optimization, algorithm 7.4) are written as two triangular
    systems of the inner products: five matrix products per step replace 120 small operations.
    """

    steps: Array = field(default_factory=lambda: np.empty((0, 0, 0)))
    gradient_changes: Array = field(default_factory=lambda: np.empty((0, 0, 0)))
    inner_products: Array = field(default_factory=lambda: np.empty((0, 0, 0)))
    slots: list[int] = field(default_factory=list)
    dtype: type[np.floating[Any]] = np.float64
    n_steps: int = 0
    curvature: WeightedGram | None = None
    blocks: BlockPreconditioner | None = None

    def __len__(self) -> int:
        return len(self.slots)

    def add(self, step: Array, gradient_change: Array) -> None:
        """Add a pair; both arrays have shape (g, rows of theta in a group, d + 1)."""
        step, gradient_change = step.reshape(len(step), -1), gradient_change.reshape(len(gradient_change), -1)
        if self.steps.shape[::2] != step.shape:
            self.steps, self.gradient_changes = (
                np.empty((len(step), HISTORY_SIZE, step.shape[1]), self.dtype) for _ in range(2)
            )
            self.inner_products = np.empty((len(step), HISTORY_SIZE, HISTORY_SIZE))
        slot = self.slots.pop(0) if len(self.slots) == HISTORY_SIZE else len(self.slots)
        self.slots.append(slot)
        self.steps[:, slot], self.gradient_changes[:, slot] = step, gradient_change
        n_pairs = len(self.slots)
        self.inner_products[:, :n_pairs, slot] = _batched_matvec(
            self.steps[:, :n_pairs], self.gradient_changes[:, slot]
        )
        # Groups that did not move, or whose curvature along the step is rounding error, store zeros.
        is_degenerate = self.inner_products[:, slot, slot] <= 1e-300
        if is_degenerate.any():
            self.steps[is_degenerate, slot] = self.gradient_changes[is_degenerate, slot] = 0
            self.inner_products[is_degenerate, :, slot] = self.inner_products[is_degenerate, slot, :] = 0
            self.inner_products[is_degenerate, slot, slot] = 1

    def clear(self) -> None:
        self.slots.clear()

    def select_groups(self, groups: NDArray[np.intp]) -> None:
        """Restrict to some groups."""
        if self.slots:
            self.steps = self.steps[groups]
            self.gradient_changes = self.gradient_changes[groups]
            self.inner_products = self.inner_products[groups]

    def update_penalty(self, ridge_increase: float, width: int) -> None:
        """Adapt the gradient changes to a penalty that is larger by ``ridge_increase``."""
        if not self.slots:
            return
        n_pairs = len(self.slots)
        for slot in range(n_pairs):
            gradient_change = self.gradient_changes[:, slot]
            intercept_change = gradient_change[:, width - 1 :: width].copy()
            gradient_change += ridge_increase * self.steps[:, slot]
            gradient_change[:, width - 1 :: width] = intercept_change
        inner_products = np.matmul(self.steps[:, :n_pairs], self.gradient_changes[:, :n_pairs].transpose(0, 2, 1))
        diagonal = np.arange(n_pairs)
        curvatures = inner_products[:, diagonal, diagonal]
        inner_products[:, diagonal, diagonal] = np.where(
            curvatures == 0, 1.0, curvatures
        )  # of a group that did not move
        self.inner_products[:, :n_pairs, :n_pairs] = inner_products

    def direction(self, gradient: Array, precondition: Callable[[Array], Array]) -> Array:
        """The quasi-Newton step of each group.

        Parameters
        ----------
        gradient : ndarray of shape (g, rows of theta in a group, d + 1)
        precondition : callable
            Applies the inverse preconditioner to arrays of shape (c, g, rows of theta in a group, d + 1).
        """
        if not self.slots:
            return -precondition(gradient[None])[0]
        n_pairs, order = len(self.slots), np.array(self.slots)
        steps, gradient_changes = self.steps[:, :n_pairs], self.gradient_changes[:, :n_pairs]
        triangle = self.inner_products[:, order[:, None], order]
        flat_gradient = gradient.reshape(len(gradient), -1).astype(self.dtype)
        backward_coefficients = _solve_triangular(triangle, _batched_matvec(steps, flat_gradient)[:, order])
        newest_change = gradient_changes[:, order[-1]]
        stacked = np.stack(
            [flat_gradient - _combine_rows(backward_coefficients, gradient_changes, order), newest_change]
        )
        step, preconditioned_change = precondition(stacked.reshape(2, *gradient.shape)).reshape(stacked.shape)
        change_norms = np.einsum("gp,gp->g", newest_change, preconditioned_change)
        curvatures = np.einsum("gii->gi", triangle)
        step *= np.where(change_norms > 0, curvatures[:, -1] / np.where(change_norms > 0, change_norms, 1.0), 1.0)[
            :, None
        ]
        forward_coefficients = _solve_triangular(
            triangle,
            curvatures * backward_coefficients - _batched_matvec(gradient_changes, step)[:, order],
            transposed=True,
        )
        step += _combine_rows(forward_coefficients, steps, order)
        return -step.reshape(gradient.shape)


def group_dot(a: Array, b: Array) -> Array:
    """Inner product of each group."""
    if len(a) == 1:
        return np.array([np.vdot(a, b)])
    return np.einsum("gkd,gkd->g", a, b)


def _batched_matvec(rows: Array, vectors: Array) -> Array:
    """Products of shape (g, m), from (g, m, p) and (g, p)."""
    if len(rows) == 1:
        return (rows[0] @ vectors[0])[None]
    return np.matmul(rows, vectors[..., None])[..., 0]


def _combine_rows(coefficients: Array, rows: Array, order: NDArray[np.intp]) -> Array:
    """Σ_i coefficients_i rows_order(i), shape (g, p)."""
    slot_coefficients = np.empty(coefficients.shape, rows.dtype)
    slot_coefficients[:, order] = coefficients
    if len(rows) == 1:
        return (slot_coefficients[0] @ rows[0])[None]
    return np.matmul(slot_coefficients[:, None], rows)[:, 0]


def _solve_triangular(triangle: Array, rhs: Array, *, transposed: bool = False) -> Array:
    """Solve the upper triangular system, or its transpose, for each group; entries below the diagonal are ignored."""
    if len(triangle) == 1:
        single_solution: Array = dtrtrs(triangle[0], rhs[0], trans=int(transposed))[0]
        return single_solution.reshape(rhs.shape)
    triangles = np.triu(triangle).transpose(0, 2, 1) if transposed else np.triu(triangle)
    solutions: NDArray[Any] = np.linalg.solve(triangles, rhs[..., None])[..., 0]
    return np.asarray(solutions, np.float64)
