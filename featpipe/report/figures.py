"""Charts as figures: a table for those who read, a sentence for those in a hurry, and points for the script."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.evaluation import Evaluation
from featpipe.evaluation.trusting import NEW, novelty_summary
from featpipe.reliability import judged
from featpipe.report.page import Table
from featpipe.scores import share_interval

__all__ = ["Figure", "learning_of", "novelty_of", "reliability_of", "sets_of", "threshold_of"]

Figure = tuple[Table, str, Any]

BINS = 10


def _confidences(evaluation: Evaluation) -> tuple[NDArray[np.float64], NDArray[np.bool_]] | None:
    """What is claimed of each decision and whether it is so, flat; None where nothing is claimed."""
    if evaluation.model.task == "regression" or len(evaluation.model.classes) < 2:
        return None
    confidence, right = judged(evaluation.predicted, evaluation.judged.y)
    return confidence.ravel(), right.ravel()


def reliability_of(evaluation: Evaluation) -> Figure | None:
    """How often the model is right, where it is so sure."""
    found = _confidences(evaluation)
    if found is None:
        return None
    confidence, right = found
    where = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(where, minlength=BINS)
    hits, claimed = np.bincount(where, right, BINS), np.bincount(where, confidence, BINS)
    low, high = share_interval(hits, count)
    points = [
        {
            "from": i / BINS,
            "to": (i + 1) / BINS,
            "confidence": round(claimed[i] / count[i], 4),
            "share": round(hits[i] / count[i], 4),
            "low": round(float(low[i]), 4),
            "high": round(float(high[i]), 4),
            "rows": int(count[i]),
        }
        for i in np.flatnonzero(count).tolist()
    ]
    rows = [
        [f"{p['from']:.1f}–{p['to']:.1f}", p["rows"], p["confidence"], p["share"], p["low"], p["high"]] for p in points
    ]
    gap = float((claimed - hits).sum() / count.sum())
    many = evaluation.model.task == "multilabel"
    if many:
        text = f"Over all labels, probabilities are {abs(gap):.1%} too {'high' if gap > 0 else 'low'} on average."
    else:
        text = f"The model is right {right.mean():.1%} of the time and {confidence.mean():.1%} sure on average"
        text += ": well calibrated overall." if abs(gap) < 0.02 else f": {'over' if gap > 0 else 'under'}confident."
    return Table(["confidence", "rows", "mean confidence", "share right", "low", "high"], rows), text, points


def threshold_of(evaluation: Evaluation) -> Figure | None:
    """What is left, and how right it is, where only answers above a threshold are given."""
    found = _confidences(evaluation)
    if found is None:
        return None
    confidence, right = found
    if evaluation.model.task == "multilabel":
        return _labels_given(confidence, right)
    points = []
    for step in range(100):
        answered = confidence >= step / 100
        if not answered.any():
            break
        hits, n = float(right[answered].sum()), int(answered.sum())
        low, high = share_interval(hits, n)
        points.append(
            {
                "threshold": step / 100,
                "answered": round(n / len(confidence), 4),
                "right": round(hits / n, 4),
                "low": round(float(low), 4),
                "high": round(float(high), 4),
                "wrong": n - int(hits),
                "rows": n,
            }
        )
    rows = [[p["threshold"], p["rows"], p["answered"], p["right"], p["wrong"]] for p in points[::10]]
    wanted = next((p for p in points if p["right"] >= 0.99), None)
    text = (
        f"Answers from a probability of {wanted['threshold']:.2f} on are right 99 % of the time; they are "
        f"{wanted['answered']:.0%} of all."
        if wanted
        else "No threshold leaves answers that are right 99 % of the time."
    )
    return Table(["threshold", "answered", "share answered", "share right", "wrong"], rows), text, points


def _labels_given(p: NDArray[np.float64], true: NDArray[np.bool_]) -> Figure:
    """Precision and recall over all labels."""
    points: list[dict[str, Any]] = []
    for step in range(100):
        given = p >= step / 100
        if not given.any():
            break
        hits = int((given & true).sum())
        points.append(
            {
                "threshold": step / 100,
                "answered": round(hits / max(1, int(true.sum())), 4),
                "right": round(hits / max(1, int(given.sum())), 4),
                "wrong": int((given & ~true).sum()),
                "rows": int(given.sum()),
            }
        )
    best = max(points, key=lambda q: 2 * q["right"] * q["answered"] / max(1e-9, q["right"] + q["answered"]))
    text = f"Precision and recall are best balanced at a probability of {best['threshold']:.2f}."
    rows = [[q["threshold"], q["rows"], q["answered"], q["right"], q["wrong"]] for q in points[::10]]
    return Table(["threshold", "labels given", "recall", "precision", "wrong"], rows), text, points


def learning_of(evaluation: Evaluation) -> Figure | None:
    """The errors of heads trained on fewer images, and what more are expected to bring."""
    curve = evaluation.learning_curve
    if curve is None:
        return None
    each = zip(curve.sizes, curve.errors, curve.lows, curve.highs, strict=True)
    measured = [{"size": n, "error": e, "low": low, "high": high} for n, e, low, high in each]
    ahead = {"size": curve.ahead, "error": curve.expected, "low": curve.low, "high": curve.high}
    rows: list[list[Any]] = [[p["size"], p["error"], p["low"], p["high"]] for p in measured]
    rows.append([f"{curve.ahead:,} (forecast)", curve.expected, curve.low, curve.high])
    share = evaluation.model.task != "regression"
    now, then, low, high = (
        f"{value:.1%}" if share else f"{value:.3g}"
        for value in (curve.errors[-1], curve.expected, curve.low, curve.high)
    )
    text = f"With twice the training images ({curve.ahead:,}) the error is expected to go from {now} to {then}, within "
    text += f"{low} and {high}" + ("." if curve.high < curve.errors[-1] else ": a gain cannot be told from chance.")
    return Table(["training images", "error", "low", "high"], rows), text, {"measured": measured, "ahead": ahead}


def sets_of(evaluation: Evaluation) -> Figure | None:
    """How often sets of answers hold the right one."""
    found = evaluation.coverage
    if not found:
        return None
    numbers = evaluation.model.task == "regression"
    points = [coverage.to_dict() for coverage in found]
    size = "mean width" if numbers else "mean size"
    rows = [[f"{p['level']:.0%}", p["coverage"], p["low"], p["high"], p["size"], p["single"]] for p in points]
    at = min(found, key=lambda coverage: abs(coverage.level - 0.9))
    what = "intervals" if numbers else "sets"
    text = f"Of {what} asked to hold the right answer {at.level:.0%} of the time, {at.coverage.value:.1%} do"
    text += f", with a {size} of {at.size:.3g}." + ("" if numbers else f" {at.single:.0%} name one class alone.")
    return Table(["asked for", "holds", "low", "high", size, "single"], rows), text, points


def novelty_of(evaluation: Evaluation) -> Figure | None:
    """How new the rows look, beside training-like images, of which each bar would hold as many."""
    novelty, summary = evaluation.novelty, novelty_summary(evaluation)
    if novelty is None or summary is None:
        return None
    count = np.histogram(novelty, bins=20, range=(0, 1))[0]
    points = [
        {"from": i / 20, "to": (i + 1) / 20, "share": round(n / len(novelty), 4)} for i, n in enumerate(count.tolist())
    ]
    text = f"{summary['share']:.1%} of the images look newer than {NEW:.0%} of training-like ones"
    right, others = summary.get("right_of_new"), summary.get("right_of_others")
    if right is not None and others is not None:
        text += f"; of those {right:.1%} are right, of the others {others:.1%}"
    rows = [[f"{p['from']:.2f}–{p['to']:.2f}", n, p["share"]] for p, n in zip(points, count.tolist(), strict=True)]
    return Table(["novelty", "images", "share"], rows), text + ".", points
