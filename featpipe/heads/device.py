"""The objective of logistic regression with its passes over the rows on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.heads.objective import LogisticProblem, Point

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceProblem", "get_device"]

Array = NDArray[np.float64]

DEVICE_BLOCK_ROWS = 1 << 16  # sums over more are in float64


def get_device(name: str) -> Any:
    """A device of torch.

    Raises
    ------
    ValueError
        If it is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which is not there ({' '.join(str(error).split())[:100]})") from None
    return device


@dataclass(frozen=True, eq=False)
class DeviceProblem(LogisticProblem):
    """A problem whose rows lie on a device; points come back as numpy.

    Attributes
    ----------
    device : torch.device
    held : dict
        What was moved there, and from which array.
    """

    device: Any = None
    tensor_cache: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def evaluate(self, theta: Array, dtype: Any = np.float64) -> Point:
        """Value and gradient, as `Problem.at`."""
        import torch

        torch_dtype = torch.float32 if np.dtype(dtype) == np.float32 else torch.float64
        X, Y, weights = self._device_rows(dtype), self._to_device("Y", self.Y), self._to_device("weights", self.weights)
        W = torch.as_tensor(theta[:, :-1], dtype=torch_dtype, device=self.device)
        b = torch.as_tensor(theta[:, -1], dtype=torch_dtype, device=self.device)
        losses = torch.zeros(self.groups, dtype=torch.float64, device=self.device)
        gradient = torch.zeros((self.k, self.d + 1), dtype=torch.float64, device=self.device)
        for start in range(0, self.n, DEVICE_BLOCK_ROWS):
            block = slice(start, start + DEVICE_BLOCK_ROWS)
            scores = torch.addmm(b, X[block], W.T)
            losses += self._residuals(scores, Y[block], weights[block])
            gradient[:, :-1] += scores.T @ X[block]
            gradient[:, -1] += scores.sum(dim=0)
        group_losses, gradient_array = losses.cpu().numpy(), gradient.cpu().numpy()
        gradient_array[:, :-1] += self.ridge * theta[:, :-1]
        if not self.fit_intercept:
            gradient_array[:, -1] = 0.0
        return Point(theta, group_losses, group_losses + self._penalties(theta), gradient_array)

    def _residuals(self, scores: torch.Tensor, Y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
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

    def _device_rows(self, dtype: Any) -> torch.Tensor:
        import torch

        def move_rows() -> torch.Tensor:
            blocks = (
                torch.from_numpy(np.ascontiguousarray(self.read_rows(block, dtype))) for block in self.row_blocks()
            )
            return torch.cat([block.to(self.device) for block in blocks])

        return self._get_cached(f"X {np.dtype(dtype).name}", self.X, move_rows)

    def _to_device(self, name: str, array: NDArray[Any]) -> torch.Tensor:
        import torch

        return self._get_cached(name, array, lambda: torch.from_numpy(np.ascontiguousarray(array)).to(self.device))

    def _get_cached(self, name: str, source: Any, load_tensor: Any) -> torch.Tensor:
        """What was moved before, if it was of this very array: a part of a problem has others."""
        cached = self.tensor_cache.get(name)
        if cached is None or cached[0] is not source:
            cached = self.tensor_cache[name] = (source, load_tensor())
        tensor: torch.Tensor = cached[1]
        return tensor
