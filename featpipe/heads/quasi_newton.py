"""What L-BFGS remembers, and the steps that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dtrtrs

from featpipe.heads.curvature import Blocks, Curvature

__all__ = ["Memory", "dots"]

Array = NDArray[np.float64]

HISTORY = 30


@dataclass(eq=False)
class Memory:
    """Steps and the changes of the gradient along them, of g groups side by side.

    Attributes
    ----------
    steps, changes : ndarray of shape (g, 30, p)
        Each pair in a slot of its own; a new one takes the slot of the oldest.
    products : ndarray of shape (g, 30, 30)
        Of step i and change j, where j is not older than i.
    slots : list of int
        Those in use, from the oldest to the newest.
    dtype : type
        Of what is kept.
    taken : int
        Steps in all.
    curvature, blocks : optional
        The latest that were worked out.

    Notes
    -----
    The two loops of L-BFGS (Nocedal and Wright, Numerical Optimization, algorithm 7.4) are two triangular systems of
    the products: five matrix products a step take the place of a hundred and twenty small operations.
    """

    steps: Array = field(default_factory=lambda: np.empty((0, 0, 0)))
    changes: Array = field(default_factory=lambda: np.empty((0, 0, 0)))
    products: Array = field(default_factory=lambda: np.empty((0, 0, 0)))
    slots: list[int] = field(default_factory=list)
    dtype: type[np.floating[Any]] = np.float64
    taken: int = 0
    curvature: Curvature | None = None
    blocks: Blocks | None = None

    def __len__(self) -> int:
        return len(self.slots)

    def add(self, step: Array, change: Array) -> None:
        """Remember a pair; both have shape (g, rows of theta in a group, d + 1)."""
        step, change = step.reshape(len(step), -1), change.reshape(len(change), -1)
        if self.steps.shape[::2] != step.shape:
            self.steps, self.changes = (np.empty((len(step), HISTORY, step.shape[1]), self.dtype) for _ in range(2))
            self.products = np.empty((len(step), HISTORY, HISTORY))
        slot = self.slots.pop(0) if len(self.slots) == HISTORY else len(self.slots)
        self.slots.append(slot)
        self.steps[:, slot], self.changes[:, slot] = step, change
        used = len(self.slots)
        self.products[:, :used, slot] = _times(self.steps[:, :used], self.changes[:, slot])
        # A group that did not move, or along whose step there is no curvature but rounding, has nothing to remember.
        nothing = self.products[:, slot, slot] <= 1e-300
        if nothing.any():
            self.steps[nothing, slot] = self.changes[nothing, slot] = 0
            self.products[nothing, :, slot] = self.products[nothing, slot, :] = 0
            self.products[nothing, slot, slot] = 1

    def clear(self) -> None:
        self.slots.clear()

    def only(self, groups: NDArray[np.intp]) -> None:
        """Forget all groups but some."""
        if self.slots:
            self.steps, self.changes, self.products = self.steps[groups], self.changes[groups], self.products[groups]

    def repenalise(self, more: float, width: int) -> None:
        """Go on under a penalty that is stronger by so much: only its share of the changes differs."""
        if not self.slots:
            return
        used = len(self.slots)
        for slot in range(used):
            change = self.changes[:, slot]
            of_intercepts = change[:, width - 1 :: width].copy()
            change += more * self.steps[:, slot]
            change[:, width - 1 :: width] = of_intercepts
        products = np.matmul(self.steps[:, :used], self.changes[:, :used].transpose(0, 2, 1))
        every = np.arange(used)
        squares = products[:, every, every]
        products[:, every, every] = np.where(squares == 0, 1.0, squares)  # of a group that did not move
        self.products[:, :used, :used] = products

    def direction(self, gradient: Array, solve: Callable[[Array], Array]) -> Array:
        """The quasi-Newton step of each group.

        Parameters
        ----------
        gradient : ndarray of shape (g, rows of theta in a group, d + 1)
        solve : callable
            The inverse of the metric, on arrays of shape (c, g, rows of theta in a group, d + 1).
        """
        if not self.slots:
            return -solve(gradient[None])[0]
        used, order = len(self.slots), np.array(self.slots)
        steps, changes = self.steps[:, :used], self.changes[:, :used]
        upper = self.products[:, order[:, None], order]
        flat = gradient.reshape(len(gradient), -1).astype(self.dtype)
        first = _triangular(upper, _times(steps, flat)[:, order])
        newest = changes[:, order[-1]]
        both = np.stack([flat - _combined(first, changes, order), newest])
        there, of_newest = solve(both.reshape(2, *gradient.shape)).reshape(both.shape)
        lengths = np.einsum("gp,gp->g", newest, of_newest)
        curvatures = np.einsum("gii->gi", upper)
        there *= np.where(lengths > 0, curvatures[:, -1] / np.where(lengths > 0, lengths, 1.0), 1.0)[:, None]
        second = _triangular(upper, curvatures * first - _times(changes, there)[:, order], transposed=True)
        there += _combined(second, steps, order)
        return -there.reshape(gradient.shape)


def dots(a: Array, b: Array) -> Array:
    """Inner product of each group."""
    if len(a) == 1:
        return np.array([np.vdot(a, b)])
    return np.einsum("gkd,gkd->g", a, b)


def _times(rows: Array, vectors: Array) -> Array:
    """Shape (g, m), from (g, m, p) and (g, p)."""
    if len(rows) == 1:
        return (rows[0] @ vectors[0])[None]
    return np.matmul(rows, vectors[..., None])[..., 0]


def _combined(shares: Array, rows: Array, order: NDArray[np.intp]) -> Array:
    """Σ_i shares_i rows_order(i), shape (g, p)."""
    placed = np.empty(shares.shape, rows.dtype)
    placed[:, order] = shares
    if len(rows) == 1:
        return (placed[0] @ rows[0])[None]
    return np.matmul(placed[:, None], rows)[:, 0]


def _triangular(upper: Array, right: Array, *, transposed: bool = False) -> Array:
    """Solve upper x = right, or its transpose, for each group; what is below the diagonal does not count."""
    if len(upper) == 1:
        found: Array = dtrtrs(upper[0], right[0], trans=int(transposed))[0]
        return found.reshape(right.shape)
    matrices = np.triu(upper).transpose(0, 2, 1) if transposed else np.triu(upper)
    solved: NDArray[Any] = np.linalg.solve(matrices, right[..., None])[..., 0]
    return np.asarray(solved, np.float64)
