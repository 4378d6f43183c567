"""Charts of an evaluation: for each a table, a caption, and the points that the script draws."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.evaluation import NOVELTY_THRESHOLD, Evaluation, summarize_novelty
from featpipe.metrics import compute_confidence, wilson_interval
from featpipe.report.page import ReportTable

Figure = tuple[ReportTable, str, Any]
"""A table, a caption, and points ready for JSON."""

N_RELIABILITY_BINS = 10
N_NOVELTY_BINS = 20
THRESHOLDS = [step / 100 for step in range(100)]
TARGET_ACCURACY = 0.99  # the caption names the lowest threshold whose answers have this accuracy
WELL_CALIBRATED_GAP = 0.02


def make_reliability_figure(evaluation: Evaluation) -> Figure | None:
    """Make a reliability diagram: accuracy by confidence."""
    decisions = _compute_decision_confidence(evaluation)
    if decisions is None:
        return None
    confidence, is_correct = decisions
    bins = np.minimum((confidence * N_RELIABILITY_BINS).astype(int), N_RELIABILITY_BINS - 1)
    counts = np.bincount(bins, minlength=N_RELIABILITY_BINS)
    correct_counts = np.bincount(bins, is_correct, N_RELIABILITY_BINS)
    confidence_sums = np.bincount(bins, confidence, N_RELIABILITY_BINS)
    low, high = wilson_interval(correct_counts, counts)
    points = [
        {
            "from": i / N_RELIABILITY_BINS,
            "to": (i + 1) / N_RELIABILITY_BINS,
            "confidence": round(confidence_sums[i] / counts[i], 4),
            "share": round(correct_counts[i] / counts[i], 4),
            "low": round(float(low[i]), 4),
            "high": round(float(high[i]), 4),
            "rows": int(counts[i]),
        }
        for i in np.flatnonzero(counts).tolist()
    ]
    table_rows = [
        [
            f"{point['from']:.1f}–{point['to']:.1f}",
            *(point[key] for key in ("rows", "confidence", "share", "low", "high")),
        ]
        for point in points
    ]
    gap = float((confidence_sums - correct_counts).sum() / counts.sum())
    if evaluation.model.task == "multilabel":
        direction = "high" if gap > 0 else "low"
        caption = f"Over all labels, probabilities are {abs(gap):.1%} too {direction} on average."
    else:
        calibration = "overconfident" if gap > 0 else "underconfident"
        calibration = "well calibrated" if abs(gap) < WELL_CALIBRATED_GAP else calibration
        accuracy, mean_confidence = is_correct.mean(), confidence.mean()
        caption = f"Accuracy is {accuracy:.1%}, mean confidence {mean_confidence:.1%}: {calibration} on average."
    return (
        ReportTable(["confidence", "rows", "mean confidence", "accuracy", "low", "high"], table_rows),
        caption,
        points,
    )


def make_threshold_figure(evaluation: Evaluation) -> Figure | None:
    """Make the curves of coverage and accuracy by confidence threshold; for multilabel, recall and precision."""
    decisions = _compute_decision_confidence(evaluation)
    if decisions is None:
        return None
    confidence, is_correct = decisions
    if evaluation.model.task == "multilabel":
        return _make_precision_recall_figure(confidence, is_correct)
    points = []
    for threshold in THRESHOLDS:
        is_answered = confidence >= threshold
        if not is_answered.any():
            break
        n_correct, n_answered = float(is_correct[is_answered].sum()), int(is_answered.sum())
        low, high = wilson_interval(n_correct, n_answered)
        points.append(
            {
                "threshold": threshold,
                "answered": round(n_answered / len(confidence), 4),
                "right": round(n_correct / n_answered, 4),
                "low": round(float(low), 4),
                "high": round(float(high), 4),
                "wrong": n_answered - int(n_correct),
                "rows": n_answered,
            }
        )
    target_point = next((point for point in points if point["right"] >= TARGET_ACCURACY), None)
    caption = f"No threshold gives answers with an accuracy of {TARGET_ACCURACY:.0%}."
    if target_point is not None:
        caption = (
            f"Above a confidence of {target_point['threshold']:.2f}, {target_point['answered']:.0%} of the images are "
            f"answered, with an accuracy of {TARGET_ACCURACY:.0%}."
        )
    columns = ["threshold", "answered", "share answered", "accuracy", "wrong"]
    return _make_threshold_table(columns, points), caption, points


def _make_precision_recall_figure(probabilities: NDArray[np.float64], is_true: NDArray[np.bool_]) -> Figure:
    """Make the curves of precision and recall over all labels, by threshold."""
    points: list[dict[str, Any]] = []
    for threshold in THRESHOLDS:
        is_predicted = probabilities >= threshold
        if not is_predicted.any():
            break
        n_true_positives = int((is_predicted & is_true).sum())
        points.append(
            {
                "threshold": threshold,
                "answered": round(n_true_positives / max(1, int(is_true.sum())), 4),
                "right": round(n_true_positives / max(1, int(is_predicted.sum())), 4),
                "wrong": int((is_predicted & ~is_true).sum()),
                "rows": int(is_predicted.sum()),
            }
        )
    best_point = max(
        points, key=lambda point: 2 * point["right"] * point["answered"] / max(1e-9, point["right"] + point["answered"])
    )
    caption = f"F1 over all labels is highest at a threshold of {best_point['threshold']:.2f}."
    columns = ["threshold", "labels predicted", "recall", "precision", "wrong"]
    return _make_threshold_table(columns, points), caption, points


def _make_threshold_table(columns: list[str], points: list[dict[str, Any]]) -> ReportTable:
    keys = ("threshold", "rows", "answered", "right", "wrong")
    return ReportTable(columns, [[point[key] for key in keys] for point in points[::10]])


def _compute_decision_confidence(evaluation: Evaluation) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """Compute the confidence of each decision and whether it is correct, flat; None without probabilities."""
    if evaluation.model.task == "regression" or len(evaluation.model.classes) < 2:
        return None
    confidence, is_correct = compute_confidence(evaluation.predicted, evaluation.judged.y)
    return confidence.ravel(), is_correct.ravel()


def make_learning_curve_figure(evaluation: Evaluation) -> Figure | None:
    """Make the curve of the error by number of training images, with a forecast."""
    curve = evaluation.learning_curve
    if curve is None:
        return None
    measured = [
        {"size": size, "error": error, "low": low, "high": high}
        for size, error, low, high in zip(curve.sizes, curve.errors, curve.lows, curve.highs, strict=True)
    ]
    forecast = {"size": curve.ahead, "error": curve.expected, "low": curve.low, "high": curve.high}
    table_rows: list[list[Any]] = [list(point.values()) for point in measured]
    table_rows.append([f"{curve.ahead:,} (forecast)", curve.expected, curve.low, curve.high])
    current_error, expected, low, high = (
        f"{value:.3g}" if evaluation.model.task == "regression" else f"{value:.1%}"
        for value in (curve.errors[-1], curve.expected, curve.low, curve.high)
    )
    caption = (
        f"With twice the training images ({curve.ahead:,}), the forecast error is {expected} [{low}, {high}]; "
        f"it is {current_error} now."
    )
    if curve.high >= curve.errors[-1]:
        caption += " The difference is within the uncertainty of the forecast."
    points = {"measured": measured, "ahead": forecast}
    return ReportTable(["training images", "error", "low", "high"], table_rows), caption, points


def make_coverage_figure(evaluation: Evaluation) -> Figure | None:
    """Compare nominal and empirical coverage of prediction sets, or intervals."""
    if not evaluation.coverage:
        return None
    is_regression = evaluation.model.task == "regression"
    kind, size_label = ("intervals", "mean width") if is_regression else ("sets", "mean size")
    points = [coverage.to_dict() for coverage in evaluation.coverage]
    table_rows = [
        [f"{point['level']:.0%}", *(point[key] for key in ("coverage", "low", "high", "size", "single"))]
        for point in points
    ]
    shown = min(evaluation.coverage, key=lambda coverage: abs(coverage.level - 0.9))
    caption = (
        f"Prediction {kind} with a nominal coverage of {shown.level:.0%} contain the true value for "
        f"{shown.coverage.value:.1%} of the images; {size_label} {shown.size:.3g}."
    )
    if not is_regression:
        caption += f" {shown.single:.0%} of the sets have exactly one class."
    return ReportTable(["nominal", "coverage", "low", "high", size_label, "single"], table_rows), caption, points


def make_novelty_figure(evaluation: Evaluation) -> Figure | None:
    """Make a histogram of novelty scores, which is flat for images like those of training."""
    summary = summarize_novelty(evaluation.novelty, evaluation.judged)
    if evaluation.novelty is None or summary is None:
        return None
    counts = np.histogram(evaluation.novelty, bins=N_NOVELTY_BINS, range=(0, 1))[0].tolist()
    points = [
        {"from": i / N_NOVELTY_BINS, "to": (i + 1) / N_NOVELTY_BINS, "share": round(n / len(evaluation.novelty), 4)}
        for i, n in enumerate(counts)
    ]
    caption = (
        f"{summary['share']:.1%} of the images have a novelty score of at least {NOVELTY_THRESHOLD:g}; of images like "
        f"those of training, {1 - NOVELTY_THRESHOLD:.0%} would."
    )
    novel_accuracy, other_accuracy = summary.get("right_of_new"), summary.get("right_of_others")
    if novel_accuracy is not None and other_accuracy is not None:
        caption += f" Accuracy is {novel_accuracy:.1%} on these and {other_accuracy:.1%} on the others."
    table_rows = [
        [f"{point['from']:.2f}–{point['to']:.2f}", n, point["share"]] for point, n in zip(points, counts, strict=True)
    ]
    return ReportTable(["novelty", "images", "share"], table_rows), caption, points
