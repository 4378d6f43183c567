"""Error analysis: nearest neighbours, near duplicates, and tables of samples to inspect (findings)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.diagnostics import (
    MAX_FINDING_ROWS,
    CenteredNormalizer,
    DuplicatePairs,
    Finding,
    LabeledPredictions,
    compute_outlier_scores,
    count_extreme_rows,
    find_near_duplicates,
    find_nearest_neighbors,
    make_prediction_findings,
)
from featpipe.metrics import METRICS, Scores, score
from featpipe.training import EmbeddingDataset

N_OUTLIER_NEIGHBORS = 10
REFERENCE_BLOCK_ROWS = 1 << 15
MAX_CENTERING_ROWS = 20_000
MIN_TRAINING_IMAGES_PER_CLASS, MIN_TEST_IMAGES_PER_CLASS = 20, 30
N_SCORE_RESAMPLES = 200  # for the scores without duplicates


@dataclass(frozen=True, eq=False)
class NearestNeighbors:
    """The nearest neighbours of each row by cosine similarity, most similar first.

    Attributes
    ----------
    within, within_rows : ndarray of shape (m, k)
        Cosines and positions of the neighbours among the rows themselves.
    training, training_rows : ndarray of shape (m, k), or None
        Cosines and positions of the neighbours among the training rows; None if their embeddings are not available.
    """

    within: NDArray[np.float32]
    within_rows: NDArray[np.int64]
    training: NDArray[np.float32] | None
    training_rows: NDArray[np.int64] | None


def compute_nearest_neighbors(X: NDArray[np.float32], reference: EmbeddingDataset | None) -> NearestNeighbors:
    """Find the exact nearest neighbours of embeddings of shape (m, d), among themselves and in training."""
    sample = X
    if reference is not None:
        n = len(reference)
        sample = reference.take(np.linspace(0, n - 1, min(n, MAX_CENTERING_ROWS)).astype(int)).features
    normalizer = CenteredNormalizer.from_embeddings(sample)
    rows = normalizer(X)
    within, within_rows = find_nearest_neighbors(rows, rows, N_OUTLIER_NEIGHBORS, exclude_self=True)
    if reference is None:
        return NearestNeighbors(within, within_rows, None, None)
    training, training_rows = np.zeros((len(rows), 0), np.float32), np.zeros((len(rows), 0), np.int64)
    for start in range(0, len(reference), REFERENCE_BLOCK_ROWS):
        block = normalizer(np.asarray(reference.X[start : start + REFERENCE_BLOCK_ROWS], np.float32))
        similarities, indices = find_nearest_neighbors(rows, block, N_OUTLIER_NEIGHBORS)
        similarities, indices = np.hstack([training, similarities]), np.hstack([training_rows, indices + start])
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :N_OUTLIER_NEIGHBORS]
        training, training_rows = np.take_along_axis(similarities, order, 1), np.take_along_axis(indices, order, 1)
    return NearestNeighbors(within, within_rows, training, training_rows)


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Exact and near duplicates among the images.

    Attributes
    ----------
    exact : int
        Rows left out because their bytes are those of a training image.
    training : DuplicatePairs or None
        Scored rows that are near duplicates of a training image; None if the training images are not available.
    within : DuplicatePairs
        Pairs of near duplicates among the scored rows.
    without : Scores or None
        Scores of the rows that are not near duplicates of a training image; None if no row is, or every row is.
    threshold : float
        The cosine from which two images count as near duplicates.
    """

    exact: int
    training: DuplicatePairs | None
    within: DuplicatePairs
    without: Scores | None
    threshold: float

    def describe(self) -> str:
        """Describe the near duplicates of training images in one sentence; empty if there are none."""
        if self.training is None:
            return (
                "near duplicates of training images were not checked: the training cache was not found; "
                "name it with --trained-on"
            )
        if not len(self.training):
            return ""
        text = f"{len(self.training):,} rows are near duplicates of a training image (cosine ≥ {self.threshold:g})"
        if self.without is None:
            return text
        name, value = next(iter(self.without.metrics.items()))
        return f"{text}; without them {METRICS[name].title.lower()} {value} on {self.without.n:,} rows"

    def to_dict(self) -> dict[str, Any]:
        without = None if self.without is None else self.without.to_dict()
        return {
            "exact": self.exact,
            "near": None if self.training is None else len(self.training),
            "within": len(self.within),
            "threshold": self.threshold,
            "without": without and {key: without[key] for key in ("n", "metrics")},
        }


