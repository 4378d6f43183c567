"""The data that the new model retains: the old model's, updated with the new rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featpipe.heads import (
    SufficientStatistics,
    accepts_statistics,
    compute_fisher_diagonal,
    compute_statistics,
    find_statistics_kind,
    resolve_last_layer,
)
from featpipe.incremental.methods import BIAS_CORRECTED_METHODS, METHODS
from featpipe.incremental.problem import ExpansionConfig, IncrementalStep
from featpipe.model import (
    ReplayMemory,
    RetentionPolicy,
    collect_replay_memory,
    compute_penultimate_features,
    select_exemplars,
)


def resolve_policy(
    old_memory: ReplayMemory | None, policy: RetentionPolicy | None, settings: ExpansionConfig | None, method: str
) -> RetentionPolicy:
    """``policy`` if given, else that of the old model with the number of exemplars of the settings."""
    if policy is not None:
        return policy
    if old_memory is None:
        return RetentionPolicy()
    n_retained = int(np.bincount(old_memory.codes).max(initial=0))
    n_rows = settings.memory if settings is not None and (n_retained or method == "replay") else n_retained
    return RetentionPolicy(
        old_memory.statistics is not None, old_memory.importances is not None, n_rows, old_memory.network is not None
    )


def update_replay_memory(
    step: IncrementalStep, pipeline: Pipeline, policy: RetentionPolicy, *, retrained: bool
) -> ReplayMemory | None:
    """The data that the new model retains.

    Parameters
    ----------
    step : IncrementalStep
    pipeline : Pipeline
        The new head.
    policy : RetentionPolicy
    retrained : bool
        Whether the new head was fitted on all old and new rows.
    """
    if not policy:
        return None
    rows = step.old + step.new
    if retrained:
        new_memory = collect_replay_memory(policy, pipeline, rows.X, rows.y, step.k, step.settings.selection)
        return replace(
            new_memory, network=_update_network_importances(step, step.replay_memory) if policy.network else None
        )
    old_memory = step.replay_memory
    counts = np.bincount(step.new.y, minlength=step.k)
    counts[: step.k_old] += step.counts[: step.k_old]
    X, codes = _select_rows(step, policy.rows)
    return ReplayMemory(
        counts.astype(np.int64),
        X,
        codes,
        _update_statistics(step, pipeline, old_memory) if policy.statistics else None,
        _update_importances(step, pipeline, old_memory) if policy.importances else None,
        _update_network_importances(step, old_memory) if policy.network else None,
    )


def _select_rows(step: IncrementalStep, n: int) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """At most n exemplars of each class: from those retained, else from the given old rows; and from the new rows."""
    if not n:
        return np.zeros((0, step.new.X.shape[1]), np.float32), np.zeros(0, np.int32)
    replay_memory = step.replay_memory
    old_X: NDArray[Any] = step.old.X
    old_y: NDArray[Any] = step.old.y
    if replay_memory is not None and len(replay_memory.rows):
        old_X, old_y = replay_memory.rows, replay_memory.codes
    X = np.concatenate([old_X, step.new.X.astype(old_X.dtype)])
    y = np.concatenate([old_y, step.new.y]).astype(np.int32)
    is_new_class = np.isin(y, np.unique(step.new.y))
    selections = [
        np.flatnonzero(y == code)[:n] for code in np.unique(y[~is_new_class])
    ]  # retained exemplars are ordered by importance
    if replay_memory is None or not len(replay_memory.rows):
        selections = (
            [select_exemplars(step.settings.selection, step.compute_features(X[~is_new_class]), y[~is_new_class], n)]
            if (~is_new_class).any()
            else []
        )
        selections = [np.flatnonzero(~is_new_class)[rows] for rows in selections]
    if is_new_class.any():
        selections.append(
            np.flatnonzero(is_new_class)[
                select_exemplars(step.settings.selection, step.compute_features(X[is_new_class]), y[is_new_class], n)
            ]
        )
    indices = np.concatenate(selections).astype(np.intp)
    return X[indices], y[indices]


def _update_statistics(
    step: IncrementalStep, pipeline: Pipeline, old_memory: ReplayMemory | None
) -> SufficientStatistics | None:
    if old_memory is not None and old_memory.statistics is not None:
        statistics = old_memory.statistics
    elif step.has_all_old_rows and len(step.old):
        statistics = compute_statistics(find_statistics_kind(pipeline)[0], step.old.X, step.old.y, step.k)
    else:
        return None
    if not accepts_statistics(pipeline, statistics.kind):
        return None
    return (
        statistics + compute_statistics(statistics.kind, step.new.X, step.new.y, step.k, statistics.shift)
        if len(step.new)
        else statistics
    )


def _update_importances(
    step: IncrementalStep, pipeline: Pipeline, old_memory: ReplayMemory | None
) -> NDArray[np.float32] | None:
    """Mean of old and new importances, weighted by the numbers of images; old ones are zero for new classes."""
    layer = resolve_last_layer(pipeline[-1])
    if layer is None:
        return None
    new_importances = (
        compute_fisher_diagonal(layer, compute_penultimate_features(pipeline, step.new.X)) if len(step.new) else 0.0
    )
    old_importances: NDArray[Any]
    if old_memory is not None and old_memory.importances is not None:
        old_importances, n = old_memory.importances, int(old_memory.counts.sum())
    elif step.has_all_old_rows and len(step.old):
        old_importances, n = (
            compute_fisher_diagonal(layer, compute_penultimate_features(pipeline, step.old.X)),
            len(step.old),
        )
    else:
        return None
    m = len(step.new)
    return np.asarray((n * old_importances + m * new_importances) / (n + m), np.float32)


def _update_network_importances(
    step: IncrementalStep, old_memory: ReplayMemory | None
) -> dict[str, NDArray[np.float32]] | None:
    """The old importances, scaled down by the number of new images, which did not go through the network."""
    if old_memory is None or old_memory.network is None:
        return None
    n, m = int(old_memory.counts.sum()), len(step.new)
    return {name: np.asarray(n / max(1, n + m) * array, np.float32) for name, array in old_memory.network.items()}


def fit_to_budget(replay_memory: ReplayMemory, budget: int, priority: str = "") -> ReplayMemory:
    """Drop parts that exceed a budget in bytes; exemplars are reduced in number. The part ``priority`` comes first."""
    remaining = budget
    for part in sorted(("rows", "statistics", "importances"), key=lambda name: name != priority):
        value = getattr(replay_memory, part)
        if value is None or not len(value if part == "rows" else [0]):
            continue
        if part == "rows":
            rows_per_class = int(np.bincount(replay_memory.codes).max())
            replay_memory = replay_memory.truncate(
                min(
                    rows_per_class,
                    remaining // (len(replay_memory.counts) * (value[:1].nbytes + replay_memory.codes.itemsize)),
                )
            )
            remaining -= replay_memory.rows.nbytes + replay_memory.codes.nbytes
        elif value.nbytes <= remaining:
            remaining -= value.nbytes
        else:
            replay_memory = (
                replace(replay_memory, statistics=None)
                if part == "statistics"
                else replace(replay_memory, importances=None)
            )
    too_large = (
        replay_memory.network is not None and sum(array.nbytes for array in replay_memory.network.values()) > remaining
    )
    return replace(replay_memory, network=None) if too_large else replay_memory


def compute_memory_bytes(method: str, step: IncrementalStep) -> int:
    """Bytes of the retained data that a method uses, for training or for the bias correction."""
    parts, replay_memory = {METHODS[method].memory_part}, step.replay_memory
    if replay_memory is not None and (
        method in BIAS_CORRECTED_METHODS or method == "replay"
    ):  # which sample old rows from statistics
        parts |= {"rows"} if len(replay_memory.rows) else set()
        parts |= {"statistics"} if replay_memory.statistics is not None else set()
    return sum(_part_bytes(part, step) for part in parts)


def _part_bytes(part: str, step: IncrementalStep) -> int:
    replay_memory = step.replay_memory
    d = step.new.X.shape[1]
    if part == "rows":
        return step.k * step.settings.memory * d * 4
    if part == "statistics":
        statistics = replay_memory.statistics if replay_memory is not None else None
        return statistics.nbytes if statistics is not None else 8 * d * (d + 1) // 2
    if part == "importances":
        return 4 * step.k * (d + 1) if step.layer is None else 4 * step.k * (step.layer.W.shape[1] + 1)
    return 0
