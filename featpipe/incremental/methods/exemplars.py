"""Rows that represent the old images: stored exemplars, or rows sampled from stored statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.incremental.dataset import LabeledEmbeddings
from featpipe.incremental.problem import IncrementalStep
from featpipe.model import select_exemplars

Array = NDArray[np.float64]

MAX_PSEUDO_ROWS_PER_CLASS = 100  # sampled rows of each old class


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
    def from_embeddings(cls, embeddings: LabeledEmbeddings) -> WeightedEmbeddings:
        ones = np.ones(len(embeddings))
        return cls(embeddings.X, embeddings.y, ones, ones)

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
    replay_memory, n = step.replay_memory, step.settings.memory
    if replay_memory is not None and len(replay_memory.rows):
        replay_memory = replay_memory.truncate(n)
        weights = replay_memory.exemplar_weights()
        exemplars = WeightedEmbeddings(
            np.asarray(replay_memory.rows, np.float32), replay_memory.codes, weights, weights
        )
        pseudo_exemplars = sample_from_statistics(
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
    return WeightedEmbeddings(old.X[indices], old.y[indices], weights, weights)


def make_old_rows(step: IncrementalStep) -> WeightedEmbeddings | None:
    """Rows in place of the old ones: stored exemplars, else rows sampled from statistics; None if nothing is stored."""
    replay_memory = step.replay_memory
    if replay_memory is None:
        return None
    return (
        select_weighted_exemplars(step)
        if len(replay_memory.rows)
        else sample_from_statistics(step, replay_memory.counts)
    )


def sample_from_statistics(step: IncrementalStep, counts: NDArray[np.int64]) -> WeightedEmbeddings | None:
    """Sample rows from the stored statistics; together they weigh ``counts`` images of each class."""
    if step.replay_memory is None or step.replay_memory.statistics is None:
        return None
    rows_per_class = int(min(MAX_PSEUDO_ROWS_PER_CLASS, max(1, counts.max(initial=0))))
    X, codes = step.replay_memory.statistics.sample_rows(rows_per_class)
    weights = counts[codes] / rows_per_class
    rows = WeightedEmbeddings(X.astype(np.float32), codes, weights, weights)
    return rows.take(rows.weights > 0)
