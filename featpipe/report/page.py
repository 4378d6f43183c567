"""What a report says, apart from how it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from featpipe.scores import Interval, Scores

__all__ = ["Page", "Picture", "Row"]


@dataclass(frozen=True)
class Row:
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
class Picture:
    """One image with what was predicted for it.

    Attributes
    ----------
    jpeg : bytes
        A thumbnail; it is shown as it is, so make it small.
    id : str
        The sample's id, as caption.
    true : str or None
        Its label, None where it is not known.
    predicted : str
    probability : float or None
        Of what was predicted, None where there is none (a number).
    """

    jpeg: bytes
    id: str
    true: str | None
    predicted: str
    probability: float | None = None


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
        What is compared, as one of the names in `featpipe.scores.METRICS` or any text.
    scores : Scores or None
    pictures : sequence of Picture
    bad : sequence of (str, int)
        Why images could not be read, and how many.
    provenance : sequence of (str, str)
        What makes the result repeatable: backbone, fingerprint, versions, command.
    curves : mapping of str to sequence of float
        A value for each epoch, by name.
    """

    title: str
    lead: str = ""
    facts: Sequence[tuple[str, str]] = ()
    comparison: Sequence[Row] = ()
    comparison_score: str = "accuracy"
    scores: Scores | None = None
    pictures: Sequence[Picture] = ()
    bad: Sequence[tuple[str, int]] = ()
    provenance: Sequence[tuple[str, str]] = ()
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
