"""From an evaluation to a page: which samples are shown, and what the script draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.evaluation import Evaluation
from featpipe.findings import Finding
from featpipe.report.figures import learning_of, novelty_of, reliability_of, sets_of, threshold_of
from featpipe.report.page import Gallery, Picture, Table
from featpipe.report.projection import projected
from featpipe.report.thumbnails import Thumbnails

__all__ = ["Shown", "shown_of"]

PICTURES = 24  # of one gallery
LISTED = 50  # rows of one table
OF_A_CELL, OF_A_HIT = 6, 3  # pictures of each cell of the confusion matrix, wrong or right
MAPPED = 10_000  # samples that the script knows
THUMBNAILS = 1500
PICTURE_BYTES = 4_500_000  # of those that only the script shows; base64 adds a third
LONGEST = 200  # characters of a name that the script knows

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Shown:
    """What a page takes from an evaluation besides its scores.

    Attributes
    ----------
    galleries : list of Gallery
    pictures : list of Picture
        Samples that were rightly recognised.
    tables : dict of str to Table
    sentences : dict of str to str
    drawn : dict
    note : str
        Why there are no pictures, if there are none.
    """

    galleries: list[Gallery]
    pictures: list[Picture]
    tables: dict[str, Table]
    sentences: dict[str, str]
    drawn: dict[str, Any]
    note: str


def shown_of(evaluation: Evaluation, made: Thumbnails | None = None) -> Shown:
    """Choose the samples, make their pictures and draw up the figures."""
    thumbnails = made or Thumbnails(evaluation.cache)
    told = _Told.of(evaluation)
    place = {name: i for i, name in enumerate(told.ids)}
    galleries = [_gallery(evaluation, told, place, finding, thumbnails) for finding in evaluation.findings]
    examples = _examples(evaluation, told, thumbnails)
    drawn = _samples(evaluation, told, thumbnails, galleries, examples)
    tables: dict[str, Table] = {}
    sentences: dict[str, str] = {}
    for name, figure in (
        ("reliability", reliability_of(evaluation)),
        ("threshold", threshold_of(evaluation)),
        ("sets", sets_of(evaluation)),
        ("novelty", novelty_of(evaluation)),
        ("learning", learning_of(evaluation)),
    ):
        if figure is not None:
            tables[name], sentences[name], drawn[name] = figure
    note = (
        ""
        if thumbnails.found
        else "There are no pictures: the archives are not where they were, or hold other images by now."
    )
    return Shown(galleries, examples, tables, sentences, drawn, note)


@dataclass(frozen=True, eq=False)
class _Told:
    """What each row is, and what it is taken for, in words."""

    ids: list[str]
    labels: list[str]
    predicted: list[str]
    sure: NDArray[np.float64]  # NaN for a regression
    right: NDArray[np.bool_]

    @classmethod
    def of(cls, evaluation: Evaluation) -> _Told:
        judged = evaluation.judged
        if judged.task == "regression":
            texts = [[_numbers(row) for row in values] for values in (judged.y, judged.predicted)]
            nothing = np.full(len(judged.ids), np.nan)
            return cls(list(judged.ids), texts[0], texts[1], nothing, np.ones(len(judged.ids), bool))
        told = [judged.told(row) for row in range(len(judged.ids))]
        labels, predicted, sure = zip(*told, strict=True)
        return cls(list(judged.ids), list(labels), list(predicted), np.array(sure), judged.right)


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in np.ravel(values))


def _picture(told: _Told, row: int, image: bytes, beside: bytes = b"", note: str = "") -> Picture:
    probability = None if np.isnan(told.sure[row]) else float(told.sure[row])
    return Picture(image, told.ids[row], told.labels[row], told.predicted[row], probability, row, beside, note)


def _gallery(
    evaluation: Evaluation, told: _Told, place: dict[str, int], finding: Finding, thumbnails: Thumbnails
) -> Gallery:
    table = Table(
        [name.replace("_", " ") for name in finding.columns],
        [[row.get(name) for name in finding.columns] for row in finding.rows[:LISTED]],
        finding.total,
    )
    pictures: list[Picture] = []
    if finding.of_samples:
        chosen = finding.rows[: PICTURES // 2 if finding.name == "near_duplicates" else PICTURES]
        rows = [place[row["id"]] for row in chosen]
        images = thumbnails.of(evaluation.rows[rows].tolist())
        twins = _twins(evaluation, chosen, place, thumbnails) if finding.name == "near_duplicates" else {}
        pictures = [
            _picture(
                told, row, images.get(int(evaluation.rows[row]), b""), twins.get(i, b""), _note(finding, chosen[i])
            )
            for i, row in enumerate(rows)
            if int(evaluation.rows[row]) in images
        ]
    return Gallery(finding.name, finding.title, finding.meaning, table, pictures, finding.note)


def _note(finding: Finding, row: Any) -> str:
    if finding.name == "near_duplicates":
        return f"{row['similarity']:.2f} to {row['of']} image {row['other'][:LONGEST]}, {row['other_label'][:LONGEST]}"
    if finding.name == "label_errors":
        return f"label quality {row['quality']:.2f}"
    return f"distance {row['distance']:.2f}" if finding.name == "outliers" else ""


def _twins(
    evaluation: Evaluation, chosen: Sequence[Any], place: dict[str, int], thumbnails: Thumbnails
) -> dict[int, bytes]:
    """The pictures of the copies, by position in the table."""
    found: dict[int, bytes] = {}
    reference = evaluation.reference
    same = reference is None or reference.cache.path == evaluation.cache.path
    theirs = thumbnails if reference is None or same else Thumbnails(reference.cache)
    number: dict[str, int] = {}
    if reference is not None and any(row["of"] == "training" for row in chosen):
        wanted = {row["other"] for row in chosen if row["of"] == "training"}
        every = ((reference.cache.ids[row], row) for row in reference.rows.tolist())
        number = {name: row for name, row in every if name in wanted}
    for i, row in enumerate(chosen):
        if row["of"] == "training":
            source, at = theirs, number[row["other"]]
        else:
            source, at = thumbnails, int(evaluation.rows[place[row["other"]]])
        images = source.of([at])
        if at in images:
            found[i] = images[at]
    return found


def _examples(evaluation: Evaluation, told: _Told, thumbnails: Thumbnails) -> list[Picture]:
    """Some rows that are right, evenly spread."""
    good = np.flatnonzero(told.right)
    some = good[np.linspace(0, len(good) - 1, min(len(good), PICTURES // 2)).round().astype(int)]
    images = thumbnails.of(evaluation.rows[some].tolist())
    return [
        _picture(told, row, images[int(evaluation.rows[row])])
        for row in some.tolist()
        if int(evaluation.rows[row]) in images
    ]


def _samples(
    evaluation: Evaluation,
    told: _Told,
    thumbnails: Thumbnails,
    galleries: Sequence[Gallery],
    examples: Sequence[Picture],
) -> dict[str, Any]:
    """The samples as the script knows them: columns of one length, and pictures that stand nowhere else."""
    model = evaluation.model
    here = _known(told.right)
    xy, how = projected(evaluation.features)
    names = list(model.classes) if model.task != "regression" else []
    code = {name: i for i, name in enumerate(names)}
    whole = model.task == "classification"
    placed = {picture.row for gallery in galleries for picture in gallery.pictures} | {p.row for p in examples}
    wanted = [row for row in _worth_a_picture(told, here, code, whole) if row not in placed]
    images = _within_budget(evaluation, thumbnails, wanted)
    return {
        "task": model.task,
        "classes": [name[:LONGEST] for name in names],
        "rows": here.tolist(),
        "ids": [told.ids[row][:LONGEST] for row in here],
        "true": [code[told.labels[row]] if whole else told.labels[row][:LONGEST] for row in here],
        "predicted": [code[told.predicted[row]] if whole else told.predicted[row][:LONGEST] for row in here],
        "sure": [None if np.isnan(told.sure[row]) else _thousandths(told.sure[row]) for row in here],
        "right": [int(told.right[row]) for row in here],
        "x": [round(float(value), 4) for value in xy[here, 0]],
        "y": [round(float(value), 4) for value in xy[here, 1]],
        "projection": how,
        "pictures": images,
        "of": len(told.ids),
        **({} if evaluation.novelty is None else {"new": [round(float(n), 3) for n in evaluation.novelty[here]]}),
    }


def _thousandths(probability: float) -> float:
    """Rounded, but never up to certainty."""
    return round(float(probability), 3) if probability >= 1 else min(round(float(probability), 3), 0.999)


def _known(right: NDArray[np.bool_]) -> Rows:
    """Which rows the script knows: all, or mistakes first and some of the others, evenly spread."""
    if len(right) <= MAPPED:
        return np.arange(len(right))
    wrong, good = np.flatnonzero(~right), np.flatnonzero(right)
    wrong = wrong[np.linspace(0, len(wrong) - 1, min(len(wrong), MAPPED // 2)).astype(int)] if len(wrong) else wrong
    good = good[np.linspace(0, len(good) - 1, min(len(good), MAPPED - len(wrong))).astype(int)]
    return np.sort(np.concatenate([wrong, good]))


def _worth_a_picture(told: _Told, here: Rows, code: dict[str, int], whole: bool) -> Iterable[int]:
    """Rows in the order in which they deserve one: wrong cells of the matrix, right ones, then all over the map."""
    chosen: dict[int, None] = {}
    if whole:
        cells: dict[tuple[int, int], list[int]] = {}
        for row in here.tolist():
            cells.setdefault((code[told.labels[row]], code[told.predicted[row]]), []).append(row)
        for (true, predicted), rows in sorted(cells.items(), key=lambda cell: cell[0][0] == cell[0][1]):
            most = OF_A_HIT if true == predicted else OF_A_CELL
            chosen |= dict.fromkeys(sorted(rows, key=lambda row: -told.sure[row])[:most])
    spread = np.random.default_rng(0).permutation(here)
    chosen |= dict.fromkeys(spread.tolist())
    return list(chosen)[:THUMBNAILS]


def _within_budget(evaluation: Evaluation, thumbnails: Thumbnails, wanted: Sequence[int]) -> dict[str, bytes]:
    """Pictures by row, as many as the page can carry."""
    images = thumbnails.of([int(evaluation.rows[row]) for row in wanted])
    kept: dict[str, bytes] = {}
    left = PICTURE_BYTES
    for row in wanted:
        image = images.get(int(evaluation.rows[row]))
        if image is not None and len(image) <= left:
            kept[str(row)] = image
            left -= len(image)
    return kept
