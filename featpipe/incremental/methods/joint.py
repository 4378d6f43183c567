"""``joint``: train on old and new images together."""

from __future__ import annotations

from sklearn.pipeline import Pipeline

from featpipe.incremental.problem import EpochCallback, IncrementalStep


def fit_joint(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """As `featpipe.train` does, with the head's settings, on old and new rows together."""
    rows = step.old + step.new
    return step.make_unfitted().fit(rows.X, rows.y)
