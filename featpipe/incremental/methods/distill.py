"""``distill``: train on new rows with the old head's answers as soft targets."""

from __future__ import annotations

from sklearn.pipeline import Pipeline

from featpipe.heads import LastLayer
from featpipe.incremental.last_layer_loss import DistillationTerm, LastLayerObjective, fit_last_layer
from featpipe.incremental.methods.bias_correction import fit_with_bias_correction
from featpipe.incremental.methods.exemplars import WeightedEmbeddings
from featpipe.incremental.methods.last_layer import init_fold_layer, make_quadratic_penalty
from featpipe.incremental.problem import EpochCallback, IncrementalStep

DISTILL_STRENGTH = 20.0


def fit_distill(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Train on new rows; old weights are pulled to their old values, and an offset is fitted afterwards."""

    def fit(rows: WeightedEmbeddings, callback: EpochCallback | None) -> LastLayer:
        assert step.layer is not None
        Z, strength = step.compute_features(rows.X), step.settings.strength
        distillation = DistillationTerm(
            step.compute_old_scores(rows.X),
            step.settings.temperature,
            DISTILL_STRENGTH if strength is None else strength,
        )
        ridge, quadratic_penalty = make_quadratic_penalty(step)
        objective = LastLayerObjective(
            Z, rows.y, rows.weights, ridge, distillation=distillation, quadratic_penalty=quadratic_penalty
        )
        return fit_last_layer(objective, init_fold_layer(step, Z, rows.y), step.settings.epochs, callback)

    return fit_with_bias_correction(step, fit, on_epoch)
