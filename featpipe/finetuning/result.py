"""The result of fine-tuning: probe and fine-tuned model on the same test rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.finetuning.head_layers import predict_with_model
from featpipe.metrics import (
    METRICS,
    Interval,
    Note,
    ProbeComparison,
    Scores,
    compare_paired,
    format_note,
    format_stored_interval,
    mcnemar_test,
    score,
)
from featpipe.model import Model
from featpipe.runtime import nan_to_none


def compare_models(
    task: str, truth: NDArray[Any], probe: NDArray[Any], tuned: NDArray[Any], classes: tuple[str, ...]
) -> ProbeComparison:
    """Scores of both models with intervals, and paired tests of the differences.

    Parameters
    ----------
    task : str
    truth : ndarray
        Class names, 0/1 matrix or targets of m rows.
    probe, tuned : ndarray of shape (m, k)
        Probabilities or numbers.
    classes : tuple of str
    """
    tuned_scores, probe_scores = (score(task, truth, predictions, classes) for predictions in (tuned, probe))
    contrasts = compare_paired(task, truth, tuned, probe, classes).contrasts
    metrics = [
        {
            "name": name,
            "probe": _to_list(probe_scores.metrics[name]),
            "tuned": _to_list(tuned_scores.metrics[name]),
            "difference": _to_list(contrast.difference),
            "p": nan_to_none(contrast.p),
        }
        for name, contrast in contrasts.items()
    ]
    per_class = _compare_classes(truth, probe, tuned, tuned_scores, probe_scores) if task == "classification" else []
    main = next(name for name in tuned_scores.metrics if name in contrasts)
    return ProbeComparison(len(truth), main, metrics, per_class)


def _compare_classes(
    truth: NDArray[Any], probe: NDArray[Any], tuned: NDArray[Any], tuned_scores: Scores, probe_scores: Scores
) -> list[dict[str, Any]]:
    class_names = np.array(tuned_scores.classes, dtype=object)
    probe_correct, tuned_correct = (class_names[scores.argmax(axis=1)] == truth for scores in (probe, tuned))
    rows = []
    for tuned_row, probe_row in zip(tuned_scores.per_class, probe_scores.per_class, strict=True):
        in_class = truth == tuned_row["name"]
        rows.append(
            {
                "name": tuned_row["name"],
                "rows": int(in_class.sum()),
                "probe": nan_to_none([probe_row["recall"], *probe_row["recall_interval"]]),
                "tuned": nan_to_none([tuned_row["recall"], *tuned_row["recall_interval"]]),
                "p": mcnemar_test(tuned_correct[in_class], probe_correct[in_class]).p if in_class.any() else None,
            }
        )
    return rows


def _to_list(interval: Interval) -> list[float | None]:
    return list(nan_to_none([interval.value, interval.low, interval.high]))


@dataclass(frozen=True, eq=False)
class FineTuningResult:
    """The better of probe and fine-tuned model, and their comparison.

    Attributes
    ----------
    model : Model
        The fine-tuned model, or the unchanged probe.
    kept : {"fine-tuned", "probe"}
        Which of the two `model` is.
    comparison : ProbeComparison
    curve : list of dict
        For each epoch, 0 being before the first step: ``number``, ``loss``, ``validation_loss``, ``validation_score``,
        ``rate``.
    best_epoch : int
    remarks : tuple of mappings
        The splits, and what training started from, see :func:`featpipe.metrics.format_note`; text in earlier files.
    images : dict
        Numbers of ``training``, ``validation`` and ``test`` images; empty in earlier files.
    """

    model: Model
    kept: str
    comparison: ProbeComparison
    curve: list[dict[str, Any]]
    best_epoch: int
    remarks: tuple[Note | str, ...]
    images: Mapping[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks as text."""
        return tuple(map(format_note, self.remarks))

    def to_dict(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "comparison": self.comparison.to_dict(),
            "curve": self.curve,
            "best_epoch": self.best_epoch,
            "notes": list(self.remarks),
            "images": dict(self.images),
        }

    @classmethod
    def from_dict(cls, model: Model, document: Mapping[str, Any]) -> FineTuningResult:
        """From `to_dict`."""
        return cls(
            model,
            document["kept"],
            ProbeComparison(**document["comparison"]),
            document["curve"],
            document["best_epoch"],
            tuple(document["notes"]),
            document.get("images", {}),
        )

    def as_table(self) -> list[list[str]]:
        """A header, and a row for each metric."""
        rows = [["", "probe", "fine-tuned", "difference", "p"]]
        for row in self.comparison.metrics:
            intervals = format_stored_interval(row["probe"]), format_stored_interval(row["tuned"])
            difference = format_stored_interval(row["difference"], signed=True)
            rows.append([METRICS[row["name"]].title, *intervals, difference, _format_p(row["p"])])
        return rows

    def class_table(self) -> list[list[str]]:
        """A header, and a row with the recall of each class; the header alone for tasks other than classification."""
        rows = [["class", "rows", "probe", "fine-tuned", "p"]]
        for row in self.comparison.per_class:
            intervals = format_stored_interval(row["probe"]), format_stored_interval(row["tuned"])
            rows.append([row["name"], str(row["rows"]), *intervals, _format_p(row["p"])])
        return rows


def _format_p(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


def predict_rows(model: Model, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities or numbers of shape (m, k), from the embeddings of a cache."""
    return predict_with_model(model, np.asarray(cache.features(model.output)[rows], np.float32))
