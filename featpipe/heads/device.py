"""The objective of logistic regression with its passes over the rows on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.heads.objective import Point, Problem

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceProblem", "device_named"]

Array = NDArray[np.float64]

ROWS_AT_ONCE = 1 << 16  # sums over more are in float64


def device_named(name: str) -> Any:
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
class DeviceProblem(Problem):
    """A problem whose rows lie on a device; points come back as numpy.

    Attributes
    ----------
    device : torch.device
    held : dict
        What was moved there, and from which array.
    """

    device: Any = None
    held: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def at(self, theta: Array, dtype: Any = np.float64) -> Point:
        """Value and gradient, as `Problem.at`."""
        import torch

        kind = torch.float32 if np.dtype(dtype) == np.float32 else torch.float64
        X, Y, weights = self._rows_there(dtype), self._there("Y", self.Y), self._there("weights", self.weights)
        W = torch.as_tensor(theta[:, :-1], dtype=kind, device=self.device)
        b = torch.as_tensor(theta[:, -1], dtype=kind, device=self.device)
        losses = torch.zeros(self.groups, dtype=torch.float64, device=self.device)
        gradient = torch.zeros((self.k, self.d + 1), dtype=torch.float64, device=self.device)
        for start in range(0, self.n, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            scores = torch.addmm(b, X[rows], W.T)
            losses += self._residuals(scores, Y[rows], weights[rows])
            gradient[:, :-1] += scores.T @ X[rows]
            gradient[:, -1] += scores.sum(dim=0)
        here, slopes = losses.cpu().numpy(), gradient.cpu().numpy()
        slopes[:, :-1] += self.ridge * theta[:, :-1]
        if not self.fit_intercept:
            slopes[:, -1] = 0.0
        return Point(theta, here, here + self._penalties(theta), slopes)

    def _residuals(self, scores: torch.Tensor, Y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Σ w_i loss_i of each group; the scores become w_i (p_i - y_i) in place."""
        import torch

        if self.link == "sigmoid":
            signs = (1 - 2 * Y).to(scores.dtype)
            scores *= signs
            losses = scores.clamp(min=0) + torch.log1p(torch.exp(-scores.abs()))
            scores.sigmoid_().mul_(signs).mul_(weights)
            return (losses * weights).sum(dim=0, dtype=torch.float64)
        chosen = Y[:, None]
        scores -= scores.amax(dim=1, keepdim=True)
        behind = scores.gather(1, chosen)
        scores.exp_()
        right = scores.gather(1, chosen)
        scores.scatter_(1, chosen, 0.0)
        others = scores.sum(dim=1, keepdim=True)
        losses = torch.where(behind == 0, torch.log1p(others), torch.log(others + right) - behind)
        factors = weights[:, None].to(scores.dtype) / (others + right)
        scores *= factors
        scores.scatter_(1, chosen, -others * factors)
        return (losses[:, 0] * weights).sum(dtype=torch.float64)[None]

    def _rows_there(self, dtype: Any) -> torch.Tensor:
        import torch

        def moved() -> torch.Tensor:
            blocks = (torch.from_numpy(np.ascontiguousarray(self.rows(block, dtype))) for block in self.blocks())
            return torch.cat([block.to(self.device) for block in blocks])

        return self._once(f"X {np.dtype(dtype).name}", self.X, moved)

    def _there(self, name: str, array: NDArray[Any]) -> torch.Tensor:
        import torch

        return self._once(name, array, lambda: torch.from_numpy(np.ascontiguousarray(array)).to(self.device))

    def _once(self, name: str, source: Any, move: Any) -> torch.Tensor:
        """What was moved before, if it was of this very array: a part of a problem has others."""
        known = self.held.get(name)
        if known is None or known[0] is not source:
            known = self.held[name] = (source, move())
        moved: torch.Tensor = known[1]
        return moved
