"""The offset between the scores of old and of new classes (compare BiC, Wu et al. 2019); and ``frozen-old``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from sklearn.pipeline import Pipeline

from featpipe.heads import LastLayer
from featpipe.incremental.last_layer_loss import Array, EpochCallback, LastLayerObjective, fit_last_layer
from featpipe.incremental.methods.last_layer import init_fold_layer, make_expanded_pipeline, with_last_layer
from featpipe.incremental.methods.replay import WeightedEmbeddings, make_old_rows
from featpipe.incremental.problem import IncrementalStep

N_OFFSET_FOLDS, MIN_ROWS_FOR_FOLDS = 3, 6
SLOPE_RIDGE = 1e-3  # keeps the slope finite where old and new rows are separable
# Lower bound of the slope, in standard deviations of the margin: without it, a margin that carries almost no
# information sends all rows to the more frequent side.
MIN_SLOPE = 1.0
NEW_CLASS_SHARE = 0.75  # share of the new rows predicted as new classes where nothing represents the old ones


def fit_with_bias_correction(
    step: IncrementalStep,
    fit: Callable[[WeightedEmbeddings, EpochCallback | None], LastLayer],
    on_epoch: EpochCallback | None,
) -> Pipeline:
    """Fit a last layer, then the offset between old and new classes, by cross-validation on the new rows.

    Parameters
    ----------
    step : IncrementalStep
    fit : callable
        From training rows, and a function that is called after each epoch, to a last layer.
    on_epoch : callable or None
        Called while the layer is fitted on all new rows.
    """
    rows, old_rows = WeightedEmbeddings.from_dataset(step.new), make_old_rows(step)
    layer = equalize_margins(step, fit(rows, on_epoch), rows)
    scores = np.zeros((len(rows.y), step.k))
    old_scores = np.zeros((0 if old_rows is None else len(old_rows.y), step.k))
    folds = make_fold_masks(len(rows.y))
    for is_train, is_held_out in folds:
        fold_layer = equalize_margins(step, fit(rows.take(is_train), None), rows.take(is_train))
        scores[is_held_out] = fold_layer.compute_scores(step.compute_features(rows.X[is_held_out]))
        if old_rows is not None:
            old_scores += fold_layer.compute_scores(step.compute_features(old_rows.X)) / len(folds)
    old_weights = np.zeros(0) if old_rows is None else old_rows.offset_weights
    offset = fit_bias_correction(step.k_old, old_scores, old_weights, scores, rows.y)
    return with_last_layer(step, shift_new_classes(layer, step.k_old, offset))


def equalize_margins(step: IncrementalStep, layer: LastLayer, rows: WeightedEmbeddings) -> LastLayer:
    """Shift new classes so that, on average over the new rows that the layer was fitted on, they score as old ones do.

    Trained on new classes alone, the margin grows without limit, and its size depends on when the solver stops. An
    offset that was found for one layer fits another only if both have the same mean margin.
    """
    Z = step.compute_features(rows.X[rows.y >= step.k_old])
    if not len(Z):
        return layer
    margins = compute_margins(layer.compute_scores(Z), step.k_old)
    return shift_new_classes(layer, step.k_old, -float(margins.mean()))


def make_fold_masks(n: int) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Training and held-out rows of each fold, as masks of shape (n,); all rows are both if there are too few."""
    if n < MIN_ROWS_FOR_FOLDS:
        return [(np.ones(n, bool), np.ones(n, bool))]
    folds = np.random.default_rng(0).permutation(n) % N_OFFSET_FOLDS
    return [(folds != fold, folds == fold) for fold in range(N_OFFSET_FOLDS)]


def fit_bias_correction(
    k_old: int, old_scores: Array, old_weights: Array, new_scores: Array, y: NDArray[np.integer[Any]]
) -> float:
    """The offset to add to the scores of new classes that separates old from new rows best (log loss).

    Parameters
    ----------
    k_old : int
    old_scores : ndarray of shape (r, k)
        Of rows of old classes; there may be none.
    old_weights : ndarray of shape (r,)
    new_scores : ndarray of shape (n, k)
        Of held-out rows; some may be of old classes too.
    y : ndarray of shape (n,)
        Class codes of ``new_scores``.
    """
    new_margins, is_new = compute_margins(new_scores, k_old), y >= k_old
    if not is_new.any():
        return 0.0
    if not len(old_scores) and is_new.all():
        return -float(np.quantile(new_margins, 1 - NEW_CLASS_SHARE))
    margins = np.concatenate([compute_margins(old_scores, k_old), new_margins])
    sign = np.concatenate([np.ones(len(old_scores)), np.where(is_new, -1.0, 1.0)])
    weights, scale = np.concatenate([old_weights, np.ones(len(y))]), max(float(margins.std()), 1e-12)

    def loss(slope_and_offset: Array) -> tuple[float, Array]:
        """Logistic loss of old against new rows; the slope is free, since scores fitted on few rows are too large."""
        slope, offset = slope_and_offset
        error_logits = sign * (slope * margins / scale + offset)
        residuals, ridge = weights * sign * expit(error_logits), SLOPE_RIDGE * weights.sum()
        value = weights @ np.logaddexp(0, error_logits) + 0.5 * ridge * slope**2
        return float(value), np.array([residuals @ margins / scale + ridge * slope, residuals.sum()])

    bounds = [(MIN_SLOPE, None), (None, None)]
    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(scale * offset / slope)


def compute_margins(scores: Array, k_old: int) -> Array:
    """Log odds of new classes against old ones, shape (m,)."""
    return np.asarray(logsumexp(scores[:, k_old:], axis=1) - logsumexp(scores[:, :k_old], axis=1))


def shift_new_classes(layer: LastLayer, k_old: int, offset: float) -> LastLayer:
    """Add an offset to the scores of new classes."""
    b = layer.b.copy()
    b[k_old:] += offset
    return LastLayer(layer.W, b)


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
