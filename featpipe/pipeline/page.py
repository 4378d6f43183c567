"""Stages in order, and the page that tells what came out."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featpipe.cache import FeatureCache
from featpipe.evaluation import Evaluation
from featpipe.evaluation.document import how_of
from featpipe.evaluation.trusting import novelty_summary
from featpipe.expansion.result import Expansion
from featpipe.model import Model
from featpipe.report import Page, Rival, Row, write
from featpipe.report.evaluated import shown_of

__all__ = ["command_line", "write_report"]

FEW_ROWS = 100
_CURVES_OF_SIDES = {
    "Accuracy of old classes": "old_accuracy",
    "Accuracy of new classes": "new_accuracy",
    "Loss on old classes": "old_loss",
    "Loss on new classes": "new_loss",
    "Loss of the expansion": "train_loss",
}
_SPLITS = {"given": "marked for training in the split that came with the labels", "all labelled rows": "all labelled"}


def command_line() -> str:
    """What was typed, to repeat it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    title: str = "",
    comparison: Sequence[Row] = (),
    compared_by: str = "",
    command: str = "",
) -> Path:
    """Write the page of an evaluation.

    Parameters
    ----------
    path : path
    evaluation : Evaluation
    title : str
    comparison : sequence of Row
        Other heads and baselines on the same rows; the models that it was compared with if not given.
    compared_by : str
        The score of their rows; the first of the task if not given.
    command : str
        What to type to repeat it.
    """
    model, scores, cache = evaluation.model, evaluation.scores, evaluation.cache
    name, first = next(iter(scores.metrics.items()))
    shown = shown_of(evaluation)
    page = Page(
        title=title or f"{model.head_name} on {model.request['name']}",
        lead=_lead(model, evaluation, name, first),
        facts=_facts(model, evaluation),
        comparison=list(comparison) or _models(evaluation, name),
        comparison_score=compared_by or name,
        scores=scores,
        pictures=shown.pictures,
        bad=list(cache.bad_rows().items()),
        provenance=_provenance(model, cache, command),
        curves=_curves(model),
        notes=[*_notes(evaluation), *([shown.note] if shown.note else [])],
        how=_how(evaluation),
        rivals=_rivals(evaluation, name),
        galleries=shown.galleries,
        tables=shown.tables,
        sentences=shown.sentences,
        drawn=shown.drawn,
    )
    return write(page, path)


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
    cache, history = evaluation.cache, model.history.get("trained_on", {})
    return [
        ("Trained on", f"{history.get('rows', len(model.trained_on)):,} images"),
        ("Scored on", f"{len(evaluation.rows):,} images"),
        ("Classes" if model.task != "regression" else "Targets", f"{len(model.classes):,}"),
        ("Unreadable images", f"{sum(cache.bad_rows().values()):,}"),
    ]


def _notes(evaluation: Evaluation) -> list[str]:
    """What could make the result look better, or surer, than it is."""
    notes = [text for text in (evaluation.duplicates.told(),) if text]
    n = len(evaluation.rows)
    if n < FEW_ROWS:
        notes.append(f"only {n} images were scored: read the intervals, not the figures")
    curve = evaluation.learning_curve
    if curve is not None and curve.high < curve.errors[-1]:
        notes.append("more labels like these would help: see the learning curve")
    new = novelty_summary(evaluation)
    if new is not None and new["share"] > 2 * (1 - new["from"]):
        notes.append(f"{new['share']:.0%} of the images look unlike those of training, where 5 % would be usual")
    short = [held for held in evaluation.coverage if held.level == 0.9 and held.coverage.high < held.level]
    if short:
        notes.append(
            f"sets asked to hold the right answer 90 % of the time do so {short[0].coverage.value:.0%} of the time: "
            "these images are unlike those that the model was calibrated on"
        )
    found = {finding.name: finding.total for finding in evaluation.findings}
    if found.get("label_errors"):
        total = found["label_errors"]
        notes.append(f"{total:,} label{' is' if total == 1 else 's are'} in doubt: look at them below")
    return [note[0].upper() + note[1:] + "." for note in notes]


def _how(evaluation: Evaluation) -> list[tuple[str, str]]:
    how = how_of(evaluation)
    tuned = how["tuned"]
    lines = [
        ("Scored", how["scored"]),
        *((f"Left out: {reason}", f"{count:,}") for reason, count in evaluation.left_out.items()),
        ("Trained on", f"{how['training_rows']:,} images, {_SPLITS.get(how['training_split'], 'of an unknown split')}"),
        ("Unreadable", f"{how['bad']:,} of the scored cache, {how['bad_in_training']:,} of the training cache"),
        ("Copies of training images", _copies(evaluation)),
        (
            "Settings",
            f"{tuned['settings']} chosen by {tuned['metric']}, {tuned['how']} of the training images"
            if tuned
            else "none was chosen on any rows",
        ),
        ("Head", _head_chosen(how)),
        ("Probabilities", "calibrated on held-out training images" if how["calibrated"] else "as the head gives them"),
        *_learnt_later(evaluation.model),
        ("Intervals", "95 %: Wilson's of shares, else percentiles over 1,000 resamples of the rows, seed 0"),
    ]
    return lines


