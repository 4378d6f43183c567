"""``frozen-old``: the scores of old classes stay, new rows of the last layer are trained beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.heads import LastLayer, make_expanded_head
from featpipe.incremental.last_layer_loss import LastLayerObjective, fit_last_layer
from featpipe.incremental.methods.bias_correction import fit_bias_correction, make_fold_masks
from featpipe.incremental.methods.exemplars import WeightedEmbeddings, make_old_rows
from featpipe.incremental.methods.last_layer import init_layer
from featpipe.incremental.problem import EpochCallback, IncrementalStep

Array = NDArray[np.float64]


def fit_frozen_old(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Train the layer of the new classes, against rows that represent old ones if there are any; then the offset."""
    old_rows, T = make_old_rows(step), step.temperature
    new_rows = WeightedEmbeddings.from_embeddings(step.new)
    new_class_rows = new_rows.take(new_rows.y >= step.k_old)

    def fit(rows: WeightedEmbeddings, callback: EpochCallback | None) -> LastLayer:
        Z = step.compute_features(rows.X)
        empty_layer = LastLayer(np.zeros((step.k_old, Z.shape[1])), np.zeros(step.k_old))
        initial_layer = init_layer(step.layer or empty_layer, *_new_class_features(step, Z, rows.y), step.k)
        new_class_layer = LastLayer(initial_layer.W[step.k_old :], initial_layer.b[step.k_old :])
        if old_rows is None:
            return fit_last_layer(
                LastLayerObjective(Z, rows.y - step.k_old, rows.weights, step.ridge),
                new_class_layer,
                step.settings.epochs,
                callback,
            )
        fixed_scores = step.compute_old_scores(rows.X) / T
        return fit_last_layer(
            LastLayerObjective(Z, rows.y, rows.weights, step.ridge, fixed_scores),
            new_class_layer,
            step.settings.epochs,
            callback,
        )

    rows = new_class_rows if old_rows is None else old_rows + new_rows
    layer = fit(rows, on_epoch)
    all_scores = np.zeros((len(rows.y), step.k))
    all_scores[:, : step.k_old] = step.compute_old_scores(rows.X) / T
    for is_train, is_held_out in make_fold_masks(len(rows.y)):
        all_scores[is_held_out, step.k_old :] = fit(rows.take(is_train), None).compute_scores(
            step.compute_features(rows.X[is_held_out])
        )
    is_new = rows.y >= step.k_old
    new_scores, old_scores = all_scores[is_new], all_scores[~is_new]
    offset = fit_bias_correction(step.k_old, old_scores, rows.offset_weights[~is_new], new_scores, rows.y[is_new])
    new_layer = LastLayer(T * layer.W, T * (layer.b + offset))
    head = make_expanded_head(
        step.pipeline[-1], step.class_mapping.new_codes, new_layer, int(step.pipeline[-1].n_features_in_)
    )
    return Pipeline([("scale", step.pipeline[0]), ("head", head)])


def _new_class_features(
    step: IncrementalStep, Z: Array, y: NDArray[np.integer[Any]]
) -> tuple[Array, NDArray[np.integer[Any]]]:
    if np.isin(np.arange(step.k_old, step.k), y).all():
        return Z, y
    return step.compute_features(step.new.X), step.new.y
