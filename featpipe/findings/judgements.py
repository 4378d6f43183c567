"""What the predictions of a model say of single samples: mistakes, doubts, and labels that may be wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.findings.table import Finding

__all__ = ["SHOWN", "Judged", "few", "suspects"]

Floats = NDArray[np.float64]

SHOWN = 1000
"""The most rows of one table."""


def few(m: int, share: float) -> int:
    """How many of m rows are the most extreme ones: a share of many, some of few."""
    return min(SHOWN, max(int(share * m), min(20, -(-m // 4))))


@dataclass(frozen=True, eq=False)
class Judged:
    """Predictions of some samples, by a model that was not trained on them.

    Attributes
    ----------
    task : {"classification", "multilabel", "regression"}
    ids : sequence of m str
    y : ndarray of shape (m,), (m, k) or (m, t)
        Class codes, a 0/1 matrix, or targets.
    predicted : ndarray of shape (m, k) or (m, t)
        Probabilities, or numbers.
    names : sequence of str
        Of classes or targets.
    """

    task: str
    ids: Sequence[str]
    y: NDArray[Any]
    predicted: Floats
    names: Sequence[str]

    @cached_property
    def best(self) -> NDArray[np.intp]:
        """The most probable class of each row, shape (m,)."""
        return np.asarray(self.predicted.argmax(axis=1))

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Whether each row is right as a whole, shape (m,)."""
        if self.task == "multilabel":
            return np.asarray(((self.predicted >= 0.5) == self.y.astype(bool)).all(axis=1))
        return np.asarray(self.best == self.y)

    def told(self, row: int) -> tuple[str, str, float]:
        """What a row is, what it is taken for, and how probable that is said to be."""
        if self.task == "multilabel":
            given = self.predicted[row] >= 0.5
            sure = np.where(given, self.predicted[row], 1 - self.predicted[row]).min()
            return self._joined(self.y[row] > 0), self._joined(given), float(sure)
        best = int(self.best[row])
        return self.names[int(self.y[row])], self.names[best], float(self.predicted[row, best])

    def _joined(self, chosen: NDArray[np.bool_]) -> str:
        return ";".join(self.names[i] for i in np.flatnonzero(chosen).tolist())


def suspects(judged: Judged) -> list[Finding]:
    """The tables that a task has."""
    return [make(judged) for make in _TABLES[judged.task]]


def _mistakes(judged: Judged) -> Finding:
    sure = np.array([judged.told(row)[2] for row in range(len(judged.ids))])
    wrong = np.flatnonzero(~judged.right)
    order = wrong[np.argsort(-sure[wrong], kind="stable")]
    return Finding(
        "mistakes",
        "Most confident mistakes",
        "What the model is surest of and wrong about: a label to mend, or a kind of image to bring more of.",
        ("id", "label", "predicted", "probability"),
        [_row(judged, row) for row in order[:SHOWN].tolist()],
        len(order),
    )


def _unsure(judged: Judged) -> Finding:
    if judged.task == "multilabel":
        margin = abs(judged.predicted - 0.5).min(axis=1) * 2
    else:
        two = np.sort(judged.predicted, axis=1)[:, -2:]
        margin = two[:, -1] - two[:, 0] if two.shape[1] > 1 else np.ones(len(two))
    order = np.argsort(margin, kind="stable")[: few(len(margin), 0.05)]
    return Finding(
        "unsure",
        "Least confident",
        "Where the model hesitates between two answers: labels for more images like these teach it most.",
        ("id", "label", "predicted", "probability", "margin"),
        [{**_row(judged, row), "margin": round(float(margin[row]), 4)} for row in order.tolist()],
        len(order),
    )


def _row(judged: Judged, row: int) -> dict[str, Any]:
    label, predicted, probability = judged.told(row)
    return {"id": judged.ids[row], "label": label, "predicted": predicted, "probability": round(probability, 4)}