def _copies(evaluation: Evaluation) -> str:
    found = evaluation.duplicates
    near = "near ones were not looked for" if found.training is None else f"{len(found.training):,} near, scored"
    return f"{found.exact:,} exact, left out; {near}; {len(found.within):,} near pairs among the scored"


def _head_chosen(how: dict[str, Any]) -> str:
    if how["heads_compared"] > 1:
        return f"the best of {how['heads_compared']} by cross-validation on the training images"
    return "was given, not chosen by these scores"


def _models(evaluation: Evaluation, name: str) -> list[Row]:
    """The model and those that it was compared with, on the same rows."""
    if not evaluation.rivals:
        return []
    model = evaluation.model
    rows = [Row(model.head_name, evaluation.scores.metrics[name], _seconds(model), "this model", chosen=True)]
    for rival in evaluation.rivals:
        if name in rival.scores.metrics:
            note = f"{rival.model.head_name} on {rival.model.request['name']}"
            rows.append(Row(rival.name, rival.scores.metrics[name], _seconds(rival.model), note))
    return rows


def _seconds(model: Model) -> float | None:
    seconds = model.history.get("seconds_to_fit")
    return float(seconds) if isinstance(seconds, (int, float)) and math.isfinite(seconds) else None


def _rivals(evaluation: Evaluation, name: str) -> list[Rival]:
    rows = []
    for rival in evaluation.rivals:
        contrast = rival.paired.contrasts.get(name)
        if contrast is not None:
            test = "McNemar's exact test" if contrast.test == "mcnemar" else "paired bootstrap"
            found = rival.paired
            rows.append(
                Rival(
                    rival.name,
                    rival.scores.metrics[name],
                    contrast.difference,
                    contrast.p,
                    test,
                    found.only_first,
                    found.only_second,
                )
            )
    return rows


def _provenance(model: Model, cache: FeatureCache, command: str) -> list[tuple[str, str]]:
    facts = model.facts["backbone"]
    versions = {**cache.manifest.get("versions", {}), **model.history.get("versions", {})}
    lines = [
        ("Backbone", f"{facts['name']} ({facts['source']}), weights {facts['weights'][:16]}"),
        ("Output", model.output),
        ("Precision", str(model.facts["precision"])),
        ("Head", f"{model.head_name} {model.history.get('params') or ''}".strip()),
        ("Random state", str(model.history.get("random_state"))),
        ("Fingerprint of the cache", cache.fingerprint),
        ("Cache", str(cache.path)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [*lines, ("Command", command)] if command else lines


def _curves(model: Model) -> dict[str, list[float]]:
    """Of heads that have epochs."""
    named = {
        "Training loss": "loss_curve",
        "Validation loss": "validation_curve",
        "Validation score": "validation_score_curve",
    }
    found = _drawable(model.history.get("curves") or {}, named)
    expansion = _expansion_of(model)
    if expansion is not None and expansion.outcomes:
        found |= _drawable(expansion.outcomes[0].curves, _CURVES_OF_SIDES)
    return found


def _drawable(curves: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, list[float]]:
    """Those that there are, by what they are called on the page."""
    return {
        label: [float(v) if isinstance(v, (int, float)) else math.nan for v in curves[name]]
        for label, name in named.items()
        if curves.get(name)
    }


def _expansion_of(model: Model) -> Expansion | None:
    """What the step in which a model learnt its last classes did."""
    found = model.scores.get("expansion")
    return None if found is None else Expansion.of(model, found["result"])


def _learnt_later(model: Model) -> list[tuple[str, str]]:
    """What each method did to old and new classes, when the last ones came."""
    expansion = _expansion_of(model)
    if expansion is None:
        return []
    came = ", ".join(expansion.new) or "no new class"
    lines = [("Learnt later", f"{came}, by {expansion.method}; judged by {expansion.how or 'nothing'}")]
    if expansion.before is not None:
        lines.append(("Before that", f"old classes {expansion.before}, among themselves"))
    for outcome in expansion.outcomes:
        sides = {"old classes": outcome.old, "new": outcome.new, "all": outcome.all, "forgetting": outcome.forgetting}
        told = ", ".join(f"{name} {value}" for name, value in sides.items() if value is not None)
        lines.append((f"By {outcome.method}", told))
    return lines
