"""From an evaluation to its findings: neighbours in training, copies, outliers, and classes short of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from featpipe.metrics import METRICS, Interval, Scores, score, wilson_interval

if TYPE_CHECKING:
    from featpipe.evaluation.dataset import TrainingReference
    from featpipe.evaluation.result import Evaluation

__all__ = [
    "NOVELTY_THRESHOLD",
    "Coverage",
    "Duplicates",
    "NearestNeighbors",
    "compute_coverage",
    "compute_nearest_neighbors",
    "find_duplicates",
    "make_findings",
    "make_labeled_predictions",
    "summarize_novelty",
]

N_NEIGHBORS = 10
REFERENCE_BLOCK_ROWS = 1 << 15
MAX_CENTERING_ROWS = 20_000  # rows
MIN_TRAINING_IMAGES_PER_CLASS, MIN_TEST_IMAGES_PER_CLASS = 20, 30
N_BOOTSTRAP_RESAMPLES = 200  # for scores that stand beside the main ones


@dataclass(frozen=True, eq=False)
class NearestNeighbors:
    """The most similar images of each row, the most similar first.

    Attributes
    ----------
    within, within_rows : ndarray of shape (m, k)
        Cosines and positions among the rows themselves.
    training, training_rows : ndarray of shape (m, k), or None
        Cosines and positions among the rows that the model was trained on, where they are at hand.
    """

    within: NDArray[np.float32]
    within_rows: NDArray[np.int64]
    training: NDArray[np.float32] | None
    training_rows: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Copies among the images.

    Attributes
    ----------
    exact : int
        Rows whose bytes the model was trained on; they were left out.
    training : Pairs or None
        Rows that are nearly a training image; None where the training images are not at hand.
    within : Pairs
        Rows that are nearly each other.
    without : Scores or None
        Of the rows that are nearly no training image; None where there is no copy, or no such row.
    threshold : float
    """

    exact: int
    training: DuplicatePairs | None
    within: DuplicatePairs
    without: Scores | None
    threshold: float

    def describe(self) -> str:
        """For the terminal."""
        if self.training is None:
            return (
                "near-duplicates of training images were not looked for: their cache is not at hand; "
                "name it with --trained-on"
            )
        if not len(self.training):
            return ""
        text = f"{len(self.training):,} rows are nearly a training image (cosine from {self.threshold:g})"
        if self.without is None:
            return text
        name, value = next(iter(self.without.metrics.items()))
        return f"{text}; without them {METRICS[name].title.lower()} {value} on {self.without.n:,} rows"


def compute_nearest_neighbors(evaluation: Evaluation) -> NearestNeighbors:
    """Find them, exactly."""
    reference, X = evaluation.reference, evaluation.features
    normalizer = CenteredNormalizer.from_embeddings(
        X if reference is None else _sample_reference_features(evaluation, reference)
    )
    normalized_rows = normalizer(X)
    within, within_rows = find_nearest_neighbors(normalized_rows, normalized_rows, N_NEIGHBORS, exclude_self=True)
    if reference is None:
        return NearestNeighbors(within, within_rows, None, None)
    similarities = np.zeros((len(normalized_rows), 0), np.float32)
    reference_indices = np.zeros((len(normalized_rows), 0), np.int64)
    for start, block in _iter_reference_blocks(evaluation, reference):
        block_similarities, block_indices = find_nearest_neighbors(normalized_rows, normalizer(block), N_NEIGHBORS)
        similarities, reference_indices = (
            np.hstack([similarities, block_similarities]),
            np.hstack([reference_indices, block_indices + start]),
        )
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :N_NEIGHBORS]
        similarities, reference_indices = (
            np.take_along_axis(similarities, order, 1),
            np.take_along_axis(reference_indices, order, 1),
        )
    return NearestNeighbors(within, within_rows, similarities, reference_indices)


