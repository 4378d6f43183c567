"""The table of metrics, and the scores of a set of predictions: by name, by class, as JSON and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.metrics.intervals import Interval, format_score
from featpipe.runtime import nan_to_none


@dataclass(frozen=True)
class Metric:
    """How a metric is presented and compared.

    Attributes
    ----------
    title : str
    meaning : str
        A short explanation for reports.
    higher_is_better : bool
    """

    title: str
    meaning: str
    higher_is_better: bool = True

    def gain(self, value: float) -> float:
        """The value, with the sign that makes larger better."""
        return value if self.higher_is_better else -value


METRICS: dict[str, Metric] = {
    "accuracy": Metric("Accuracy", "share of rows whose most probable class is correct"),
    "balanced_accuracy": Metric("Balanced accuracy", "mean recall; every class counts the same"),
    "macro_f1": Metric("Macro F1", "mean F1; every class counts the same"),
    "top5_accuracy": Metric("Top-5 accuracy", "share of rows whose class is among the five most probable"),
    "log_loss": Metric(
        "Log loss", "mean negative log probability of the true class; lower is better", higher_is_better=False
    ),
    "calibration_error": Metric(
        "Calibration error", "how far confidence is from accuracy, on average; lower is better", higher_is_better=False
    ),
    "roc_auc": Metric("ROC AUC", "probability that a row of a class ranks above a row of another class"),
    "pr_auc": Metric("PR AUC", "mean precision of a class over all thresholds, averaged over classes"),
    "mean_average_precision": Metric(
        "Mean average precision",
        "mean over labels; 1 if every label ranks its rows first",
    ),
    "micro_f1": Metric("Micro F1", "F1 over all decisions at probability 0.5"),
    "exact_match": Metric("Exact match", "share of rows with every label correct at probability 0.5"),
    "mae": Metric("Mean absolute error", "in the units of the target; lower is better", higher_is_better=False),
    "rmse": Metric("Root mean squared error", "in the units of the target; lower is better", higher_is_better=False),
    "r2": Metric("R²", "share of the variance explained; 0 equals always predicting the mean"),
    "spearman": Metric("Spearman correlation", "agreement of the order of predictions with the order of targets"),
}
"""Every score that featpipe reports, by name."""

SELECTION_METRICS: dict[str, dict[str, str]] = {
    "classification": {
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced_accuracy",
        "macro_f1": "f1_macro",
        "log_loss": "neg_log_loss",
        "roc_auc": "roc_auc_ovr",
    },
    "multilabel": {
        "mean_average_precision": "average_precision",
        "log_loss": "log_loss",
        "micro_f1": "f1_micro",
        "macro_f1": "f1_macro",
        "exact_match": "accuracy",
    },
    "regression": {
        "r2": "r2",
        "mae": "neg_mean_absolute_error",
        "rmse": "neg_root_mean_squared_error",
    },
}
"""By task, the metrics that select settings and heads, with scikit-learn's scorers; the first is the default."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of m predictions.

    Attributes
    ----------
    task : {"classification", "multilabel", "regression"}
    n : int
        Rows scored.
    metrics : dict of str to Interval
        By the names in `METRICS`, the most important first, without the scores that are undefined for these rows.
    per_class : list of dict
        For each class, in the order of `classes`: ``name``, ``precision``, ``recall``, ``f1``, ``support``,
        ``precision_interval`` and ``recall_interval`` (low, high), and ``average_precision`` for several labels.
        For each target of a regression: ``name``, ``mae``, ``rmse``, ``r2``, ``spearman``. NaN where undefined: the
        precision of a class never predicted.
    confusion : ndarray of shape (k, k), int64, or None
        Rows are true, columns predicted classes; for classification alone.
    classes : tuple of str
        Class or target names.
    """

    task: str
    n: int
    metrics: dict[str, Interval]
    per_class: list[dict[str, Any]]
    confusion: NDArray[np.int64] | None
    classes: tuple[str, ...]

    def confused(self, limit: int) -> list[tuple[str, str, int]]:
        """The most frequent confusions (true, predicted, rows), at most ``limit``."""
        if self.confusion is None:
            return []
        true, predicted = np.nonzero(self.confusion)
        pairs = [(self.confusion[t, p], t, p) for t, p in zip(true, predicted, strict=True) if t != p]
        pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
        return [(self.classes[t], self.classes[p], int(rows)) for rows, t, p in pairs[:limit]]

    def weakest(self) -> list[dict[str, Any]]:
        """`per_class` by ascending F1 (R² for targets); among equals the larger class comes first.

        Classes without rows or without such a score come last.
        """
        score = "r2" if self.task == "regression" else "f1"

        def sort_key(row: dict[str, Any]) -> tuple[bool, float, int]:
            support = row.get("support", self.n)
            is_defined = support > 0 and math.isfinite(row[score])
            return not is_defined, row[score] if is_defined else 0.0, -support

        return sorted(self.per_class, key=sort_key)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; undefined scores are None.

        The keys are stable: ``task``, ``n``, ``metrics`` (name to ``{"value", "low", "high"}``),
        ``per_class`` (as the attribute), ``confusion`` (list of rows, or None) and ``classes``.
        """
        return {
            "task": self.task,
            "n": self.n,
            "metrics": {name: nan_to_none(vars(interval)) for name, interval in self.metrics.items()},
            "per_class": nan_to_none(self.per_class),
            "confusion": None if self.confusion is None else self.confusion.tolist(),
            "classes": list(self.classes),
        }

    def table(self, limit: int = 20) -> str:
        """A text table of the scores with their intervals, then of the ``limit`` weakest classes."""
        metric_rows = [
            (
                METRICS[name].title,
                format_score(interval.value),
                f"[{format_score(interval.low)}, {format_score(interval.high)}]" if interval.known else "",
            )
            for name, interval in self.metrics.items()
        ]
        lines = [
            f"{_format_count(self.n, 'row')}, {_format_count(len(self.classes), _COLUMN_NOUNS[self.task])}",
            "",
            *_align_columns(metric_rows),
        ]
        if len(self.classes) > 1:
            weakest = [
                {key: value for key, value in row.items() if not key.endswith("_interval")}
                for row in self.weakest()[:limit]
            ]
            header = tuple(_HEADINGS.get(key, key) for key in weakest[0])
            body_rows = [tuple(_format_cell(value) for value in row.values()) for row in weakest]
            lines += ["", *_align_columns([header, *body_rows])]
            if len(self.classes) > limit:
                lines.append(f"the {limit} weakest of {len(self.classes):,}")
        return "\n".join(lines)


_HEADINGS = {"name": "", "support": "rows", "average_precision": "avg. precision"}


_COLUMN_NOUNS = {"classification": "class", "multilabel": "label", "regression": "target"}


def _format_count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")


def _format_cell(value: object) -> str:
    """A table cell for the terminal, with control characters and direction marks of a name escaped."""
    if isinstance(value, str):
        printable = "".join(
            character if character.isprintable() else character.encode("unicode_escape").decode()
            for character in value[:60]
        )
        return printable if len(printable) <= 32 and len(value) <= 32 else printable[:31] + "…"
    return format_score(value) if isinstance(value, float) else f"{value:,}"


def _align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                first_cell.ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(other_cells, widths[1:], strict=True)),
            ]
        ).rstrip()
        for first_cell, *other_cells in rows
    ]
