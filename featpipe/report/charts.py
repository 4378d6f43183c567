"""From numbers to the places where a chart draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from featpipe.scores import Scores, number

__all__ = ["Axis", "Cell", "Curve", "axis_of", "curve_of", "matrix_of"]


@dataclass(frozen=True)
class Axis:
    """A horizontal scale; places are percentages of its width, so that charts fit every screen."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> str:
        """Where a value lies.

        Examples
        --------
        >>> Axis(0, 2, ()).at(0.5)
        '25.00%'
        """
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

    def across(self, start: float, end: float) -> str:
        """How far apart two values lie."""
        return f"{abs(float(self.at(end)[:-1]) - float(self.at(start)[:-1])):.2f}%"


def axis_of(values: Iterable[float]) -> Axis:
    """The scale for some values: always with zero, and 0 to 1 where all of them are shares.

    Examples
    --------
    >>> axis_of([0.92, 0.11]).ticks, axis_of([-3.0, 12.0]).ticks
    ((0.0, 0.25, 0.5, 0.75, 1.0), (-5.0, 0.0, 5.0, 10.0, 15.0))
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if low >= 0 and 0.05 < high <= 1:
        return Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
    low, high = min(low, 0.0), max(high, 0.0)
    step = _round_step((high - low if high - low > 1e-300 else 1.0) / 4)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    ticks = tuple(float(f"{step * i:.12g}") for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


@dataclass(frozen=True)
class Cell:
    """One cell of a confusion matrix; `level` 0 is nothing, 5 the deepest colour."""

    predicted: str
    rows: int
    level: int
    right: bool


def matrix_of(scores: Scores) -> list[tuple[str, int, list[Cell]]]:
    """Each true class with its rows and its cells, coloured by their share of the class."""
    if scores.confusion is None:
        return []
    table = []
    for true, counts in enumerate(scores.confusion.tolist()):
        support = sum(counts)
        cells = [
            Cell(
                scores.classes[predicted],
                rows,
                _level(rows / support, right=true == predicted) if rows else 0,
                true == predicted,
            )
            for predicted, rows in enumerate(counts)
        ]
        table.append((scores.classes[true], support, cells))
    return table


def _level(share: float, *, right: bool) -> int:
    """Mistakes deepen sooner than hits: a tenth of a class gone astray is worth seeing."""
    steps = (0.2, 0.4, 0.6, 0.8) if right else (0.03, 0.08, 0.2, 0.4)
    return 1 + sum(share >= step for step in steps)


@dataclass(frozen=True)
class Curve:
    """A line in a box 100 wide and 40 high, as one SVG path; gaps where a value is not finite."""

    name: str
    path: str
    epochs: int
    first: str
    last: str
    least: str
    most: str


def curve_of(name: str, values: Sequence[float]) -> Curve:
    """Draw one value for each epoch."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    height = high - low or 1.0
    width = max(len(values) - 1, 1)
    path, pen = [], "M"
    for epoch, value in enumerate(values):
        if math.isfinite(value):
            path.append(f"{pen}{100 * epoch / width:.2f} {38 - 36 * (value - low) / height:.2f}")
            pen = "L"
        else:
            pen = "M"
    first, last = (number(values[0]), number(values[-1])) if values else ("–", "–")
    return Curve(name, "".join(path), len(values), first, last, number(low), number(high))
