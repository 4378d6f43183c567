"""Expansion through the network (experimental): a method learns on features, then training goes on in the network.

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
from scipy.special import logsumexp
from torch import nn

from featpipe.errors import ConfigError
from featpipe.finetuning import HeadLayers, TrainedNetwork, train_network
from featpipe.heads import forward
from featpipe.incremental.context import ExpansionContext
from featpipe.incremental.deep.ewc import ParameterImportances, compute_network_importances, get_last_layer_name
from featpipe.incremental.deep.methods import find_missing_requirement, select_default_method
from featpipe.incremental.deep.setup import NEW_CLASSES, OLD_CLASSES, DeepTrainingConfig, TrainingSetup
from featpipe.incremental.methods import METHODS, NEW_CLASS_SHARE
from featpipe.incremental.metrics import MethodEvaluator, MethodOutcome
from featpipe.incremental.result import Expansion, build_expanded_model, make_expansion, make_history
from featpipe.incremental.retention import fit_to_budget, resolve_policy
from featpipe.incremental.select_method import BASELINE_METHODS, SelectedMethod, select_and_fit
from featpipe.metrics import compute_logits
from featpipe.model import Model, ReplayMemory, RetentionPolicy, collect_replay_memory

logger = logging.getLogger(__name__)

DEEP_BIAS_CORRECTED_METHODS = ("distill", "ewc")  # with an offset between old and new classes after the training
NETWORK_UNCHANGED_NOTE = (
    "no epoch was better than the start on the validation images: the network stays as it was, and the result is that "
    "of expansion on features"
)


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
        Names of the caches that are learnt from, for the model's history.
    request : str
        Digest of the request.

    Raises
    ------
    ConfigError
        If the method does not train a network, or lacks what it needs.
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
    trained = train_network(setup.finetune_context, setup.backbone, setup.initial_head, deep_config.resume)
    if trained.best_epoch.number == 0 and METHODS[method].missing_requirement(full_step) is None:
        logger.info(NETWORK_UNCHANGED_NOTE)
        return build_expanded_model(
            original_context, select_and_fit(original_context, method), caches, request, notes=(NETWORK_UNCHANGED_NOTE,)
        )
    return _make_result(setup, trained, caches, request, round(perf_counter() - started, 3))


def _make_result(
    setup: TrainingSetup, trained: TrainedNetwork, caches: Sequence[str], request: str, seconds: float
) -> Expansion:
    """The model, and how training the network compares with features alone on images that neither has seen."""
    context, finetune_context, evaluator = setup.context, setup.finetune_context, None
    unchanged_notes = [NETWORK_UNCHANGED_NOTE] if trained.best_epoch.number == 0 else []
    layers = trained.layers if unchanged_notes else _correct_bias(setup, trained)
    model = trained.to_model(layers=layers, calibrate=False)  # the temperature is in the layers
    model.kept = make_replay_memory(setup, trained, model, layers)
    outcomes: tuple[MethodOutcome, ...] = ()
    notes = [
        setup.initial_head.description,
        finetune_context.splits.description,
        *unchanged_notes,
        *describe_lost_parts(context.model.kept, model.kept),
    ]
    if len(context.data.test):
        evaluator = MethodEvaluator.from_step(context.data.test, setup.full_step, *context.get_past_steps())
        outcomes, verdict = _compare_outcomes(setup, evaluator, model, trained, seconds)
        notes += [verdict] if verdict else []
    for text in notes[2:]:
        logger.info(text)
    selected = SelectedMethod(setup.method, model.head, setup.full_step, outcomes, evaluator)
    training_details = {"unfreeze": str(finetune_context.tuning.unfreeze), "best_epoch": trained.best_epoch.number}
    model.history = {
        **model.history,
        **_select_history(make_history(context, selected, caches, request, **training_details)),
    }
    description = (
        f"{len(context.data.test):,} images that were not trained on" if evaluator is not None else "no test images"
    )
    return make_expansion(context, selected, model, description, notes)


def _select_history(history: dict[str, Any]) -> dict[str, Any]:
    return {name: history[name] for name in ("trained_on", "steps", "judged", "expansions")}


def _correct_bias(setup: TrainingSetup, trained: TrainedNetwork) -> HeadLayers:
    """Shift new classes so that as many validation images are predicted as new ones as before the training.

    Trained on new classes alone, the margin to old ones grows without limit. Before the training the offset was fitted
    with what the model retains of old images.
    """
    k_old, pool, layers = setup.full_step.k_old, setup.replay_dataset.pool, trained.layers
    is_validation = ~setup.replay_dataset.is_train & (pool.y >= k_old)
    if setup.method not in DEEP_BIAS_CORRECTED_METHODS or not is_validation.any():
        return layers
    old_margin = _compute_margin(setup.initial_head.layers, pool.X[is_validation], k_old)
    new_margin = _compute_margin(layers, setup.load_embeddings(trained.cache, setup.pool_rows[is_validation]), k_old)
    share = max(NEW_CLASS_SHARE, float((old_margin > 0).mean()))
    offsets = np.zeros(len(layers.biases[-1]))
    offsets[k_old:] = -float(np.quantile(new_margin, 1 - share))
    return layers.fold_output_scaling(1.0, offsets)


def _compute_margin(layers: HeadLayers, X: NDArray[np.float32], k_old: int) -> NDArray[np.float64]:
    """Log odds of new classes against old ones, shape (m,)."""
    scores = forward(X.astype(np.float64), [w.T for w in layers.weights], layers.biases, layers.activation)
    return np.asarray(logsumexp(scores[:, k_old:], axis=1) - logsumexp(scores[:, :k_old], axis=1))


def _compare_outcomes(
    setup: TrainingSetup,
    evaluator: MethodEvaluator,
    model: Model,
    trained: TrainedNetwork,
    seconds: float,
) -> tuple[tuple[MethodOutcome, ...], str]:
    """The rows of the table, the trained network first, and the verdict on it."""
    method, full_step = setup.method, setup.full_step
    X = setup.load_embeddings(trained.cache, setup.test_rows)
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
        return f"training the network improved accuracy by {change}"
    if change.high < 0:
        return f"training the network cost accuracy ({change}): expand without --unfreeze"
    return f"training the network made no difference beyond chance ({change}); without --unfreeze it takes seconds"


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
    """What the new model retains: computed from the images at hand, since the network's embeddings have changed."""
    context, full_step, replay_dataset, method = setup.context, setup.full_step, setup.replay_dataset, setup.method
    policy = _resolve_policy(context, method)
    if not policy:
        return None
    X, y = setup.load_embeddings(trained.cache, setup.pool_rows), replay_dataset.pool.y
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
    importances = _compute_importances(setup, trained.network, layers) if policy.network else None
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
    """As requested, else as the old model; with ewc the importances of the network too, unless nothing is retained."""
    policy = resolve_policy(
        context.model.kept, context.policy, context.settings if context.has_explicit_memory else None, method
    )
    if context.policy is None and context.model.kept is not None and method == "ewc":
        policy = replace(policy, network=True)
    return policy


def _compute_importances(setup: TrainingSetup, network: nn.Module, layers: HeadLayers) -> ParameterImportances | None:
    """Importances from all images so far: old ones from the images at hand, else as the model retained them."""
    replay_dataset, full_step, context = setup.replay_dataset, setup.full_step, setup.finetune_context
    initial_head = replace(setup.initial_head, layers=layers)

    def compute_importances(mask: NDArray[np.bool_]) -> ParameterImportances:
        return compute_network_importances(
            context, setup.backbone, network, initial_head, np.unique(setup.pool_rows[mask])
        )

    if setup.importances is None and not replay_dataset.is_old.any():
        logger.info("no importances are kept: those of the old classes are unknown")
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
    """A note on retained data that belongs to the old network's embeddings and is dropped."""
    old_parts = {} if old_memory is None else old_memory.to_summary()["bytes"]
    new_parts = {} if new_memory is None else new_memory.to_summary()["bytes"]
    lost_parts = [part for part in old_parts if part not in new_parts]
    return [f"dropped, since the embeddings have changed: {', '.join(lost_parts)}"] if lost_parts else []
