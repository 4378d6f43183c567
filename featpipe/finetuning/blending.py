"""Mixup and cutmix: batches in which each image is blended with another, and so are the answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe.recipe import FineTuning

__all__ = ["Blend", "blended"]


@dataclass(frozen=True, eq=False)
class Blend:
    """With which other row each was blended, and how much of it is still there.

    Attributes
    ----------
    partner : ndarray of shape (b,), int64, or None
    share : float
    """

    partner: NDArray[np.int64] | None = None
    share: float = 1.0


def blended(inputs: Tensor, tuning: FineTuning) -> tuple[Tensor, Blend]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), with torch's random numbers; where both are on, by turns.

    Parameters
    ----------
    inputs : Tensor of shape (b, 3, h, w)
    tuning : FineTuning
    """
    if not (tuning.mixup or tuning.cutmix) or len(inputs) < 2:
        return inputs, Blend()
    random = np.random.default_rng(int(torch.randint(2**31, ())))
    cuts = bool(tuning.cutmix) and (not tuning.mixup or random.random() < 0.5)
    alpha = tuning.cutmix if cuts else tuning.mixup
    share, partner = float(random.beta(alpha, alpha)), random.permutation(len(inputs))
    others = inputs[torch.from_numpy(partner)]
    if not cuts:
        return inputs * share + others * (1 - share), Blend(partner, share)
    height, width = inputs.shape[-2:]
    sides = [round(side * (1 - share) ** 0.5) for side in (height, width)]
    top, left = (int(random.integers(0, side - cut + 1)) for side, cut in zip((height, width), sides, strict=True))
    window = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
    mixed = inputs.clone()
    mixed[window] = others[window]
    return mixed, Blend(partner, 1 - sides[0] * sides[1] / (height * width))