def find_duplicates(
    neighbors: NearestNeighbors, truth: NDArray[Any], predictions: LabeledPredictions, threshold: float, n_exact: int
) -> Duplicates:
    """Find near duplicates, and score the rows that are not near duplicates of a training image.

    Parameters
    ----------
    neighbors : NearestNeighbors
    truth : ndarray of shape (m,), (m, k) or (m, t)
        Class names, a 0/1 matrix, or targets.
    predictions : LabeledPredictions
        Of the same m rows.
    threshold : float
        The cosine from which two images count as near duplicates.
    n_exact : int
        Rows left out as exact copies of training images.
    """
    within = find_near_duplicates(neighbors.within, neighbors.within_rows, threshold, within_rows=True)
    if neighbors.training is None or neighbors.training_rows is None:
        return Duplicates(n_exact, None, within, None, threshold)
    training = find_near_duplicates(neighbors.training, neighbors.training_rows, threshold)
    other_rows = np.setdiff1d(np.arange(len(truth)), training.rows)
    without = None
    if len(training) and len(other_rows):
        predicted = predictions.predicted[other_rows]
        without = score(predictions.task, truth[other_rows], predicted, predictions.names, bootstrap=N_SCORE_RESAMPLES)
    return Duplicates(n_exact, training, within, without, threshold)


def make_findings(
    predictions: LabeledPredictions,
    neighbors: NearestNeighbors,
    duplicates: Duplicates,
    reference: EmbeddingDataset | None,
    per_class: Sequence[Mapping[str, Any]],
) -> list[Finding]:
    """Make all tables of samples and classes to inspect, the most useful first."""
    first_finding, *other_findings = make_prediction_findings(predictions)
    labels = _format_labels(predictions)
    findings = [
        first_finding,
        _make_duplicates_finding(duplicates, reference, predictions.ids, labels),
        *other_findings,
        _make_outliers_finding(neighbors, predictions.ids, labels),
    ]
    if predictions.task == "classification":
        findings.append(_make_small_classes_finding(per_class, reference))
    return findings


def _format_labels(predictions: LabeledPredictions) -> list[str]:
    if predictions.task == "regression":
        return [_format_targets(row) for row in predictions.y]
    return [predictions.describe_row(row)[0] for row in range(len(predictions.ids))]


def _format_dataset_labels(dataset: EmbeddingDataset) -> list[str]:
    if dataset.task == "classification":
        return [dataset.classes[code] for code in dataset.y]
    if dataset.task == "multilabel":
        return [";".join(dataset.classes[i] for i in np.flatnonzero(row > 0)) for row in dataset.y]
    return [_format_targets(row) for row in dataset.y]


def _format_targets(values: NDArray[Any]) -> str:
    return ", ".join(f"{value:g}" for value in np.ravel(values))


def _make_duplicates_finding(
    duplicates: Duplicates, reference: EmbeddingDataset | None, ids: Sequence[str], labels: Sequence[str]
) -> Finding:
    rows: list[dict[str, Any]] = []
    n_training = 0
    if duplicates.training is not None and reference is not None:
        n_training = len(duplicates.training)
        originals = reference.take(duplicates.training.others[:MAX_FINDING_ROWS])
        training_partners = list(zip(originals.ids, _format_dataset_labels(originals), strict=True))
        rows += _make_pair_rows(duplicates.training, ids, labels, training_partners, "training")
    within_partners = [(ids[row], labels[row]) for row in duplicates.within.others[:MAX_FINDING_ROWS].tolist()]
    rows += _make_pair_rows(duplicates.within, ids, labels, within_partners, "test")
    return Finding(
        "near_duplicates",
        "Near duplicates",
        "Pairs of nearly identical images. Near duplicates of training images inflate the scores; "
        "pairs with different labels confuse the head.",
        ("id", "other", "of", "similarity", "label", "other_label"),
        rows,
        n_training + len(duplicates.within),
        "" if duplicates.training is not None else "among the test images only: the training cache was not found",
    )


