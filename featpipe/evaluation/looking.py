"""From an evaluation to its findings: neighbours in training, copies, outliers, and classes short of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.findings import Finding, Judged, Pairs, near_duplicates, nearest, outlying, suspects
from featpipe.findings.judgements import SHOWN, few
from featpipe.findings.neighbours import Directions
from featpipe.scores import METRICS, Scores, score

if TYPE_CHECKING:
    from featpipe.evaluation.reference import Reference
    from featpipe.evaluation.result import Evaluation

__all__ = ["Duplicates", "Neighbourhood", "duplicates_of", "judged_of", "neighbourhood_of", "tables_of"]

NEIGHBOURS = 10
ROWS_AT_ONCE = 1 << 15
CENTRED_ON = 20_000  # rows
FEW_TRAINING, FEW_TEST = 20, 30
RESAMPLES = 200  # for scores that stand beside the main ones


@dataclass(frozen=True, eq=False)
class Neighbourhood:
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
    training: Pairs | None
    within: Pairs
    without: Scores | None
    threshold: float

    def told(self) -> str:
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
        return f"{text}; without them {METRICS[name][0].lower()} {value} on {self.without.n:,} rows"


def neighbourhood_of(evaluation: Evaluation) -> Neighbourhood:
    """Find them, exactly."""
    reference, X = evaluation.reference, evaluation.features
    directions = Directions.of(X if reference is None else _sample(evaluation, reference))
    rows = directions(X)
    within, within_rows = nearest(rows, rows, NEIGHBOURS, same=True)
    if reference is None:
        return Neighbourhood(within, within_rows, None, None)
    best = np.zeros((len(rows), 0), np.float32)
    number = np.zeros((len(rows), 0), np.int64)
    for start, block in _blocks(evaluation, reference):
        found, at = nearest(rows, directions(block), NEIGHBOURS)
        best, number = np.hstack([best, found]), np.hstack([number, at + start])
        order = np.argsort(-best, axis=1, kind="stable")[:, :NEIGHBOURS]
        best, number = np.take_along_axis(best, order, 1), np.take_along_axis(number, order, 1)
    return Neighbourhood(within, within_rows, best, number)


def _sample(evaluation: Evaluation, reference: Reference) -> NDArray[np.float32]:
    some = reference.rows[np.linspace(0, len(reference.rows) - 1, min(len(reference.rows), CENTRED_ON)).astype(int)]
    return np.asarray(reference.cache.features(evaluation.model.output)[some], np.float32)


def _blocks(evaluation: Evaluation, reference: Reference) -> Iterator[tuple[int, NDArray[np.float32]]]:
    features = reference.cache.features(evaluation.model.output)
    for start in range(0, len(reference.rows), ROWS_AT_ONCE):
        yield start, np.asarray(features[reference.rows[start : start + ROWS_AT_ONCE]], np.float32)


def duplicates_of(evaluation: Evaluation) -> Duplicates:
    """Find the copies, and score the rows that are none."""
    near = evaluation.neighbourhood
    within = near_duplicates(near.within, near.within_rows, evaluation.near, same=True)
    exact = evaluation.left_out.get("trained on", 0)
    if near.training is None or near.training_rows is None:
        return Duplicates(exact, None, within, None, evaluation.near)
    training = near_duplicates(near.training, near.training_rows, evaluation.near)
    kept = np.setdiff1d(np.arange(len(evaluation.rows)), training.rows)
    without = None
    if len(training) and len(kept):
        model = evaluation.model
        predicted, truth = evaluation.predicted[kept], evaluation.truth[kept]
        without = score(model.task, truth, predicted, model.classes, bootstrap=RESAMPLES)
    return Duplicates(exact, training, within, without, evaluation.near)


def judged_of(evaluation: Evaluation) -> Judged:
    """The predictions, as the tables want them."""
    model, truth = evaluation.model, evaluation.truth
    if model.task == "classification":
        code = {name: i for i, name in enumerate(model.classes)}
        truth = np.array([code[name] for name in truth], np.intp)
    ids = [evaluation.cache.ids[row] for row in evaluation.rows.tolist()]
    return Judged(model.task, ids, truth, evaluation.predicted, model.classes)


def tables_of(evaluation: Evaluation) -> list[Finding]:
    """All tables, the most useful first."""
    judged = evaluation.judged
    first, *others = suspects(judged)
    found = [first, _near(evaluation, judged), *others, _outliers(evaluation, judged)]
    return [*found, _short(evaluation)] if evaluation.model.task == "classification" else found


def _near(evaluation: Evaluation, judged: Judged) -> Finding:
    copies = evaluation.duplicates
    labels = _labels(judged)
    rows: list[dict[str, Any]] = []
    if copies.training is not None and evaluation.reference is not None:
        reference = evaluation.reference
        theirs = _shown_labels(reference.cache, reference.rows[copies.training.others])
        for i in range(min(len(copies.training), SHOWN)):
            row, other = int(copies.training.rows[i]), int(copies.training.others[i])
            twin = reference.cache.ids[int(reference.rows[other])]
            rows.append(
                _pair(judged.ids[row], twin, "training", copies.training.similarities[i], labels[row], theirs[i])
            )
    for i in range(min(len(copies.within), SHOWN)):
        row, other = int(copies.within.rows[i]), int(copies.within.others[i])
        similarity = copies.within.similarities[i]
        rows.append(_pair(judged.ids[row], judged.ids[other], "test", similarity, labels[row], labels[other]))
    return Finding(
        "near_duplicates",
        "Near-duplicates",
        "Pairs that are nearly one picture; those of training flatter the score, those of two labels mislead the head.",
        ("id", "other", "of", "similarity", "label", "other_label"),
        rows,
        (0 if copies.training is None else len(copies.training)) + len(copies.within),
        "" if copies.training is not None else "among the rows alone: the cache of the training images is not at hand",
    )


def _pair(row: str, other: str, of: str, similarity: float, label: str, other_label: str) -> dict[str, Any]:
    return {
        "id": row,
        "other": other,
        "of": of,
        "similarity": round(float(similarity), 4),
        "label": label,
        "other_label": other_label,
    }


def _labels(judged: Judged) -> list[str]:
    if judged.task == "regression":
        return [", ".join(f"{value:g}" for value in np.ravel(row)) for row in judged.y]
    return [judged.told(row)[0] for row in range(len(judged.ids))]


def _shown_labels(cache: Any, rows: NDArray[np.int64]) -> list[str]:
    labels = cache.label_table.take(rows)
    if labels.task == "classification":
        return [str(name) for name in labels.y]
    if labels.task == "multilabel":
        return [";".join(labels.classes[i] for i in np.flatnonzero(row > 0)) for row in labels.values]
    return [", ".join(f"{value:g}" for value in np.ravel(row)) for row in labels.values]


def _outliers(evaluation: Evaluation, judged: Judged) -> Finding:
    near = evaluation.neighbourhood
    trained = near.training is not None and near.training.shape[1] > 0
    similar = near.training if trained and near.training is not None else near.within
    distance, labels = outlying(similar), _labels(judged)
    order = np.argsort(-distance, kind="stable")[: few(len(distance), 0.02)].tolist()
    return Finding(
        "outliers",
        "Outliers",
        f"Least like {'the training images' if trained else 'the other rows'}, by the mean of 1 - cosine to the "
        f"{NEIGHBOURS} nearest: do they belong here at all?",
        ("id", "label", "distance"),
        [{"id": judged.ids[i], "label": labels[i], "distance": round(float(distance[i]), 4)} for i in order],
        len(order),
    )


def _short(evaluation: Evaluation) -> Finding:
    reference = evaluation.reference
    trained = Counter(reference.labels()) if reference is not None else None
    rows = []
    for row in evaluation.scores.per_class:
        count = None if trained is None else trained[row["name"]]
        why = _why_short(count, row["support"], trained)
        if why:
            low, high = row["recall_interval"]
            figures = {"recall": row["recall"], "low": low, "high": high}
            known = {name: None if np.isnan(value) else round(float(value), 4) for name, value in figures.items()}
            rows.append({"class": row["name"], "training": count, "test": row["support"], **known, "why": why})
    rows.sort(key=lambda row: (row["training"] or 0, row["test"]))
    return Finding(
        "short_classes",
        "Classes short of images",
        "Classes that more images would help: to learn them, or to know how well they are recognised.",
        ("class", "training", "test", "recall", "low", "high", "why"),
        rows,
        len(rows),
        "" if trained is not None else "by test images alone: the cache of the training images is not at hand",
    )


def _why_short(training: int | None, test: int, trained: Counter[str] | None) -> str:
    reasons = []
    if trained is not None and training is not None:
        middle = float(np.median(list(trained.values())))
        if training < FEW_TRAINING:
            reasons.append(f"fewer than {FEW_TRAINING} training images")
        elif training < middle / 2:
            reasons.append(f"less than half as many training images as most classes ({middle:g})")
    if test < FEW_TEST:
        reasons.append(f"fewer than {FEW_TEST} test images: its scores are uncertain")
    return "; ".join(reasons)
