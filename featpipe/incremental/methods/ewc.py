"""``ewc``: train on new rows while elastic weight consolidation holds the old weights."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.heads import LastLayer, compute_fisher_diagonal
from featpipe.incremental.last_layer_loss import LastLayerObjective, fit_last_layer
from featpipe.incremental.methods.bias_correction import fit_with_bias_correction
from featpipe.incremental.methods.exemplars import WeightedEmbeddings
from featpipe.incremental.methods.last_layer import init_fold_layer, make_quadratic_penalty
from featpipe.incremental.problem import EpochCallback, IncrementalStep


def fit_ewc(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Train on new rows; each old weight is pulled to its old value by its importance.

    With strength 1, the pull is the quadratic approximation of the loss on all old rows.
    """
    assert step.layer is not None
    importances: NDArray[Any]
    if step.replay_memory is not None and step.replay_memory.importances is not None:
        importances, n = step.replay_memory.importances[: step.k_old], int(step.replay_memory.counts.sum())
    else:
        importances, n = compute_fisher_diagonal(step.layer, step.compute_features(step.old.X)), len(step.old)
    strength = step.settings.strength
    ridge, quadratic_penalty = make_quadratic_penalty(step, n * (1.0 if strength is None else strength) * importances)

    def fit(rows: WeightedEmbeddings, callback: EpochCallback | None) -> LastLayer:
        Z = step.compute_features(rows.X)
        objective = LastLayerObjective(Z, rows.y, rows.weights, ridge, quadratic_penalty=quadratic_penalty)
        return fit_last_layer(objective, init_fold_layer(step, Z, rows.y), step.settings.epochs, callback)

    return fit_with_bias_correction(step, fit, on_epoch)
