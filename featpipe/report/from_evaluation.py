"""From an evaluation to a page: which samples are shown, and what the script draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.diagnostics import Finding
from featpipe.evaluation import Evaluation
from featpipe.report.figures import (
    make_coverage_figure,
    make_learning_curve_figure,
    make_novelty_figure,
    make_reliability_figure,
    make_threshold_figure,
)
from featpipe.report.page import Gallery, ReportImage, ReportTable
from featpipe.report.projection import project_to_plane
from featpipe.report.thumbnails import Thumbnails

__all__ = ["EvaluationContent", "make_evaluation_content"]

MAX_GALLERY_IMAGES = 24  # of one gallery
MAX_REPORT_TABLE_ROWS = 50  # rows of one table
MAX_IMAGES_PER_ERROR_CELL, MAX_IMAGES_PER_CORRECT_CELL = (
    6,
    3,
)  # pictures of each cell of the confusion matrix, wrong or right
MAX_MAP_SAMPLES = 10_000  # samples that the script knows
MAX_SCRIPT_THUMBNAILS = 1500
MAX_SCRIPT_IMAGE_BYTES = 4_500_000  # of those that only the script shows; base64 adds a third
MAX_NAME_LENGTH = 200  # characters of a name that the script knows

RowIndices = NDArray[np.int64]


@dataclass(frozen=True)
class EvaluationContent:
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
    pictures: list[ReportImage]
    tables: dict[str, ReportTable]
    sentences: dict[str, str]
    drawn: dict[str, Any]
    note: str


def make_evaluation_content(evaluation: Evaluation, thumbnail_source: Thumbnails | None = None) -> EvaluationContent:
    """Choose the samples, make their pictures and draw up the figures."""
    thumbnails = thumbnail_source or Thumbnails(evaluation.cache)
    descriptions = _SampleDescriptions.from_evaluation(evaluation)
    row_by_id = {sample_id: i for i, sample_id in enumerate(descriptions.ids)}
    galleries = [
        _make_gallery(evaluation, descriptions, row_by_id, finding, thumbnails) for finding in evaluation.findings
    ]
    correct_examples = _make_correct_examples(evaluation, descriptions, thumbnails)
    chart_data = _make_script_data(evaluation, descriptions, thumbnails, galleries, correct_examples)
    tables: dict[str, ReportTable] = {}
    sentences: dict[str, str] = {}
    for name, figure in (
        ("reliability", make_reliability_figure(evaluation)),
        ("threshold", make_threshold_figure(evaluation)),
        ("sets", make_coverage_figure(evaluation)),
        ("novelty", make_novelty_figure(evaluation)),
        ("learning", make_learning_curve_figure(evaluation)),
    ):
        if figure is not None:
            tables[name], sentences[name], chart_data[name] = figure
    note = (
        ""
        if thumbnails.is_available
        else "There are no pictures: the archives are not where they were, or hold other images by now."
    )
    return EvaluationContent(galleries, correct_examples, tables, sentences, chart_data, note)


@dataclass(frozen=True, eq=False)
class _SampleDescriptions:
    """What each row is, and what it is taken for, in words."""

    ids: list[str]
    labels: list[str]
    predicted: list[str]
    confidence: NDArray[np.float64]  # NaN for a regression
    is_correct: NDArray[np.bool_]

    @classmethod
    def from_evaluation(cls, evaluation: Evaluation) -> _SampleDescriptions:
        predictions = evaluation.judged
        if predictions.task == "regression":
            texts = [[_format_numbers(row) for row in values] for values in (predictions.y, predictions.predicted)]
            no_confidence = np.full(len(predictions.ids), np.nan)
            return cls(list(predictions.ids), texts[0], texts[1], no_confidence, np.ones(len(predictions.ids), bool))
        descriptions = [predictions.describe_row(row) for row in range(len(predictions.ids))]
        labels, predicted, confidence = zip(*descriptions, strict=True)
        return cls(list(predictions.ids), list(labels), list(predicted), np.array(confidence), predictions.is_correct)


def _format_numbers(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in np.ravel(values))


def _make_image(
    descriptions: _SampleDescriptions, row: int, thumbnail: bytes, duplicate_thumbnail: bytes = b"", note: str = ""
) -> ReportImage:
    probability = None if np.isnan(descriptions.confidence[row]) else float(descriptions.confidence[row])
    return ReportImage(
        thumbnail,
        descriptions.ids[row],
        descriptions.labels[row],
        descriptions.predicted[row],
        probability,
        row,
        duplicate_thumbnail,
        note,
    )


def _make_gallery(
    evaluation: Evaluation,
    descriptions: _SampleDescriptions,
    row_by_id: dict[str, int],
    finding: Finding,
    thumbnails: Thumbnails,
) -> Gallery:
    table = ReportTable(
        [name.replace("_", " ") for name in finding.columns],
        [[row.get(name) for name in finding.columns] for row in finding.rows[:MAX_REPORT_TABLE_ROWS]],
        finding.total,
    )
    gallery_images: list[ReportImage] = []
    if finding.has_sample_rows:
        finding_rows = finding.rows[
            : MAX_GALLERY_IMAGES // 2 if finding.name == "near_duplicates" else MAX_GALLERY_IMAGES
        ]
        rows = [row_by_id[row["id"]] for row in finding_rows]
        thumbnail_by_row = thumbnails.load(evaluation.rows[rows].tolist())
        duplicate_thumbnails = (
            _load_duplicate_thumbnails(evaluation, finding_rows, row_by_id, thumbnails)
            if finding.name == "near_duplicates"
            else {}
        )
        gallery_images = [
            _make_image(
                descriptions,
                row,
                thumbnail_by_row.get(int(evaluation.rows[row]), b""),
                duplicate_thumbnails.get(i, b""),
                _caption_note(finding, finding_rows[i]),
            )
            for i, row in enumerate(rows)
            if int(evaluation.rows[row]) in thumbnail_by_row
        ]
    return Gallery(finding.name, finding.title, finding.meaning, table, gallery_images, finding.note)


def _caption_note(finding: Finding, row: Any) -> str:
    if finding.name == "near_duplicates":
        return f"{row['similarity']:.2f} to {row['of']} image {row['other'][:MAX_NAME_LENGTH]}, {row['other_label'][:MAX_NAME_LENGTH]}"
    if finding.name == "label_errors":
        return f"label quality {row['quality']:.2f}"
    return f"distance {row['distance']:.2f}" if finding.name == "outliers" else ""


def _load_duplicate_thumbnails(
    evaluation: Evaluation, finding_rows: Sequence[Any], row_by_id: dict[str, int], thumbnails: Thumbnails
) -> dict[int, bytes]:
    """The pictures of the copies, by position in the table."""
    duplicate_thumbnails: dict[int, bytes] = {}
    reference = evaluation.reference
    is_same_cache = reference is None or reference.cache.path == evaluation.cache.path
    training_thumbnails = thumbnails if reference is None or is_same_cache else Thumbnails(reference.cache)
    training_row_by_id: dict[str, int] = {}
    if reference is not None and any(row["of"] == "training" for row in finding_rows):
        training_ids = {row["other"] for row in finding_rows if row["of"] == "training"}
        training_samples = ((reference.cache.ids[row], row) for row in reference.rows.tolist())
        training_row_by_id = {sample_id: row for sample_id, row in training_samples if sample_id in training_ids}
    for i, row in enumerate(finding_rows):
        if row["of"] == "training":
            thumbnail_source, cache_row = training_thumbnails, training_row_by_id[row["other"]]
        else:
            thumbnail_source, cache_row = thumbnails, int(evaluation.rows[row_by_id[row["other"]]])
        thumbnail_by_row = thumbnail_source.load([cache_row])
        if cache_row in thumbnail_by_row:
            duplicate_thumbnails[i] = thumbnail_by_row[cache_row]
    return duplicate_thumbnails


def _make_correct_examples(
    evaluation: Evaluation, descriptions: _SampleDescriptions, thumbnails: Thumbnails
) -> list[ReportImage]:
    """Some rows that are right, evenly spread."""
    correct_rows = np.flatnonzero(descriptions.is_correct)
    sampled_rows = correct_rows[
        np.linspace(0, len(correct_rows) - 1, min(len(correct_rows), MAX_GALLERY_IMAGES // 2)).round().astype(int)
    ]
    thumbnail_by_row = thumbnails.load(evaluation.rows[sampled_rows].tolist())
    return [
        _make_image(descriptions, row, thumbnail_by_row[int(evaluation.rows[row])])
        for row in sampled_rows.tolist()
        if int(evaluation.rows[row]) in thumbnail_by_row
    ]


def _make_script_data(
    evaluation: Evaluation,
    descriptions: _SampleDescriptions,
    thumbnails: Thumbnails,
    galleries: Sequence[Gallery],
    correct_examples: Sequence[ReportImage],
) -> dict[str, Any]:
    """The samples as the script knows them: columns of one length, and pictures that stand nowhere else."""
    model = evaluation.model
    script_rows = _select_script_rows(descriptions.is_correct)
    xy, projection_note = project_to_plane(evaluation.features)
    class_names = list(model.classes) if model.task != "regression" else []
    class_index = {name: i for i, name in enumerate(class_names)}
    is_classification = model.task == "classification"
    shown_rows = {picture.row for gallery in galleries for picture in gallery.pictures} | {
        picture.row for picture in correct_examples
    }
    thumbnail_rows = [
        row
        for row in _rank_rows_for_thumbnails(descriptions, script_rows, class_index, is_classification)
        if row not in shown_rows
    ]
    thumbnail_by_row = _load_thumbnails_within_budget(evaluation, thumbnails, thumbnail_rows)
    return {
        "task": model.task,
        "classes": [name[:MAX_NAME_LENGTH] for name in class_names],
        "rows": script_rows.tolist(),
        "ids": [descriptions.ids[row][:MAX_NAME_LENGTH] for row in script_rows],
        "true": [
            class_index[descriptions.labels[row]] if is_classification else descriptions.labels[row][:MAX_NAME_LENGTH]
            for row in script_rows
        ],
        "predicted": [
            class_index[descriptions.predicted[row]]
            if is_classification
            else descriptions.predicted[row][:MAX_NAME_LENGTH]
            for row in script_rows
        ],
        "sure": [
            None if np.isnan(descriptions.confidence[row]) else _round_probability(descriptions.confidence[row])
            for row in script_rows
        ],
        "right": [int(descriptions.is_correct[row]) for row in script_rows],
        "x": [round(float(value), 4) for value in xy[script_rows, 0]],
        "y": [round(float(value), 4) for value in xy[script_rows, 1]],
        "projection": projection_note,
        "pictures": thumbnail_by_row,
        "of": len(descriptions.ids),
        **(
            {} if evaluation.novelty is None else {"new": [round(float(n), 3) for n in evaluation.novelty[script_rows]]}
        ),
    }


def _round_probability(probability: float) -> float:
    """Rounded, but never up to certainty."""
    return round(float(probability), 3) if probability >= 1 else min(round(float(probability), 3), 0.999)


def _select_script_rows(is_correct: NDArray[np.bool_]) -> RowIndices:
    """Which rows the script knows: all, or mistakes first and some of the others, evenly spread."""
    if len(is_correct) <= MAX_MAP_SAMPLES:
        return np.arange(len(is_correct))
    error_rows, correct_rows = np.flatnonzero(~is_correct), np.flatnonzero(is_correct)
    error_rows = (
        error_rows[np.linspace(0, len(error_rows) - 1, min(len(error_rows), MAX_MAP_SAMPLES // 2)).astype(int)]
        if len(error_rows)
        else error_rows
    )
    correct_rows = correct_rows[
        np.linspace(0, len(correct_rows) - 1, min(len(correct_rows), MAX_MAP_SAMPLES - len(error_rows))).astype(int)
    ]
    return np.sort(np.concatenate([error_rows, correct_rows]))


def _rank_rows_for_thumbnails(
    descriptions: _SampleDescriptions, script_rows: RowIndices, class_index: dict[str, int], is_classification: bool
) -> Iterable[int]:
    """Rows in the order in which they deserve one: wrong cells of the matrix, right ones, then all over the map."""
    ranked_rows: dict[int, None] = {}
    if is_classification:
        rows_by_cell: dict[tuple[int, int], list[int]] = {}
        for row in script_rows.tolist():
            rows_by_cell.setdefault(
                (class_index[descriptions.labels[row]], class_index[descriptions.predicted[row]]), []
            ).append(row)
        for (true_class, predicted_class), rows in sorted(
            rows_by_cell.items(), key=lambda cell: cell[0][0] == cell[0][1]
        ):
            max_images = MAX_IMAGES_PER_CORRECT_CELL if true_class == predicted_class else MAX_IMAGES_PER_ERROR_CELL
            ranked_rows |= dict.fromkeys(sorted(rows, key=lambda row: -descriptions.confidence[row])[:max_images])
    shuffled_rows = np.random.default_rng(0).permutation(script_rows)
    ranked_rows |= dict.fromkeys(shuffled_rows.tolist())
    return list(ranked_rows)[:MAX_SCRIPT_THUMBNAILS]


def _load_thumbnails_within_budget(
    evaluation: Evaluation, thumbnails: Thumbnails, thumbnail_rows: Sequence[int]
) -> dict[str, bytes]:
    """Pictures by row, as many as the page can carry."""
    thumbnail_by_row = thumbnails.load([int(evaluation.rows[row]) for row in thumbnail_rows])
    selected_thumbnails: dict[str, bytes] = {}
    remaining_bytes = MAX_SCRIPT_IMAGE_BYTES
    for row in thumbnail_rows:
        thumbnail = thumbnail_by_row.get(int(evaluation.rows[row]))
        if thumbnail is not None and len(thumbnail) <= remaining_bytes:
            selected_thumbnails[str(row)] = thumbnail
            remaining_bytes -= len(thumbnail)
    return selected_thumbnails
