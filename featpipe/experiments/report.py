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
from featpipe.evaluation import Evaluation, describe_protocol, summarize_novelty
from featpipe.incremental import Expansion
from featpipe.model import Model
from featpipe.report import BaselineRow, ComparisonRow, Page, make_evaluation_content, write_page

__all__ = ["command_line", "write_report"]

SMALL_TEST_SET = 100
_EXPANSION_CURVES = {
    "Accuracy of old classes": "old_accuracy",
    "Accuracy of new classes": "new_accuracy",
    "Loss on old classes": "old_loss",
    "Loss on new classes": "new_loss",
    "Loss of the expansion": "train_loss",
}
_SPLIT_DESCRIPTIONS = {
    "given": "marked for training in the split that came with the labels",
    "all labelled rows": "all labelled",
}


def command_line() -> str:
    """What was typed, to repeat it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    title: str = "",
    comparison: Sequence[ComparisonRow] = (),
    comparison_metric: str = "",
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
    metric_name, main_metric = next(iter(scores.metrics.items()))
    content = make_evaluation_content(evaluation)
    page = Page(
        title=title or f"{model.head_name} on {model.request['name']}",
        lead=_make_lead(model, evaluation, metric_name, main_metric),
        facts=_make_key_figures(model, evaluation),
        comparison=list(comparison) or _make_comparison_rows(evaluation, metric_name),
        comparison_score=comparison_metric or metric_name,
        scores=scores,
        pictures=content.pictures,
        bad=list(cache.bad_rows().items()),
        provenance=_make_provenance(model, cache, command),
        curves=_collect_curves(model),
        notes=[*_make_notes(evaluation), *([content.note] if content.note else [])],
        how=_describe_method(evaluation),
        rivals=_make_paired_comparisons(evaluation, metric_name),
        galleries=content.galleries,
        tables=content.tables,
        sentences=content.sentences,
        drawn=content.drawn,
    )
    return write_page(page, path)


def _make_lead(model: Model, evaluation: Evaluation, metric_name: str, metric: Any) -> str:
    n = len(evaluation.rows)
    performance = {
        "classification": f"names the right class of {metric.value:.1%} of {n:,} images that it was not trained on",
        "multilabel": f"reaches a mean average precision of {metric.value:.3f} on {n:,} images it was not trained on",
        "regression": f"is off by {metric.value:.3g} on average, on {n:,} images that it was not trained on",
    }[model.task]
    interval = f", 95 % interval {metric.low:.3g} to {metric.high:.3g}" if metric.known else ""
    return f"The model {performance} ({metric_name.replace('_', ' ')}{interval})."


def _make_key_figures(model: Model, evaluation: Evaluation) -> list[tuple[str, str]]:
    cache, history = evaluation.cache, model.history.get("trained_on", {})
    return [
        ("Trained on", f"{history.get('rows', len(model.trained_on)):,} images"),
        ("Scored on", f"{len(evaluation.rows):,} images"),
        ("Classes" if model.task != "regression" else "Targets", f"{len(model.classes):,}"),
        ("Unreadable images", f"{sum(cache.bad_rows().values()):,}"),
    ]


def _make_notes(evaluation: Evaluation) -> list[str]:
    """What could make the result look better, or surer, than it is."""
    notes = [text for text in (evaluation.duplicates.describe(),) if text]
    n = len(evaluation.rows)
    if n < SMALL_TEST_SET:
        notes.append(f"only {n} images were scored: read the intervals, not the figures")
    curve = evaluation.learning_curve
    if curve is not None and curve.high < curve.errors[-1]:
        notes.append("more labels like these would help: see the learning curve")
    novelty = summarize_novelty(evaluation.novelty, evaluation.judged)
    if novelty is not None and novelty["share"] > 2 * (1 - novelty["from"]):
        notes.append(f"{novelty['share']:.0%} of the images look unlike those of training, where 5 % would be usual")
    undercovered = [
        set_coverage
        for set_coverage in evaluation.coverage
        if set_coverage.level == 0.9 and set_coverage.coverage.high < set_coverage.level
    ]
    if undercovered:
        notes.append(
            f"sets asked to hold the right answer 90 % of the time do so {undercovered[0].coverage.value:.0%} of the time: "
            "these images are unlike those that the model was calibrated on"
        )
    finding_counts = {finding.name: finding.total for finding in evaluation.findings}
    if finding_counts.get("label_errors"):
        total = finding_counts["label_errors"]
        notes.append(f"{total:,} label{' is' if total == 1 else 's are'} in doubt: look at them below")
    return [note[0].upper() + note[1:] + "." for note in notes]


def _describe_method(evaluation: Evaluation) -> list[tuple[str, str]]:
    method = describe_protocol(evaluation.model, evaluation.cache)
    tuning = method["tuned"]
    lines = [
        ("Scored", method["scored"]),
        *((f"Left out: {reason}", f"{count:,}") for reason, count in evaluation.left_out.items()),
        (
            "Trained on",
            f"{method['training_rows']:,} images, {_SPLIT_DESCRIPTIONS.get(method['training_split'], 'of an unknown split')}",
        ),
        ("Unreadable", f"{method['bad']:,} of the scored cache, {method['bad_in_training']:,} of the training cache"),
        ("Copies of training images", _describe_duplicates(evaluation)),
        (
            "Settings",
            f"{tuning['settings']} chosen by {tuning['metric']}, {tuning['how']} of the training images"
            if tuning
            else "none was chosen on any rows",
        ),
        ("Head", _describe_head_selection(method)),
        (
            "Probabilities",
            "calibrated on held-out training images" if method["calibrated"] else "as the head gives them",
        ),
        *_describe_expansion(evaluation.model),
        ("Intervals", "95 %: Wilson's of shares, else percentiles over 1,000 resamples of the rows, seed 0"),
    ]
    return lines


def _describe_duplicates(evaluation: Evaluation) -> str:
    duplicates = evaluation.duplicates
    near_text = (
        "near ones were not looked for" if duplicates.training is None else f"{len(duplicates.training):,} near, scored"
    )
    return f"{duplicates.exact:,} exact, left out; {near_text}; {len(duplicates.within):,} near pairs among the scored"


def _describe_head_selection(method: dict[str, Any]) -> str:
    if method["heads_compared"] > 1:
        return f"the best of {method['heads_compared']} by cross-validation on the training images"
    return "was given, not chosen by these scores"


def _make_comparison_rows(evaluation: Evaluation, metric_name: str) -> list[ComparisonRow]:
    """The model and those that it was compared with, on the same rows."""
    if not evaluation.rivals:
        return []
    model = evaluation.model
    rows = [
        ComparisonRow(
            model.head_name, evaluation.scores.metrics[metric_name], _get_fit_seconds(model), "this model", chosen=True
        )
    ]
    for baseline in evaluation.rivals:
        if metric_name in baseline.scores.metrics:
            note = f"{baseline.model.head_name} on {baseline.model.request['name']}"
            rows.append(
                ComparisonRow(
                    baseline.name, baseline.scores.metrics[metric_name], _get_fit_seconds(baseline.model), note
                )
            )
    return rows


def _get_fit_seconds(model: Model) -> float | None:
    seconds = model.history.get("seconds_to_fit")
    return float(seconds) if isinstance(seconds, (int, float)) and math.isfinite(seconds) else None


def _make_paired_comparisons(evaluation: Evaluation, metric_name: str) -> list[BaselineRow]:
    comparisons = []
    for baseline in evaluation.rivals:
        contrast = baseline.paired.contrasts.get(metric_name)
        if contrast is not None:
            test = "McNemar's exact test" if contrast.test == "mcnemar" else "paired bootstrap"
            paired = baseline.paired
            comparisons.append(
                BaselineRow(
                    baseline.name,
                    baseline.scores.metrics[metric_name],
                    contrast.difference,
                    contrast.p,
                    test,
                    paired.only_first,
                    paired.only_second,
                )
            )
    return comparisons


def _make_provenance(model: Model, cache: FeatureCache, command: str) -> list[tuple[str, str]]:
    backbone_spec = model.facts["backbone"]
    versions = {**cache.manifest.get("versions", {}), **model.history.get("versions", {})}
    lines = [
        ("Backbone", f"{backbone_spec['name']} ({backbone_spec['source']}), weights {backbone_spec['weights'][:16]}"),
        ("Output", model.output),
        ("Precision", str(model.facts["precision"])),
        ("Head", f"{model.head_name} {model.history.get('params') or ''}".strip()),
        ("Random state", str(model.history.get("random_state"))),
        ("Fingerprint of the cache", cache.fingerprint),
        ("Cache", str(cache.path)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [*lines, ("Command", command)] if command else lines


def _collect_curves(model: Model) -> dict[str, list[float]]:
    """Of heads that have epochs."""
    curve_keys = {
        "Training loss": "loss_curve",
        "Validation loss": "validation_curve",
        "Validation score": "validation_score_curve",
    }
    curves = _select_curves(model.history.get("curves") or {}, curve_keys)
    expansion = _load_expansion(model)
    if expansion is not None and expansion.outcomes:
        curves |= _select_curves(expansion.outcomes[0].curves, _EXPANSION_CURVES)
    return curves


def _select_curves(curves: Mapping[str, Any], curve_keys: Mapping[str, str]) -> dict[str, list[float]]:
    """Those that there are, by what they are called on the page."""
    return {
        label: [float(v) if isinstance(v, (int, float)) else math.nan for v in curves[key]]
        for label, key in curve_keys.items()
        if curves.get(key)
    }


def _load_expansion(model: Model) -> Expansion | None:
    """What the step in which a model learnt its last classes did."""
    document = model.scores.get("expansion")
    return None if document is None else Expansion.from_dict(model, document["result"])


def _describe_expansion(model: Model) -> list[tuple[str, str]]:
    """What each method did to old and new classes, when the last ones came."""
    expansion = _load_expansion(model)
    if expansion is None:
        return []
    new_classes = ", ".join(expansion.new) or "no new class"
    lines = [("Learnt later", f"{new_classes}, by {expansion.method}; judged by {expansion.how or 'nothing'}")]
    if expansion.before is not None:
        lines.append(("Before that", f"old classes {expansion.before}, among themselves"))
    for outcome in expansion.outcomes:
        measures = {
            "old classes": outcome.old,
            "new": outcome.new,
            "all": outcome.all,
            "forgetting": outcome.forgetting,
        }
        text = ", ".join(f"{name} {value}" for name, value in measures.items() if value is not None)
        lines.append((f"By {outcome.method}", text))
    return lines