def _confused(judged: Judged) -> Finding:
    k = len(judged.names)
    pairs = np.bincount(judged.y * k + judged.best, minlength=k * k).reshape(k, k)
    support = pairs.sum(axis=1)
    np.fill_diagonal(pairs, 0)
    order = [i for i in np.argsort(-pairs.ravel(), kind="stable")[:SHOWN].tolist() if pairs.ravel()[i]]
    rows = [
        {
            "label": judged.names[i // k],
            "predicted": judged.names[i % k],
            "rows": int(pairs.ravel()[i]),
            "share": round(float(pairs.ravel()[i] / support[i // k]), 4),
        }
        for i in order
    ]
    return Finding(
        "confused",
        "Most confused pairs",
        "Classes that are taken for each other: look whether their labels follow one rule.",
        ("label", "predicted", "rows", "share"),
        rows,
        int((pairs > 0).sum()),
    )


def _label_errors(judged: Judged) -> Finding:
    empty = Finding(
        "label_errors",
        "Likely label errors",
        "Labels that confident learning doubts, the worst first: look, and mend those that are wrong.",
        ("id", "label", "suggested", "quality"),
    )
    try:
        import cleanlab  # noqa: F401
    except ImportError:
        return _without(empty, "not looked for: pip install 'featpipe[labels]' brings cleanlab")
    if len(judged.names) < 2:
        return _without(empty, "not looked for: a single class has no other label")
    doubted, quality = (_doubted_sets if judged.task == "multilabel" else _doubted)(judged)
    order = doubted[np.argsort(quality[doubted], kind="stable")]
    rows = []
    for row in order[:SHOWN].tolist():
        label, suggested, _ = judged.told(row)
        rows.append(
            {"id": judged.ids[row], "label": label, "suggested": suggested, "quality": round(float(quality[row]), 4)}
        )
    return Finding(empty.name, empty.title, empty.meaning, empty.columns, rows, len(order))


def _without(finding: Finding, note: str) -> Finding:
    return Finding(finding.name, finding.title, finding.meaning, finding.columns, note=note)


def _doubted(judged: Judged) -> tuple[NDArray[np.intp], Floats]:
    """Rows whose labels cleanlab doubts, and the quality of all labels; classes that no row has are left aside."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    present, y = np.unique(judged.y, return_inverse=True)
    p = judged.predicted[:, present] + 1e-12
    p = p / p.sum(axis=1, keepdims=True)
    quality = np.asarray(get_label_quality_scores(y, p), float)
    if len(present) < 2:
        return np.zeros(0, np.intp), quality
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with few rows, which are a table of their own
        doubted = np.flatnonzero(find_label_issues(y, p, n_jobs=1))
    return doubted[judged.best[doubted] != judged.y[doubted]], quality


def _doubted_sets(judged: Judged) -> tuple[NDArray[np.intp], Floats]:
    from cleanlab.multilabel_classification import get_label_quality_scores
    from cleanlab.multilabel_classification.filter import find_label_issues

    sets = [np.flatnonzero(row).tolist() for row in judged.y > 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        doubted = np.flatnonzero(find_label_issues(sets, judged.predicted, n_jobs=1))
        quality = np.asarray(get_label_quality_scores(sets, judged.predicted), float)
    return doubted[~judged.right[doubted]], quality


def _errors(judged: Judged) -> Finding:
    true, predicted = (np.reshape(values, (len(judged.ids), -1)) for values in (judged.y, judged.predicted))
    spread = np.maximum(true.std(axis=0), 1e-12)
    error = abs(predicted - true) / spread
    order = np.argsort(-error.max(axis=1), kind="stable")[: few(len(true), 0.05)].tolist()
    worst = error.argmax(axis=1)
    rows = [
        {
            "id": judged.ids[row],
            "target": judged.names[int(worst[row])],
            "label": float(true[row, worst[row]]),
            "predicted": float(predicted[row, worst[row]]),
            "error": round(float(error[row].max()), 4),
        }
        for row in order
    ]
    return Finding(
        "errors",
        "Largest errors",
        "In standard deviations of the target: a label to mend, or a kind of image to bring more of.",
        ("id", "target", "label", "predicted", "error"),
        rows,
        len(rows),
    )


_TABLES: dict[str, Sequence[Callable[[Judged], Finding]]] = {
    "classification": (_label_errors, _mistakes, _confused, _unsure),
    "multilabel": (_label_errors, _mistakes, _unsure),
    "regression": (_errors,),
}
