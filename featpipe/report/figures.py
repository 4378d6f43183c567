"""Charts as figures: a table for those who read, a sentence for those in a hurry, and points for the script."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.evaluation import NOVELTY_THRESHOLD, Evaluation, summarize_novelty
from featpipe.metrics import compute_confidence, wilson_interval
from featpipe.report.page import ReportTable

__all__ = [
    "Figure",
    "make_coverage_figure",
    "make_learning_curve_figure",
    "make_novelty_figure",
    "make_reliability_figure",
    "make_threshold_figure",
]

Figure = tuple[ReportTable, str, Any]

N_RELIABILITY_BINS = 10


def _decision_confidences(evaluation: Evaluation) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """What is claimed of each decision and whether it is so, flat; None where nothing is claimed."""
    if evaluation.model.task == "regression" or len(evaluation.model.classes) < 2:
        return None
    confidence, is_correct = compute_confidence(evaluation.predicted, evaluation.judged.y)
    return confidence.ravel(), is_correct.ravel()


def make_reliability_figure(evaluation: Evaluation) -> Figure | None:
    """How often the model is right, where it is so sure."""
    decisions = _decision_confidences(evaluation)
    if decisions is None:
        return None
    confidence, is_correct = decisions
    bin_indices = np.minimum((confidence * N_RELIABILITY_BINS).astype(int), N_RELIABILITY_BINS - 1)
    bin_counts = np.bincount(bin_indices, minlength=N_RELIABILITY_BINS)
    correct_counts, confidence_sums = (
        np.bincount(bin_indices, is_correct, N_RELIABILITY_BINS),
        np.bincount(bin_indices, confidence, N_RELIABILITY_BINS),
    )
    low, high = wilson_interval(correct_counts, bin_counts)
    points = [
        {
            "from": i / N_RELIABILITY_BINS,
            "to": (i + 1) / N_RELIABILITY_BINS,
            "confidence": round(confidence_sums[i] / bin_counts[i], 4),
            "share": round(correct_counts[i] / bin_counts[i], 4),
            "low": round(float(low[i]), 4),
            "high": round(float(high[i]), 4),
            "rows": int(bin_counts[i]),
        }
        for i in np.flatnonzero(bin_counts).tolist()
    ]
    table_rows = [
        [
            f"{point['from']:.1f}–{point['to']:.1f}",
            point["rows"],
            point["confidence"],
            point["share"],
            point["low"],
            point["high"],
        ]
        for point in points
    ]
    calibration_gap = float((confidence_sums - correct_counts).sum() / bin_counts.sum())
    is_multilabel = evaluation.model.task == "multilabel"
    if is_multilabel:
        text = f"Over all labels, probabilities are {abs(calibration_gap):.1%} too {'high' if calibration_gap > 0 else 'low'} on average."
    else:
        text = f"The model is right {is_correct.mean():.1%} of the time and {confidence.mean():.1%} sure on average"
        text += (
            ": well calibrated overall."
            if abs(calibration_gap) < 0.02
            else f": {'over' if calibration_gap > 0 else 'under'}confident."
        )
    return (
        ReportTable(["confidence", "rows", "mean confidence", "share right", "low", "high"], table_rows),
        text,
        points,
    )


def make_threshold_figure(evaluation: Evaluation) -> Figure | None:
    """What is left, and how right it is, where only answers above a threshold are given."""
    decisions = _decision_confidences(evaluation)
    if decisions is None:
        return None
    confidence, is_correct = decisions
    if evaluation.model.task == "multilabel":
        return _make_precision_recall_figure(confidence, is_correct)
    points = []
    for step in range(100):
        is_answered = confidence >= step / 100
        if not is_answered.any():
            break
        n_correct, n_answered = float(is_correct[is_answered].sum()), int(is_answered.sum())
        low, high = wilson_interval(n_correct, n_answered)
        points.append(
            {
                "threshold": step / 100,
                "answered": round(n_answered / len(confidence), 4),
                "right": round(n_correct / n_answered, 4),
                "low": round(float(low), 4),
                "high": round(float(high), 4),
                "wrong": n_answered - int(n_correct),
                "rows": n_answered,
            }
        )
    table_rows = [
        [point["threshold"], point["rows"], point["answered"], point["right"], point["wrong"]] for point in points[::10]
    ]
    target_point = next((point for point in points if point["right"] >= 0.99), None)
    text = (
        f"Answers from a probability of {target_point['threshold']:.2f} on are right 99 % of the time; they are "
        f"{target_point['answered']:.0%} of all."
        if target_point
        else "No threshold leaves answers that are right 99 % of the time."
    )
    return ReportTable(["threshold", "answered", "share answered", "share right", "wrong"], table_rows), text, points


def _make_precision_recall_figure(probabilities: NDArray[np.float64], is_true: NDArray[np.bool_]) -> Figure:
    """Precision and recall over all labels."""
    points: list[dict[str, Any]] = []
    for step in range(100):
        is_predicted = probabilities >= step / 100
        if not is_predicted.any():
            break
        n_true_positives = int((is_predicted & is_true).sum())
        points.append(
            {
                "threshold": step / 100,
                "answered": round(n_true_positives / max(1, int(is_true.sum())), 4),
                "right": round(n_true_positives / max(1, int(is_predicted.sum())), 4),
                "wrong": int((is_predicted & ~is_true).sum()),
                "rows": int(is_predicted.sum()),
            }
        )
    best_point = max(
        points, key=lambda point: 2 * point["right"] * point["answered"] / max(1e-9, point["right"] + point["answered"])
    )
    text = f"Precision and recall are best balanced at a probability of {best_point['threshold']:.2f}."
    table_rows = [
        [point["threshold"], point["rows"], point["answered"], point["right"], point["wrong"]] for point in points[::10]
    ]
    return ReportTable(["threshold", "labels given", "recall", "precision", "wrong"], table_rows), text, points


def make_learning_curve_figure(evaluation: Evaluation) -> Figure | None:
    """The errors of heads trained on fewer images, and what more are expected to bring."""
    curve = evaluation.learning_curve
    if curve is None:
        return None
    curve_points = zip(curve.sizes, curve.errors, curve.lows, curve.highs, strict=True)
    measured = [{"size": size, "error": error, "low": low, "high": high} for size, error, low, high in curve_points]
    forecast_point = {"size": curve.ahead, "error": curve.expected, "low": curve.low, "high": curve.high}
    table_rows: list[list[Any]] = [[point["size"], point["error"], point["low"], point["high"]] for point in measured]
    table_rows.append([f"{curve.ahead:,} (forecast)", curve.expected, curve.low, curve.high])
    is_percentage = evaluation.model.task != "regression"
    current_error, forecast_error, low, high = (
        f"{value:.1%}" if is_percentage else f"{value:.3g}"
        for value in (curve.errors[-1], curve.expected, curve.low, curve.high)
    )
    text = f"With twice the training images ({curve.ahead:,}) the error is expected to go from {current_error} to {forecast_error}, within "
    text += f"{low} and {high}" + ("." if curve.high < curve.errors[-1] else ": a gain cannot be told from chance.")
    return (
        ReportTable(["training images", "error", "low", "high"], table_rows),
        text,
        {"measured": measured, "ahead": forecast_point},
    )


def make_coverage_figure(evaluation: Evaluation) -> Figure | None:
    """How often sets of answers hold the right one."""
    coverages = evaluation.coverage
    if not coverages:
        return None
    is_regression = evaluation.model.task == "regression"
    points = [coverage.to_dict() for coverage in coverages]
    size_label = "mean width" if is_regression else "mean size"
    table_rows = [
        [f"{point['level']:.0%}", point["coverage"], point["low"], point["high"], point["size"], point["single"]]
        for point in points
    ]
    reference_coverage = min(coverages, key=lambda coverage: abs(coverage.level - 0.9))
    set_kind = "intervals" if is_regression else "sets"
    text = f"Of {set_kind} asked to hold the right answer {reference_coverage.level:.0%} of the time, {reference_coverage.coverage.value:.1%} do"
    text += f", with a {size_label} of {reference_coverage.size:.3g}." + (
        "" if is_regression else f" {reference_coverage.single:.0%} name one class alone."
    )
    return ReportTable(["asked for", "holds", "low", "high", size_label, "single"], table_rows), text, points


def make_novelty_figure(evaluation: Evaluation) -> Figure | None:
    """How new the rows look, beside training-like images, of which each bar would hold as many."""
    novelty, summary = evaluation.novelty, summarize_novelty(evaluation.novelty, evaluation.judged)
    if novelty is None or summary is None:
        return None
    bin_counts = np.histogram(novelty, bins=20, range=(0, 1))[0]
    points = [
        {"from": i / 20, "to": (i + 1) / 20, "share": round(n / len(novelty), 4)}
        for i, n in enumerate(bin_counts.tolist())
    ]
    text = f"{summary['share']:.1%} of the images look newer than {NOVELTY_THRESHOLD:.0%} of training-like ones"
    novel_accuracy, other_accuracy = summary.get("right_of_new"), summary.get("right_of_others")
    if novel_accuracy is not None and other_accuracy is not None:
        text += f"; of those {novel_accuracy:.1%} are right, of the others {other_accuracy:.1%}"
    table_rows = [
        [f"{point['from']:.2f}–{point['to']:.2f}", n, point["share"]]
        for point, n in zip(points, bin_counts.tolist(), strict=True)
    ]
    return ReportTable(["novelty", "images", "share"], table_rows), text + ".", points
