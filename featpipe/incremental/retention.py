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
from featpipe.incremental.problem import IncrementalStep
from featpipe.model import (
    ReplayMemory,
    RetentionPolicy,
    collect_replay_memory,
    compute_penultimate_features,
    select_exemplars,
)
from featpipe.training import EmbeddingDataset


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
    memory, network = step.replay_memory, _update_network_importances(step) if policy.network else None
    if retrained:
        rows = step.old + step.new
        new_memory = collect_replay_memory(policy, pipeline, rows.features, rows.y, step.k, step.settings.selection)
        return replace(new_memory, network=network)
    counts = np.bincount(step.new.y, minlength=step.k)
    counts[: step.k_old] += step.counts[: step.k_old]
    X, codes = _select_rows(step, policy.rows)
    return ReplayMemory(
        counts.astype(np.int64),
        X,
        codes,
        _update_statistics(step, pipeline, memory) if policy.statistics else None,
        _update_importances(step, pipeline, memory) if policy.importances else None,
        network,
    )


def _select_rows(step: IncrementalStep, n: int) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """At most n exemplars per class: from the retained ones, else the given old rows, and from the new rows."""
    memory, new = step.replay_memory, step.new
    if not n:
        return np.zeros((0, new.X.shape[1]), np.float32), np.zeros(0, np.int32)
    has_exemplars = memory is not None and len(memory.rows) > 0
    old_X: NDArray[Any] = memory.rows if memory is not None and has_exemplars else step.old.features
    old_y: NDArray[Any] = memory.codes if memory is not None and has_exemplars else step.old.y
    X, y = np.concatenate([old_X, new.features.astype(old_X.dtype)]), np.concatenate([old_y, new.y]).astype(np.int32)

    def select(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
        rows = np.flatnonzero(mask)
        return rows[select_exemplars(step.settings.selection, step.compute_features(X[rows]), y[rows], n)]

    gets_new_rows = np.isin(y, new.y)
    if has_exemplars:  # ordered by importance already
        selections = [np.flatnonzero(y == code)[:n] for code in np.unique(y[~gets_new_rows])]
    else:
        selections = [select(~gets_new_rows)]
    indices = np.concatenate([*selections, select(gets_new_rows)]).astype(np.intp)
    return X[indices], y[indices]


def _update_statistics(
    step: IncrementalStep, pipeline: Pipeline, memory: ReplayMemory | None
) -> SufficientStatistics | None:
    old, new = step.old, step.new
    if memory is not None and memory.statistics is not None:
        statistics = memory.statistics
    elif step.has_all_old_rows and len(old):
        statistics = compute_statistics(find_statistics_kind(pipeline)[0], old.features, old.y, step.k)
    else:
        return None
    if not accepts_statistics(pipeline, statistics.kind):
        return None
    if not len(new):
        return statistics
    return statistics + compute_statistics(statistics.kind, new.features, new.y, step.k, statistics.shift)


def _update_importances(
    step: IncrementalStep, pipeline: Pipeline, memory: ReplayMemory | None
) -> NDArray[np.float32] | None:
    """Mean of old and new importances, weighted by the numbers of images; old ones are zero for new classes."""
    layer = resolve_last_layer(pipeline[-1])
    if layer is None:
        return None

    def compute_importances(dataset: EmbeddingDataset) -> NDArray[Any]:
        return compute_fisher_diagonal(layer, compute_penultimate_features(pipeline, dataset.features))

    m = len(step.new)
    if memory is not None and memory.importances is not None:
        old_importances, n = memory.importances, int(memory.counts.sum())
    elif step.has_all_old_rows and len(step.old):
        old_importances, n = compute_importances(step.old), len(step.old)
    else:
        return None
    new_importances = compute_importances(step.new) if m else 0.0
    return np.asarray((n * old_importances + m * new_importances) / (n + m), np.float32)


def _update_network_importances(step: IncrementalStep) -> dict[str, NDArray[np.float32]] | None:
    """The old importances, scaled down by the number of new images, which did not go through the network."""
    memory = step.replay_memory
    if memory is None or memory.network is None:
        return None
    n, m = int(memory.counts.sum()), len(step.new)
    return {name: np.asarray(n / max(1, n + m) * array, np.float32) for name, array in memory.network.items()}


def fit_to_budget(memory: ReplayMemory, budget: int, priority: str = "") -> ReplayMemory:
    """Drop parts that exceed a budget in bytes; exemplars are reduced in number. The part ``priority`` comes first."""
    remaining = budget
    for part in sorted(("rows", "statistics", "importances"), key=lambda name: name != priority):
        value = getattr(memory, part)
        if part == "rows" and len(memory.rows):
            bytes_per_rank = len(memory.counts) * (memory.rows[:1].nbytes + memory.codes.itemsize)
            memory = memory.truncate(min(int(np.bincount(memory.codes).max()), remaining // bytes_per_rank))
            remaining -= memory.rows.nbytes + memory.codes.nbytes
        elif part != "rows" and value is not None and value.nbytes <= remaining:
            remaining -= value.nbytes
        elif part == "statistics":
            memory = replace(memory, statistics=None)
        elif part == "importances":
            memory = replace(memory, importances=None)
    network_bytes = sum(array.nbytes for array in (memory.network or {}).values())
    return memory if network_bytes <= remaining else replace(memory, network=None)


def compute_memory_bytes(method: str, step: IncrementalStep) -> int:
    """Bytes of the retained data that a method uses, for training or for the bias correction."""
    parts, memory = {METHODS[method].memory_part}, step.replay_memory
    if memory is not None and (
        method in BIAS_CORRECTED_METHODS or method == "replay"
    ):  # old rows can be sampled from statistics
        parts |= {"rows"} if len(memory.rows) else set()
        parts |= {"statistics"} if memory.statistics is not None else set()
    return sum(_count_part_bytes(part, step) for part in parts)


def _count_part_bytes(part: str, step: IncrementalStep) -> int:
    memory, d = step.replay_memory, step.new.X.shape[1]
    if part == "rows":
        return int(step.k * step.settings.memory * d * 4)
    if part == "statistics":
        return 8 * d * (d + 1) // 2 if memory is None or memory.statistics is None else memory.statistics.nbytes
    if part == "importances":
        return int(4 * step.k * ((d if step.layer is None else step.layer.W.shape[1]) + 1))
    return 0
