"""Methods of class-incremental learning on embeddings; `METHODS` is the table of all.

In benchmarks ``joint``, ``statistics``, ``replay`` and ``frozen-old`` are the useful ones. ``naive`` is the lower
baseline; ``distill`` and ``ewc`` are methods of the literature, for comparison.
"""

from __future__ import annotations

from featpipe.incremental.methods.bias_correction import NEW_CLASS_SHARE, compute_margins
from featpipe.incremental.methods.last_layer import make_initial_head, make_old_head, make_regrouped_head
from featpipe.incremental.methods.registry import (
    BIAS_CORRECTED_METHODS,
    METHODS,
    explain_missing_last_layer,
    explain_missing_old_images,
)
from featpipe.incremental.methods.regularized import DISTILL_STRENGTH
from featpipe.incremental.methods.replay import REPLAY_DISTILL_STRENGTH, compute_weights_and_offsets

__all__ = [
    "BIAS_CORRECTED_METHODS",
    "DISTILL_STRENGTH",
    "METHODS",
    "NEW_CLASS_SHARE",
    "REPLAY_DISTILL_STRENGTH",
    "compute_margins",
    "compute_weights_and_offsets",
    "explain_missing_last_layer",
    "explain_missing_old_images",
    "make_initial_head",
    "make_old_head",
    "make_regrouped_head",
]
