"""Findings from predictions: errors, least confident samples, confused classes, and likely label errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.diagnostics.finding import Finding

Floats = NDArray[np.float64]

MAX_FINDING_ROWS = 1000
"""Maximum number of rows of one finding."""


def count_extreme_rows(m: int, fraction: float) -> int:
    """The number of m rows to list as extreme: a fraction, but at least 20, or a quarter of m if that is less."""
    return min(MAX_FINDING_ROWS, max(int(fraction * m), min(20, -(-m // 4))))


@dataclass(frozen=True, eq=False)
class LabeledPredictions:
    """Predictions and labels of m samples, by a model that was not trained on them.

    Attributes
    ----------
    task : {"classification", "multilabel", "regression"}
    ids : sequence of m str
    y : ndarray of shape (m,), (m, k) or (m, t)
        Class codes, a 0/1 matrix, or targets.
    predicted : ndarray of shape (m, k) or (m, t)
        Probabilities, or numbers for a regression.
    names : sequence of str
        Classes or targets.
    """

    task: str
    ids: Sequence[str]
    y: NDArray[Any]
    predicted: Floats
    names: Sequence[str]

    @cached_property
    def top_class(self) -> NDArray[np.intp]:
        """The most probable class of each row, shape (m,)."""
        return np.asarray(self.predicted.argmax(axis=1))

    @cached_property
    def is_correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is correct (for several labels: all of them), shape (m,)."""
        if self.task == "multilabel":
            return np.asarray(((self.predicted >= 0.5) == self.y.astype(bool)).all(axis=1))
        return np.asarray(self.top_class == self.y)

    def describe_row(self, row: int) -> tuple[str, str, float]:
        """The label, the prediction and the probability of the prediction."""
        if self.task == "multilabel":
            is_predicted = self.predicted[row] >= 0.5
            confidence = np.where(is_predicted, self.predicted[row], 1 - self.predicted[row]).min()
            return self._join_labels(self.y[row] > 0), self._join_labels(is_predicted), float(confidence)
        top_class = int(self.top_class[row])
        return self.names[int(self.y[row])], self.names[top_class], float(self.predicted[row, top_class])

    def _join_labels(self, label_mask: NDArray[np.bool_]) -> str:
        return ";".join(self.names[i] for i in np.flatnonzero(label_mask).tolist())


def make_prediction_findings(predictions: LabeledPredictions) -> list[Finding]:
    """Make the findings of the task."""
    return [make_finding(predictions) for make_finding in _FINDING_MAKERS[predictions.task]]


def _find_mistakes(predictions: LabeledPredictions) -> Finding:
    confidence = np.array([predictions.describe_row(row)[2] for row in range(len(predictions.ids))])
    error_rows = np.flatnonzero(~predictions.is_correct)
    order = error_rows[np.argsort(-confidence[error_rows], kind="stable")]
    return Finding(
        "mistakes",
        "Most confident errors",
        "Wrong predictions with the highest probability: correct the label, or add more images of this kind.",
        ("id", "label", "predicted", "probability"),
        [_to_finding_row(predictions, row) for row in order[:MAX_FINDING_ROWS].tolist()],
        len(order),
    )


def _find_least_confident(predictions: LabeledPredictions) -> Finding:
    if predictions.task == "multilabel":
        margin = abs(predictions.predicted - 0.5).min(axis=1) * 2
    else:
        top_two = np.sort(predictions.predicted, axis=1)[:, -2:]
        margin = top_two[:, -1] - top_two[:, 0] if top_two.shape[1] > 1 else np.ones(len(top_two))
    order = np.argsort(margin, kind="stable")[: count_extreme_rows(len(margin), 0.05)]
    return Finding(
        "unsure",
        "Least confident",
        "Predictions with the smallest margin: labelling more images like these helps most.",
        ("id", "label", "predicted", "probability", "margin"),
        [{**_to_finding_row(predictions, row), "margin": round(float(margin[row]), 4)} for row in order.tolist()],
        len(order),
    )


def _to_finding_row(predictions: LabeledPredictions, row: int) -> dict[str, Any]:
    label, predicted, probability = predictions.describe_row(row)
    return {"id": predictions.ids[row], "label": label, "predicted": predicted, "probability": round(probability, 4)}


