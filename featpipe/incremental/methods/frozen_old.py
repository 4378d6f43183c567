"""``frozen-old``: the scores of old classes stay, new rows of the last layer are trained beside them."""

from __future__ import annotations

import numpy as np
from sklearn.pipeline import Pipeline

from featpipe.heads import LastLayer
from featpipe.incremental.last_layer_loss import EpochCallback, LastLayerObjective, fit_last_layer
from featpipe.incremental.methods.bias_correction import fit_bias_correction, make_fold_masks
from featpipe.incremental.methods.exemplars import WeightedEmbeddings, make_old_rows
from featpipe.incremental.methods.last_layer import init_fold_layer, make_expanded_pipeline
from featpipe.incremental.problem import IncrementalStep


def fit_frozen_old(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Train the layer of the new classes, against rows that represent old ones if there are any; then the offset."""
    old_rows, new_rows, T = make_old_rows(step), WeightedEmbeddings.from_dataset(step.new), step.temperature

    def fit(rows: WeightedEmbeddings, callback: EpochCallback | None) -> LastLayer:
        Z = step.compute_features(rows.X)
        initial_layer = init_fold_layer(step, Z, rows.y)
        new_class_layer = LastLayer(initial_layer.W[step.k_old :], initial_layer.b[step.k_old :])
        if old_rows is None:
            objective = LastLayerObjective(Z, rows.y - step.k_old, rows.weights, step.ridge)
        else:
            old_scores = step.compute_old_scores(rows.X) / T
            objective = LastLayerObjective(Z, rows.y, rows.weights, step.ridge, fixed_scores=old_scores)
        return fit_last_layer(objective, new_class_layer, step.settings.epochs, callback)

    rows = new_rows.take(new_rows.y >= step.k_old) if old_rows is None else old_rows + new_rows
    layer = fit(rows, on_epoch)
    scores = np.zeros((len(rows.y), step.k))
    scores[:, : step.k_old] = step.compute_old_scores(rows.X) / T
    for is_train, is_held_out in make_fold_masks(len(rows.y)):
        fold_layer = fit(rows.take(is_train), None)
        scores[is_held_out, step.k_old :] = fold_layer.compute_scores(step.compute_features(rows.X[is_held_out]))
    is_new = rows.y >= step.k_old
    offset = fit_bias_correction(
        step.k_old, scores[~is_new], rows.offset_weights[~is_new], scores[is_new], rows.y[is_new]
    )
    new_layer = LastLayer(T * layer.W, T * (layer.b + offset))
    return make_expanded_pipeline(step, new_layer)
