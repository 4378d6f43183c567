"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sklearn.pipeline import Pipeline

from featpipe.incremental.methods.closed_form import fit_closed_form
from featpipe.incremental.methods.distill import fit_distill
from featpipe.incremental.methods.ewc import fit_ewc
from featpipe.incremental.methods.frozen_old import fit_frozen_old
from featpipe.incremental.methods.joint import fit_joint
from featpipe.incremental.methods.naive import fit_naive
from featpipe.incremental.methods.replay import fit_replay
from featpipe.incremental.methods.requirements import (
    Requirement,
    first_missing,
    missing_last_layer,
    missing_memory,
    missing_new_class,
    missing_new_rows,
    missing_old_images,
)
from featpipe.incremental.problem import EpochCallback, IncrementalStep


@dataclass(frozen=True)
class ExpansionMethod:
    """A way for a head to learn more classes.

    Attributes
    ----------
    summary : str
    fit : callable
        From a step, and a function that is called after each epoch, to a fitted pipeline for the classes after.
    missing_requirement : callable
        From a step to the reason why the method is unavailable, None if it is available.
    memory_part : str
        The part of a model's retained data that the method uses.
    """

    summary: str
    fit: Callable[[IncrementalStep, EpochCallback | None], Pipeline]
    missing_requirement: Requirement
    memory_part: str = ""


METHODS: dict[str, ExpansionMethod] = {
    "joint": ExpansionMethod("old and new images together, which must be at hand", fit_joint, missing_old_images),
    "statistics": ExpansionMethod(
        "closed form from sums over the old rows; lda, ridge and centroid exactly, other heads become ridge",
        fit_closed_form,
        missing_memory("statistics", "statistics"),
        memory_part="statistics",
    ),
    "replay": ExpansionMethod(
        "with some embeddings of each old class; any head",
        fit_replay,
        first_missing(missing_new_rows, missing_memory("rows", "rows=20")),
        memory_part="rows",
    ),
    "frozen-old": ExpansionMethod(
        "the scores of old classes stay bit for bit; any classifier", fit_frozen_old, missing_new_class
    ),
    "distill": ExpansionMethod(
        "the old model's answers on the new images as soft targets", fit_distill, missing_last_layer
    ),
    "ewc": ExpansionMethod(
        "old weights held by their importance",
        fit_ewc,
        first_missing(missing_last_layer, missing_memory("importances", "importances")),
        memory_part="importances",
    ),
    "naive": ExpansionMethod("the new images alone: what forgetting is", fit_naive, missing_last_layer),
}
# These train without old rows; an offset between old and new classes is found afterwards.
BIAS_CORRECTED_METHODS = ("frozen-old", "distill", "ewc")
