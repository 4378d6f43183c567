"""Write the report of an evaluation: the result in one sentence, notes, protocol, comparisons and provenance."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featpipe.cache import FeatureCache
from featpipe.evaluation import NOVELTY_THRESHOLD, Evaluation, describe_protocol, summarize_novelty
from featpipe.metrics import Interval
from featpipe.model import Model
from featpipe.report.from_evaluation import make_evaluation_content
from featpipe.report.page import BaselineRow, ComparisonRow, Page
from featpipe.report.render import write_page
from featpipe.training import format_params

if TYPE_CHECKING:
    from featpipe.incremental import Expansion

SMALL_TEST_SET_ROWS = 100
_HEAD_CURVES = {
    "Training loss": "loss_curve",
    "Validation loss": "validation_curve",
    "Validation score": "validation_score_curve",
}
_EXPANSION_CURVES = {
    "Accuracy of old classes": "old_accuracy",
    "Accuracy of new classes": "new_accuracy",
    "Loss on old classes": "old_loss",
    "Loss on new classes": "new_loss",
    "Loss of the expansion": "train_loss",
}
_SPLIT_DESCRIPTIONS = {
    "given": "the training rows of the split that came with the labels",
    "all labelled rows": "all labelled images of the cache",
}


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    title: str = "",
    comparison: Sequence[ComparisonRow] = (),
    comparison_metric: str = "",
    command: str = "",
) -> Path:
    """Write the report of an evaluation as one HTML file.

    Parameters
    ----------
    path : path-like
    evaluation : Evaluation
    title : str
        The names of head and backbone if not given.
    comparison : sequence of ComparisonRow
        Heads and baselines on the same rows; if not given, the models that `evaluation` compares.
    comparison_metric : str
        The metric of `comparison`; the first metric of the task if not given.
    command : str
        The command that reproduces the report.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    model, scores, cache = evaluation.model, evaluation.scores, evaluation.cache
    metric_name, main_score = next(iter(scores.metrics.items()))
    content = make_evaluation_content(evaluation)
    page = Page(
        title=title or f"{model.head_name} on {model.request['name']}",
        lead=_make_lead(model.task, len(evaluation.rows), metric_name, main_score),
        key_figures=_make_key_figures(evaluation),
        comparison=list(comparison) or _make_comparison_rows(evaluation, metric_name),
        comparison_metric=comparison_metric or metric_name,
        scores=scores,
        examples=content.examples,
        unreadable=list(cache.bad_rows().items()),
        provenance=_make_provenance(model, cache, command),
        curves=_collect_curves(model),
        notes=[*_make_notes(evaluation), *([content.note] if content.note else [])],
        protocol=_make_protocol_lines(evaluation),
        baselines=_make_baseline_rows(evaluation, metric_name),
        galleries=content.galleries,
        tables=content.tables,
        captions=content.captions,
        script_data=content.script_data,
    )
    return write_page(page, path)


def _make_lead(task: str, n: int, metric_name: str, main_score: Interval) -> str:
    performance = {
        "classification": f"classifies {main_score.value:.1%} of {n:,} unseen images correctly",
        "multilabel": f"reaches a mean average precision of {main_score.value:.3f} on {n:,} unseen images",
        "regression": f"has a mean absolute error of {main_score.value:.3g} on {n:,} unseen images",
    }[task]
    interval = f"; 95 % interval {main_score.low:.3g} to {main_score.high:.3g}" if main_score.known else ""
    return f"The model {performance} ({metric_name.replace('_', ' ')}{interval})."


def _make_key_figures(evaluation: Evaluation) -> list[tuple[str, str]]:
    model, training_info = evaluation.model, evaluation.model.history.get("trained_on", {})
    return [
        ("Trained on", f"{training_info.get('rows', len(model.trained_on)):,} images"),
        ("Scored on", f"{len(evaluation.rows):,} images"),
        ("Classes" if model.task != "regression" else "Targets", f"{len(model.classes):,}"),
        ("Unreadable images", f"{sum(evaluation.cache.bad_rows().values()):,}"),
    ]


