"""Geometry of the static charts: axes, bars, cells of the confusion matrix, training curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from featpipe.metrics import Scores, format_score


@dataclass(frozen=True)
class Axis:
    """A horizontal linear scale; positions are percentages of its width, so that charts fit every screen."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def position(self, value: float) -> str:
        """The position of a value, clipped to the axis.

        Examples
        --------
        >>> Axis(0, 2, ()).position(0.5)
        '25.00%'
        """
        fraction = (value - self.low) / (self.high - self.low)
        return f"{100 * min(max(fraction, 0.0), 1.0):.2f}%"

    def distance(self, start: float, end: float) -> str:
        """The distance between two values, clipped to the axis."""
        return f"{abs(float(self.position(end)[:-1]) - float(self.position(start)[:-1])):.2f}%"


def make_axis(values: Iterable[float]) -> Axis:
    """Make an axis that contains the values and zero; 0 to 1 if all of them are shares.

    Examples
    --------
    >>> make_axis([0.92, 0.11]).ticks, make_axis([-3.0, 12.0]).ticks
    ((0.0, 0.25, 0.5, 0.75, 1.0), (-5.0, 0.0, 5.0, 10.0, 15.0))
    """
    finite_values = [value for value in values if math.isfinite(value)]
    low, high = min(finite_values, default=0.0), max(finite_values, default=1.0)
    if low >= 0 and 0.05 < high <= 1:
        return Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    low, high = min(low, 0.0), max(high, 0.0)
    step = _round_tick_step((high - low if high - low > 1e-300 else 1.0) / 4)
    first_tick, last_tick = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    ticks = tuple(float(f"{step * i:.12g}") for i in range(first_tick, last_tick + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _round_tick_step(step: float) -> float:
    """Round a step up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= step * (1 - 1e-9))


@dataclass(frozen=True)
class ConfusionCell:
    """One cell of a confusion matrix; `level` is the depth of its colour, from 0 (none) to 5."""

    predicted: str
    rows: int
    level: int
    is_correct: bool


def make_confusion_matrix(scores: Scores) -> list[tuple[str, int, list[ConfusionCell]]]:
    """Make the lines of a confusion matrix: true class, its number of rows, and its cells."""
    if scores.confusion is None:
        return []
    matrix = []
    for true_index, counts in enumerate(scores.confusion.tolist()):
        support = sum(counts)
        cells = [
            ConfusionCell(
                scores.classes[predicted_index],
                rows,
                _color_level(rows / support, is_correct=true_index == predicted_index) if rows else 0,
                true_index == predicted_index,
            )
            for predicted_index, rows in enumerate(counts)
        ]
        matrix.append((scores.classes[true_index], support, cells))
    return matrix


def _color_level(class_share: float, *, is_correct: bool) -> int:
    """The colour depth of a share of a class. Errors get deep colours sooner, so that 10 % of a class stands out."""
    thresholds = (0.2, 0.4, 0.6, 0.8) if is_correct else (0.03, 0.08, 0.2, 0.4)
    return 1 + sum(class_share >= threshold for threshold in thresholds)


@dataclass(frozen=True)
class TrainingCurve:
    """A line as one SVG path in a box 100 wide and 40 high, with gaps where values are not finite."""

    name: str
    path: str
    epochs: int
    first: str
    last: str
    minimum: str
    maximum: str


def make_training_curve(name: str, values: Sequence[float]) -> TrainingCurve:
    """Draw one value per epoch."""
    finite_values = [value for value in values if math.isfinite(value)]
    low, high = min(finite_values, default=0.0), max(finite_values, default=1.0)
    height = high - low or 1.0
    width = max(len(values) - 1, 1)
    path_commands, command = [], "M"
    for epoch, value in enumerate(values):
        if math.isfinite(value):
            path_commands.append(f"{command}{100 * epoch / width:.2f} {38 - 36 * (value - low) / height:.2f}")
            command = "L"
        else:
            command = "M"
    first, last = (format_score(values[0]), format_score(values[-1])) if values else ("–", "–")
    return TrainingCurve(name, "".join(path_commands), len(values), first, last, format_score(low), format_score(high))
