"""What a model keeps after its network was trained: embeddings are others then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from featpipe.cache import FeatureCache
from featpipe.expansion.begun import TrainingSetup
from featpipe.expansion.case import ExpansionContext
from featpipe.expansion.memory import fit_to_budget, resolve_policy
from featpipe.expansion.weighing import ParameterImportances, get_last_layer_name
from featpipe.finetuning.layers import HeadLayers
from featpipe.finetuning.work import compute_network_importances
from featpipe.kept import ReplayMemory, RetentionPolicy, collect_replay_memory
from featpipe.model import Model
from featpipe.progress import Progress

__all__ = ["describe_lost_parts", "make_replay_memory"]


def make_replay_memory(
    setup: TrainingSetup, model: Model, network: nn.Module, layers: HeadLayers, new_cache: FeatureCache
) -> ReplayMemory | None:
    """What can be known of embeddings that are others now: of the images that are at hand."""
    context, full_step, replay_dataset, method = setup.context, setup.full_step, setup.replay_dataset, setup.method
    policy = _resolve_policy(context, method)
    if not policy:
        return None
    X, y = setup.load_embeddings(new_cache, setup.pool_rows), replay_dataset.pool.y
    counts = np.bincount(full_step.new.y, minlength=full_step.k) + full_step.counts
    if method == "joint":
        replay_memory = collect_replay_memory(
            replace(policy, network=False), model.head, X, y, full_step.k, context.settings.selection
        )
    elif method == "replay":
        rows_policy = replace(policy, statistics=False, importances=False, network=False)
        replay_memory = replace(
            collect_replay_memory(rows_policy, model.head, X, y, full_step.k, context.settings.selection), counts=counts
        )
    else:
        replay_memory = ReplayMemory(counts, X[:0], np.zeros(0, np.int32))
    importances = _compute_importances(setup, network, layers) if policy.network else None
    if importances is not None:
        replay_memory = _add_importances(replay_memory, importances, layers)
    return replay_memory if context.budget is None else fit_to_budget(replay_memory, context.budget)


def _add_importances(
    replay_memory: ReplayMemory, importances: ParameterImportances, layers: HeadLayers
) -> ReplayMemory:
    last_layer_name = get_last_layer_name(layers)
    W = np.column_stack([importances.pop(f"{last_layer_name}.weight"), importances.pop(f"{last_layer_name}.bias")])
    return replace(replay_memory, importances=np.asarray(W, np.float32), network=importances)


def _resolve_policy(context: ExpansionContext, method: str) -> RetentionPolicy:
    """As asked for, or as before; for ewc its importances too, unless the model keeps nothing."""
    policy = resolve_policy(
        context.model.kept, context.policy, context.settings if context.has_explicit_memory else None, method
    )
    if context.policy is None and context.model.kept is not None and method == "ewc":
        policy = replace(policy, network=True)
    return policy


def _compute_importances(setup: TrainingSetup, network: nn.Module, layers: HeadLayers) -> ParameterImportances | None:
    """Of all images so far: of the new ones as they are now, of old ones too if they are at hand, or as was known."""
    replay_dataset, full_step, context = setup.replay_dataset, setup.full_step, setup.finetune_context
    initial_head = replace(setup.initial_head, layers=layers)

    def compute_importances(mask: NDArray[np.bool_]) -> ParameterImportances:
        return compute_network_importances(
            context, setup.backbone, network, initial_head, np.unique(setup.pool_rows[mask])
        )

    if setup.importances is None and not replay_dataset.is_old.any():
        context.progress(Progress("note", "no importances are kept: of those of the old classes nothing is known"))
        return None
    new_importances, old_importances = (
        compute_importances(~replay_dataset.is_old),
        setup.importances or compute_importances(replay_dataset.is_old),
    )
    n, m = int(full_step.counts.sum()), len(full_step.new)
    return {
        name: (n * old_importances[name] + m * new_importances.get(name, np.zeros((), np.float32))).astype(np.float32)
        / np.float32(n + m)
        for name in old_importances
    }


def describe_lost_parts(old_memory: ReplayMemory | None, new_memory: ReplayMemory | None) -> list[str]:
    """What the model before kept of embeddings that are no longer those of the network."""
    old_parts = {} if old_memory is None else old_memory.to_summary()["bytes"]
    new_parts = {} if new_memory is None else new_memory.to_summary()["bytes"]
    lost_parts = [part for part in old_parts if part not in new_parts]
    return [f"gone is what was kept of the embeddings before: {', '.join(lost_parts)}"] if lost_parts else []
