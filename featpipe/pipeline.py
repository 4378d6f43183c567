"""Stages in order, and the page that tells what came out."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featpipe import archive, image
from featpipe.cache import FeatureCache
from featpipe.errors import ArchiveError, FeatpipeError
from featpipe.evaluation import Evaluation
from featpipe.fingerprint import digest
from featpipe.model import Model
from featpipe.report import Page, Picture, Row, write

__all__ = ["command_line", "write_report"]

PICTURES = 24
THUMBNAIL_PIXELS = 96


def command_line() -> str:
    """What was typed, to repeat it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def write_report(
    path: str | os.PathLike[str],
    model: Model,
    evaluation: Evaluation,
    *,
    title: str = "",
    comparison: Sequence[Row] = (),
    command: str = "",
) -> Path:
    """Write the page of an evaluation.

    Parameters
    ----------
    path : path-like
    model : Model
    evaluation : Evaluation
    title : str
    comparison : sequence of Row
        Other heads and baselines on the same rows.
    command : str
        What to type to repeat it.
    """
    scores, cache = evaluation.scores, evaluation.cache
    name, first = next(iter(scores.metrics.items()))
    page = Page(
        title=title or f"{model.head_name} on {model.request['name']}",
        lead=_lead(model, evaluation, name, first),
        facts=_facts(model, evaluation),
        comparison=list(comparison),
        comparison_score=name,
        scores=scores,
        pictures=_pictures(model, evaluation),
        bad=list(cache.bad_rows().items()),
        provenance=_provenance(model, cache, command),
        curves=_curves(model),
    )
    write(page, path)
    return Path(path)


def _lead(model: Model, evaluation: Evaluation, name: str, value: Any) -> str:
    n = len(evaluation.rows)
    what = {
        "classification": f"names the right class of {value.value:.1%} of {n:,} images that it was not trained on",
        "multilabel": f"reaches a mean average precision of {value.value:.3f} on {n:,} images it was not trained on",
        "regression": f"is off by {value.value:.3g} on average, on {n:,} images that it was not trained on",
    }[model.task]
    sure = f", 95 % interval {value.low:.3g} to {value.high:.3g}" if value.known else ""
    return f"The model {what} ({name.replace('_', ' ')}{sure})."


def _facts(model: Model, evaluation: Evaluation) -> list[tuple[str, str]]:
    cache, history = evaluation.cache, model.history["trained_on"]
    facts = [
        ("Trained on", f"{history['rows']:,} images"),
        ("Scored on", f"{len(evaluation.rows):,} images"),
        ("Classes" if model.task != "regression" else "Targets", f"{len(model.classes):,}"),
        ("Unreadable images", f"{sum(cache.bad_rows().values()):,}"),
        ("How the rows were split", history["split"]),
    ]
    return facts + [(f"Left out: {reason}", f"{count:,}") for reason, count in evaluation.left_out.items()]


def _provenance(model: Model, cache: FeatureCache, command: str) -> list[tuple[str, str]]:
    facts = model.facts["backbone"]
    versions = {**cache.manifest.get("versions", {}), **model.history.get("versions", {})}
    lines = [
        ("Backbone", f"{facts['name']} ({facts['source']}), weights {facts['weights'][:16]}"),
        ("Output", model.output),
        ("Precision", str(model.facts["precision"])),
        ("Head", f"{model.head_name} {model.history['params'] or ''}".strip()),
        ("Fingerprint of the cache", cache.fingerprint),
        ("Cache", str(cache.path)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [*lines, ("Command", command)] if command else lines


def _curves(model: Model) -> dict[str, list[float]]:
    head = model.head[-1] if hasattr(model.head, "steps") else model.head
    named = {"Training loss": "loss_curve_", "Validation score": "validation_scores_"}
    found = {label: getattr(head, attribute, None) for label, attribute in named.items()}
    return {label: [float(v) for v in values] for label, values in found.items() if values is not None and len(values)}


def _pictures(model: Model, evaluation: Evaluation) -> list[Picture]:
    """The most confident mistakes, then examples of what is right; none if the archives are gone."""
    if model.task != "classification":
        return []
    cache = evaluation.cache
    truth = cache.label_table.take(evaluation.rows).y
    best = evaluation.predicted.argmax(axis=1)
    probability = evaluation.predicted[np.arange(len(best)), best]
    right = np.array([model.classes[b] == t for b, t in zip(best, truth, strict=True)])
    wrong = np.flatnonzero(~right)[np.argsort(-probability[~right], kind="stable")][: PICTURES // 2]
    good = np.flatnonzero(right)
    good = good[np.linspace(0, len(good) - 1, min(len(good), PICTURES - len(wrong))).round().astype(int)]
    chosen = [*wrong.tolist(), *good.tolist()]
    jpegs = _thumbnails(cache, evaluation.rows[chosen].tolist())
    return [
        Picture(jpegs[at], cache.ids[int(evaluation.rows[i])], truth[i], model.classes[best[i]], float(probability[i]))
        for at, i in enumerate(chosen)
        if at in jpegs
    ]


def _thumbnails(cache: FeatureCache, rows: Sequence[int]) -> dict[int, bytes]:
    """Small re-encoded pictures of some rows, by position; those that can still be read."""
    made: dict[int, bytes] = {}
    try:
        index = archive.index(cache.manifest.get("archives", []))
    except FeatpipeError:
        return made
    if index.ids != cache.ids:
        return made
    with index.open() as reader:
        for at, row in enumerate(rows):
            try:
                data = reader.read(row)
                if digest(data) == cache.digests[row].tobytes():  # else it is another picture by now
                    made[at] = image.thumbnail(image.decode(data), THUMBNAIL_PIXELS)
            except ArchiveError:
                continue
    return made
