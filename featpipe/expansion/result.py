"""What an expansion found, as a person and a program read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featpipe.expansion.measure import MethodOutcome
from featpipe.model import Model
from featpipe.scores import Interval

__all__ = ["Expansion", "collect_metrics"]

N_CURVE_ROWS = 8


@dataclass(frozen=True, eq=False)
class Expansion:
    """A model of more classes, and what the step did.

    Attributes
    ----------
    model : Model
    method : str
        By which ``model`` was made.
    new, dropped : tuple of str
        Classes.
    merged : dict
        What old classes are called now.
    images : dict
        How many were ``learnt``, at hand of those trained on (``old``), and judged by (``tested``).
    how : str
        How it was judged.
    before : Interval or None
        Accuracy of the old classes before, on the same test rows and among themselves.
    outcomes : tuple of Outcome
        The chosen method first; then those that it is compared with.
    recommended : str or None
        Where all methods were compared.
    unavailable : dict
        Of methods that could not be tried: why.
    notes : tuple of str
    """

    model: Model
    method: str
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    merged: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)
    how: str = ""
    before: Interval | None = None
    outcomes: tuple[MethodOutcome, ...] = ()
    recommended: str | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the model."""
        return {
            "method": self.method,
            "classes": list(self.model.classes),
            "new": list(self.new),
            "dropped": list(self.dropped),
            "merged": dict(self.merged),
            "images": dict(self.images),
            "how": self.how,
            "before": None if self.before is None else {k: _finite_or_none(v) for k, v in vars(self.before).items()},
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
            "recommended": self.recommended,
            "unavailable": dict(self.unavailable),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, model: Model, record: Mapping[str, Any]) -> Expansion:
        """From `to_dict`."""
        before = record["before"]
        nan = float("nan")
        return cls(
            model,
            record["method"],
            tuple(record["new"]),
            tuple(record["dropped"]),
            record["merged"],
            record["images"],
            record["how"],
            None if before is None else Interval(*(nan if v is None else v for v in before.values())),
            tuple(MethodOutcome.from_dict(outcome) for outcome in record["outcomes"]),
            record["recommended"],
            record["unavailable"],
            tuple(record["notes"]),
        )

    def as_table(self) -> list[list[str]]:
        """The header, and a row for the model before and for each method."""
        header = ["method", "old classes", "new classes", "all", "forgetting", "backward transfer", "keeps", "seconds"]
        rows = [["before", str(self.before or ""), *[""] * 6]] if self.before is not None else []
        for row in self.outcomes:
            figures = [row.old, row.new, row.all, row.forgetting, row.backward]
            cells = ["" if figure is None else str(figure) for figure in figures]
            rows.append([row.method, *cells, f"{row.bytes / 1e6:.2f} MB", f"{row.seconds:.2f}"])
        return [header, *rows]

    def curve_table(self) -> list[list[str]]:
        """Some epochs of the chosen method: the header, and the rows; nothing of a method without epochs."""
        curves = self.outcomes[0].curves if self.outcomes else {}
        if not curves:
            return []
        epochs = curves["epochs"]
        indices = sorted({0, *(2**i for i in range(N_CURVE_ROWS)), len(epochs) - 1} & set(range(len(epochs))))
        names = ["train_loss", "old_loss", "new_loss", "old_accuracy", "new_accuracy"]
        header = ["epoch", *(name.replace("_", " ") for name in names)]
        return [header, *([f"{epochs[i]:.0f}", *(_format_number(curves[name][i]) for name in names)] for i in indices)]


def collect_metrics(outcome: MethodOutcome) -> dict[str, dict[str, float | None]]:
    """By the names that a model's estimates have."""
    names = {"accuracy": "all", "old_accuracy": "old", "new_accuracy": "new", "forgetting": "forgetting"}
    intervals = {name: getattr(outcome, attribute) for name, attribute in names.items()}
    return {
        name: {k: _finite_or_none(v) for k, v in vars(value).items()}
        for name, value in intervals.items()
        if value is not None
    }


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _finite_or_none(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
