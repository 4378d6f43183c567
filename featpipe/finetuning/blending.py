"""Mixup and cutmix: batches in which each image is blended with another, and so are the answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe.recipe import FineTuneConfig

__all__ = ["BatchMix", "apply_mixup_cutmix"]


@dataclass(frozen=True, eq=False)
class BatchMix:
    """With which other row each was blended, and how much of it is still there.

    Attributes
    ----------
    partner : ndarray of shape (b,), int64, or None
    share : float
    """

    partner: NDArray[np.int64] | None = None
    lam: float = 1.0


def apply_mixup_cutmix(inputs: Tensor, tuning: FineTuneConfig) -> tuple[Tensor, BatchMix]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), with torch's random numbers; where both are on, by turns.

    Parameters
    ----------
    inputs : Tensor of shape (b, 3, h, w)
    tuning : FineTuning
    """
    if not (tuning.mixup or tuning.cutmix) or len(inputs) < 2:
        return inputs, BatchMix()
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    use_cutmix = bool(tuning.cutmix) and (not tuning.mixup or rng.random() < 0.5)
    alpha = tuning.cutmix if use_cutmix else tuning.mixup
    lam, partner = float(rng.beta(alpha, alpha)), rng.permutation(len(inputs))
    partner_inputs = inputs[torch.from_numpy(partner)]
    if not use_cutmix:
        return inputs * lam + partner_inputs * (1 - lam), BatchMix(partner, lam)
    height, width = inputs.shape[-2:]
    cut_sizes = [round(length * (1 - lam) ** 0.5) for length in (height, width)]
    top, left = (
        int(rng.integers(0, length - cut_length + 1))
        for length, cut_length in zip((height, width), cut_sizes, strict=True)
    )
    window = (..., slice(top, top + cut_sizes[0]), slice(left, left + cut_sizes[1]))
    mixed = inputs.clone()
    mixed[window] = partner_inputs[window]
    return mixed, BatchMix(partner, 1 - cut_sizes[0] * cut_sizes[1] / (height * width))
