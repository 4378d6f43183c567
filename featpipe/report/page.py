"""What a report says, apart from how it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from featpipe.metrics import Interval, Scores

__all__ = ["BaselineRow", "ComparisonRow", "Gallery", "Page", "ReportImage", "ReportTable"]


@dataclass(frozen=True)
class ComparisonRow:
    """One head or baseline of a comparison on the same test rows.

    Attributes
    ----------
    name : str
    score : Interval
    seconds_to_fit : float or None
    note : str
        A few words: what it is, or why it is here.
    chosen : bool
        Whether it is the head of the model.
    """

    name: str
    score: Interval
    seconds_to_fit: float | None = None
    note: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class ReportImage:
    """One image with what was predicted for it.

    Attributes
    ----------
    jpeg : bytes
        A thumbnail, JPEG or WebP; it is shown as it is, so make it small. Empty where the image is not at hand.
    id : str
        The sample's id, as caption.
    true : str or None
        Its label, None where it is not known.
    predicted : str
    probability : float or None
        Of what was predicted, None where there is none (a number).
    row : int or None
        Its place among the samples that the script knows.
    beside : bytes
        Another picture that it is shown with, as a copy of it.
    note : str
        A few words more.
    """

    jpeg: bytes
    id: str
    true: str | None
    predicted: str
    probability: float | None = None
    row: int | None = None
    beside: bytes = b""
    note: str = ""


@dataclass(frozen=True)
class ReportTable:
    """Figures, with their headings.

    Attributes
    ----------
    columns : sequence of str
    rows : sequence of sequence
        Text and numbers.
    total : int
        How many rows there are in all.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    total: int = 0


@dataclass(frozen=True)
class Gallery:
    """Samples of one kind that deserve a look.

    Attributes
    ----------
    name : str
        For links within the page.
    title, meaning : str
    table : Table
    pictures : sequence of Picture
    note : str
        What was not looked for, and why.
    """

    name: str
    title: str
    meaning: str
    table: ReportTable
    pictures: Sequence[ReportImage] = ()
    note: str = ""


@dataclass(frozen=True)
class BaselineRow:
    """Another model on the same rows, and how the two differ.

    Attributes
    ----------
    name : str
    score, difference : Interval
        Of it; and of the first model minus it.
    p : float
    test : str
        For people.
    only_first, only_second : int or None
        Rows that one alone gets right.
    """

    name: str
    score: Interval
    difference: Interval
    p: float
    test: str
    only_first: int | None = None
    only_second: int | None = None


@dataclass(frozen=True)
class Page:
    """One report. Whatever is empty is left out of the page; all text is untrusted and stays text.

    Attributes
    ----------
    title : str
    lead : str
        The result in one sentence, for someone with one minute.
    facts : sequence of (str, str)
        Summary figures: ("Samples", "940").
    comparison : sequence of Row
    comparison_score : str
        What is compared, as one of the names in `featpipe.metrics.METRICS` or any text.
    scores : Scores or None
    pictures : sequence of Picture
    bad : sequence of (str, int)
        Why images could not be read, and how many.
    provenance : sequence of (str, str)
        What makes the result repeatable: backbone, fingerprint, versions, command.
    curves : mapping of str to sequence of float
        A value for each epoch, by name.
    notes : sequence of str
        What someone with one minute must know beside the result.
    how : sequence of (str, str)
        How the rows were split, and what was chosen by which of them.
    rivals : sequence of Rival
    galleries : sequence of Gallery
    tables : mapping of str to Table
        The figures behind the charts, by the chart's name: ``reliability``, ``threshold``, ``learning``, ``sets``.
    sentences : mapping of str to str
        What a chart shows, in words, by its name.
    drawn : mapping
        What the script draws, as JSON can hold it; its texts are untrusted too.
    """

    title: str
    lead: str = ""
    facts: Sequence[tuple[str, str]] = ()
    comparison: Sequence[ComparisonRow] = ()
    comparison_score: str = "accuracy"
    scores: Scores | None = None
    pictures: Sequence[ReportImage] = ()
    bad: Sequence[tuple[str, int]] = ()
    provenance: Sequence[tuple[str, str]] = ()
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    how: Sequence[tuple[str, str]] = ()
    rivals: Sequence[BaselineRow] = ()
    galleries: Sequence[Gallery] = ()
    tables: Mapping[str, ReportTable] = field(default_factory=dict)
    sentences: Mapping[str, str] = field(default_factory=dict)
    drawn: Mapping[str, Any] = field(default_factory=dict)