def _sample_reference_features(evaluation: Evaluation, reference: TrainingReference) -> NDArray[np.float32]:
    sampled_rows = reference.rows[
        np.linspace(0, len(reference.rows) - 1, min(len(reference.rows), MAX_CENTERING_ROWS)).astype(int)
    ]
    return np.asarray(reference.cache.features(evaluation.model.output)[sampled_rows], np.float32)


def _iter_reference_blocks(
    evaluation: Evaluation, reference: TrainingReference
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    features = reference.cache.features(evaluation.model.output)
    for start in range(0, len(reference.rows), REFERENCE_BLOCK_ROWS):
        yield start, np.asarray(features[reference.rows[start : start + REFERENCE_BLOCK_ROWS]], np.float32)


def find_duplicates(evaluation: Evaluation) -> Duplicates:
    """Find the copies, and score the rows that are none."""
    neighbors = evaluation.neighbourhood
    within = find_near_duplicates(neighbors.within, neighbors.within_rows, evaluation.near, within_rows=True)
    n_exact = evaluation.left_out.get("trained on", 0)
    if neighbors.training is None or neighbors.training_rows is None:
        return Duplicates(n_exact, None, within, None, evaluation.near)
    training = find_near_duplicates(neighbors.training, neighbors.training_rows, evaluation.near)
    unique_rows = np.setdiff1d(np.arange(len(evaluation.rows)), training.rows)
    deduplicated_scores = None
    if len(training) and len(unique_rows):
        model = evaluation.model
        predicted, truth = evaluation.predicted[unique_rows], evaluation.truth[unique_rows]
        deduplicated_scores = score(model.task, truth, predicted, model.classes, bootstrap=N_BOOTSTRAP_RESAMPLES)
    return Duplicates(n_exact, training, within, deduplicated_scores, evaluation.near)


def make_labeled_predictions(evaluation: Evaluation) -> LabeledPredictions:
    """The predictions, as the tables want them."""
    model, truth = evaluation.model, evaluation.truth
    if model.task == "classification":
        class_index = {name: i for i, name in enumerate(model.classes)}
        truth = np.array([class_index[name] for name in truth], np.intp)
    ids = [evaluation.cache.ids[row] for row in evaluation.rows.tolist()]
    return LabeledPredictions(model.task, ids, truth, evaluation.predicted, model.classes)


def make_findings(evaluation: Evaluation) -> list[Finding]:
    """All tables, the most useful first."""
    predictions = evaluation.judged
    first_finding, *other_findings = make_prediction_findings(predictions)
    findings = [
        first_finding,
        _make_duplicates_finding(evaluation, predictions),
        *other_findings,
        _make_outliers_finding(evaluation, predictions),
    ]
    return (
        [*findings, _make_small_classes_finding(evaluation)] if evaluation.model.task == "classification" else findings
    )


def _make_duplicates_finding(evaluation: Evaluation, predictions: LabeledPredictions) -> Finding:
    duplicates = evaluation.duplicates
    labels = _true_labels(predictions)
    rows: list[dict[str, Any]] = []
    if duplicates.training is not None and evaluation.reference is not None:
        reference = evaluation.reference
        training_labels = _format_cache_labels(reference.cache, reference.rows[duplicates.training.others])
        for i in range(min(len(duplicates.training), MAX_FINDING_ROWS)):
            row, other_index = int(duplicates.training.rows[i]), int(duplicates.training.others[i])
            other_id = reference.cache.ids[int(reference.rows[other_index])]
            rows.append(
                _to_pair_row(
                    predictions.ids[row],
                    other_id,
                    "training",
                    duplicates.training.similarities[i],
                    labels[row],
                    training_labels[i],
                )
            )
    for i in range(min(len(duplicates.within), MAX_FINDING_ROWS)):
        row, other_index = int(duplicates.within.rows[i]), int(duplicates.within.others[i])
        similarity = duplicates.within.similarities[i]
        rows.append(
            _to_pair_row(
                predictions.ids[row], predictions.ids[other_index], "test", similarity, labels[row], labels[other_index]
            )
        )
    return Finding(
        "near_duplicates",
        "Near-duplicates",
        "Pairs that are nearly one picture; those of training flatter the score, those of two labels mislead the head.",
        ("id", "other", "of", "similarity", "label", "other_label"),
        rows,
        (0 if duplicates.training is None else len(duplicates.training)) + len(duplicates.within),
        ""
        if duplicates.training is not None
        else "among the rows alone: the cache of the training images is not at hand",
    )


def _to_pair_row(
    sample_id: str, other_id: str, other_origin: str, similarity: float, label: str, other_label: str
) -> dict[str, Any]:
    return {
        "id": sample_id,
        "other": other_id,
        "of": other_origin,
        "similarity": round(float(similarity), 4),
        "label": label,
        "other_label": other_label,
    }


def _true_labels(predictions: LabeledPredictions) -> list[str]:
    if predictions.task == "regression":
        return [", ".join(f"{value:g}" for value in np.ravel(row)) for row in predictions.y]
    return [predictions.describe_row(row)[0] for row in range(len(predictions.ids))]


def _format_cache_labels(cache: Any, rows: NDArray[np.int64]) -> list[str]:
    labels = cache.label_table.take(rows)
    if labels.task == "classification":
        return [str(name) for name in labels.y]
    if labels.task == "multilabel":
        return [";".join(labels.classes[i] for i in np.flatnonzero(row > 0)) for row in labels.values]
    return [", ".join(f"{value:g}" for value in np.ravel(row)) for row in labels.values]


def _make_outliers_finding(evaluation: Evaluation, predictions: LabeledPredictions) -> Finding:
    neighbors = evaluation.neighbourhood
    has_reference = neighbors.training is not None and neighbors.training.shape[1] > 0
    similarities = neighbors.training if has_reference and neighbors.training is not None else neighbors.within
    outlier_scores, labels = compute_outlier_scores(similarities), _true_labels(predictions)
    order = np.argsort(-outlier_scores, kind="stable")[: count_extreme_rows(len(outlier_scores), 0.02)].tolist()
    return Finding(
        "outliers",
        "Outliers",
        f"Least like {'the training images' if has_reference else 'the other rows'}, by the mean of 1 - cosine to the "
        f"{N_NEIGHBORS} nearest: do they belong here at all?",
        ("id", "label", "distance"),
        [{"id": predictions.ids[i], "label": labels[i], "distance": round(float(outlier_scores[i]), 4)} for i in order],
        len(order),
    )


def _make_small_classes_finding(evaluation: Evaluation) -> Finding:
    reference = evaluation.reference
    training_counts = Counter(reference.labels()) if reference is not None else None
    rows = []
    for row in evaluation.scores.per_class:
        n_training = None if training_counts is None else training_counts[row["name"]]
        reason_text = _explain_small_class(n_training, row["support"], training_counts)
        if reason_text:
            recall_low, recall_high = row["recall_interval"]
            recall_scores = {"recall": row["recall"], "low": recall_low, "high": recall_high}
            rounded_scores = {
                name: None if np.isnan(value) else round(float(value), 4) for name, value in recall_scores.items()
            }
            rows.append(
                {
                    "class": row["name"],
                    "training": n_training,
                    "test": row["support"],
                    **rounded_scores,
                    "why": reason_text,
                }
            )
    rows.sort(key=lambda row: (row["training"] or 0, row["test"]))
    return Finding(
        "short_classes",
        "Classes short of images",
        "Classes that more images would help: to learn them, or to know how well they are recognised.",
        ("class", "training", "test", "recall", "low", "high", "why"),
        rows,
        len(rows),
        "" if training_counts is not None else "by test images alone: the cache of the training images is not at hand",
    )


def _explain_small_class(n_training: int | None, n_test: int, training_counts: Counter[str] | None) -> str:
    reasons = []
    if training_counts is not None and n_training is not None:
        median_count = float(np.median(list(training_counts.values())))
        if n_training < MIN_TRAINING_IMAGES_PER_CLASS:
            reasons.append(f"fewer than {MIN_TRAINING_IMAGES_PER_CLASS} training images")
        elif n_training < median_count / 2:
            reasons.append(f"less than half as many training images as most classes ({median_count:g})")
    if n_test < MIN_TEST_IMAGES_PER_CLASS:
        reasons.append(f"fewer than {MIN_TEST_IMAGES_PER_CLASS} test images: its scores are uncertain")
    return "; ".join(reasons)


COVERAGE_LEVELS = (0.8, 0.9, 0.95, 0.99)
NOVELTY_THRESHOLD = 0.95
"""From this novelty on, an image is called new: of training-like images one in twenty is."""


@dataclass(frozen=True)
class Coverage:
    """Sets, or intervals of numbers, that were asked to hold the right answer with a certain share.

    Attributes
    ----------
    level : float
        What was asked for.
    coverage : Interval
        The share that holds it; of several targets, on average.
    size : float
        Mean number of classes in a set; of a regression, the mean width.
    single : float
        Share of sets of one class; NaN of a regression.
    """

    level: float
    coverage: Interval
    size: float
    single: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        coverage_dict = {
            "level": self.level,
            "coverage": self.coverage.value,
            "low": self.coverage.low,
            "high": self.coverage.high,
        }
        return {**coverage_dict, "size": self.size, "single": None if np.isnan(self.single) else self.single}


def compute_coverage(evaluation: Evaluation) -> list[Coverage]:
    """At several levels; none where the model has no sets."""
    model = evaluation.model
    conformal = model.trust.conformal
    if conformal is None or model.task == "multilabel":
        return []
    coverages = []
    for level in COVERAGE_LEVELS:
        if not np.isfinite(conformal.score_quantile(level)).all():
            continue  # too few held-out images to say
        if model.task == "regression":
            intervals = conformal.predict_intervals(evaluation.predicted, level)
            truth = np.reshape(evaluation.truth, intervals.shape[:2])
            is_covered = ((intervals[..., 0] <= truth) & (truth <= intervals[..., 1])).mean(axis=1)
            coverages.append(
                _make_coverage(level, is_covered, (intervals[..., 1] - intervals[..., 0]).mean(axis=1), np.nan)
            )
        else:
            prediction_sets = conformal.predict_sets(evaluation.predicted, level)
            set_sizes = prediction_sets.sum(axis=1)
            is_covered = prediction_sets[np.arange(len(prediction_sets)), evaluation.judged.y]
            coverages.append(_make_coverage(level, is_covered.astype(float), set_sizes, float((set_sizes == 1).mean())))
    return coverages


def _make_coverage(
    level: float, is_covered: NDArray[np.float64], sizes: NDArray[Any], singleton_share: float
) -> Coverage:
    low, high = wilson_interval(is_covered.sum(), len(is_covered))
    return Coverage(
        level, Interval(float(is_covered.mean()), float(low), float(high)), float(sizes.mean()), singleton_share
    )


def summarize_novelty(evaluation: Evaluation) -> dict[str, Any] | None:
    """How many rows look new, and how right the model is of them and of the others; None where that is not known."""
    novelty = evaluation.novelty
    if novelty is None:
        return None
    is_novel = novelty >= NOVELTY_THRESHOLD
    summary: dict[str, Any] = {
        "from": NOVELTY_THRESHOLD,
        "share": float(is_novel.mean()),
        "median": float(np.median(novelty)),
    }
    if evaluation.model.task != "regression":
        is_correct = evaluation.judged.is_correct
        for name, rows in (("right_of_new", is_novel), ("right_of_others", ~is_novel)):
            summary[name] = float(is_correct[rows].mean()) if rows.any() else None
    return summary
