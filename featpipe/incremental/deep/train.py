"""An expansion that goes on into the network: it starts where the same method on features ends.

The loop is that of fine-tuning; what holds it to the old classes is a :class:`featpipe.incremental.deep.regularizers.Past`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import nn

from featpipe.cache import FeatureCache
from featpipe.errors import ConfigError
from featpipe.finetuning import (
    HeadLayers,
    TrainingState,
    compute_network_importances,
    finetune_network,
    make_finetuned_backbone,
    make_finetuned_model,
)
from featpipe.heads import forward
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.deep.ewc import ParameterImportances, get_last_layer_name
from featpipe.incremental.deep.methods import find_missing_requirement, select_default_method
from featpipe.incremental.deep.setup import DeepTrainingConfig, TrainingSetup
from featpipe.incremental.methods import METHODS, NEW_CLASS_SHARE
from featpipe.incremental.metrics import MethodEvaluator, MethodOutcome
from featpipe.incremental.result import Expansion, build_expanded_model, make_expansion, make_history
from featpipe.incremental.retention import fit_to_budget, resolve_policy
from featpipe.incremental.select_method import BASELINE_METHODS, SelectedMethod, select_and_fit
from featpipe.metrics import compute_logits
from featpipe.model import Model, ReplayMemory, RetentionPolicy, collect_replay_memory

__all__ = ["describe_lost_parts", "expand_network", "make_replay_memory"]

logger = logging.getLogger(__name__)

DEEP_BIAS_CORRECTED_METHODS = ("distill", "ewc")  # after which old and new classes are set against each other
NETWORK_UNCHANGED_NOTE = (
    "no epoch was better than the start on the images that say when to stop: the network stays as it was, and what "
    "comes out is what features give"
)


def expand_network(
    context: ExpansionContext,
    method: str | None,
    deep_config: DeepTrainingConfig,
    caches: Sequence[str],
    request: str,
) -> Expansion:
    """Learn on features, then go on into the network from there, and judge both on images that neither has seen.

    Parameters
    ----------
    case : Case
    method : str or None
        If none is named, the one that has most of the old classes at hand.
    way : Way
    caches : sequence of str
        Names of what is learnt from.
    request : str

    Raises
    ------
    ConfigError
        If the method cannot, or lacks what it needs.
    KeyboardInterrupt
        If the work was interrupted; the same call goes on from its checkpoint.
    """
    original_context, context = context, replace(context, data=context.data.with_holdout())
    full_step, started = context.make_step(context.data), perf_counter()
    if method is None:
        method = select_default_method(full_step)
        logger.info(f"method: {method}, {METHODS[method].summary}")
    if (missing_requirement := find_missing_requirement(method, full_step)) is not None:
        raise ConfigError(f"{method} {missing_requirement}")
    if deep_config.out is not None:
        Model.check_target(deep_config.out)
    setup = TrainingSetup.create(context, method, deep_config, full_step)
    network, layers, state = finetune_network(
        setup.finetune_context, setup.backbone, setup.initial_head, deep_config.resume
    )
    if state.best_epoch.number == 0 and METHODS[method].missing_requirement(full_step) is None:
        logger.info(NETWORK_UNCHANGED_NOTE)
        return build_expanded_model(
            original_context, select_and_fit(original_context, method), caches, request, notes=(NETWORK_UNCHANGED_NOTE,)
        )
    return _make_result(setup, network, layers, state, caches, request, round(perf_counter() - started, 3))


def _make_result(
    setup: TrainingSetup,
    network: nn.Module,
    layers: HeadLayers,
    state: TrainingState,
    caches: Sequence[str],
    request: str,
    seconds: float,
) -> Expansion:
    """The model, and how both ways compare on images that neither has seen."""
    context, finetune_context, evaluator = setup.context, setup.finetune_context, None
    weights_path = None if finetune_context.out is None else os.path.abspath(finetune_context.out)
    backbone = make_finetuned_backbone(context.model.backbone, network, weights_path)
    new_cache = finetune_context.extract_embeddings(backbone)
    unchanged_notes = [NETWORK_UNCHANGED_NOTE] if state.best_epoch.number == 0 else []
    layers = layers if unchanged_notes else _correct_bias(setup, layers, new_cache)
    uncalibrated_model = replace(finetune_context.model, calibration=None)  # its temperature is in the layers
    model = make_finetuned_model(
        uncalibrated_model, finetune_context.model, backbone, new_cache, finetune_context.splits, layers, state, {}
    )
    model.kept = make_replay_memory(setup, model, network, layers, new_cache)
    outcomes: tuple[MethodOutcome, ...] = ()
    notes = [
        setup.initial_head.description,
        finetune_context.splits.description,
        *unchanged_notes,
        *describe_lost_parts(context.model.kept, model.kept),
    ]
    if len(context.data.test):
        evaluator = MethodEvaluator.from_step(context.data.test, setup.full_step, *context.get_past_steps())
        outcomes, verdict = _compare_outcomes(setup, evaluator, model, new_cache, state, seconds)
        notes += [verdict] if verdict else []
    for text in notes[2:]:
        logger.info(text)
    selected = SelectedMethod(setup.method, model.head, setup.full_step, outcomes, evaluator)
    training_details = {"unfreeze": str(finetune_context.tuning.unfreeze), "best_epoch": state.best_epoch.number}
    model.history = {
        **model.history,
        **_select_history(make_history(context, selected, caches, request, **training_details)),
    }
    description = (
        f"{len(context.data.test):,} images that were not trained on" if evaluator is not None else "not judged"
    )
    return make_expansion(context, selected, model, description, notes)


def _select_history(history: dict[str, Any]) -> dict[str, Any]:
    return {name: history[name] for name in ("trained_on", "steps", "judged", "expansions")}


def _correct_bias(setup: TrainingSetup, layers: HeadLayers, new_cache: FeatureCache) -> HeadLayers:
    """With scores of new classes as high above old ones as before the network was trained.

    Images of new classes alone draw the two apart without end. How many of those that say when to stop are taken for
    new ones is what the start, which was set by what is remembered of old images, had found to be right.
    """
    k_old, pool = setup.full_step.k_old, setup.replay_dataset.pool
    is_validation = ~setup.replay_dataset.is_train & (pool.y >= k_old)
    if setup.method not in DEEP_BIAS_CORRECTED_METHODS or not is_validation.any():
        return layers
    old_margin = _compute_margin(setup.initial_head.layers, pool.X[is_validation], k_old)
    new_margin = _compute_margin(layers, setup.load_embeddings(new_cache, setup.pool_rows[is_validation]), k_old)
    share = max(NEW_CLASS_SHARE, float((old_margin > 0).mean()))
    offsets = np.zeros(len(layers.biases[-1]))
    offsets[k_old:] = -float(np.quantile(new_margin, 1 - share))
    return layers.fold_output_scaling(1.0, offsets)


def _compute_margin(layers: HeadLayers, X: NDArray[np.float32], k_old: int) -> NDArray[np.float64]:
    """How much more is said for new classes than for old ones, of shape (m,)."""
    scores = forward(X.astype(np.float64), [w.T for w in layers.weights], layers.biases, layers.activation)
    return np.asarray(logsumexp(scores[:, k_old:], axis=1) - logsumexp(scores[:, :k_old], axis=1))


def _compare_outcomes(
    setup: TrainingSetup,
    evaluator: MethodEvaluator,
    model: Model,
    new_cache: FeatureCache,
    state: TrainingState,
    seconds: float,
) -> tuple[tuple[MethodOutcome, ...], str]:
    """The rows of the table, this way first, and what is to be said of it."""
    method, full_step = setup.method, setup.full_step
    X = setup.load_embeddings(new_cache, setup.test_rows)
    is_correct = np.asarray(compute_logits(model.head, X).argmax(axis=1) == evaluator.test.y)
    bytes_by_part = {} if method != "ewc" or model.kept is None else model.kept.to_summary()["bytes"]
    memory_bytes = sum(bytes_by_part.get(part, 0) for part in ("importances", "network"))
    outcomes = [
        evaluator.make_outcome(method, is_correct, bytes=memory_bytes, seconds=seconds, curves=_make_curves(state))
    ]
    correct_by_method: dict[str, NDArray[np.bool_]] = {}
    for name in dict.fromkeys((method, *BASELINE_METHODS)):
        if METHODS[name].missing_requirement(full_step) is None:
            started = perf_counter()
            correct_by_method[name] = evaluator.predict_correct(METHODS[name].fit(full_step, None))
            outcomes.append(
                evaluator.make_outcome(
                    f"{name} on features", correct_by_method[name], seconds=round(perf_counter() - started, 3)
                )
            )
    if method not in correct_by_method:
        return tuple(outcomes), ""
    return tuple(outcomes), _describe_change(evaluator, is_correct, correct_by_method[method])


def _describe_change(
    evaluator: MethodEvaluator, is_correct: NDArray[np.bool_], is_correct_on_features: NDArray[np.bool_]
) -> str:
    change = evaluator.paired_difference(is_correct, is_correct_on_features)
    if change.low > 0:
        return f"training the network brought {change}"
    if change.high < 0:
        return f"training the network cost accuracy ({change}): expand without --unfreeze"
    return f"training the network made no difference beyond chance ({change}); without --unfreeze it is done in seconds"


def _make_curves(state: TrainingState) -> dict[str, list[Any]]:
    """By the names of :class:`featpipe.incremental.metrics.Curves`."""
    epochs = [epoch.to_dict() for epoch in state.curve]
    names = {"train_loss": "loss", "old_loss": "old_loss", "new_loss": "new_loss"}
    names |= {"old_accuracy": "old_score", "new_accuracy": "new_score"}
    return {"epochs": [epoch["number"] for epoch in epochs]} | {
        name: [epoch.get(field) for epoch in epochs] for name, field in names.items()
    }


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
        logger.info("no importances are kept: of those of the old classes nothing is known")
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
