"""Rows that represent the old images: stored exemplars, or rows sampled from stored statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.incremental.last_layer_loss import Array
from featpipe.incremental.problem import IncrementalStep
from featpipe.training import EmbeddingDataset

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
