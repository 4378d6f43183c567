"""The objective of logistic regression: value and gradient, in one pass over blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featpipe.heads.halves import as_float
from featpipe.workers import Workers

__all__ = ["Point", "Problem"]

Array = NDArray[np.float64]

NUMBERS_IN_A_BLOCK = 1 << 20
ROWS_IN_A_BLOCK = (1024, 8192)
FEWEST_ROWS, FEWEST_BLOCKS = 512, 2
NUMBERS_READY = 1 << 24


@dataclass(frozen=True, eq=False)
class Point:
    """The objective at one theta = [W, b] of shape (k, d + 1), for each of g independent groups of its rows.

    Attributes
    ----------
    theta : ndarray of shape (k, d + 1)
    losses : ndarray of shape (g,)
        Σ w_i loss_i.
    values : ndarray of shape (g,)
        The losses and the penalty.
    gradient : ndarray of shape (k, d + 1)
        Of the values.
    """

    theta: Array
    losses: Array
    values: Array
    gradient: Array


@dataclass(frozen=True, eq=False)
class Problem:
    """f(W, b) = Σ w_i loss(y_i, W x_i + b) + ½ ridge ‖W‖², to be minimised over W of shape (k, d) and b of shape (k,).

    The softmax makes one group of all k rows of W; sigmoids make k groups of one row, independent of each other, which
    share the passes over X.

    Attributes
    ----------
    X : array of shape (n, d)
        Anything that gives ndarrays for slices and for sorted row numbers, of any float type (a memory map): it is
        read block by block, and never copied as a whole.
    Y : ndarray of shape (n,) or (n, k), int64
        Codes for the softmax, 0 and 1 for sigmoids.
    weights : ndarray of the shape of Y, float64
        Weight of each loss, the inverse penalty C included.
    link : {"softmax", "sigmoid"}
    k : int
    fit_intercept : bool
        Without it b stays zero.
    ridge : float
    center, scale : ndarray of shape (d,) or None
        Each block is read as (x - center) / scale, so that standardised rows need no copy either.
    workers : Workers
    ready : mapping from dtype to ndarray of shape (n, d)
        All rows as the problem means them, where they are few.
    """

    X: Any
    Y: NDArray[np.int64]
    weights: Array
    link: Literal["softmax", "sigmoid"]
    k: int
    fit_intercept: bool = True
    ridge: float = 1.0
    center: NDArray[Any] | None = None
    scale: NDArray[Any] | None = None
    workers: Workers = field(default_factory=Workers)
    ready: Mapping[Any, NDArray[Any]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return int(self.X.shape[0])

    @property
    def d(self) -> int:
        return int(self.X.shape[1])

    @property
    def groups(self) -> int:
        return 1 if self.link == "softmax" else self.k

    def only(self, groups: NDArray[np.intp]) -> Problem:
        """The problem of some of the groups."""
        return replace(self, Y=self.Y[:, groups], weights=self.weights[:, groups], k=len(groups))

    def rows(self, which: slice | NDArray[np.intp], dtype: Any) -> NDArray[Any]:
        """Some rows of X as the problem means them."""
        if dtype in self.ready:
            return self.ready[dtype][which]
        block = as_float(self.X[which], dtype)
        if self.center is not None:
            block = block - np.asarray(self.center, dtype)
        if self.scale is not None:
            block = block / np.asarray(self.scale, dtype)
        return block

    def ready_in(self, dtype: Any) -> Problem:
        """The same problem; few rows are converted once, and not in every pass."""
        if dtype in self.ready or type(self.X) is not np.ndarray or self.X.size > NUMBERS_READY:
            return self
        return replace(self, ready={dtype: np.ascontiguousarray(self.rows(slice(None), dtype))})

    def start(self) -> Array:
        """Zero weights, and the intercepts that are best for them: a point to begin at."""
        theta = np.zeros((self.k, self.d + 1))
        if self.fit_intercept:
            if self.link == "softmax":
                theta[:, -1] = np.log(np.maximum(np.bincount(self.Y, self.weights, self.k), 1e-300))
                theta[:, -1] -= theta[:, -1].mean()
            else:
                ones = (self.weights * self.Y).sum(axis=0)
                theta[:, -1] = np.log(ones) - np.log(self.weights.sum(axis=0) - ones)
        return theta

    def loss_at_start(self) -> float:
        """Σ w_i loss_i of the softmax at `start`, without a pass."""
        totals = np.bincount(self.Y, self.weights, self.k)
        scores = self.start()[:, -1]
        return float(totals.sum() * np.logaddexp.reduce(scores) - totals @ scores)

    def at(self, theta: Array, dtype: Any = np.float64) -> Point:
        """Value and gradient, the products over rows in ``dtype``; sums over blocks are in float64 always."""
        W, b = np.asarray(theta[:, :-1], dtype), np.asarray(theta[:, -1], dtype)

        def one(block: slice) -> tuple[Array, NDArray[Any], NDArray[Any]]:
            x = self.rows(block, dtype)
            scores = _product(x, W.T)
            scores += b
            losses = self._losses_to_residuals(scores, block)
            return losses, _product(scores.T, x), scores.sum(axis=0)

        losses, gradient = np.zeros(self.groups), np.zeros((self.k, self.d + 1))
        for of_block, in_W, in_b in self.workers.map(one, self.blocks()):
            losses += of_block
            gradient[:, :-1] += in_W
            gradient[:, -1] += in_b
        gradient[:, :-1] += self.ridge * theta[:, :-1]
        if not self.fit_intercept:
            gradient[:, -1] = 0.0
        return Point(theta, losses, losses + self._penalties(theta), gradient)

    def under(self, ridge: float, point: Point) -> tuple[Problem, Point]:
        """The problem with another penalty, and a point of this one as one of that: no row is needed."""
        W = point.theta[:, :-1]
        gradient = point.gradient.copy()
        gradient[:, :-1] += (ridge - self.ridge) * W
        other = replace(self, ridge=ridge)
        return other, replace(point, values=point.losses + other._penalties(point.theta), gradient=gradient)

    def _penalties(self, theta: Array) -> Array:
        squares = np.einsum("kd,kd->k", theta[:, :-1], theta[:, :-1])
        penalties: Array = 0.5 * self.ridge * squares.reshape(self.groups, -1).sum(axis=1)
        return penalties

    def probabilities(self, theta: Array, x: NDArray[Any]) -> NDArray[Any]:
        """Of rows that `rows` gave, shape (b, k)."""
        scores = _product(x, np.asarray(theta[:, :-1].T, x.dtype))
        scores += np.asarray(theta[:, -1], x.dtype)
        if self.link == "softmax":
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1, keepdims=True)
            return scores
        return _sigmoid(scores)[0]

    def intercept_curvature(self, theta: Array, dtype: Any) -> Array:
        """Second derivatives in b: (1, k, k) for the softmax, (k, 1, 1) for sigmoids."""

        def one(block: slice) -> Array:
            p = self.probabilities(theta, self.rows(block, dtype)).astype(np.float64)
            if self.link == "sigmoid":
                return (self.weights[block] * p * (1 - p)).sum(axis=0)[:, None, None]
            weighted = p * self.weights[block, None]
            return (np.diag(weighted.sum(axis=0)) - p.T @ weighted)[None]

        return sum(self.workers.map(one, self.blocks()), np.zeros((1, 1, 1)))

    def intercept_decrements(self, point: Point, dtype: Any) -> Array:
        """What b has yet to gain, by its Newton decrement, shape (g,); products over rows are in ``dtype``."""
        slopes = point.gradient[:, -1].reshape(self.groups, -1)
        pairs = zip(slopes, self.intercept_curvature(point.theta, dtype), strict=True)
        return np.array([0.5 * abs(float(s @ np.linalg.lstsq(c, s, rcond=1e-12)[0])) for s, c in pairs])

    def blocks(self) -> Iterator[slice]:
        """Row ranges whose numbers stay in a core's cache."""
        least, most = ROWS_IN_A_BLOCK
        length = min(max(least, NUMBERS_IN_A_BLOCK // max(self.d, self.k)), most)
        length = min(length, max(FEWEST_ROWS, -(-self.n // FEWEST_BLOCKS)))
        return (slice(start, min(start + length, self.n)) for start in range(0, self.n, length))

    def _losses_to_residuals(self, scores: NDArray[Any], block: slice) -> Array:
        """Σ w_i loss_i of each group; the scores (b, k) become w_i (p_i - y_i) in place."""
        weights, Y = self.weights[block], self.Y[block]
        if self.link == "sigmoid":
            signs = (1 - 2 * Y).astype(scores.dtype)
            scores *= signs
            p, exponentials = _sigmoid(scores)
            losses = np.log1p(exponentials, out=exponentials)
            losses += np.maximum(scores, 0)
            np.multiply(p * signs, weights, out=scores, casting="same_kind")
            return np.einsum("ik,ik->k", weights, losses)
        chosen = np.arange(len(Y)), Y
        highest = scores.max(axis=1)
        scores -= highest[:, None]
        behind = scores[chosen]
        np.exp(scores, out=scores)
        right = scores[chosen]
        scores[chosen] = 0
        # Sums without the right class: what is near 1 keeps no digits of a small loss.
        others = scores.sum(axis=1)
        losses = np.where(behind == 0, np.log1p(others), np.log(others + right) - behind).astype(np.float64)
        factors = weights.astype(scores.dtype) / (others + right)
        scores *= factors[:, None]
        scores[chosen] = -others * factors
        return np.array([weights @ losses])


def _product(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """``a @ b`` of finite numbers, never invalid unless it overflows, and that is told as such.

    BLAS may raise the processor's flag all the same, for what lies in memory beside a small matrix.
    """
    with np.errstate(invalid="ignore"):
        found: NDArray[Any] = a @ b
    return found


def _sigmoid(scores: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probabilities, and exp(-|score|)."""
    exponentials = np.exp(-np.abs(scores))
    p = np.where(scores >= 0, scores.dtype.type(1), exponentials)
    p /= 1 + exponentials
    return p, exponentials
