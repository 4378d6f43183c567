"""The content of a report, separate from its HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from featpipe.metrics import Interval, Scores

MAX_NAME_CHARACTERS = 200  # of ids and class names; longer ones are truncated


@dataclass(frozen=True)
class ComparisonRow:
    """One head or baseline of a comparison on the same test rows.

    Attributes
    ----------
    name : str
    score : Interval
    seconds_to_fit : float or None
    note : str
        Remark shown below the name.
    is_selected : bool
        Whether this is the head of the reported model.
    """

    name: str
    score: Interval
    seconds_to_fit: float | None = None
    note: str = ""
    is_selected: bool = False


@dataclass(frozen=True)
class ReportImage:
    """One image with its prediction.

    Attributes
    ----------
    thumbnail : bytes
        JPEG or WebP, embedded unchanged; empty if the image is not available.
    id : str
        The sample's id.
    label : str or None
        None if unknown.
    predicted : str
    probability : float or None
        Probability of the prediction; None for a regression.
    row : int or None
        Position among the scored rows, by which the script finds the image.
    duplicate : bytes
        Thumbnail of a near duplicate, shown next to it.
    note : str
        Remark shown below the prediction.
    """

    thumbnail: bytes
    id: str
    label: str | None
    predicted: str
    probability: float | None = None
    row: int | None = None
    duplicate: bytes = b""
    note: str = ""


@dataclass(frozen=True)
class ReportTable:
    """A table.

    Attributes
    ----------
    columns : sequence of str
    rows : sequence of sequence
        Text and numbers.
    total : int
        Number of rows of the whole table, if `rows` has only the first ones.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    total: int = 0


@dataclass(frozen=True)
class Gallery:
    """One finding: samples to inspect, as a table and as images.

    Attributes
    ----------
    name : str
        Anchor of the section.
    title, meaning : str
    table : ReportTable
    images : sequence of ReportImage
    note : str
        Reason why a check was not made, or only in part.
    """

    name: str
    title: str
    meaning: str
    table: ReportTable
    images: Sequence[ReportImage] = ()
    note: str = ""


@dataclass(frozen=True)
class BaselineRow:
    """Another model on the same rows, and its difference to the reported model.

    Attributes
    ----------
    name : str
    score : Interval
    difference : Interval
        The reported model minus this one.
    p : float
        p-value of the difference.
    test : str
        Name of the statistical test.
    only_first, only_second : int or None
        Rows on which only the reported model, or only this one, is correct.
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
    """The content of one report. Empty parts are omitted; all text is untrusted and escaped.

    Attributes
    ----------
    title : str
    lead : str
        The result in one sentence.
    key_figures : sequence of (str, str)
        For example ("Samples", "940").
    comparison : sequence of ComparisonRow
    comparison_metric : str
        The metric of `comparison`: a name in `featpipe.metrics.METRICS`, or any text.
    scores : Scores or None
    examples : sequence of ReportImage
        Correct predictions; for a regression, any predictions.
    unreadable : sequence of (str, int)
        Unreadable images by reason.
    provenance : sequence of (str, str)
        Information that reproduces the result.
    curves : mapping of str to sequence of float
        Training curves by title, one value per epoch.
    notes : sequence of str
        Warnings and advice, shown next to the result.
    protocol : sequence of (str, str)
        Which rows trained, tuned and tested the model.
    baselines : sequence of BaselineRow
    galleries : sequence of Gallery
    tables : mapping of str to ReportTable
        The data of the charts, by chart: ``reliability``, ``threshold``, ``learning``, ``sets``, ``novelty``.
    captions : mapping of str to str
        The main result of each chart in one or two sentences.
    script_data : mapping
        Data of the charts and the map, as JSON values and thumbnails (bytes); its texts are untrusted too.
    """

    title: str
    lead: str = ""
    key_figures: Sequence[tuple[str, str]] = ()
    comparison: Sequence[ComparisonRow] = ()
    comparison_metric: str = "accuracy"
    scores: Scores | None = None
    examples: Sequence[ReportImage] = ()
    unreadable: Sequence[tuple[str, int]] = ()
    provenance: Sequence[tuple[str, str]] = ()
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    protocol: Sequence[tuple[str, str]] = ()
    baselines: Sequence[BaselineRow] = ()
    galleries: Sequence[Gallery] = ()
    tables: Mapping[str, ReportTable] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)
    script_data: Mapping[str, Any] = field(default_factory=dict)
