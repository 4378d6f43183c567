"""Heads with a last layer for more, or for other, classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.heads import LastLayer, get_base_head, make_expanded_head, replace_last_layer
from featpipe.incremental.last_layer_loss import Array
from featpipe.incremental.problem import IncrementalStep


def init_layer(layer: LastLayer, Z: Array, y: NDArray[np.integer[Any]], k: int) -> LastLayer:
    """Extend a last layer: old weights are unchanged, new ones are the class means, scaled to the old ones' mean norm.

    Parameters
    ----------
    layer : LastLayer
        Of the k_old old classes.
    Z : ndarray of shape (n, p)
        Features of the new classes, k_old to k - 1; old classes may be among them.
    y : ndarray of shape (n,)
        Class codes.
    k : int
    """
    k_old = len(layer.b)
    means = np.stack([Z[y == code].mean(axis=0) for code in range(k_old, k)]) if k > k_old else layer.W[:0]
    length = np.linalg.norm(layer.W, axis=1).mean()
    scale = length / max(np.linalg.norm(means, axis=1).mean() if len(means) else 1.0, 1e-12)
    # nearest mean: up to a term common to all classes, |z - m|² is -2 (z m - |m|² / 2)
    b = layer.b.mean() - 0.5 * scale * (means**2).sum(axis=1)
    return LastLayer(np.vstack([layer.W, scale * means]), np.concatenate([layer.b, b]))


def init_fold_layer(step: IncrementalStep, Z: Array, y: NDArray[np.integer[Any]]) -> LastLayer:
    """`init_layer` for the rows of a fold, or for all new rows if a new class has none in it.

    A head without a last layer counts as one of zeros.
    """
    layer = step.layer or LastLayer(np.zeros((step.k_old, Z.shape[1])), np.zeros(step.k_old))
    if np.isin(np.arange(step.k_old, step.k), y).all():
        return init_layer(layer, Z, y, step.k)
    return init_layer(layer, step.compute_features(step.new.features), step.new.y, step.k)


def make_initial_head(step: IncrementalStep) -> Pipeline:
    """The head extended by the new classes, before any training."""
    assert step.layer is not None
    Z, y = step.compute_features(step.new.features), step.new.y
    return with_last_layer(step, init_layer(step.layer, Z, y, step.k))


def make_old_head(step: IncrementalStep) -> Pipeline:
    """The old head for the classes that remain, with one linear last layer even where classes were merged."""
    assert step.layer is not None
    return with_last_layer(step, step.layer)


def make_regrouped_head(step: IncrementalStep) -> Pipeline:
    """The head with classes dropped or merged, exactly: its probabilities are renormalized or summed."""
    new_codes, head = step.class_mapping.new_codes, step.pipeline[-1]
    if np.array_equal(new_codes, np.arange(len(new_codes))):
        return step.pipeline
    if step.layer is not None and len(np.unique(new_codes[new_codes >= 0])) == (new_codes >= 0).sum():
        return with_last_layer(step, step.layer)
    width = int(head.n_features_in_) if step.layer is None else step.layer.W.shape[1]
    return make_expanded_pipeline(step, LastLayer(np.zeros((0, width)), np.zeros(0)))


def make_expanded_pipeline(step: IncrementalStep, new_layer: LastLayer) -> Pipeline:
    """The unchanged old head, with an additional layer for the new classes."""
    head = step.pipeline[-1]
    expanded_head = make_expanded_head(head, step.class_mapping.new_codes, new_layer, int(head.n_features_in_))
    return Pipeline([("scale", step.pipeline[0]), ("head", expanded_head)])


def with_last_layer(step: IncrementalStep, layer: LastLayer) -> Pipeline:
    """The step's pipeline with another last layer."""
    head = replace_last_layer(get_base_head(step.pipeline[-1]), layer)
    return Pipeline([("scale", step.pipeline[0]), ("head", head)])
