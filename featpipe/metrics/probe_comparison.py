"""The comparison of a fine-tuned model with its probe: data in models and results, text where it is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from featpipe.metrics.intervals import Interval
from featpipe.metrics.scores import METRICS


@dataclass(frozen=True, eq=False)
class ProbeComparison:
    """Probe and fine-tuned model on the same test rows.

    Attributes
    ----------
    n : int
        Test rows.
    main : str
        The metric that decides which model is better.
    metrics : list of dict
        For each score: ``name``, ``probe`` and ``tuned`` (value, low, high), ``difference`` (value, low, high), ``p``.
    per_class : list of dict
        For each class ``name``, ``rows``, ``probe`` and ``tuned`` (recall, low, high), ``p``; empty for other tasks.
    """

    n: int
    main: str
    metrics: list[dict[str, Any]]
    per_class: list[dict[str, Any]]

    @property
    def gain(self) -> float:
        """How much better the fine-tuned model is by the main metric."""
        value = next(row["difference"][0] for row in self.metrics if row["name"] == self.main)
        return METRICS[self.main].gain(value)

    @property
    def sure(self) -> bool:
        """Whether the interval of the difference is on one side of zero."""
        low, high = next(row["difference"][1:] for row in self.metrics if row["name"] == self.main)
        return low is not None and high is not None and not low <= 0 <= high

    def verdict(self) -> str:
        """Summarize the comparison in one sentence."""
        row = next(row for row in self.metrics if row["name"] == self.main)
        name, p = METRICS[self.main].title.lower(), row["p"]
        change = f"{name} {format_stored_interval(row['probe'])} → {format_stored_interval(row['tuned'])}"
        if self.gain == 0:
            return f"fine-tuned is neither better nor worse than the probe on {self.n} held-out images: {change}"
        direction = "better" if self.gain > 0 else "worse"
        caveat = "" if self.sure else ", which may be chance"
        return f"fine-tuned is {direction} than the probe on {self.n} held-out images{caveat}: {change}, p = {p:.2g}"

    def to_dict(self) -> dict[str, Any]:
        return {"n": self.n, "main": self.main, "metrics": self.metrics, "per_class": self.per_class}


def format_stored_interval(values: Sequence[float | None], signed: bool = False) -> str:
    """Format an interval that is stored as (value, low, high), with None for NaN."""
    interval = Interval(*(math.nan if value is None else value for value in values))
    return f"{'+' if signed and interval.value > 0 else ''}{interval}"
