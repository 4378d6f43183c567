"""``replay``: train on new rows and on rows that represent old ones: exemplars, or rows sampled from statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from featpipe.incremental.methods.last_layer import init_layer
from featpipe.incremental.problem import IncrementalStep
from featpipe.training import EmbeddingDataset

MAX_PSEUDO_ROWS_PER_CLASS = 100  # sampled rows of each old class
REPLAY_DISTILL_STRENGTH = 1.0  # weight of the old head's soft targets


def fit_replay(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Train on exemplars and new rows, weighted so that each class counts as much as all its old rows would.

    The old head's predictions on all rows are soft targets, and old weights are pulled to their old values as strongly
    as by the head's own penalty: both replace information of the missing old rows.
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


@dataclass(frozen=True, eq=False)
class WeightedEmbeddings:
    """Embeddings, each of which represents a number of images.

    Attributes
    ----------
    X : ndarray of shape (r, d)
    y, weights : ndarray of shape (r,)
    offset_weights : ndarray of shape (r,)
        Weights in the fit of the offset between old and new classes. Sampled rows count only where there are no real
        ones, which are harder to separate.
    """

    X: NDArray[Any]
    y: NDArray[np.integer[Any]]
    weights: Array
    offset_weights: Array

    @classmethod
    def from_dataset(cls, dataset: EmbeddingDataset) -> WeightedEmbeddings:
        ones = np.ones(len(dataset))
        return cls(dataset.features, dataset.y, ones, ones)

    def take(self, mask: NDArray[np.bool_]) -> WeightedEmbeddings:
        return WeightedEmbeddings(self.X[mask], self.y[mask], self.weights[mask], self.offset_weights[mask])

    def __add__(self, other: WeightedEmbeddings) -> WeightedEmbeddings:
        return WeightedEmbeddings(
            *(np.concatenate(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def select_weighted_exemplars(step: IncrementalStep) -> WeightedEmbeddings:
    """Stored exemplars, weighted by the images they represent; selected from the available old rows if none are stored.

    Where statistics are stored too, exemplars represent themselves alone, and sampled rows represent the rest.
    """
    memory, n = step.replay_memory, step.settings.memory
    if memory is not None and len(memory.rows):
        memory = memory.truncate(n)
        weights, counts = memory.exemplar_weights(), np.bincount(memory.codes, minlength=len(memory.counts))
        exemplars = WeightedEmbeddings(np.asarray(memory.rows, np.float32), memory.codes, weights, weights)
        sampled_rows = sample_from_statistics(step, memory.counts - counts)
        if sampled_rows is None:
            return exemplars
        exemplars = replace(exemplars, weights=np.ones(len(weights)))
        return exemplars + replace(sampled_rows, offset_weights=np.zeros(len(sampled_rows.y)))
    exemplars = WeightedEmbeddings.from_dataset(step.old.take(step.select_old_exemplars()))
    represented = np.bincount(step.old.y, minlength=step.k) / np.maximum(np.bincount(exemplars.y, minlength=step.k), 1)
    return replace(exemplars, weights=represented[exemplars.y], offset_weights=represented[exemplars.y])


def make_old_rows(step: IncrementalStep) -> WeightedEmbeddings | None:
    """Rows in place of the old ones: stored exemplars, else rows sampled from statistics; None if nothing is stored."""
    memory = step.replay_memory
    if memory is None:
        return None
    return select_weighted_exemplars(step) if len(memory.rows) else sample_from_statistics(step, memory.counts)


def sample_from_statistics(step: IncrementalStep, counts: NDArray[np.int64]) -> WeightedEmbeddings | None:
    """Sample rows from the stored statistics; together they weigh ``counts`` images of each class."""
    if step.replay_memory is None or step.replay_memory.statistics is None:
        return None
    rows_per_class = int(min(MAX_PSEUDO_ROWS_PER_CLASS, max(1, counts.max(initial=0))))
    X, codes = step.replay_memory.statistics.sample_rows(rows_per_class)
    weights = counts[codes] / rows_per_class
    rows = WeightedEmbeddings(X.astype(np.float32), codes, weights, weights)
    return rows.take(rows.weights > 0)
