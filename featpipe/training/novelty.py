"""Fit the out-of-distribution score on training embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import splits
from featpipe.model import MAX_REFERENCES, NoveltyScorer
from featpipe.training.dataset import EmbeddingDataset

MAX_NOVELTY_ROWS = 20_000  # that the score is fitted on
MIN_NOVELTY_ROWS = 10


def fit_novelty(dataset: EmbeddingDataset, task: str) -> NoveltyScorer | None:
    """Fit the score on some training rows, with references from all classes; None if there are too few rows."""
    sample = dataset.subset(MAX_NOVELTY_ROWS, splits.SplitSeed.NOVELTY)
    if len(sample) < MIN_NOVELTY_ROWS:
        return None
    reference_rows = np.sort(_make_round_robin_order(sample, task)[: max(MAX_REFERENCES, len(dataset.classes))])
    novelty = NoveltyScorer.from_embeddings(
        np.asarray(sample.X, np.float32), reference_rows, _make_copy_and_group_codes(sample)
    )
    return novelty if len(novelty.distances) >= MIN_NOVELTY_ROWS else None


def update_novelty(old_novelty: NoveltyScorer, n_old_images: int, dataset: EmbeddingDataset) -> NoveltyScorer:
    """Update the score of a classifier with new training rows, without the old ones.

    Parameters
    ----------
    old_novelty : NoveltyScorer
    n_old_images : int
        How many images `old_novelty` was fitted on.
    dataset : EmbeddingDataset
        The new rows. The share of them that becomes references is that of the old rows, at least one row per class.
    """
    if not len(dataset):
        return old_novelty
    sample = dataset.subset(MAX_NOVELTY_ROWS, splits.SplitSeed.NOVELTY)
    share = min(1.0, len(old_novelty.references) / max(1, n_old_images))
    n_reference_rows = max(round(share * len(dataset)), len(np.unique(sample.y)))
    return old_novelty.extend(
        np.asarray(sample.X, np.float32),
        np.sort(_make_round_robin_order(sample, "classification")[:n_reference_rows]),
        _make_copy_and_group_codes(sample),
        n_old_images,
    )


def _make_copy_and_group_codes(dataset: EmbeddingDataset) -> NDArray[Any]:
    """Codes that are equal for copies of an image and, if there are groups, for a group: shape (m, 1) or (m, 2)."""
    _, copy_codes = np.unique(dataset.digests, axis=0, return_inverse=True)
    code_columns: list[NDArray[Any]] = [np.ravel(copy_codes)]
    if dataset.groups is not None:
        code_columns.append(np.unique(dataset.groups, return_inverse=True)[1])
    return np.column_stack(code_columns)


def _make_round_robin_order(dataset: EmbeddingDataset, task: str) -> NDArray[np.intp]:
    """Order rows so that classes alternate; within a class the order depends on the bytes of the images."""
    keys = splits.compute_keys(dataset.digests, splits.SplitSeed.NOVELTY)
    rank_in_class = np.zeros(len(dataset), np.intp)
    if task == "classification":
        for code in range(len(dataset.classes)):
            class_rows = np.flatnonzero(dataset.y == code)
            rank_in_class[class_rows[np.argsort(keys[class_rows], kind="stable")]] = np.arange(len(class_rows))
    return np.lexsort((keys, rank_in_class))
