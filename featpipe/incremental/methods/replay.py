"""``replay``: train on new rows and on exemplars of the old classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

from featpipe.heads import LastLayer, MLPClassifier, get_base_head, replace_last_layer
from featpipe.incremental.last_layer_loss import (
    Array,
    DistillationTerm,
    EpochCallback,
    LastLayerObjective,
    QuadraticPenalty,
    fit_last_layer,
)
from featpipe.incremental.methods.exemplars import WeightedEmbeddings, select_weighted_exemplars
from featpipe.incremental.methods.last_layer import init_layer
from featpipe.incremental.problem import IncrementalStep

REPLAY_DISTILL_STRENGTH = 1.0  # weight of the old head's answers


def fit_replay(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Train on exemplars and new rows; classes weigh as if all old rows were there.

    The old head's answers on all rows are soft targets, and old weights are pulled to their old values as strongly as
    by the head's own penalty: both carry what the missing old rows would say.
    """
    exemplars = select_weighted_exemplars(step)
    if step.layer is None:
        return _refit_head(step, exemplars)
    rows = exemplars + WeightedEmbeddings.from_dataset(step.new)
    old_scaler, new_scaler = step.pipeline[0], _refit_scaler(step, rows)
    layer, Z = step.layer, step.compute_features(rows.X)
    if new_scaler is not old_scaler:
        layer, Z = rescale_layer(layer, old_scaler, new_scaler), np.asarray(new_scaler.transform(rows.X), np.float64)

    def report_epoch(current_layer: LastLayer, loss: float) -> None:
        if on_epoch is not None:
            is_rescaled = new_scaler is not old_scaler
            on_epoch(rescale_layer(current_layer, new_scaler, old_scaler) if is_rescaled else current_layer, loss)

    weights, offsets = compute_weights_and_offsets(rows.y, rows.weights, step.k)
    old_scores = step.compute_old_scores(rows.X)
    objective = LastLayerObjective(
        Z,
        rows.y,
        weights,
        step.ridge,
        offsets=offsets,
        distillation=DistillationTerm(old_scores, step.settings.temperature, REPLAY_DISTILL_STRENGTH),
        quadratic_penalty=QuadraticPenalty.from_layer(layer, step.k, step.ridge),
    )
    trained_layer = fit_last_layer(objective, init_layer(layer, Z, rows.y, step.k), step.settings.epochs, report_epoch)
    head = replace_last_layer(get_base_head(step.pipeline[-1]), trained_layer)
    return Pipeline([("scale", new_scaler), ("head", head)])


def compute_weights_and_offsets(y: NDArray[np.integer[Any]], represented_counts: Array, k: int) -> tuple[Array, Array]:
    """Let few rows represent many: half by row weights, half by a logit offset of their class, in logarithms.

    With weights alone, few heavy rows are overfitted. With offsets alone (Menon et al., "Long-tail learning via logit
    adjustment", 2021), classes of many rows get too much room.

    Parameters
    ----------
    y : ndarray of shape (n,)
        Class codes.
    represented_counts : ndarray of shape (n,)
        How many images each row represents.
    k : int

    Returns
    -------
    weights : ndarray of shape (n,)
    offsets : ndarray of shape (k,)
        Added to the logits in the loss alone.
    """
    counts_per_row = np.bincount(y, represented_counts, k) / np.maximum(np.bincount(y, minlength=k), 1)
    counts_per_row = np.where(counts_per_row > 0, counts_per_row, 1.0)
    return np.sqrt(counts_per_row)[y], -0.5 * np.log(counts_per_row)


def _refit_scaler(step: IncrementalStep, rows: WeightedEmbeddings) -> Any:
    """A scaler refitted on old and new classes; the old one if hidden layers were trained on its output."""
    scaler = step.pipeline[0]
    if isinstance(get_base_head(step.pipeline[-1]), MLPClassifier) or not isinstance(scaler, StandardScaler):
        return scaler
    if not (scaler.with_mean and scaler.with_std):
        return scaler
    return clone(scaler).fit(np.asarray(rows.X, np.float64), sample_weight=rows.weights)


def rescale_layer(layer: LastLayer, from_scaler: StandardScaler, to_scaler: StandardScaler) -> LastLayer:
    """The layer whose scores on features of ``to_scaler`` are those of ``layer`` on features of ``from_scaler``."""
    W = layer.W / from_scaler.scale_
    return LastLayer(W * to_scaler.scale_, layer.b + W @ (to_scaler.mean_ - from_scaler.mean_))


def _refit_head(step: IncrementalStep, exemplars: WeightedEmbeddings) -> Pipeline:
    """Refit a head without a linear last layer on exemplars and new rows.

    If the head takes no sample weights, sampled rows bring old classes nearer to their true frequencies: without them
    an LDA lost seven more points of accuracy on emoji (tests/benchmarks/expansion.py).
    """
    pipeline, rows = step.make_unfitted(), exemplars + WeightedEmbeddings.from_dataset(step.new)
    if has_fit_parameter(pipeline[-1], "sample_weight"):
        return pipeline.fit(rows.X, rows.y, head__sample_weight=rows.weights)
    return pipeline.fit(rows.X, rows.y)
