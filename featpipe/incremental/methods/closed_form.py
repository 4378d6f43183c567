"""``statistics``: a closed-form head from sufficient statistics of old and new rows."""

from __future__ import annotations

from sklearn.pipeline import Pipeline

from featpipe.heads import compute_statistics, find_statistics_kind, fit_from_statistics, make_closed_form_head
from featpipe.incremental.problem import EpochCallback, IncrementalStep


def fit_closed_form(step: IncrementalStep, on_epoch: EpochCallback | None) -> Pipeline:
    """Equal to training on all rows at once. A head without a closed form is replaced, see `make_closed_form_head`."""
    pipeline, replay_memory = step.make_unfitted(), step.replay_memory
    kind = find_statistics_kind(pipeline)[0]
    if replay_memory is not None and replay_memory.statistics is not None:
        statistics, kind = replay_memory.statistics, replay_memory.statistics.kind
    else:
        statistics = compute_statistics(kind, step.old.X, step.old.y, step.k)
    if len(step.new):
        statistics = statistics + compute_statistics(kind, step.new.X, step.new.y, step.k, statistics.shift)
    return fit_from_statistics(make_closed_form_head(pipeline, kind), statistics)
