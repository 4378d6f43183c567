"""The methods by name: how each fits a head, and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.pipeline import Pipeline

from featpipe.heads import (
    compute_statistics,
    find_statistics_kind,
    fit_from_statistics,
    get_base_head,
    make_closed_form_head,
)
from featpipe.incremental.last_layer_loss import EpochCallback
from featpipe.incremental.methods.bias_correction import fit_frozen_old
from featpipe.incremental.methods.regularized import fit_distill, fit_ewc, fit_naive
from featpipe.incremental.methods.replay import fit_replay
from featpipe.incremental.problem import IncrementalStep
from featpipe.metrics import Note

Requirement = Callable[
    [IncrementalStep], Note | None
]  # the reason why a method is unavailable, None if it is available


@dataclass(frozen=True)
class ExpansionMethod:
    """A method for adding classes to a head.

    Attributes
    ----------
    summary : str
    fit : callable
        From a step, and a function that is called after each epoch, to a fitted pipeline for all classes.
    missing_requirement : callable
        From a step to the reason why the method is unavailable, None if it is available.
    memory_part : str
        The part of a model's retained data that the method uses.
    """

    summary: str
    fit: Callable[[IncrementalStep, EpochCallback | None], Pipeline]
    missing_requirement: Requirement
    memory_part: str = ""


def fit_joint(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """As `featpipe.train` does, with the head's settings, on old and new rows together."""
    rows = step.old + step.new
    return step.make_unfitted().fit(rows.X, rows.y)


def fit_closed_form(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Equal to training on all rows at once. A head without a closed form is replaced, see `make_closed_form_head`."""
    pipeline, memory = step.make_unfitted(), step.replay_memory
    if memory is not None and memory.statistics is not None:
        statistics = memory.statistics
    else:
        kind = find_statistics_kind(pipeline)[0]
        statistics = compute_statistics(kind, step.old.features, step.old.y, step.k)
    if len(step.new):
        shift = statistics.shift
        statistics = statistics + compute_statistics(statistics.kind, step.new.features, step.new.y, step.k, shift)
    return fit_from_statistics(make_closed_form_head(pipeline, statistics.kind), statistics)


def explain_missing_last_layer(step: IncrementalStep) -> Note | None:
    """For methods that train a last layer."""
    if step.layer is None:
        kind = type(get_base_head(step.pipeline[-1])).__name__
        return {"kind": "needs_last_layer", "head": kind}
    return explain_missing_new_rows(step)


def explain_missing_new_rows(step: IncrementalStep) -> Note | None:
    """For methods that train on new images."""
    return None if len(step.new) else {"kind": "needs_new_images"}


def explain_missing_new_class(step: IncrementalStep) -> Note | None:
    """For methods that train new classes only."""
    return None if step.class_mapping.new_classes else {"kind": "needs_new_classes"}


def explain_missing_old_images(step: IncrementalStep) -> Note | None:
    """For methods that train on old images: some of each class."""
    missing = np.setdiff1d(np.arange(step.k_old), step.old.y)
    if not len(missing):
        return None
    return {"kind": "needs_old_images", "classes": [repr(step.class_mapping.classes[code]) for code in missing[:3]]}


def make_memory_requirement(part: str, keep_option: str) -> Requirement:
    """For methods that use a part of the model's retained data, or old images instead."""

    def find_missing(step: IncrementalStep) -> Note | None:
        value = getattr(step.replay_memory, part, None)
        if value is not None and (part != "rows" or len(value)):
            return None
        if explain_missing_old_images(step) is None and (step.has_all_old_rows or part == "rows"):
            return None
        return {"kind": "needs_retained_data", "part": part, "keep": keep_option}

    return find_missing


def combine_requirements(*checks: Requirement) -> Requirement:
    """Combine requirements: the first reason counts."""
    return lambda step: next((reason for check in checks if (reason := check(step))), None)


METHODS: dict[str, ExpansionMethod] = {
    "joint": ExpansionMethod(
        "trains on old and new images together; needs all old images", fit_joint, explain_missing_old_images
    ),
    "statistics": ExpansionMethod(
        "closed form from sums over the old rows; exact for lda, ridge and centroid, other heads become ridge",
        fit_closed_form,
        make_memory_requirement("statistics", "statistics"),
        memory_part="statistics",
    ),
    "replay": ExpansionMethod(
        "trains on new images and some embeddings of each old class; any head",
        fit_replay,
        combine_requirements(explain_missing_new_rows, make_memory_requirement("rows", "rows=20")),
        memory_part="rows",
    ),
    "frozen-old": ExpansionMethod(
        "keeps the scores of old classes bit for bit; any classifier", fit_frozen_old, explain_missing_new_class
    ),
    "distill": ExpansionMethod(
        "trains on new images, with the old model's predictions as soft targets",
        fit_distill,
        explain_missing_last_layer,
    ),
    "ewc": ExpansionMethod(
        "trains on new images, and penalizes changes of important old weights",
        fit_ewc,
        combine_requirements(explain_missing_last_layer, make_memory_requirement("importances", "importances")),
        memory_part="importances",
    ),
    "naive": ExpansionMethod(
        "trains on the new images alone: the lower baseline", fit_naive, explain_missing_last_layer
    ),
}
# These train without old rows; an offset between old and new classes is fitted afterwards.
BIAS_CORRECTED_METHODS = ("frozen-old", "distill", "ewc")
