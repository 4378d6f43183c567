"""What fine-tuning brought: probe and fine-tuned model on the same rows that neither has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.model import Model
from featpipe.scores import METRICS, Scores, number, paired, score
from featpipe.scores.paired import mcnemar

__all__ = ["Comparison", "FineTuned", "compared"]

LOWER_IS_BETTER = ("log_loss", "calibration_error", "mae", "rmse")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models on the same held-out rows.

    Attributes
    ----------
    n : int
    main : str
        The score that decides.
    metrics : list of dict
        For each score: ``name``, ``probe`` and ``tuned`` (value, low, high), ``difference`` (value, low, high), ``p``.
    per_class : list of dict
        For each class ``name``, ``rows``, ``probe`` and ``tuned`` (its recall, low, high), ``p``; empty but of classes.
    """

    n: int
    main: str
    metrics: list[dict[str, Any]]
    per_class: list[dict[str, Any]]

    @property
    def gain(self) -> float:
        """How much better the fine-tuned model is by the main score."""
        value = next(row["difference"][0] for row in self.metrics if row["name"] == self.main)
        return -value if self.main in LOWER_IS_BETTER else value

    @property
    def sure(self) -> bool:
        """Whether the interval of the difference is on one side of zero."""
        low, high = next(row["difference"][1:] for row in self.metrics if row["name"] == self.main)
        return low is not None and high is not None and not low <= 0 <= high

    def verdict(self) -> str:
        """In one sentence."""
        row = next(row for row in self.metrics if row["name"] == self.main)
        name, p = METRICS[self.main][0].lower(), row["p"]
        change = f"{name} {_shown(row['probe'])} → {_shown(row['tuned'])}"
        if self.gain == 0:
            return f"fine-tuned is neither better nor worse than the probe on {self.n} held-out images: {change}"
        what = "better" if self.gain > 0 else "worse"
        chance = "" if self.sure else ", which may be chance"
        return f"fine-tuned is {what} than the probe on {self.n} held-out images{chance}: {change}, p = {p:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"n": self.n, "main": self.main, "metrics": self.metrics, "per_class": self.per_class}


def compared(
    task: str, truth: NDArray[Any], probe: NDArray[Any], tuned: NDArray[Any], classes: tuple[str, ...]
) -> Comparison:
    """Scores of both, with their intervals and the tests of what differs.

    Parameters
    ----------
    task : str
    truth : ndarray
        Class names, 0/1 matrix or targets of m rows.
    probe, tuned : ndarray of shape (m, k)
        Probabilities or numbers.
    classes : tuple of str
    """
    ours, theirs = (score(task, truth, answers, classes) for answers in (tuned, probe))
    contrasts = paired(task, truth, tuned, probe, classes).contrasts
    metrics = [
        {
            "name": name,
            "probe": _interval(theirs, name),
            "tuned": _interval(ours, name),
            "difference": [_plain(v) for v in (c.difference.value, c.difference.low, c.difference.high)],
            "p": _plain(c.p),
        }
        for name, c in contrasts.items()
    ]
    per_class = _per_class(truth, probe, tuned, ours, theirs) if task == "classification" else []
    main = next(name for name in ours.metrics if name in contrasts)
    return Comparison(len(truth), main, metrics, per_class)


def _per_class(
    truth: NDArray[Any], probe: NDArray[Any], tuned: NDArray[Any], ours: Scores, theirs: Scores
) -> list[dict[str, Any]]:
    names = np.array(ours.classes, dtype=object)
    right = {"probe": names[probe.argmax(axis=1)] == truth, "tuned": names[tuned.argmax(axis=1)] == truth}
    found = []
    for mine, before in zip(ours.per_class, theirs.per_class, strict=True):
        of_class = truth == mine["name"]
        found.append(
            {
                "name": mine["name"],
                "rows": int(of_class.sum()),
                "probe": [_plain(v) for v in (before["recall"], *before["recall_interval"])],
                "tuned": [_plain(v) for v in (mine["recall"], *mine["recall_interval"])],
                "p": mcnemar(right["tuned"][of_class], right["probe"][of_class]).p if of_class.any() else None,
            }
        )
    return found


def _interval(scores: Scores, name: str) -> list[float | None]:
    found = scores.metrics[name]
    return [_plain(value) for value in (found.value, found.low, found.high)]


def _plain(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _shown(values: list[float | None], signed: bool = False) -> str:
    value, low, high = (math.nan if v is None else v for v in values)
    sign = "+" if signed and value > 0 else ""
    bounds = f" [{number(low)}, {number(high)}]" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{sign}{number(value)}{bounds}"


@dataclass(frozen=True, eq=False)
class FineTuned:
    """What fine-tuning left.

    Attributes
    ----------
    model : Model
        The one that is kept: fine-tuned, or the probe as it was.
    kept : {"fine-tuned", "probe"}
    comparison : Comparison
    curve : list of dict
        For each epoch, 0 being before the first step: ``number``, ``loss``, ``validation_loss``, ``validation_score``,
        ``rate``.
    best_epoch : int
    notes : tuple of str
        How it was done, for people.
    """

    model: Model
    kept: str
    comparison: Comparison
    curve: list[dict[str, Any]]
    best_epoch: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "kept": self.kept,
            "verdict": self.comparison.verdict(),
            "comparison": self.comparison.to_dict(),
            "curve": self.curve,
            "best_epoch": self.best_epoch,
            "notes": list(self.notes),
        }

    @classmethod
    def of(cls, model: Model, facts: Mapping[str, Any]) -> FineTuned:
        """From `to_dict`."""
        comparison = Comparison(**facts["comparison"])
        return cls(model, facts["kept"], comparison, facts["curve"], facts["best_epoch"], tuple(facts["notes"]))

    def as_table(self) -> list[list[str]]:
        """The scores for people, a header first."""
        rows = [["", "probe", "fine-tuned", "difference", "p"]]
        for row in self.comparison.metrics:
            difference = _shown(row["difference"], signed=True)
            name, p = METRICS[row["name"]][0], row["p"]
            rows.append([name, _shown(row["probe"]), _shown(row["tuned"]), difference, "" if p is None else f"{p:.2g}"])
        return rows

    def class_table(self) -> list[list[str]]:
        """The share of each class that is right, for people, a header first; only that for tasks without classes."""
        rows = [["class", "rows", "probe", "fine-tuned", "p"]]
        for row in self.comparison.per_class:
            p = "" if row["p"] is None else f"{row['p']:.2g}"
            rows.append([row["name"], str(row["rows"]), _shown(row["probe"]), _shown(row["tuned"]), p])
        return rows
