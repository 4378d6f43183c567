"""Expansion through the network (experimental): a method trains on features, then training continues in the network.

The training is `featpipe.finetuning.train_network`, with the loss terms of `featpipe.incremental.deep.regularizers`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from featpipe.errors import ConfigError
from featpipe.finetuning import HeadLayers, TrainedNetwork, train_network
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.deep.ewc import ParameterImportances, compute_network_importances, get_last_layer_name
from featpipe.incremental.deep.methods import find_missing_requirement, select_default_method
from featpipe.incremental.deep.setup import NEW_CLASSES, OLD_CLASSES, DeepTrainingConfig, TrainingSetup, find_rows
from featpipe.incremental.methods import METHODS, NEW_CLASS_SHARE, compute_margins
from featpipe.incremental.metrics import MethodEvaluator, MethodOutcome
from featpipe.incremental.result import Expansion, build_expanded_model, make_expansion, make_history
from featpipe.incremental.retention import fit_to_budget
from featpipe.incremental.select_method import BASELINE_METHODS, SelectedMethod, select_and_fit
from featpipe.metrics import Note, compute_logits, format_note
from featpipe.model import Model, ReplayMemory, RetentionPolicy, collect_replay_memory

logger = logging.getLogger(__name__)

DEEP_BIAS_CORRECTED_METHODS = ("distill", "ewc")  # with an offset between old and new classes after the training
NETWORK_UNCHANGED: Note = {"kind": "network_unchanged"}


def expand_network(
    context: ExpansionContext,
    method: str | None,
    deep_config: DeepTrainingConfig,
    caches: Sequence[str],
    request: str,
) -> Expansion:
    """Fit a method on features, continue training in the network, and compare both on the test images.

    Parameters
    ----------
    context : ExpansionContext
    method : str or None
        If None, the method that uses most of the available data of old classes.
    deep_config : DeepTrainingConfig
    caches : sequence of str
        Names of the caches with the training images, for the model's history.
    request : str
        Digest of the request.

    Raises
    ------
    ConfigError
        If the method does not train a network, or lacks what it needs.
    KeyboardInterrupt
        If the work was interrupted; the same call resumes it from the checkpoint.
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
    trained = train_network(setup.finetune_context, setup.backbone, setup.initial_head, deep_config.resume)
    if trained.best_epoch.number == 0 and METHODS[method].missing_requirement(full_step) is None:
        logger.info(format_note(NETWORK_UNCHANGED))
        return build_expanded_model(
            original_context, select_and_fit(original_context, method), caches, request, remarks=(NETWORK_UNCHANGED,)
        )
    return _make_result(setup, trained, caches, request, round(perf_counter() - started, 3))


def _make_result(
    setup: TrainingSetup, trained: TrainedNetwork, caches: Sequence[str], request: str, seconds: float
) -> Expansion:
    """The model, and how training the network compares with features alone on images that neither has seen."""
    context, finetune_context, evaluator = setup.context, setup.finetune_context, None
    is_unchanged = trained.best_epoch.number == 0
    layers = trained.layers if is_unchanged else _correct_bias(setup, trained)
    model = trained.to_model(layers=layers, calibrate=False)  # the temperature is in the layers
    model.kept = make_replay_memory(setup, trained, model, layers)
    outcomes: tuple[MethodOutcome, ...] = ()
    remarks: list[Note] = [
        setup.initial_head.note,
        finetune_context.splits.note,
        *([NETWORK_UNCHANGED] if is_unchanged else []),
        *note_lost_parts(context.model.kept, model.kept),
    ]
    if len(context.data.test):
        evaluator = MethodEvaluator.from_step(context.data.test, setup.full_step, *context.get_past_steps())
        outcomes, effect = _compare_outcomes(setup, evaluator, model, trained, seconds)
        remarks += [] if effect is None else [effect]
    for remark in remarks[2:]:
        logger.info(format_note(remark))
    selected = SelectedMethod(setup.method, model.head, setup.full_step, outcomes, evaluator)
    training_details = {"unfreeze": str(finetune_context.tuning.unfreeze), "best_epoch": trained.best_epoch.number}
    history = make_history(context, selected, caches, request, **training_details)
    model.history |= {name: history[name] for name in ("trained_on", "steps", "judged", "expansions")}
    n = len(context.data.test)
    return make_expansion(context, selected, model, {"kind": "unseen", "n": n} if n else {"kind": "none"}, remarks)


