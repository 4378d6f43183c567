"""The methods: how a head learns more classes, behind one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

from featpipe.heads import (
    LastLayer,
    MLPClassifier,
    compute_fisher_diagonal,
    compute_statistics,
    find_statistics_kind,
    fit_from_statistics,
    get_base_head,
    make_closed_form_head,
    make_expanded_head,
    replace_last_layer,
)
from featpipe.incremental.dataset import LabeledEmbeddings
from featpipe.incremental.last_layer_loss import DistillationTerm, LastLayerObjective, QuadraticPenalty, fit_last_layer
from featpipe.incremental.problem import EpochCallback, IncrementalStep
from featpipe.model import select_exemplars

__all__ = [
    "BIAS_CORRECTED_METHODS",
    "DISTILL_STRENGTH",
    "METHODS",
    "REPLAY_DISTILL_STRENGTH",
    "ExpansionMethod",
    "compute_weights_and_offsets",
    "init_layer",
    "make_initial_head",
    "make_old_head",
    "make_regrouped_head",
    "missing_last_layer",
    "missing_old_images",
]

Array = NDArray[np.float64]

N_FOLDS, MIN_ROWS_FOR_FOLDS = 3, 6  # rows; on which the offset between old and new classes is found
REPLAY_DISTILL_STRENGTH = 1.0  # how much replay weighs what the old head says
DISTILL_STRENGTH = 20.0
MAX_PSEUDO_ROWS_PER_CLASS = 100  # made-up rows of each old class
SLOPE_RIDGE = 1e-3  # for old and new rows that are told apart without a mistake
# Of a margin that tells next to nothing, in its deviations: with less all rows go to the more frequent side.
MIN_SLOPE = 1.0
NEW_CLASS_SHARE = 0.75  # the share of new rows that the offset lets win where nothing is remembered of the old ones


@dataclass(frozen=True)
class ExpansionMethod:
    """One row of the table.

    Attributes
    ----------
    summary : str
    fit : callable
        From a step, and a function that is told each epoch, to a fitted pipeline of the classes after.
    missing : callable
        From a step to what it lacks, in words; or None.
    keeps : str
        The part of what a model keeps that it lives on.
    """

    summary: str
    fit: Callable[[IncrementalStep, EpochCallback | None], Pipeline]
    missing_requirement: Callable[[IncrementalStep], str | None]
    memory_part: str = ""


# ------------------------------------------------------------------------------------------------- where all starts
def init_layer(layer: LastLayer, Z: Array, y: NDArray[np.integer[Any]], k: int) -> LastLayer:
    """The old rows as they are, and new ones at the means of their classes, as long as old ones are on average.

    Parameters
    ----------
    layer : LastLayer
        Of the k_old classes before.
    Z : ndarray of shape (n, p), y : ndarray of shape (n,)
        Rows of the new classes, k_old to k - 1, and perhaps of old ones.
    """
    k_old = len(layer.b)
    means = np.stack([Z[y == code].mean(axis=0) for code in range(k_old, k)]) if k > k_old else layer.W[:0]
    length = np.linalg.norm(layer.W, axis=1).mean()
    scale = length / max(np.linalg.norm(means, axis=1).mean() if len(means) else 1.0, 1e-12)
    # nearest mean: |z - m|² is, but for what is the same for all classes, -2 (z m - |m|² / 2)
    b = layer.b.mean() - 0.5 * scale * (means**2).sum(axis=1)
    return LastLayer(np.vstack([layer.W, scale * means]), np.concatenate([layer.b, b]))


def _make_pipeline(step: IncrementalStep, layer: LastLayer) -> Pipeline:
    head = replace_last_layer(get_base_head(step.pipeline[-1]), layer)
    return Pipeline([("scale", step.pipeline[0]), ("head", head)])


def make_initial_head(step: IncrementalStep) -> Pipeline:
    """The head with more classes, before it learns anything."""
    assert step.layer is not None
    return _make_pipeline(step, init_layer(step.layer, step.compute_features(step.new.X), step.new.y, step.k))


def make_old_head(step: IncrementalStep) -> Pipeline:
    """The head before, of the classes that stay: one whose last layer is linear, also where classes were joined."""
    assert step.layer is not None
    return _make_pipeline(step, step.layer)


def _stack_weights(layer: LastLayer) -> Array:
    return np.column_stack([layer.W, layer.b])


# ------------------------------------------------------------------------------------------------- old rows at hand
def _fit_joint(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """As `train` does, with the settings that the head has, on old and new rows together."""
    rows = step.old + step.new
    return step.make_unfitted().fit(rows.X, rows.y)


def _fit_naive(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """On the new rows alone."""
    assert step.layer is not None
    Z, y = step.compute_features(step.new.X), step.new.y
    objective = LastLayerObjective(Z, y, np.ones(len(y)), step.ridge)
    return _make_pipeline(
        step, fit_last_layer(objective, init_layer(step.layer, Z, y, step.k), step.settings.epochs, on_epoch)
    )


# ------------------------------------------------------------------------------------------------- some old rows
@dataclass(frozen=True, eq=False)
class _WeightedEmbeddings:
    """Old rows that stand for others, and new ones.

    Attributes
    ----------
    X : ndarray of shape (r, d)
    y, weights : ndarray of shape (r,)
    judges : ndarray of shape (r,)
        How much each tells of where old and new classes part: made-up rows nothing, where there are others, which
        are harder.
    """

    X: NDArray[Any]
    y: NDArray[np.integer[Any]]
    weights: Array
    offset_weights: Array

    @classmethod
    def from_embeddings(cls, embeddings: LabeledEmbeddings) -> _WeightedEmbeddings:
        ones = np.ones(len(embeddings))
        return cls(embeddings.X, embeddings.y, ones, ones)

    def take(self, mask: NDArray[np.bool_]) -> _WeightedEmbeddings:
        return _WeightedEmbeddings(self.X[mask], self.y[mask], self.weights[mask], self.offset_weights[mask])

    def __add__(self, other: _WeightedEmbeddings) -> _WeightedEmbeddings:
        return _WeightedEmbeddings(
            *(np.concatenate(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def _select_exemplars(step: IncrementalStep) -> _WeightedEmbeddings:
    """Kept rows, each as heavy as the rows that it stands for; from the old rows at hand if none are kept.

    Where statistics are kept too, kept rows stand for themselves alone, and made-up rows for the others.
    """
    replay_memory, n = step.replay_memory, step.settings.memory
    if replay_memory is not None and len(replay_memory.rows):
        replay_memory = replay_memory.truncate(n)
        weights = replay_memory.exemplar_weights()
        exemplars = _WeightedEmbeddings(
            np.asarray(replay_memory.rows, np.float32), replay_memory.codes, weights, weights
        )
        pseudo_exemplars = _sample_from_statistics(
            step, replay_memory.counts - np.bincount(replay_memory.codes, minlength=len(replay_memory.counts))
        )
        if pseudo_exemplars is None:
            return exemplars
        return replace(exemplars, weights=np.ones(len(weights))) + replace(
            pseudo_exemplars, offset_weights=np.zeros(len(pseudo_exemplars.y))
        )
    old = step.old
    indices = select_exemplars(step.settings.selection, step.compute_features(old.X), old.y, n)
    counts = np.bincount(old.y, minlength=step.k)
    chosen_counts = np.bincount(old.y[indices], minlength=step.k)
    weights = (counts / np.maximum(chosen_counts, 1))[old.y[indices]]
    return _WeightedEmbeddings(old.X[indices], old.y[indices], weights, weights)


def _fit_replay(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """On remembered and new rows: classes weigh as they would if all old rows were there.

    What old rows said that are no longer there, the old head still says, of all rows that are; and the weights that it
    learnt from them are drawn to what they were, as strongly as by its own penalty.
    """
    exemplars = _select_exemplars(step)
    if step.layer is None:
        return _refit_head(step, exemplars)
    rows = exemplars + _WeightedEmbeddings.from_embeddings(step.new)
    old_scaler, new_scaler = step.pipeline[0], _refit_scaler(step, rows)
    layer = step.layer if new_scaler is old_scaler else _rescale_layer(step.layer, old_scaler, new_scaler)
    Z = (
        step.compute_features(rows.X)
        if new_scaler is old_scaler
        else np.asarray(new_scaler.transform(rows.X), np.float64)
    )

    def report_epoch(current_layer: LastLayer, loss: float) -> None:
        if on_epoch is not None:
            on_epoch(
                current_layer if new_scaler is old_scaler else _rescale_layer(current_layer, new_scaler, old_scaler),
                loss,
            )

    theta = _stack_weights(layer)
    penalty_weights = np.zeros((step.k, theta.shape[1]))
    penalty_weights[: step.k_old, :-1] = step.ridge
    weights, offsets = compute_weights_and_offsets(rows.y, rows.weights, step.k)
    objective = LastLayerObjective(
        Z,
        rows.y,
        weights,
        step.ridge,
        offsets=offsets,
        distillation=DistillationTerm(
            step.compute_old_scores(rows.X), step.settings.temperature, REPLAY_DISTILL_STRENGTH
        ),
        quadratic_penalty=QuadraticPenalty(theta, penalty_weights),
    )
    trained_layer = fit_last_layer(objective, init_layer(layer, Z, rows.y, step.k), step.settings.epochs, report_epoch)
    return Pipeline(
        [("scale", new_scaler), ("head", replace_last_layer(get_base_head(step.pipeline[-1]), trained_layer))]
    )


def compute_weights_and_offsets(y: NDArray[np.integer[Any]], represented_counts: Array, k: int) -> tuple[Array, Array]:
    """How few rows stand for many: half by their weight, half by an offset of their class, in logarithms.

    Few rows of great weight are learnt by heart; rows of weight one, of which the loss alone knows how rare they are
    (Menon et al., "Long-tail learning via logit adjustment", 2021), give too much room to classes of many rows.
    """
    counts_per_row = np.bincount(y, represented_counts, k) / np.maximum(np.bincount(y, minlength=k), 1)
    counts_per_row = np.where(counts_per_row > 0, counts_per_row, 1.0)
    return np.sqrt(counts_per_row)[y], -0.5 * np.log(counts_per_row)


def _refit_scaler(step: IncrementalStep, rows: _WeightedEmbeddings) -> Any:
    """A scaler of old and new classes; that of the old ones where hidden layers have learnt from what it gives."""
    scaler = step.pipeline[0]
    if isinstance(get_base_head(step.pipeline[-1]), MLPClassifier) or not isinstance(scaler, StandardScaler):
        return scaler
    if not (scaler.with_mean and scaler.with_std):
        return scaler
    return clone(scaler).fit(np.asarray(rows.X, np.float64), sample_weight=rows.weights)


def _rescale_layer(layer: LastLayer, from_scaler: StandardScaler, to_scaler: StandardScaler) -> LastLayer:
    """The layer that says of features of one scaler what a layer says of those of another."""
    W = layer.W / from_scaler.scale_
    return LastLayer(W * to_scaler.scale_, layer.b + W @ (to_scaler.mean_ - from_scaler.mean_))


def _init_fold_layer(step: IncrementalStep, Z: Array, y: NDArray[np.integer[Any]]) -> LastLayer:
    """`start`; a new class all of whose rows are in the other folds starts from those."""
    assert step.layer is not None
    if np.isin(np.arange(step.k_old, step.k), y).all():
        return init_layer(step.layer, Z, y, step.k)
    return init_layer(step.layer, step.compute_features(step.new.X), step.new.y, step.k)


def _refit_head(step: IncrementalStep, exemplars: _WeightedEmbeddings) -> Pipeline:
    """Heads without a last layer: anew, on what there is.

    Where rows cannot have weights, those that are made up bring old classes nearer to their true shares: without them
    an LDA on emoji lost seven more points.
    """
    pipeline, rows = step.make_unfitted(), exemplars + _WeightedEmbeddings.from_embeddings(step.new)
    if has_fit_parameter(pipeline[-1], "sample_weight"):
        return pipeline.fit(rows.X, rows.y, head__sample_weight=rows.weights)
    return pipeline.fit(rows.X, rows.y)


# ------------------------------------------------------------------------------------------------- sums over old rows
def _fit_statistics(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """In closed form: what training on everything at once gives. Heads without one give way, see `in_place_of`."""
    pipeline, replay_memory = step.make_unfitted(), step.replay_memory
    kind = find_statistics_kind(pipeline)[0]
    if replay_memory is not None and replay_memory.statistics is not None:
        statistics, kind = replay_memory.statistics, replay_memory.statistics.kind
    else:
        statistics = compute_statistics(kind, step.old.X, step.old.y, step.k)
    if len(step.new):
        statistics = statistics + compute_statistics(kind, step.new.X, step.new.y, step.k, statistics.shift)
    return fit_from_statistics(make_closed_form_head(pipeline, kind), statistics)


# ------------------------------------------------------------------------------------------------- no old rows
def _fit_distill(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """On new rows, with what the old head says of them as soft targets."""

    def fit(rows: _WeightedEmbeddings, callback: EpochCallback | None) -> LastLayer:
        assert step.layer is not None
        Z, strength = step.compute_features(rows.X), step.settings.strength
        distillation = DistillationTerm(
            step.compute_old_scores(rows.X),
            step.settings.temperature,
            DISTILL_STRENGTH if strength is None else strength,
        )
        ridge, quadratic_penalty = _make_quadratic_penalty(step)
        objective = LastLayerObjective(
            Z, rows.y, rows.weights, ridge, distillation=distillation, quadratic_penalty=quadratic_penalty
        )
        return fit_last_layer(objective, _init_fold_layer(step, Z, rows.y), step.settings.epochs, callback)

    return _fit_with_bias_correction(step, fit, on_epoch)


def _make_quadratic_penalty(
    step: IncrementalStep, importances: NDArray[np.floating] | float = 0.0
) -> tuple[Array, QuadraticPenalty]:
    """The head's penalty, which draws new weights to zero, and old ones to what they were; and importances beside it.

    Drawn to zero, old weights would be forgotten by the penalty alone, the sooner the fewer new rows there are.
    """
    assert step.layer is not None
    theta = _stack_weights(step.layer)
    penalty_weights = np.zeros((step.k, theta.shape[1]))
    penalty_weights[: step.k_old, :-1] = step.ridge
    penalty_weights[: step.k_old] += importances
    ridge = np.where(np.arange(step.k) < step.k_old, 0.0, step.ridge)[:, None]
    return ridge, QuadraticPenalty(theta, penalty_weights)


def _fit_ewc(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """On new rows, with the old weights held by their importance: of strength 1 as much as the old rows would."""
    assert step.layer is not None
    importances: NDArray[Any]
    if step.replay_memory is not None and step.replay_memory.importances is not None:
        importances, n = step.replay_memory.importances[: step.k_old], int(step.replay_memory.counts.sum())
    else:
        importances, n = compute_fisher_diagonal(step.layer, step.compute_features(step.old.X)), len(step.old)
    strength = step.settings.strength
    ridge, quadratic_penalty = _make_quadratic_penalty(step, n * (1.0 if strength is None else strength) * importances)

    def fit(rows: _WeightedEmbeddings, callback: EpochCallback | None) -> LastLayer:
        Z = step.compute_features(rows.X)
        objective = LastLayerObjective(Z, rows.y, rows.weights, ridge, quadratic_penalty=quadratic_penalty)
        return fit_last_layer(objective, _init_fold_layer(step, Z, rows.y), step.settings.epochs, callback)

    return _fit_with_bias_correction(step, fit, on_epoch)


def _fit_with_bias_correction(
    step: IncrementalStep,
    fit: Callable[[_WeightedEmbeddings, EpochCallback | None], LastLayer],
    on_epoch: EpochCallback | None,
) -> Pipeline:
    """With an offset between old and new classes that is found on new rows that were held out."""
    rows = _WeightedEmbeddings.from_embeddings(step.new)
    layer = _equalize_margins(step, fit(rows, on_epoch), rows)
    pseudo_exemplars = _make_pseudo_exemplars(step)
    scores = np.zeros((len(rows.y), step.k))
    old_scores = np.zeros((0 if pseudo_exemplars is None else len(pseudo_exemplars.y), step.k))
    folds = _make_fold_masks(len(rows.y))
    for ((is_train, is_held_out),) in folds:
        fold_layer = _equalize_margins(step, fit(rows.take(is_train), None), rows.take(is_train))
        scores[is_held_out] = fold_layer.compute_scores(step.compute_features(rows.X[is_held_out]))
        if pseudo_exemplars is not None:
            old_scores += fold_layer.compute_scores(step.compute_features(pseudo_exemplars.X)) / len(folds)
    old_weights = np.zeros(0) if pseudo_exemplars is None else pseudo_exemplars.offset_weights
    return _make_pipeline(
        step,
        _shift_new_classes(
            layer, step.k_old, _fit_bias_correction(step.k_old, old_scores, old_weights, scores, rows.y)
        ),
    )


def _equalize_margins(step: IncrementalStep, layer: LastLayer, rows: _WeightedEmbeddings) -> LastLayer:
    """New classes as high as old ones, on average over the new rows that the layer was fitted on.

    Rows of new classes alone draw the two apart without end, and how far they come is the search's, not the rows'. An
    offset can only be carried over between layers that begin alike.
    """
    Z = step.compute_features(rows.X[rows.y >= step.k_old])
    if not len(Z):
        return layer
    scores = layer.compute_scores(Z)
    margin = logsumexp(scores[:, step.k_old :], axis=1) - logsumexp(scores[:, : step.k_old], axis=1)
    return _shift_new_classes(layer, step.k_old, -float(margin.mean()))


def _fit_frozen_old(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """New rows alone are trained, against what stands for old rows, or else against each other; then the offset."""
    pseudo_exemplars, T = _make_pseudo_exemplars(step), step.temperature
    new_rows = _WeightedEmbeddings.from_embeddings(step.new)
    new_class_rows = new_rows.take(new_rows.y >= step.k_old)

    def fit(rows: _WeightedEmbeddings, callback: EpochCallback | None) -> LastLayer:
        Z = step.compute_features(rows.X)
        empty_layer = LastLayer(np.zeros((step.k_old, Z.shape[1])), np.zeros(step.k_old))
        initial_layer = init_layer(step.layer or empty_layer, *_new_class_features(step, Z, rows.y), step.k)
        new_class_layer = LastLayer(initial_layer.W[step.k_old :], initial_layer.b[step.k_old :])
        if pseudo_exemplars is None:
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

    rows = new_class_rows if pseudo_exemplars is None else pseudo_exemplars + new_rows
    layer = fit(rows, on_epoch)
    all_scores = np.zeros((len(rows.y), step.k))
    all_scores[:, : step.k_old] = step.compute_old_scores(rows.X) / T
    for ((is_train, is_held_out),) in _make_fold_masks(len(rows.y)):
        all_scores[is_held_out, step.k_old :] = fit(rows.take(is_train), None).compute_scores(
            step.compute_features(rows.X[is_held_out])
        )
    is_new = rows.y >= step.k_old
    new_scores, old_scores = all_scores[is_new], all_scores[~is_new]
    offset = _fit_bias_correction(step.k_old, old_scores, rows.offset_weights[~is_new], new_scores, rows.y[is_new])
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


def _make_pseudo_exemplars(step: IncrementalStep) -> _WeightedEmbeddings | None:
    """What stands for the old rows: kept ones, or rows that are made up from statistics."""
    replay_memory = step.replay_memory
    if replay_memory is None:
        return None
    return _select_exemplars(step) if len(replay_memory.rows) else _sample_from_statistics(step, replay_memory.counts)


def _sample_from_statistics(step: IncrementalStep, counts: NDArray[np.int64]) -> _WeightedEmbeddings | None:
    """Rows made up from the statistics that are kept, as heavy as so many of each class."""
    if step.replay_memory is None or step.replay_memory.statistics is None:
        return None
    rows_per_class = int(min(MAX_PSEUDO_ROWS_PER_CLASS, max(1, counts.max(initial=0))))
    X, codes = step.replay_memory.statistics.sample_rows(rows_per_class)
    weights = counts[codes] / rows_per_class
    rows = _WeightedEmbeddings(X.astype(np.float32), codes, weights, weights)
    return rows.take(rows.weights > 0)


# ------------------------------------------------------------------------------------------------- no new rows
def make_regrouped_head(step: IncrementalStep) -> Pipeline:
    """The head with classes left out or joined, exactly: what is left of its probabilities, or their sums."""
    new_codes, head = step.class_mapping.new_codes, step.pipeline[-1]
    if np.array_equal(new_codes, np.arange(len(new_codes))):
        return step.pipeline
    if step.layer is not None and len(np.unique(new_codes[new_codes >= 0])) == (new_codes >= 0).sum():
        return _make_pipeline(step, step.layer)
    width = (step.layer or LastLayer(np.zeros((0, head.n_features_in_)), np.zeros(0))).W.shape[1]
    empty_layer = LastLayer(np.zeros((0, width)), np.zeros(0))
    return Pipeline(
        [
            ("scale", step.pipeline[0]),
            ("head", make_expanded_head(head, new_codes, empty_layer, int(head.n_features_in_))),
        ]
    )


# ------------------------------------------------------------------------------------------------- old against new
def _make_fold_masks(*counts: int) -> list[tuple[tuple[NDArray[np.bool_], NDArray[np.bool_]], ...]]:
    """Which rows to fit on and which to judge by, in turns; for each of several kinds of rows, of so many each.

    All of them are both where there are too few of a kind.
    """
    if min(counts) < MIN_ROWS_FOR_FOLDS:
        return [tuple((np.ones(n, bool), np.ones(n, bool)) for n in counts)]
    folds = [np.random.default_rng(seed).permutation(n) % N_FOLDS for seed, n in enumerate(counts)]
    return [tuple((fold != fold_number, fold == fold_number) for fold in folds) for fold_number in range(N_FOLDS)]


def _fit_bias_correction(
    k_old: int, old_scores: Array, old_weights: Array, new_scores: Array, y: NDArray[np.integer[Any]]
) -> float:
    """What is added to the scores of new classes so that old and new are told apart as well as can be.

    Parameters
    ----------
    k_old : int
    old : ndarray of shape (r, k), weights : ndarray of shape (r,)
        Scores of rows of old classes; there may be none.
    new : ndarray of shape (n, k), y : ndarray of shape (n,)
        Scores of rows that the head was not trained on, of which some may be of old classes too.
    """
    margin = logsumexp(new_scores[:, k_old:], axis=1) - logsumexp(new_scores[:, :k_old], axis=1)
    is_new = y >= k_old
    if not is_new.any():
        return 0.0
    if not len(old_scores) and is_new.all():
        return -float(np.quantile(margin, 1 - NEW_CLASS_SHARE))
    old_margin = logsumexp(old_scores[:, k_old:], axis=1) - logsumexp(old_scores[:, :k_old], axis=1)
    margins, sign = (
        np.concatenate([old_margin, margin]),
        np.concatenate([np.ones(len(old_margin)), np.where(is_new, -1.0, 1.0)]),
    )
    weights, scale = np.concatenate([old_weights, np.ones(len(margin))]), max(float(margins.std()), 1e-12)

    def loss(slope_and_offset: Array) -> tuple[float, Array]:
        """Of telling old from new by the margin; with a slope, since scores of few rows are too sure of themselves."""
        slope, offset = slope_and_offset
        error_logits = sign * (slope * margins / scale + offset)
        residuals = weights * sign * expit(error_logits)
        value = weights @ np.logaddexp(0, error_logits) + 0.5 * SLOPE_RIDGE * weights.sum() * slope**2
        return float(value), np.array(
            [residuals @ margins / scale + SLOPE_RIDGE * weights.sum() * slope, residuals.sum()]
        )

    bounds = [(MIN_SLOPE, None), (None, None)]
    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(scale * offset / slope)


def _shift_new_classes(layer: LastLayer, k_old: int, offset: float) -> LastLayer:
    b = layer.b.copy()
    b[k_old:] += offset
    return LastLayer(layer.W, b)


# ------------------------------------------------------------------------------------------------- what each needs
def missing_last_layer(step: IncrementalStep) -> str | None:
    """What a method of last layers lacks."""
    if step.layer is None:
        kind = type(get_base_head(step.pipeline[-1])).__name__
        return f"is for heads that end in a softmax layer (logistic, linear, mlp, keras), and this one is a {kind}"
    return _missing_new_rows(step)


def _missing_new_rows(step: IncrementalStep) -> str | None:
    return None if len(step.new) else "learns from new images, and there are none"


def _missing_new_class(step: IncrementalStep) -> str | None:
    return None if step.class_mapping.new_classes else "trains new classes alone, and there are none"


def missing_old_images(step: IncrementalStep) -> str | None:
    """What a method that sees old images lacks: some of each class."""
    present = np.unique(step.old.y)
    if len(present) < step.k_old:
        missing_names = [
            name for code, name in enumerate(step.class_mapping.classes[: step.k_old]) if code not in present
        ]
        return (
            f"needs the images that the model was trained on, and there are none of {', '.join(map(repr, missing_names[:3]))}"
            "; give the old cache too"
        )
    return None


def _missing_memory(part: str, keep_option: str) -> Callable[[IncrementalStep], str | None]:
    def find_missing(step: IncrementalStep) -> str | None:
        value = getattr(step.replay_memory, part, None)
        if value is not None and (part != "rows" or len(value)):
            return None
        if missing_old_images(step) is None and (step.has_all_old_rows or part == "rows"):
            return None
        return (
            f"needs {part} of the old classes, and the model keeps none: train it with --keep {keep_option}, "
            "or give the cache that it was trained on too"
        )

    return find_missing


def _first_missing(*checks: Callable[[IncrementalStep], str | None]) -> Callable[[IncrementalStep], str | None]:
    return lambda step: next((reason for reason in (check(step) for check in checks) if reason), None)


METHODS: dict[str, ExpansionMethod] = {
    "joint": ExpansionMethod("old and new images together, which must be at hand", _fit_joint, missing_old_images),
    "statistics": ExpansionMethod(
        "closed form from sums over the old rows; lda, ridge and centroid exactly, other heads become ridge",
        _fit_statistics,
        _missing_memory("statistics", "statistics"),
        memory_part="statistics",
    ),
    "replay": ExpansionMethod(
        "with some embeddings of each old class; any head",
        _fit_replay,
        _first_missing(_missing_new_rows, _missing_memory("rows", "rows=20")),
        memory_part="rows",
    ),
    "frozen-old": ExpansionMethod(
        "the scores of old classes stay bit for bit; any classifier", _fit_frozen_old, _missing_new_class
    ),
    "distill": ExpansionMethod(
        "the old model's answers on the new images as soft targets", _fit_distill, missing_last_layer
    ),
    "ewc": ExpansionMethod(
        "old weights held by their importance",
        _fit_ewc,
        _first_missing(missing_last_layer, _missing_memory("importances", "importances")),
        memory_part="importances",
    ),
    "naive": ExpansionMethod("the new images alone: what forgetting is", _fit_naive, missing_last_layer),
}
# which remember no old row, and are set against old classes by what there is
BIAS_CORRECTED_METHODS = ("frozen-old", "distill", "ewc")
