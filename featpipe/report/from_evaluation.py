"""Content of a report from an evaluation: samples with thumbnails, charts, and the data of the script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.diagnostics import Finding, LabeledPredictions
from featpipe.evaluation import Evaluation
from featpipe.report.figures import (
    make_coverage_figure,
    make_learning_curve_figure,
    make_novelty_figure,
    make_reliability_figure,
    make_threshold_figure,
)
from featpipe.report.page import MAX_NAME_CHARACTERS, Gallery, ReportImage, ReportTable
from featpipe.report.thumbnails import Thumbnails

MAX_GALLERY_IMAGES = 24
MAX_GALLERY_PAIRS = MAX_EXAMPLES = MAX_GALLERY_IMAGES // 2
MAX_TABLE_ROWS = 50
MAX_IMAGES_PER_ERROR_CELL, MAX_IMAGES_PER_CORRECT_CELL = 6, 3  # of the confusion matrix
MAX_SCRIPT_SAMPLES = 10_000
MAX_SCRIPT_THUMBNAILS = 1500
MAX_SCRIPT_THUMBNAIL_BYTES = 4_500_000  # base64 adds a third
MAX_PCA_ROWS = 5000
CLIP_PERCENTILE = 99.5  # of the distances from the centre; points beyond it are drawn at the edge of the map

RowIndices = NDArray[np.int64]


@dataclass(frozen=True)
class EvaluationContent:
    """The parts of a page that need the samples of an evaluation or its charts.

    Attributes
    ----------
    galleries : list of Gallery
    examples : list of ReportImage
        Correct predictions.
    tables : dict of str to ReportTable
    captions : dict of str to str
    script_data : dict
    note : str
        Reason why there are no thumbnails; empty if there are some.
    """

    galleries: list[Gallery]
    examples: list[ReportImage]
    tables: dict[str, ReportTable]
    captions: dict[str, str]
    script_data: dict[str, Any]
    note: str


def make_evaluation_content(evaluation: Evaluation) -> EvaluationContent:
    """Select samples, load their thumbnails, and make the charts."""
    thumbnails = Thumbnails(evaluation.cache)
    samples = _SampleDescriptions.from_predictions(evaluation.judged)
    row_by_id = {sample_id: row for row, sample_id in enumerate(samples.ids)}
    galleries = [_make_gallery(evaluation, samples, row_by_id, finding, thumbnails) for finding in evaluation.findings]
    examples = _make_correct_examples(evaluation, samples, thumbnails)
    shown_images = [*examples, *(image for gallery in galleries for image in gallery.images)]
    script_data = _make_script_data(evaluation, samples, thumbnails, {image.row for image in shown_images})
    figures = {
        "reliability": make_reliability_figure(evaluation),
        "threshold": make_threshold_figure(evaluation),
        "sets": make_coverage_figure(evaluation),
        "novelty": make_novelty_figure(evaluation),
        "learning": make_learning_curve_figure(evaluation),
    }
    tables: dict[str, ReportTable] = {}
    captions: dict[str, str] = {}
    for name, figure in figures.items():
        if figure is not None:
            tables[name], captions[name], script_data[name] = figure
    note = "" if thumbnails.is_available else "No images are shown: the archives were moved or have changed."
    return EvaluationContent(galleries, examples, tables, captions, script_data, note)


@dataclass(frozen=True, eq=False)
class _SampleDescriptions:
    """Label and prediction of each scored row as text."""

    ids: Sequence[str]
    labels: list[str]
    predicted: list[str]
    confidence: NDArray[np.float64]  # NaN for a regression
    is_correct: NDArray[np.bool_]

    @classmethod
    def from_predictions(cls, predictions: LabeledPredictions) -> _SampleDescriptions:
        m = len(predictions.ids)
        if predictions.task == "regression":
            labels, predicted = (
                [", ".join(f"{value:.4g}" for value in np.ravel(row)) for row in values]
                for values in (predictions.y, predictions.predicted)
            )
            return cls(predictions.ids, labels, predicted, np.full(m, np.nan), np.ones(m, bool))
        descriptions = [predictions.describe_row(row) for row in range(m)]
        labels, predicted, confidence = map(list, zip(*descriptions, strict=True))
        return cls(predictions.ids, labels, predicted, np.array(confidence), predictions.is_correct)

    def make_image(self, row: int, thumbnail: bytes, duplicate: bytes = b"", note: str = "") -> ReportImage:
        probability = None if np.isnan(self.confidence[row]) else float(self.confidence[row])
        return ReportImage(
            thumbnail, self.ids[row], self.labels[row], self.predicted[row], probability, row, duplicate, note
        )


def _make_gallery(
    evaluation: Evaluation,
    samples: _SampleDescriptions,
    row_by_id: Mapping[str, int],
    finding: Finding,
    thumbnails: Thumbnails,
) -> Gallery:
    table = ReportTable(
        [name.replace("_", " ") for name in finding.columns],
        [[row.get(name) for name in finding.columns] for row in finding.rows[:MAX_TABLE_ROWS]],
        finding.total,
    )
    images: list[ReportImage] = []
    if finding.has_sample_rows:
        has_pairs = finding.name == "near_duplicates"
        finding_rows = finding.rows[: MAX_GALLERY_PAIRS if has_pairs else MAX_GALLERY_IMAGES]
        rows = [row_by_id[finding_row["id"]] for finding_row in finding_rows]
        cache_rows = evaluation.rows[rows].tolist()
        thumbnail_by_row = thumbnails.load(cache_rows)
        duplicate_thumbnails = (
            _load_duplicate_thumbnails(evaluation, finding_rows, row_by_id, thumbnails) if has_pairs else {}
        )
        images = [
            samples.make_image(
                row,
                thumbnail_by_row[cache_row],
                duplicate_thumbnails.get(i, b""),
                _make_caption(finding, finding_rows[i]),
            )
            for i, (row, cache_row) in enumerate(zip(rows, cache_rows, strict=True))
            if cache_row in thumbnail_by_row
        ]
    return Gallery(finding.name, finding.title, finding.meaning, table, images, finding.note)


def _make_caption(finding: Finding, row: Mapping[str, Any]) -> str:
    if finding.name == "near_duplicates":
        other_id, other_label = row["other"][:MAX_NAME_CHARACTERS], row["other_label"][:MAX_NAME_CHARACTERS]
        return f"cosine {row['similarity']:.2f} to {row['of']} image {other_id}, {other_label}"
    if finding.name == "label_errors":
        return f"label quality {row['quality']:.2f}"
    return f"distance {row['distance']:.2f}" if finding.name == "outliers" else ""


def _load_duplicate_thumbnails(
    evaluation: Evaluation,
    finding_rows: Sequence[Mapping[str, Any]],
    row_by_id: Mapping[str, int],
    thumbnails: Thumbnails,
) -> dict[int, bytes]:
    """Load the thumbnail of the other image of each pair, by position of the pair."""
    reference = evaluation.reference
    training_thumbnails, training_row_by_id = thumbnails, {}
    if reference is not None:
        assert reference.cache is not None
        if reference.cache.path != evaluation.cache.path:
            training_thumbnails = Thumbnails(reference.cache)
        training_ids = {row["other"] for row in finding_rows if row["of"] == "training"}
        if training_ids:
            samples = ((reference.cache.ids[row], row) for row in reference.rows.tolist())
            training_row_by_id = {sample_id: row for sample_id, row in samples if sample_id in training_ids}
    duplicate_thumbnails: dict[int, bytes] = {}
    for i, row in enumerate(finding_rows):
        if row["of"] == "training":
            source, cache_row = training_thumbnails, training_row_by_id[row["other"]]
        else:
            source, cache_row = thumbnails, int(evaluation.rows[row_by_id[row["other"]]])
        loaded = source.load([cache_row])
        if cache_row in loaded:
            duplicate_thumbnails[i] = loaded[cache_row]
    return duplicate_thumbnails


def _make_correct_examples(
    evaluation: Evaluation, samples: _SampleDescriptions, thumbnails: Thumbnails
) -> list[ReportImage]:
    """Select evenly spaced correct rows; in a regression, all rows count as correct."""
    rows = _space_evenly(np.flatnonzero(samples.is_correct), MAX_EXAMPLES, rounded=True)
    cache_rows = evaluation.rows[rows].tolist()
    thumbnail_by_row = thumbnails.load(cache_rows)
    return [
        samples.make_image(row, thumbnail_by_row[cache_row])
        for row, cache_row in zip(rows.tolist(), cache_rows, strict=True)
        if cache_row in thumbnail_by_row
    ]


def _space_evenly(rows: RowIndices, n: int, *, rounded: bool = False) -> RowIndices:
    """Select at most n of the rows, evenly spaced."""
    if not len(rows):
        return rows
    positions = np.linspace(0, len(rows) - 1, min(len(rows), n))
    return rows[(positions.round() if rounded else positions).astype(int)]


def _make_script_data(
    evaluation: Evaluation, samples: _SampleDescriptions, thumbnails: Thumbnails, shown_rows: set[int | None]
) -> dict[str, Any]:
    """Make the data of the script: columns of equal length, and thumbnails that the page does not show.

    Parameters
    ----------
    evaluation : Evaluation
    samples : _SampleDescriptions
    thumbnails : Thumbnails
    shown_rows : set of int or None
        Rows whose thumbnails are in the page, where the script finds them.
    """
    task, classes = evaluation.model.task, evaluation.model.classes
    class_index = {name: i for i, name in enumerate(classes)}
    rows = _select_script_rows(samples.is_correct)

    def encode(name: str) -> int | str:
        return class_index[name] if task == "classification" else name[:MAX_NAME_CHARACTERS]

    cells = None
    if task == "classification":
        cells = [(class_index[samples.labels[row]], class_index[samples.predicted[row]]) for row in rows.tolist()]
    ranked_rows = _rank_rows_for_thumbnails(rows, cells, samples.confidence)
    xy, explained_variance = _project_to_plane(evaluation.features)
    data = {
        "task": task,
        "classes": [name[:MAX_NAME_CHARACTERS] for name in classes] if task != "regression" else [],
        "rows": rows.tolist(),
        "ids": [samples.ids[row][:MAX_NAME_CHARACTERS] for row in rows],
        "true": [encode(samples.labels[row]) for row in rows],
        "predicted": [encode(samples.predicted[row]) for row in rows],
        "sure": [_round_probability(samples.confidence[row]) for row in rows],
        "right": [int(samples.is_correct[row]) for row in rows],
        "x": [round(float(value), 4) for value in xy[rows, 0]],
        "y": [round(float(value), 4) for value in xy[rows, 1]],
        "projection": f"the first two principal components, with {explained_variance:.0%} of the variance",
        "pictures": _load_thumbnails_within_budget(
            evaluation, thumbnails, [row for row in ranked_rows if row not in shown_rows]
        ),
        "of": len(samples.ids),
    }
    if evaluation.novelty is not None:
        data["new"] = [round(float(value), 3) for value in evaluation.novelty[rows]]
    return data


def _project_to_plane(X: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """Compute the first two principal components, scaled to about -1 to 1, and their share of the variance.

    The components are zero if there are too few rows or dimensions. PCA is deterministic and takes a second, unlike
    t-SNE or UMAP. Points that are near in the plane need not be near in the embedding, which the report says.
    """
    from sklearn.decomposition import PCA

    if len(X) < 3 or X.shape[1] < 2:
        return np.zeros((len(X), 2)), 0.0
    sample = X[np.linspace(0, len(X) - 1, min(len(X), MAX_PCA_ROWS)).astype(int)]
    pca = PCA(2, svd_solver="randomized", random_state=0).fit(sample)
    xy = np.asarray(pca.transform(X), np.float64)
    extent = np.percentile(abs(xy), CLIP_PERCENTILE, axis=0)
    return np.clip(xy / np.where(extent > 0, extent, 1), -1.08, 1.08), float(pca.explained_variance_ratio_.sum())


def _round_probability(probability: float) -> float | None:
    """Round a probability, but never up to 1; None for NaN."""
    if np.isnan(probability):
        return None
    return round(float(probability), 3) if probability >= 1 else min(round(float(probability), 3), 0.999)


def _select_script_rows(is_correct: NDArray[np.bool_]) -> RowIndices:
    """Select rows for the script: all, or up to half of the limit from the errors and the rest from the others."""
    if len(is_correct) <= MAX_SCRIPT_SAMPLES:
        return np.arange(len(is_correct))
    error_rows = _space_evenly(np.flatnonzero(~is_correct), MAX_SCRIPT_SAMPLES // 2)
    correct_rows = _space_evenly(np.flatnonzero(is_correct), MAX_SCRIPT_SAMPLES - len(error_rows))
    return np.sort(np.concatenate([error_rows, correct_rows]))


def _rank_rows_for_thumbnails(
    rows: RowIndices, cells: Sequence[tuple[int, int]] | None, confidence: NDArray[np.float64]
) -> list[int]:
    """Rank rows by how much they need a thumbnail: cells of errors, correct cells, then a random order.

    Parameters
    ----------
    rows : ndarray of shape (m,)
    cells : sequence of m (int, int), or None
        The cell of the confusion matrix of each row; None if the task has no confusion matrix.
    confidence : ndarray
        Confidence by row number; the most confident rows of a cell come first.
    """
    rows_by_cell: dict[tuple[int, int], list[int]] = {}
    for row, cell in zip(rows.tolist(), cells or (), strict=cells is not None):
        rows_by_cell.setdefault(cell, []).append(row)
    ranked_rows: dict[int, None] = {}
    for (label, predicted), cell_rows in sorted(rows_by_cell.items(), key=lambda item: item[0][0] == item[0][1]):
        max_images = MAX_IMAGES_PER_CORRECT_CELL if label == predicted else MAX_IMAGES_PER_ERROR_CELL
        ranked_rows |= dict.fromkeys(sorted(cell_rows, key=lambda row: -confidence[row])[:max_images])
    ranked_rows |= dict.fromkeys(np.random.default_rng(0).permutation(rows).tolist())
    return list(ranked_rows)[:MAX_SCRIPT_THUMBNAILS]


def _load_thumbnails_within_budget(
    evaluation: Evaluation, thumbnails: Thumbnails, rows: Sequence[int]
) -> dict[str, bytes]:
    """Load thumbnails in order up to the byte limit of the page, by row number as text."""
    thumbnail_by_row = thumbnails.load(evaluation.rows[list(rows)].tolist())
    selected: dict[str, bytes] = {}
    remaining_bytes = MAX_SCRIPT_THUMBNAIL_BYTES
    for row in rows:
        thumbnail = thumbnail_by_row.get(int(evaluation.rows[row]))
        if thumbnail is not None and len(thumbnail) <= remaining_bytes:
            selected[str(row)] = thumbnail
            remaining_bytes -= len(thumbnail)
    return selected
