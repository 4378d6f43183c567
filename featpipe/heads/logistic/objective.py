"""The objective of logistic regression: value and gradient in one pass over blocks of rows, on CPUs or a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featpipe.runtime import BlasThreadPool, convert_float

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]

VALUES_PER_BLOCK = 1 << 20
BLOCK_ROWS_RANGE = (1024, 8192)
MIN_ROWS_PER_BLOCK, MIN_BLOCKS = 512, 2
MAX_MATERIALIZED_VALUES = 1 << 24


@dataclass(frozen=True, eq=False)
class Point:
    """Value and gradient at theta = [W, b] of shape (k, d + 1), for g independent groups of its rows.

    Attributes
    ----------
    theta : ndarray of shape (k, d + 1)
    losses : ndarray of shape (g,)
        Σ w_i loss_i.
    values : ndarray of shape (g,)
        Losses plus penalty.
    gradient : ndarray of shape (k, d + 1)
        Gradient of the values.
    """

    theta: Array
    losses: Array
    values: Array
    gradient: Array


@dataclass(frozen=True, eq=False)
class LogisticProblem:
    """f(W, b) = Σ w_i loss(y_i, W x_i + b) + ½ ridge ‖W‖², minimised over W (k, d) and b (k,).

    With the softmax all k rows of W form one group; with sigmoids each row is an independent group, and all groups
    share the passes over X.

    Attributes
    ----------
    X : array of shape (n, d)
        Anything of a float type that returns ndarrays for slices and for sorted row numbers, such as a memory map. It
        is read in blocks and never copied as a whole.
    Y : ndarray of shape (n,) or (n, k), int64
        Class codes for the softmax, 0 and 1 for sigmoids.
    weights : ndarray of the shape of Y, float64
        Weight of each loss, including the factor C.
    link : {"softmax", "sigmoid"}
    k : int
    fit_intercept : bool
        Otherwise b stays zero.
    ridge : float
    center, scale : ndarray of shape (d,) or None
        Each block is transformed to (x - center) / scale, so that standardisation needs no copy.
    workers : BlasThreadPool
    materialized : dict
        All transformed rows by dtype, if they are few; by dtype and device, if they are on a device.
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
    workers: BlasThreadPool = field(default_factory=BlasThreadPool)
    materialized: dict[Any, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return int(self.X.shape[0])

    @property
    def d(self) -> int:
        return int(self.X.shape[1])

    @property
    def groups(self) -> int:
        return 1 if self.link == "softmax" else self.k

    def select_groups(self, groups: NDArray[np.intp]) -> LogisticProblem:
        """The problem restricted to some groups."""
        return replace(self, Y=self.Y[:, groups], weights=self.weights[:, groups], k=len(groups))

    def read_rows(self, rows: slice | NDArray[np.intp], dtype: Any) -> NDArray[Any]:
        """Rows of X, converted and transformed."""
        if dtype in self.materialized:
            block: NDArray[Any] = self.materialized[dtype][rows]
            return block
        block = convert_float(self.X[rows], dtype)
        if self.center is not None:
            block = block - np.asarray(self.center, dtype)
        if self.scale is not None:
            block = block / np.asarray(self.scale, dtype)
        return block

    def materialize(self, dtype: Any) -> LogisticProblem:
        """Convert few rows once instead of in every pass."""
        if dtype in self.materialized or type(self.X) is not np.ndarray or self.X.size > MAX_MATERIALIZED_VALUES:
            return self
        return replace(self, materialized={dtype: np.ascontiguousarray(self.read_rows(slice(None), dtype))})

    def initial_theta(self) -> Array:
        """Zero weights with their optimal intercepts."""
        theta = np.zeros((self.k, self.d + 1))
        if self.fit_intercept:
            if self.link == "softmax":
                theta[:, -1] = np.log(np.maximum(np.bincount(self.Y, self.weights, self.k), 1e-300))
                theta[:, -1] -= theta[:, -1].mean()
            else:
                positive_weights = (self.weights * self.Y).sum(axis=0)
                theta[:, -1] = np.log(positive_weights) - np.log(self.weights.sum(axis=0) - positive_weights)
        return theta

    def initial_loss(self) -> float:
        """Σ w_i loss_i of the softmax at `initial_theta`, without a pass over the rows."""
        totals = np.bincount(self.Y, self.weights, self.k)
        scores = self.initial_theta()[:, -1]
        return float(totals.sum() * np.logaddexp.reduce(scores) - totals @ scores)

    def evaluate(self, theta: Array, dtype: Any = np.float64) -> Point:
        """Value and gradient; products over rows are in ``dtype``, sums over blocks always in float64."""
        W, b = np.asarray(theta[:, :-1], dtype), np.asarray(theta[:, -1], dtype)

        def evaluate_block(block: slice) -> tuple[Array, NDArray[Any], NDArray[Any]]:
            x = self.read_rows(block, dtype)
            scores = _multiply(x, W.T)
            scores += b
            losses = self._replace_scores_by_residuals(scores, block)
            return losses, _multiply(scores.T, x), scores.sum(axis=0)

        losses, gradient = np.zeros(self.groups), np.zeros((self.k, self.d + 1))
        for block_losses, block_gradient_W, block_gradient_b in self.workers.map(evaluate_block, self.row_blocks()):
            losses += block_losses
            gradient[:, :-1] += block_gradient_W
            gradient[:, -1] += block_gradient_b
        gradient[:, :-1] += self.ridge * theta[:, :-1]
        if not self.fit_intercept:
            gradient[:, -1] = 0.0
        return Point(theta, losses, losses + self._compute_penalties(theta), gradient)

    def with_ridge(self, ridge: float, point: Point) -> tuple[LogisticProblem, Point]:
        """The problem with another penalty, and a point converted to it without a pass over the rows."""
        W = point.theta[:, :-1]
        gradient = point.gradient.copy()
        gradient[:, :-1] += (ridge - self.ridge) * W
        problem = replace(self, ridge=ridge)
        return problem, replace(point, values=point.losses + problem._compute_penalties(point.theta), gradient=gradient)

    def _compute_penalties(self, theta: Array) -> Array:
        squares = np.einsum("kd,kd->k", theta[:, :-1], theta[:, :-1])
        penalties: Array = 0.5 * self.ridge * squares.reshape(self.groups, -1).sum(axis=1)
        return penalties

    def probabilities(self, theta: Array, x: NDArray[Any]) -> NDArray[Any]:
        """Probabilities of shape (b, k) for rows from `read_rows`."""
        scores = _multiply(x, np.asarray(theta[:, :-1].T, x.dtype))
        scores += np.asarray(theta[:, -1], x.dtype)
        if self.link == "softmax":
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1, keepdims=True)
            return scores
        return _compute_sigmoid(scores)[0]

    def intercept_curvature(self, theta: Array, dtype: Any) -> Array:
        """Hessian in b: (1, k, k) for the softmax, (k, 1, 1) for sigmoids."""

        def block_curvature(block: slice) -> Array:
            p = self.probabilities(theta, self.read_rows(block, dtype)).astype(np.float64)
            if self.link == "sigmoid":
                return (self.weights[block] * p * (1 - p)).sum(axis=0)[:, None, None]
            weighted = p * self.weights[block, None]
            return (np.diag(weighted.sum(axis=0)) - p.T @ weighted)[None]

        return sum(self.workers.map(block_curvature, self.row_blocks()), np.zeros((1, 1, 1)))

    def intercept_decrements(self, point: Point, dtype: Any) -> Array:
        """The Newton decrement in b, an estimate of its gap, shape (g,); products over rows are in ``dtype``."""
        slopes = point.gradient[:, -1].reshape(self.groups, -1)
        pairs = zip(slopes, self.intercept_curvature(point.theta, dtype), strict=True)
        return np.array([0.5 * abs(float(s @ np.linalg.lstsq(c, s, rcond=1e-12)[0])) for s, c in pairs])

    def row_blocks(self) -> Iterator[slice]:
        """Slices of rows that fit into a core's cache."""
        min_rows, max_rows = BLOCK_ROWS_RANGE
        block_rows = min(max(min_rows, VALUES_PER_BLOCK // max(self.d, self.k)), max_rows)
        block_rows = min(block_rows, max(MIN_ROWS_PER_BLOCK, -(-self.n // MIN_BLOCKS)))
        return (slice(start, min(start + block_rows, self.n)) for start in range(0, self.n, block_rows))

    def _replace_scores_by_residuals(self, scores: NDArray[Any], block: slice) -> Array:
        """Σ w_i loss_i of each group; the scores (b, k) become w_i (p_i - y_i) in place."""
        weights, Y = self.weights[block], self.Y[block]
        if self.link == "sigmoid":
            signs = (1 - 2 * Y).astype(scores.dtype)
            scores *= signs
            p, exponentials = _compute_sigmoid(scores)
            losses = np.log1p(exponentials, out=exponentials)
            losses += np.maximum(scores, 0)
            np.multiply(p * signs, weights, out=scores, casting="same_kind")
            return np.einsum("ik,ik->k", weights, losses)
        true_class = np.arange(len(Y)), Y
        max_scores = scores.max(axis=1)
        scores -= max_scores[:, None]
        true_log_ratios = scores[true_class]
        np.exp(scores, out=scores)
        true_exponentials = scores[true_class]
        scores[true_class] = 0
        # Sums without the true class: 1 - p would lose the digits of a small loss.
        other_exponentials = scores.sum(axis=1)
        losses = np.where(
            true_log_ratios == 0,
            np.log1p(other_exponentials),
            np.log(other_exponentials + true_exponentials) - true_log_ratios,
        ).astype(np.float64)
        factors = weights.astype(scores.dtype) / (other_exponentials + true_exponentials)
        scores *= factors[:, None]
        scores[true_class] = -other_exponentials * factors
        return np.array([weights @ losses])


def _multiply(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """``a @ b`` of finite numbers, without the warning "invalid value".

    BLAS may set the processor's flag because it reads memory beside a small matrix.
    """
    with np.errstate(invalid="ignore"):
        result: NDArray[Any] = a @ b
    return result


def _compute_sigmoid(scores: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probabilities, and exp(-|score|)."""
    exponentials = np.exp(-np.abs(scores))
    p = np.where(scores >= 0, scores.dtype.type(1), exponentials)
    p /= 1 + exponentials
    return p, exponentials


DEVICE_BLOCK_ROWS = 1 << 16  # sums over blocks are in float64


def get_device(name: str) -> Any:
    """A torch device.

    Raises
    ------
    ValueError
        If the device is not available.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {name!r}, which is not available ({' '.join(str(error).split())[:100]}); give cpu or auto"
        ) from None
    return device


@dataclass(frozen=True, eq=False)
class DeviceProblem(LogisticProblem):
    """A problem whose rows are on a torch device; points are in numpy.

    Attributes
    ----------
    device : torch.device
    """

    device: Any = None

    def evaluate(self, theta: Array, dtype: Any = np.float64) -> Point:
        """Value and gradient, as `LogisticProblem.evaluate`."""
        import torch

        torch_dtype = torch.float32 if np.dtype(dtype) == np.float32 else torch.float64
        X = self._move_rows_to_device(dtype)
        Y, weights = (torch.tensor(array, device=self.device) for array in (self.Y, self.weights))
        W = torch.as_tensor(theta[:, :-1], dtype=torch_dtype, device=self.device)
        b = torch.as_tensor(theta[:, -1], dtype=torch_dtype, device=self.device)
        losses = torch.zeros(self.groups, dtype=torch.float64, device=self.device)
        gradient = torch.zeros((self.k, self.d + 1), dtype=torch.float64, device=self.device)
        for start in range(0, self.n, DEVICE_BLOCK_ROWS):
            block = slice(start, start + DEVICE_BLOCK_ROWS)
            scores = torch.addmm(b, X[block], W.T)
            losses += self._replace_tensor_by_residuals(scores, Y[block], weights[block])
            gradient[:, :-1] += scores.T @ X[block]
            gradient[:, -1] += scores.sum(dim=0)
        group_losses, gradient_array = losses.cpu().numpy(), gradient.cpu().numpy()
        gradient_array[:, :-1] += self.ridge * theta[:, :-1]
        if not self.fit_intercept:
            gradient_array[:, -1] = 0.0
        return Point(theta, group_losses, group_losses + self._compute_penalties(theta), gradient_array)

    def _replace_tensor_by_residuals(
        self, scores: torch.Tensor, Y: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Σ w_i loss_i of each group; the scores become w_i (p_i - y_i) in place."""
        import torch

        if self.link == "sigmoid":
            signs = (1 - 2 * Y).to(scores.dtype)
            scores *= signs
            losses = scores.clamp(min=0) + torch.log1p(torch.exp(-scores.abs()))
            scores.sigmoid_().mul_(signs).mul_(weights)
            return (losses * weights).sum(dim=0, dtype=torch.float64)
        target_columns = Y[:, None]
        scores -= scores.amax(dim=1, keepdim=True)
        target_margin = scores.gather(1, target_columns)
        scores.exp_()
        target_exp = scores.gather(1, target_columns)
        scores.scatter_(1, target_columns, 0.0)
        other_exp = scores.sum(dim=1, keepdim=True)
        losses = torch.where(
            target_margin == 0, torch.log1p(other_exp), torch.log(other_exp + target_exp) - target_margin
        )
        row_factors = weights[:, None].to(scores.dtype) / (other_exp + target_exp)
        scores *= row_factors
        scores.scatter_(1, target_columns, -other_exp * row_factors)
        return (losses[:, 0] * weights).sum(dtype=torch.float64)[None]

    def _move_rows_to_device(self, dtype: Any) -> torch.Tensor:
        """All rows on the device, moved once."""
        import torch

        key = (dtype, self.device)
        if key not in self.materialized:
            blocks = (np.ascontiguousarray(self.read_rows(block, dtype)) for block in self.row_blocks())
            self.materialized[key] = torch.cat([torch.from_numpy(block).to(self.device) for block in blocks])
        tensor: torch.Tensor = self.materialized[key]
        return tensor
