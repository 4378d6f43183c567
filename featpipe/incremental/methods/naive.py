"""``naive``: train on the new images alone, the baseline that shows what forgetting is."""

from __future__ import annotations

import numpy as np
from sklearn.pipeline import Pipeline

from featpipe.incremental.last_layer_loss import LastLayerObjective, fit_last_layer
from featpipe.incremental.methods.last_layer import init_layer, with_last_layer
from featpipe.incremental.problem import EpochCallback, IncrementalStep


def fit_naive(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Continue training the last layer on new rows, with nothing against forgetting."""
    assert step.layer is not None
    Z, y = step.compute_features(step.new.X), step.new.y
    objective = LastLayerObjective(Z, y, np.ones(len(y)), step.ridge)
    return with_last_layer(
        step, fit_last_layer(objective, init_layer(step.layer, Z, y, step.k), step.settings.epochs, on_epoch)
    )