def _correct_bias(setup: TrainingSetup, trained: TrainedNetwork) -> HeadLayers:
    """Shift new classes so that as many validation images are predicted as new ones as before the training.

    Trained on new classes alone, the margin to old ones grows without limit. Before the training the offset was fitted
    with what the model retains of old images.
    """
    k_old, pool, layers = setup.full_step.k_old, setup.replay_dataset.pool, trained.layers
    is_validation = ~setup.replay_dataset.is_train & (pool.y >= k_old)
    if setup.method not in DEEP_BIAS_CORRECTED_METHODS or not is_validation.any():
        return layers
    X_before = pool.features[is_validation]
    X_after = setup.load_embeddings(trained.cache, setup.pool_rows[is_validation])
    margins_before = compute_margins(setup.initial_head.layers.compute_scores(X_before), k_old)
    margins_after = compute_margins(layers.compute_scores(X_after), k_old)
    share = max(NEW_CLASS_SHARE, float((margins_before > 0).mean()))
    offsets = np.zeros(len(layers.biases[-1]))
    offsets[k_old:] = -float(np.quantile(margins_after, 1 - share))
    return layers.fold_output_scaling(1.0, offsets)


def _compare_outcomes(
    setup: TrainingSetup,
    evaluator: MethodEvaluator,
    model: Model,
    trained: TrainedNetwork,
    seconds: float,
) -> tuple[tuple[MethodOutcome, ...], Note | None]:
    """The rows of the table, the trained network first, and the effect of training it."""
    method, full_step = setup.method, setup.full_step
    X = setup.load_embeddings(trained.cache, find_rows(setup.finetune_context.base_cache, evaluator.test))
    is_correct = np.asarray(compute_logits(model.head, X).argmax(axis=1) == evaluator.test.y)
    bytes_by_part = {} if method != "ewc" or model.kept is None else model.kept.to_summary()["bytes"]
    memory_bytes = sum(bytes_by_part.get(part, 0) for part in ("importances", "network"))
    outcomes = [
        evaluator.make_outcome(method, is_correct, bytes=memory_bytes, seconds=seconds, curves=_make_curves(trained))
    ]
    correct_by_method: dict[str, NDArray[np.bool_]] = {}
    for name in dict.fromkeys((method, *BASELINE_METHODS)):
        if METHODS[name].missing_requirement(full_step) is None:
            started = perf_counter()
            correct_by_method[name] = evaluator.predict_correct(METHODS[name].fit(full_step, None))
            duration = round(perf_counter() - started, 3)
            outcomes.append(evaluator.make_outcome(f"{name} on features", correct_by_method[name], seconds=duration))
    if method not in correct_by_method:
        return tuple(outcomes), None
    return tuple(outcomes), _note_change(evaluator, is_correct, correct_by_method[method])


def _note_change(
    evaluator: MethodEvaluator, is_correct: NDArray[np.bool_], is_correct_on_features: NDArray[np.bool_]
) -> Note:
    change = evaluator.paired_difference(is_correct, is_correct_on_features)
    values = {"value": change.value, "low": change.low, "high": change.high}
    if change.low > 0:
        return {"kind": "network_improved", "change": values}
    if change.high < 0:
        return {"kind": "network_cost", "change": values}
    return {"kind": "network_no_difference", "change": values}


