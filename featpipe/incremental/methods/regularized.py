"""``naive``, ``distill`` and ``ewc``: train the last layer on new rows alone, without or with regularization."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.heads import LastLayer, compute_fisher_diagonal
from featpipe.incremental.last_layer_loss import (
    Array,
    DistillationTerm,
    EpochCallback,
    LastLayerObjective,
    QuadraticPenalty,
    fit_last_layer,
)
from featpipe.incremental.methods.bias_correction import fit_with_bias_correction
from featpipe.incremental.methods.last_layer import init_fold_layer, with_last_layer
from featpipe.incremental.methods.replay import WeightedEmbeddings
from featpipe.incremental.problem import IncrementalStep

DISTILL_STRENGTH = 20.0


def fit_naive(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Continue training the last layer on new rows, without regularization: the lower baseline."""
    Z, y = step.compute_features(step.new.features), step.new.y
    objective = LastLayerObjective(Z, y, np.ones(len(y)), step.ridge)
    layer = fit_last_layer(objective, init_fold_layer(step, Z, y), step.settings.epochs, on_epoch)
    return with_last_layer(step, layer)


def fit_distill(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Train on new rows, with the old head's predictions as soft targets and a pull of old weights to their values."""
    strength = DISTILL_STRENGTH if step.settings.strength is None else step.settings.strength
    ridge, quadratic_penalty = make_quadratic_penalty(step)

    def fit(rows: WeightedEmbeddings, callback: EpochCallback | None) -> LastLayer:
        Z, old_scores = step.compute_features(rows.X), step.compute_old_scores(rows.X)
        distillation = DistillationTerm(old_scores, step.settings.temperature, strength)
        objective = LastLayerObjective(
            Z, rows.y, rows.weights, ridge, distillation=distillation, quadratic_penalty=quadratic_penalty
        )
        return fit_last_layer(objective, init_fold_layer(step, Z, rows.y), step.settings.epochs, callback)

    return fit_with_bias_correction(step, fit, on_epoch)


def fit_ewc(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Train on new rows; elastic weight consolidation pulls each old weight to its old value by its importance.

    With strength 1, the pull is the quadratic approximation of the loss on all old rows.
    """
    assert step.layer is not None
    memory, strength = step.replay_memory, step.settings.strength
    if memory is not None and memory.importances is not None:
        importances: NDArray[Any] = memory.importances[: step.k_old]
        n = int(memory.counts.sum())
    else:
        importances = compute_fisher_diagonal(step.layer, step.compute_features(step.old.features))
        n = len(step.old)
    ridge, quadratic_penalty = make_quadratic_penalty(step, n * (1.0 if strength is None else strength) * importances)

    def fit(rows: WeightedEmbeddings, callback: EpochCallback | None) -> LastLayer:
        Z = step.compute_features(rows.X)
        objective = LastLayerObjective(Z, rows.y, rows.weights, ridge, quadratic_penalty=quadratic_penalty)
        return fit_last_layer(objective, init_fold_layer(step, Z, rows.y), step.settings.epochs, callback)

    return fit_with_bias_correction(step, fit, on_epoch)


def make_quadratic_penalty(
    step: IncrementalStep, importances: NDArray[np.floating] | float = 0.0
) -> tuple[Array, QuadraticPenalty]:
    """The head's L2 penalty, which pulls new weights to zero and old ones to their old values.

    A pull to zero would make the head forget old classes by the penalty alone, the faster the fewer new rows there are.

    Parameters
    ----------
    step : IncrementalStep
    importances : float or ndarray of shape (k_old, p + 1)
        Added to the strength of the pull on old weights.

    Returns
    -------
    ridge : ndarray of shape (k, 1)
    penalty : QuadraticPenalty
    """
    assert step.layer is not None
    ridge = np.where(np.arange(step.k) < step.k_old, 0.0, step.ridge)[:, None]
    return ridge, QuadraticPenalty.from_layer(step.layer, step.k, step.ridge, importances)