def _make_comparison_rows(evaluation: Evaluation, metric_name: str) -> list[ComparisonRow]:
    """Make rows for the model and the baselines; none without baselines."""
    if not evaluation.rivals:
        return []
    model, score = evaluation.model, evaluation.scores.metrics[metric_name]
    rows = [ComparisonRow(model.head_name, score, _get_fit_seconds(model), "this model", is_selected=True)]
    for baseline in evaluation.rivals:
        if metric_name in baseline.scores.metrics:
            score = baseline.scores.metrics[metric_name]
            note = f"{baseline.model.head_name} on {baseline.model.request['name']}"
            rows.append(ComparisonRow(baseline.name, score, _get_fit_seconds(baseline.model), note))
    return rows


def _get_fit_seconds(model: Model) -> float | None:
    seconds = model.history.get("seconds_to_fit")
    return float(seconds) if isinstance(seconds, (int, float)) and math.isfinite(seconds) else None


def _make_baseline_rows(evaluation: Evaluation, metric_name: str) -> list[BaselineRow]:
    rows = []
    for baseline in evaluation.rivals:
        paired = baseline.paired
        contrast = paired.contrasts.get(metric_name)
        if contrast is not None:
            row = BaselineRow(
                name=baseline.name,
                score=baseline.scores.metrics[metric_name],
                difference=contrast.difference,
                p=contrast.p,
                test="McNemar's exact test" if contrast.test == "mcnemar" else "paired bootstrap",
                only_first=paired.only_first,
                only_second=paired.only_second,
            )
            rows.append(row)
    return rows


def _make_notes(evaluation: Evaluation) -> list[str]:
    """List the reasons why the scores may be too high or uncertain, and what would improve them."""
    notes = [evaluation.duplicates.describe()]
    n = len(evaluation.rows)
    if n < SMALL_TEST_SET_ROWS:
        notes.append(f"only {n} images were scored, so the scores are uncertain: see their intervals")
    curve = evaluation.learning_curve
    if curve is not None and curve.high < curve.errors[-1]:
        notes.append("more training images would reduce the error: see the learning curve")
    novelty = summarize_novelty(evaluation.novelty, evaluation.judged)
    if novelty is not None and novelty["share"] > 2 * (1 - NOVELTY_THRESHOLD):
        notes.append(
            f"{novelty['share']:.0%} of the images have a novelty score of at least {NOVELTY_THRESHOLD:g}, where "
            f"{1 - NOVELTY_THRESHOLD:.0%} is expected: they differ from the training images"
        )
    for coverage in evaluation.coverage:
        if coverage.level == 0.9 and coverage.coverage.high < coverage.level:
            kind = "intervals" if evaluation.model.task == "regression" else "sets"
            notes.append(
                f"90 % prediction {kind} contain the true value for only {coverage.coverage.value:.0%} of the images: "
                "they differ from the images used for calibration"
            )
    n_errors = sum(finding.total for finding in evaluation.findings if finding.name == "label_errors")
    if n_errors:
        notes.append(f"{n_errors:,} label{' is' if n_errors == 1 else 's are'} probably wrong: see below")
    return [note[0].upper() + note[1:] + "." for note in notes if note]