def _make_curves(trained: TrainedNetwork) -> dict[str, list[Any]]:
    """By the names of :class:`featpipe.incremental.metrics.TrainingCurves`; None for NaN."""
    epochs = [epoch.to_dict() for epoch in trained.curve]
    curves: dict[str, list[Any]] = {
        "epochs": [epoch["number"] for epoch in epochs],
        "train_loss": [epoch["loss"] for epoch in epochs],
    }
    for name, monitor in (("old", OLD_CLASSES), ("new", NEW_CLASSES)):
        values = [epoch.get("metrics", {}).get(monitor, {}) for epoch in epochs]
        curves[f"{name}_loss"] = [value.get("loss") for value in values]
        curves[f"{name}_accuracy"] = [value.get("score") for value in values]
    return curves


def make_replay_memory(
    setup: TrainingSetup, trained: TrainedNetwork, model: Model, layers: HeadLayers
) -> ReplayMemory | None:
    """The data that the new model retains: from the given images, because the network's embeddings have changed."""
    context, full_step, pool = setup.context, setup.full_step, setup.replay_dataset.pool
    policy = context.resolve_policy(setup.method)
    if context.policy is None and context.model.kept is not None and setup.method == "ewc":
        policy = replace(policy, network=True)
    if not policy:
        return None
    X = setup.load_embeddings(trained.cache, setup.pool_rows)

    def collect(rows_policy: RetentionPolicy) -> ReplayMemory:
        selection = context.settings.selection
        return collect_replay_memory(rows_policy, model.head, X, pool.y, full_step.k, selection)

    counts = np.bincount(full_step.new.y, minlength=full_step.k) + full_step.counts
    if setup.method == "joint":
        memory = collect(replace(policy, network=False))
    elif setup.method == "replay":
        memory = replace(collect(RetentionPolicy(rows=policy.rows)), counts=counts)
    else:
        memory = ReplayMemory(counts, X[:0], np.zeros(0, np.int32))
    importances = _compute_importances(setup, trained.network, layers) if policy.network else None
    if importances is not None:
        name = get_last_layer_name(layers)
        W = np.column_stack([importances.pop(f"{name}.weight"), importances.pop(f"{name}.bias")])
        memory = replace(memory, importances=np.asarray(W, np.float32), network=importances)
    return memory if context.budget is None else fit_to_budget(memory, context.budget)


def _compute_importances(setup: TrainingSetup, network: nn.Module, layers: HeadLayers) -> ParameterImportances | None:
    """Importances from all images: those of old images from the given ones, else as the model retained them."""
    is_old, full_step, initial_head = setup.replay_dataset.is_old, setup.full_step, setup.initial_head

    def compute(mask: NDArray[np.bool_]) -> ParameterImportances:
        rows, head = np.unique(setup.pool_rows[mask]), replace(initial_head, layers=layers)
        return compute_network_importances(setup.finetune_context, setup.backbone, network, head, rows)

    if setup.importances is None and not is_old.any():
        logger.info("no importances are retained: those of the old classes are unknown")
        return None
    new_importances, old_importances = compute(~is_old), setup.importances or compute(is_old)
    n, m, none = int(full_step.counts.sum()), len(full_step.new), np.zeros((), np.float32)
    return {
        name: (n * value + m * new_importances.get(name, none)).astype(np.float32) / np.float32(n + m)
        for name, value in old_importances.items()
    }


def note_lost_parts(old_memory: ReplayMemory | None, new_memory: ReplayMemory | None) -> list[Note]:
    """A note on retained data that belongs to the old network's embeddings and is dropped."""
    old_parts = {} if old_memory is None else old_memory.to_summary()["bytes"]
    new_parts = {} if new_memory is None else new_memory.to_summary()["bytes"]
    lost_parts = [part for part in old_parts if part not in new_parts]
    return [{"kind": "retained_data_dropped", "parts": lost_parts}] if lost_parts else []