def _find_confused_pairs(predictions: LabeledPredictions) -> Finding:
    k = len(predictions.names)
    confusion = np.bincount(predictions.y * k + predictions.top_class, minlength=k * k).reshape(k, k)
    support = confusion.sum(axis=1)
    np.fill_diagonal(confusion, 0)
    order = np.argsort(-confusion, axis=None, kind="stable")[:MAX_FINDING_ROWS]
    rows = [
        {
            "label": predictions.names[true],
            "predicted": predictions.names[predicted],
            "rows": int(confusion[true, predicted]),
            "share": round(float(confusion[true, predicted] / support[true]), 4),
        }
        for true, predicted in zip(*np.unravel_index(order, confusion.shape), strict=True)
        if confusion[true, predicted]
    ]
    return Finding(
        "confused",
        "Most confused pairs",
        "Classes that are predicted as one another: check that they are labelled consistently.",
        ("label", "predicted", "rows", "share"),
        rows,
        int((confusion > 0).sum()),
    )


def _find_label_errors(predictions: LabeledPredictions) -> Finding:
    empty_finding = Finding(
        "label_errors",
        "Likely label errors",
        "Labels that are probably wrong according to confident learning, least plausible first: check them, and "
        "correct the wrong ones.",
        ("id", "label", "suggested", "quality"),
    )
    try:
        import cleanlab  # noqa: F401
    except ImportError:
        return replace(empty_finding, note="not checked: cleanlab is missing; pip install 'featpipe[labels]'")
    if len(predictions.names) < 2:
        return replace(empty_finding, note="not checked: there is only one class")
    find_issues = _find_multilabel_issues if predictions.task == "multilabel" else _find_label_issues
    suspect_rows, quality = find_issues(predictions)
    order = suspect_rows[np.argsort(quality[suspect_rows], kind="stable")]
    rows = []
    for row in order[:MAX_FINDING_ROWS].tolist():
        label, suggested, _ = predictions.describe_row(row)
        row_quality = round(float(quality[row]), 4)
        rows.append({"id": predictions.ids[row], "label": label, "suggested": suggested, "quality": row_quality})
    return replace(empty_finding, rows=rows, total=len(order))


def _find_label_issues(predictions: LabeledPredictions) -> tuple[NDArray[np.intp], Floats]:
    """Find label issues with cleanlab, and compute the quality of all labels; classes without rows are ignored."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    present_classes, y = np.unique(predictions.y, return_inverse=True)
    probabilities = predictions.predicted[:, present_classes] + 1e-12
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    quality = np.asarray(get_label_quality_scores(y, probabilities), float)
    if len(present_classes) < 2:
        return np.zeros(0, np.intp), quality
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes with few rows, which have a finding of their own
        suspect_rows = np.flatnonzero(find_label_issues(y, probabilities, n_jobs=1))
    return suspect_rows[predictions.top_class[suspect_rows] != predictions.y[suspect_rows]], quality


def _find_multilabel_issues(predictions: LabeledPredictions) -> tuple[NDArray[np.intp], Floats]:
    from cleanlab.multilabel_classification import get_label_quality_scores
    from cleanlab.multilabel_classification.filter import find_label_issues

    label_sets = [np.flatnonzero(row).tolist() for row in predictions.y > 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        suspect_rows = np.flatnonzero(find_label_issues(label_sets, predictions.predicted, n_jobs=1))
        quality = np.asarray(get_label_quality_scores(label_sets, predictions.predicted), float)
    return suspect_rows[~predictions.is_correct[suspect_rows]], quality


def _find_largest_errors(predictions: LabeledPredictions) -> Finding:
    n_rows = len(predictions.ids)
    targets, predicted_targets = (
        np.reshape(predictions.y, (n_rows, -1)),
        np.reshape(predictions.predicted, (n_rows, -1)),
    )
    target_std = np.maximum(targets.std(axis=0), 1e-12)
    standardized_error = abs(predicted_targets - targets) / target_std
    order = np.argsort(-standardized_error.max(axis=1), kind="stable")[: count_extreme_rows(n_rows, 0.05)]
    worst_target = standardized_error.argmax(axis=1)
    rows = [
        {
            "id": predictions.ids[row],
            "target": predictions.names[int(worst_target[row])],
            "label": float(targets[row, worst_target[row]]),
            "predicted": float(predicted_targets[row, worst_target[row]]),
            "error": round(float(standardized_error[row].max()), 4),
        }
        for row in order.tolist()
    ]
    return Finding(
        "errors",
        "Largest errors",
        "In standard deviations of the target: correct the label, or add more images of this kind.",
        ("id", "target", "label", "predicted", "error"),
        rows,
        len(rows),
    )


_FINDING_MAKERS: dict[str, Sequence[Callable[[LabeledPredictions], Finding]]] = {
    "classification": (_find_label_errors, _find_mistakes, _find_confused_pairs, _find_least_confident),
    "multilabel": (_find_label_errors, _find_mistakes, _find_least_confident),
    "regression": (_find_largest_errors,),
}
