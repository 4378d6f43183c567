"""Demo of the full pipeline on sample photos: tiles → archive → cache → heads → scores → report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import data
from featpipe.cache import SPLIT_NAMES, FeatureCache
from featpipe.config import TrainingConfig
from featpipe.data import TILE_SIZE, decode_image, write_tiles
from featpipe.evaluation import Evaluation, evaluate
from featpipe.extraction import extract
from featpipe.heads import SoftmaxRegression
from featpipe.metrics import Interval, Scores, score
from featpipe.model import Model
from featpipe.report import ComparisonRow, write_report
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.storage import RecordStore, digest_arrays
from featpipe.training import train_or_load

logger = logging.getLogger(__name__)

HEADS = ("logistic", "mlp", "linear")
N_EXAMPLES = 6


@dataclass(frozen=True)
class DemoResult:
    """Files and scores of the demo.

    Attributes
    ----------
    archive, labels, report : Path
    cache : FeatureCache
    models : dict from head to Path
    comparison : list of ComparisonRow
        Heads and baselines on the same test tiles.
    best_head : str
        The head with the best cross-validated accuracy on the training tiles.
    examples : list of (id, true, predicted, probability)
    n_tested : int
        Number of test tiles, without exact copies of training tiles (black sky).
    """

    archive: Path
    labels: Path
    cache: FeatureCache
    models: dict[str, Path]
    report: Path
    comparison: list[ComparisonRow]
    best_head: str
    examples: list[tuple[str, str, str, float]]
    n_tested: int


def run_demo(folder: Path, progress: ProgressCallback = ignore_progress, command: str = "") -> DemoResult:
    """Run the full pipeline in a folder; finished work there is reused.

    Parameters
    ----------
    folder : Path
    progress : callable
    command : str
        Command shown in the report, to repeat it.
    """
    logger.info("cutting tiles from photos of scikit-image and scikit-learn")
    tiles, labels = write_tiles(folder)
    cache = extract(tiles, labels=labels, cache=folder / "cache", out=folder / "cache" / "tiles.h5", progress=progress)
    models = {}
    for head in HEADS:
        path = folder / f"tiles.{head}.model"
        models[head] = train_or_load(cache, TrainingConfig(head=head, cv=3), path, progress)
        if models[head].path is None:
            models[head].path = models[head].save(path)
    report, records = folder / "report.html", RecordStore(folder / "records")
    inputs = {
        "models": {head: model.history["request"] for head, model in models.items()},
        "tiles": digest_arrays([("digests", cache.digests), ("split", cache.split)]),
    }
    result = records.find("report", inputs, report)
    if result is None:
        result = _evaluate_and_report(models, cache, tiles, report, command)
        records.write("report", inputs, result, report)
    else:
        logger.info(f"{report}: up to date, nothing to do")
    return DemoResult(
        tiles,
        labels,
        cache,
        {head: folder / f"tiles.{head}.model" for head in HEADS},
        report,
        [ComparisonRow(**{**row, "score": Interval(**row["score"])}) for row in result["comparison"]],
        result["best_head"],
        [tuple(example) for example in result["examples"]],
        result["n_tested"],
    )


def _evaluate_and_report(
    models: dict[str, Model], cache: FeatureCache, tiles: Path, report: Path, command: str
) -> dict[str, Any]:
    """Compare the heads with baselines, and write the report."""
    best_head = max(HEADS, key=lambda head: _get_cross_validated_accuracy(models[head]))
    other_models = [model for head, model in models.items() if head != best_head]
    evaluation = evaluate(models[best_head], cache, against=other_models)
    scores = {best_head: evaluation.scores, **{baseline.name: baseline.scores for baseline in evaluation.rivals}}
    comparison = [*_make_head_rows(models, scores, best_head), *_make_baseline_rows(cache, evaluation.rows, tiles)]
    title = "Seventeen photographs, classified by their tiles"
    write_report(report, evaluation, title=title, comparison=comparison, command=command)
    return {
        "comparison": [asdict(row) for row in comparison],
        "best_head": best_head,
        "examples": _select_examples(models[best_head], evaluation),
        "n_tested": len(evaluation.rows),
    }


def _get_cross_validated_accuracy(model: Model) -> float:
    return float(model.scores["cross_validation"]["metrics"]["accuracy"]["value"])


def _make_head_rows(models: dict[str, Model], scores: dict[str, Scores], best_head: str) -> list[ComparisonRow]:
    return [
        ComparisonRow(
            name=head,
            score=scores[head].metrics["accuracy"],
            seconds_to_fit=model.history["seconds_to_fit"],
            note=f"on embeddings; cross-validated {_get_cross_validated_accuracy(model):.3f} on the left halves",
            is_selected=head == best_head,
        )
        for head, model in models.items()
    ]


def _make_baseline_rows(cache: FeatureCache, test_rows: NDArray[np.int64], tiles: Path) -> list[ComparisonRow]:
    """Scores of the baselines without a backbone on the same test rows."""
    y = cache.label_table.values
    train_rows = np.flatnonzero(cache.split == SPLIT_NAMES.index("train"))
    y_true = cache.label_table.take(test_rows).y
    logger.info("baseline: logistic regression on raw pixels")
    pixel_features = _load_pixels(tiles)
    start_time = perf_counter()
    pixel_model = SoftmaxRegression(C=0.01).fit(pixel_features[train_rows], y[train_rows])
    seconds = perf_counter() - start_time
    class_shares = np.bincount(y[train_rows], minlength=len(cache.classes)) / len(train_rows)
    majority_probabilities = np.tile(class_shares, (len(test_rows), 1))
    class_names = cache.classes
    return [
        ComparisonRow(
            "raw pixels",
            score("classification", y_true, pixel_model.predict_proba(pixel_features[test_rows]), class_names).metrics[
                "accuracy"
            ],
            seconds,
            "logistic regression without a network",
        ),
        ComparisonRow(
            "majority class",
            score("classification", y_true, majority_probabilities, class_names).metrics["accuracy"],
            None,
            f"always {class_names[int(class_shares.argmax())]}",
        ),
    ]


def _load_pixels(tiles: Path) -> NDArray[np.float32]:
    """Standardised gray values of all tiles, shape (n, TILE_SIZE * TILE_SIZE)."""
    index = data.index(tiles)
    with index.open() as reader:
        gray_tiles = [decode_image(reader.read(row))[:, :, 0] for row in range(len(index))]
    pixels = np.stack(gray_tiles).reshape(len(gray_tiles), TILE_SIZE * TILE_SIZE).astype(np.float32)
    return (pixels - pixels.mean()) / pixels.std()


def _select_examples(model: Model, evaluation: Evaluation) -> list[tuple[str, str, str, float]]:
    """Predictions for a few test tiles, one photograph each."""
    y_true: Sequence[str] = evaluation.cache.label_table.take(evaluation.rows).y.tolist()
    middle_rows = [int(np.median(np.flatnonzero(np.array(y_true) == name))) for name in sorted(set(y_true))]
    examples = []
    for example_index in (middle_rows[i] for i in np.linspace(0, len(middle_rows) - 1, N_EXAMPLES).round().astype(int)):
        predicted_class = int(evaluation.predicted[example_index].argmax())
        sample_id = evaluation.cache.ids[int(evaluation.rows[example_index])]
        examples.append(
            (
                sample_id,
                y_true[example_index],
                model.classes[predicted_class],
                float(evaluation.predicted[example_index, predicted_class]),
            )
        )
    return examples