def _make_protocol_lines(evaluation: Evaluation) -> list[tuple[str, str]]:
    protocol = describe_protocol(evaluation.model, evaluation.cache)
    split = _SPLIT_DESCRIPTIONS.get(protocol["training_split"], "of an unknown split")
    tuned = protocol["tuned"]
    return [
        ("Scored", protocol["scored"]),
        *((f"Left out: {reason}", f"{count:,}") for reason, count in evaluation.left_out.items()),
        ("Trained on", f"{protocol['training_rows']:,} images: {split}"),
        (
            "Unreadable",
            f"{protocol['bad']:,} in the scored cache, {protocol['bad_in_training']:,} in the training cache",
        ),
        ("Duplicates", _describe_duplicates(evaluation)),
        (
            "Hyperparameters",
            f"{format_params(tuned['settings'])}, selected by {tuned['metric']}: {tuned['how']} of the training images"
            if tuned
            else "not searched",
        ),
        (
            "Head",
            f"the best of {protocol['heads_compared']} by cross-validation on the training images"
            if protocol["heads_compared"] > 1
            else "fixed in advance, not selected by score",
        ),
        (
            "Probabilities",
            "calibrated on held-out training images" if protocol["calibrated"] else "uncalibrated output of the head",
        ),
        *_describe_expansion(evaluation.model),
        (
            "Intervals",
            "95 %: Wilson for shares, otherwise percentile bootstrap over 1,000 resamples of the rows, seed 0",
        ),
    ]


def _describe_duplicates(evaluation: Evaluation) -> str:
    duplicates = evaluation.duplicates
    n_near = "near duplicates not checked"
    if duplicates.training is not None:
        n_near = f"{len(duplicates.training):,} near duplicates of training images, scored"
    return (
        f"{duplicates.exact:,} exact copies of training images, left out; {n_near}; "
        f"{len(duplicates.within):,} pairs of near duplicates among the scored images"
    )


def _describe_expansion(model: Model) -> list[tuple[str, str]]:
    """Describe the last class-incremental step: the scores of each method on old and new classes."""
    expansion = _load_expansion(model)
    if expansion is None:
        return []
    new_classes = ", ".join(expansion.new) or "none"
    lines = [("Classes added", f"{new_classes}; method {expansion.method}; scored on {expansion.how or 'no images'}")]
    if expansion.before is not None:
        lines.append(("Before adding", f"accuracy of the old classes {expansion.before}, among old classes only"))
    for outcome in expansion.outcomes:
        measures = {
            "old classes": outcome.old,
            "new classes": outcome.new,
            "all classes": outcome.all,
            "forgetting": outcome.forgetting,
        }
        text = ", ".join(f"{name} {value}" for name, value in measures.items() if value is not None)
        lines.append((f"Method {outcome.method}", text))
    return lines


def _load_expansion(model: Model) -> Expansion | None:
    document = model.scores.get("expansion")
    if document is None:
        return None
    from featpipe.incremental import Expansion

    return Expansion.from_dict(model, document["result"])


def _make_provenance(model: Model, cache: FeatureCache, command: str) -> list[tuple[str, str]]:
    backbone_spec = model.facts["backbone"]
    versions = {**cache.manifest.get("versions", {}), **model.history.get("versions", {})}
    lines = [
        ("Backbone", f"{backbone_spec['name']} ({backbone_spec['source']}), weights {backbone_spec['weights'][:16]}"),
        ("Output", model.output),
        ("Precision", str(model.facts["precision"])),
        ("Head", f"{model.head_name} {model.history.get('params') or ''}".strip()),
        ("Random state", str(model.history.get("random_state"))),
        ("Cache fingerprint", cache.fingerprint),
        ("Cache", str(cache.path)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [*lines, ("Command", command)] if command else lines


def _collect_curves(model: Model) -> dict[str, list[float]]:
    """Collect the training curves by title: of heads trained in epochs, and of the last class-incremental step."""
    curves = _select_curves(model.history.get("curves") or {}, _HEAD_CURVES)
    expansion = _load_expansion(model)
    if expansion is not None and expansion.outcomes:
        curves |= _select_curves(expansion.outcomes[0].curves, _EXPANSION_CURVES)
    return curves


def _select_curves(curves: Mapping[str, Any], key_by_title: Mapping[str, str]) -> dict[str, list[float]]:
    return {
        title: [float(value) if isinstance(value, (int, float)) else math.nan for value in curves[key]]
        for title, key in key_by_title.items()
        if curves.get(key)
    }
