"""The whole line on real photographs: tiles → archive → cache → heads → scores → report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from featpipe import archive, image
from featpipe.cache import SPLITS, FeatureCache
from featpipe.evaluation import Evaluation, evaluate
from featpipe.extraction import extract
from featpipe.heads import SoftmaxRegression
from featpipe.model import Model
from featpipe.pipeline import write_report
from featpipe.progress import Progress, Tell, quiet
from featpipe.report import Row
from featpipe.scores import Scores, score
from featpipe.tiles import SIDE, write_tiles
from featpipe.training import train

__all__ = ["HEADS", "Demonstration", "demonstrate"]

HEADS = ("logistic", "mlp", "linear")
SHOWN = 6


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration leaves behind.

    Attributes
    ----------
    archive, labels, report : Path
    cache : FeatureCache
    models : dict from head to Path
    comparison : list of Row
        Heads and baselines on the same test tiles.
    chosen : str
        The head with the best cross-validated accuracy on the training tiles.
    examples : list of (id, true, predicted, probability)
    tested : int
        Test tiles; those that are byte for byte among the training tiles (black sky) are left out.
    """

    archive: Path
    labels: Path
    cache: FeatureCache
    models: dict[str, Path]
    report: Path
    comparison: list[Row]
    chosen: str
    examples: list[tuple[str, str, str, float]]
    tested: int


def demonstrate(folder: Path, progress: Tell = quiet, command: str = "") -> Demonstration:
    """Run the whole line in a folder.

    Parameters
    ----------
    folder : Path
    progress : callable
    command : str
        For the report: what to type to repeat it.
    """
    progress(Progress("note", "cutting tiles from photographs of scikit-image and scikit-learn"))
    tiles, labels = write_tiles(folder)
    cache = extract(tiles, labels=labels, cache=folder / "cache", out=folder / "cache" / "tiles.h5", progress=progress)
    models = {head: train(cache, head, cv=3, progress=progress) for head in HEADS}
    paths = {head: model.save(folder / f"tiles.{head}.model") for head, model in models.items()}
    chosen = max(HEADS, key=lambda head: _estimate(models[head]))
    best = evaluate(models[chosen], cache, against=[model for head, model in models.items() if head != chosen])
    scores = {chosen: best.scores, **{rival.name: rival.scores for rival in best.rivals}}
    comparison = [*_heads(models, scores, chosen), *_baselines(cache, best.rows, tiles, progress)]
    report = write_report(
        folder / "report.html",
        best,
        title="Seventeen photographs, told apart by their tiles",
        comparison=comparison,
        command=command,
    )
    examples = _examples(models[chosen], best)
    return Demonstration(tiles, labels, cache, paths, report, comparison, chosen, examples, len(best.rows))


def _estimate(model: Model) -> float:
    return float(model.scores["cross_validation"]["metrics"]["accuracy"]["value"])


def _heads(models: dict[str, Model], scores: dict[str, Scores], chosen: str) -> list[Row]:
    return [
        Row(
            name=head,
            score=scores[head].metrics["accuracy"],
            seconds_to_fit=model.history["seconds_to_fit"],
            note=f"on embeddings; cross-validated {_estimate(model):.3f} on the left halves",
            chosen=head == chosen,
        )
        for head, model in models.items()
    ]


def _baselines(cache: FeatureCache, held: NDArray[np.int64], tiles: Path, progress: Tell) -> list[Row]:
    """What the same test rows give without a network."""
    y = cache.label_table.values
    fit = np.flatnonzero(cache.split == SPLITS.index("train"))
    truth = cache.label_table.take(held).y
    progress(Progress("note", "baseline: logistic regression on raw pixels"))
    pixels = _pixels(tiles)
    started = perf_counter()
    raw = SoftmaxRegression(C=0.01).fit(pixels[fit], y[fit])
    seconds = perf_counter() - started
    shares = np.bincount(y[fit], minlength=len(cache.classes)) / len(fit)
    majority = np.tile(shares, (len(held), 1))
    names = cache.classes
    return [
        Row(
            "raw pixels",
            score("classification", truth, raw.predict_proba(pixels[held]), names).metrics["accuracy"],
            seconds,
            "logistic regression without a network",
        ),
        Row(
            "majority class",
            score("classification", truth, majority, names).metrics["accuracy"],
            None,
            f"always {names[int(shares.argmax())]}",
        ),
    ]


def _pixels(tiles: Path) -> NDArray[np.float32]:
    """Standardised gray values of all tiles, shape (n, SIDE * SIDE)."""
    index = archive.index(tiles)
    with index.open() as reader:
        gray = [image.decode(reader.read(row))[:, :, 0] for row in range(len(index))]
    pixels = np.stack(gray).reshape(len(gray), SIDE * SIDE).astype(np.float32)
    return (pixels - pixels.mean()) / pixels.std()


def _examples(model: Model, evaluation: Evaluation) -> list[tuple[str, str, str, float]]:
    """Predictions for a few test tiles, one photograph each."""
    truth: Sequence[str] = evaluation.cache.label_table.take(evaluation.rows).y.tolist()
    middles = [int(np.median(np.flatnonzero(np.array(truth) == name))) for name in sorted(set(truth))]
    examples = []
    for at in (middles[i] for i in np.linspace(0, len(middles) - 1, SHOWN).round().astype(int)):
        best = int(evaluation.predicted[at].argmax())
        name = evaluation.cache.ids[int(evaluation.rows[at])]
        examples.append((name, truth[at], model.classes[best], float(evaluation.predicted[at, best])))
    return examples
