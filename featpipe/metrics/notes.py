"""Notes on results of fine-tuning and expansion: data in models and results, text where they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from featpipe.metrics.intervals import Interval
from featpipe.metrics.scores import METRICS

Note = Mapping[str, Any]

_TEMPLATES = {
    "splits": "{training} training, {validation} validation and {test} test images",
    "marked_splits": "{training} training, {validation} validation and {test} test images ({marked} marked by the "
    "labels)",
    "start_head": "the layer starts as the {head} head of the model",
    "start_fitted_head": "the layer starts as a {head} head fitted on the embeddings: {old_head} cannot become a layer",
    "start_untrained": "an untrained network and a new layer: the architecture alone",
    "no_better_epoch": "no epoch was better than the start on the validation images; the comparison is of the start",
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
    "needs_last_layer": "is for heads that end in a softmax layer (logistic, linear, mlp, keras), and this head is a "
    "{head}",
    "needs_new_images": "needs new images, and there are none",
    "needs_new_classes": "trains only new classes, and there are none",
    "needs_old_images": "needs old images of every class, and there are none of {classes}; give the old cache too",
    "needs_retained_data": "needs {part} of the old classes, and the model retains none: train it with --keep {keep}, "
    "or give the cache that it was trained on too",
    "network_improved": "training the network improved accuracy by {change}",
    "network_cost": "training the network cost accuracy ({change}): expand without --unfreeze",
    "network_no_difference": "training the network made no difference beyond chance ({change}); without --unfreeze it "
    "takes seconds",
}


def format_note(note: Note | str) -> str:
    """The text of a note.

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


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Say in one sentence whether fine-tuning helped.

    Parameters
    ----------
    comparison : mapping
        The number ``n`` of held-out images, the ``main`` metric, and for each of the ``metrics`` its ``name``, the
        intervals of ``probe``, ``tuned`` and ``difference``, and ``p``.
    """
    row = next(row for row in comparison["metrics"] if row["name"] == comparison["main"])
    probe, tuned, difference = (
        Interval(*(math.nan if value is None else value for value in row[name]))
        for name in ("probe", "tuned", "difference")
    )
    change = f"{METRICS[row['name']].title.lower()} {probe} → {tuned}"
    images = f"{comparison['n']} held-out images"
    if difference.value == 0:
        return f"fine-tuned is neither better nor worse than the probe on {images}: {change}"
    direction = "better" if METRICS[row["name"]].gain(difference.value) > 0 else "worse"
    is_sure = difference.low > 0 or difference.high < 0
    caveat = "" if is_sure else ", which may be chance"
    return f"fine-tuned is {direction} than the probe on {images}{caveat}: {change}, p = {row['p']:.2g}"
