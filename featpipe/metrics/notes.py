"""How scores were measured, and notes on results: data in models and results, text where they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featpipe.metrics.intervals import Interval

Note = Mapping[str, Any]

_TEMPLATES = {
    # how scores were measured, or settings compared
    "folds": "{folds}-fold cross-validation on the {n} training images",
    "time_spans": "{folds} time spans, each predicted from the earlier ones: {n:,} of {n_rows:,} training images",
    "since": "fitted on images before {since}, scored on the {n:,} images since then",
    "inner_folds": "best of {candidates} on {folds} inner folds of {n:,} rows",
    "not_tuned": "not tuned: a class has a single image",
    "holdout": "{n} images held out",
    "unseen": "{n:,} images that were not trained on",
    "given": "{n:,} given test images",
    "new_holdout": "{n:,} new images, held out and trained on afterwards",
    "given_and_new_holdout": "{given:,} given test images and {n:,} new images, held out and trained on afterwards",
    "none": "no test images",
    # fine-tuning: the images, and what training starts from
    "splits": "{training} training, {validation} validation and {test} test images",
    "marked_splits": "{training} training, {validation} validation and {test} test images ({marked} marked by the "
    "labels)",
    "start_head": "the layer starts as the {head} head of the model",
    "start_fitted_head": "the layer starts as a {head} head fitted on the embeddings: {old_head} cannot become a layer",
    "start_untrained": "an untrained network and a new layer: the architecture alone",
    "no_better_epoch": "no epoch was better than the start on the validation images; the comparison is of the start",
    # expansion
    "prior_dropped": "the prior correction is dropped, because it was for the old classes",
    "not_resampled": "the model was trained on resampled rows; the expansion does not resample",
    "head_changed": "the head is now {head}, since {old_head} has no closed form from statistics",
    "separate_shrinkage": "lda shrinks the covariance of each class by its own rows; for old classes with new images, "
    "old and new rows are shrunk separately, an approximation of training on all rows at once (exact with "
    "shrinkage=NUMBER)",
    "scatter_reduced": "the scatter within classes is reduced by the share of images that dropped classes had",
    "balanced": "old and new classes are balanced: rows that represent old images are weighted accordingly, and an "
    "offset between old and new classes is fitted on held-out rows",
    "left_out": "left out: {counts}",
    "no_prediction_sets": "the model has no prediction sets: they need images of every class that it was not trained "
    "on; give them as --calibration, or all old images with --method joint",
    "network_unchanged": "no epoch was better than the start on the validation images: the network stays as it was, "
    "and the result is that of expansion on features",
    "retained_data_dropped": "dropped, since the embeddings have changed: {parts}",
    # why a method of expansion is unavailable
    "needs_last_layer": "is for heads that end in a softmax layer (logistic, linear, mlp, keras), and this head is a "
    "{head}",
    "needs_new_images": "needs new images, and there are none",
    "needs_new_classes": "trains only new classes, and there are none",
    "needs_old_images": "needs old images of every class, and there are none of {classes}; give the old cache too",
    "needs_retained_data": "needs {part} of the old classes, and the model retains none: train it with --keep {keep}, "
    "or give the cache that it was trained on too",
    # the effect of training the network
    "network_improved": "training the network improved accuracy by {change}",
    "network_cost": "training the network cost accuracy ({change}): expand without --unfreeze",
    "network_no_difference": "training the network made no difference beyond chance ({change}); without --unfreeze it "
    "takes seconds",
}


def format_protocol(protocol: Mapping[str, Any] | str) -> str:
    """Describe how scores were measured, or settings compared.

    Parameters
    ----------
    protocol : mapping or str
        What models and results hold under ``how``: a ``kind`` and its numbers. Older files hold the text itself.

    Examples
    --------
    >>> format_protocol({"kind": "folds", "folds": 5, "n": 90, "groups": 30})
    '5-fold cross-validation on the 90 training images, 30 groups kept together'
    """
    text = format_note(protocol)
    if isinstance(protocol, str):
        return text
    text += f", {protocol['groups']:,} groups kept together" if "groups" in protocol else ""
    return text + (f", and scaled to {protocol['scaled_to']:,}" if "scaled_to" in protocol else "")


def format_note(note: Note | str) -> str:
    """Describe a note on a result.

    Parameters
    ----------
    note : mapping or str
        What models and results hold under ``notes``: a ``kind`` and its values. Older files hold the text itself.

    Examples
    --------
    >>> format_note({"kind": "head_changed", "head": "ridge", "old_head": "logistic"})
    'the head is now ridge, since logistic has no closed form from statistics'
    """
    if isinstance(note, str):
        return note
    values = {name: _format_value(value) for name, value in note.items()}
    return _TEMPLATES[note["kind"]].format_map(values)


def _format_value(value: Any) -> Any:
    if isinstance(value, Mapping) and value.keys() == {"value", "low", "high"}:
        return str(Interval(**value))
    if isinstance(value, Mapping):
        return ", ".join(f"{count:,} {reason}" for reason, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