def _make_pair_rows(
    pairs: DuplicatePairs,
    ids: Sequence[str],
    labels: Sequence[str],
    partners: Sequence[tuple[str, str]],
    other_origin: str,
) -> list[dict[str, Any]]:
    """One row for each pair; `partners` lists its second image as (id, label)."""
    return [
        {
            "id": ids[row],
            "other": other_id,
            "of": other_origin,
            "similarity": round(float(similarity), 4),
            "label": labels[row],
            "other_label": other_label,
        }
        for row, similarity, (other_id, other_label) in zip(
            pairs.rows.tolist(), pairs.similarities, partners, strict=False
        )
    ]


def _make_outliers_finding(neighbors: NearestNeighbors, ids: Sequence[str], labels: Sequence[str]) -> Finding:
    if neighbors.training is not None and neighbors.training.shape[1] > 0:
        similarities, origin = neighbors.training, "training images"
    else:
        similarities, origin = neighbors.within, "other rows"
    distances = compute_outlier_scores(similarities)
    order = np.argsort(-distances, kind="stable")[: count_extreme_rows(len(distances), 0.02)].tolist()
    return Finding(
        "outliers",
        "Outliers",
        f"Images least similar to the {origin}, by the mean cosine distance to the {N_OUTLIER_NEIGHBORS} nearest: "
        "check whether they belong in this data set.",
        ("id", "label", "distance"),
        [{"id": ids[i], "label": labels[i], "distance": round(float(distances[i]), 4)} for i in order],
        len(order),
    )


def _make_small_classes_finding(per_class: Sequence[Mapping[str, Any]], reference: EmbeddingDataset | None) -> Finding:
    training_counts = None
    if reference is not None:
        training_counts = Counter(_format_dataset_labels(reference))
    rows = []
    for scores in per_class:
        n_training = None if training_counts is None else training_counts[scores["name"]]
        reasons = _explain_small_class(n_training, scores["support"], training_counts)
        if reasons:
            low, high = scores["recall_interval"]
            recall = {"recall": scores["recall"], "low": low, "high": high}
            rows.append(
                {
                    "class": scores["name"],
                    "training": n_training,
                    "test": scores["support"],
                    **{key: None if np.isnan(value) else round(float(value), 4) for key, value in recall.items()},
                    "why": "; ".join(reasons),
                }
            )
    rows.sort(key=lambda row: (row["training"] or 0, row["test"]))
    return Finding(
        "short_classes",
        "Classes with few images",
        "More training images would help the model learn these classes; more test images would make their scores "
        "more certain.",
        ("class", "training", "test", "recall", "low", "high", "why"),
        rows,
        len(rows),
        "" if training_counts is not None else "by test images only: the training cache was not found",
    )


def _explain_small_class(n_training: int | None, n_test: int, training_counts: Counter[str] | None) -> list[str]:
    reasons = []
    if training_counts is not None and n_training is not None:
        median_count = float(np.median(list(training_counts.values())))
        if n_training < MIN_TRAINING_IMAGES_PER_CLASS:
            reasons.append(f"fewer than {MIN_TRAINING_IMAGES_PER_CLASS} training images")
        elif n_training < median_count / 2:
            reasons.append(f"fewer than half of the median number of training images per class ({median_count:g})")
    if n_test < MIN_TEST_IMAGES_PER_CLASS:
        reasons.append(f"fewer than {MIN_TEST_IMAGES_PER_CLASS} test images: its scores are uncertain")
    return reasons
