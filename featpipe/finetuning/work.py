"""The work of a case: from the model's own answers to the weights after the best epoch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe import backbone as backbones
from featpipe.backbone import Backbone
from featpipe.errors import ConfigError
from featpipe.finetuning import checkpoint
from featpipe.finetuning.case import FineTuneContext
from featpipe.finetuning.finder import find_learning_rate
from featpipe.finetuning.job import Trainer, TrainingTargets
from featpipe.finetuning.layers import HeadLayers
from featpipe.finetuning.loop import run_training_loop
from featpipe.finetuning.past import compute_network_fisher
from featpipe.finetuning.probe import make_dataset, refit_without
from featpipe.finetuning.source import TrainingDataset
from featpipe.finetuning.sources import open_datasets
from featpipe.finetuning.start import InitialHead, initialize_head
from featpipe.finetuning.state import TrainingState
from featpipe.finetuning.unfreezing import UnfrozenParameters, select_unfrozen
from featpipe.heads.losses import LossFunction
from featpipe.model import Model
from featpipe.progress import Progress

__all__ = ["compute_network_importances", "finetune_network", "prepare_start"]

LINK_BY_TASK: Mapping[str, Any] = {"classification": "softmax", "multilabel": "sigmoid", "regression": "identity"}


def prepare_start(context: FineTuneContext) -> tuple[Model, InitialHead, Backbone]:
    """The model that is started from, its layers, and the backbone that is trained."""
    model, splits, tuning = context.model, context.splits, context.tuning
    (output,) = (output for output in model.backbone.outputs if output.name == model.output)
    backbone = replace(model.backbone, outputs=(output,))
    excluded_rows = np.concatenate([splits.validation, splits.test])
    start_model = refit_without(model, context.base_cache, splits, excluded_rows, splits.train, context.progress)
    train_set = make_dataset(model, context.base_cache, splits.y, splits.train)
    initial_head = initialize_head(start_model, np.asarray(train_set.X), train_set.y)
    if tuning.weights == "none":
        layers = HeadLayers.zeros(train_set.X.shape[1], len(model.classes))
        initial_head = replace(
            initial_head, layers=layers, description="an untrained network and a new layer: the architecture alone"
        )
        backbone = _load_untrained_backbone(context, backbone)
    context.progress(Progress("note", initial_head.description))
    return start_model, initial_head, backbone


def _load_untrained_backbone(context: FineTuneContext, backbone: Backbone) -> Backbone:
    if ":" in backbone.name:
        raise ConfigError(f"weights=none: {backbone.name} is a network of your own; give one that is untrained instead")
    outputs = [output.name for output in backbone.outputs]
    untrained = backbones.load(backbone.name, weights="none", outputs=outputs, seed=context.tuning.seed)
    return replace(backbone, network=untrained.network, digest=untrained.digest, origin=untrained.origin)


def finetune_network(
    context: FineTuneContext, backbone: Backbone, initial_head: InitialHead, resume: bool
) -> tuple[nn.Module, HeadLayers, TrainingState]:
    """The network after the best epoch, and its new layers, with answers in the units of the targets."""
    unfrozen_params = select_unfrozen(backbone, str(context.tuning.unfreeze))
    context.progress(Progress("note", unfrozen_params.describe(backbone.network)))
    network = _copy_network(context, backbone.network)
    with ExitStack() as stack:
        datasets = [
            stack.enter_context(dataset) for dataset in open_datasets(context, backbone, network, unfrozen_params)
        ]
        trainer = _make_trainer(context, network, initial_head, unfrozen_params, datasets)
        _check_batch_norms(trainer)
        context.distributed.broadcast_from_main(trainer.trained_tensors().values())
        state = _start_or_resume(context, trainer, resume)
    return network, initial_head.to_target_units(initial_head.layers.with_trained_weights(trainer.head)), state


def compute_network_importances(
    context: FineTuneContext, backbone: Backbone, network: nn.Module, initial_head: InitialHead, rows: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """How important each weight that a case trains is for the answers to some images, as they are; see `importances`.

    Parameters
    ----------
    case : Case
    backbone : Backbone
        Before the training, which is what the frozen part is.
    network : Module
        Its network, before or after.
    start : Start
        The layers on it.
    rows : ndarray of shape (m,), int64
    """
    tuning = replace(context.tuning, augmentation={}, mixup=0.0, cutmix=0.0)
    splits = replace(context.splits, train=rows, validation=rows[:0], test=rows[:0])
    plain_context, unfrozen_params = (
        replace(context, tuning=tuning, splits=splits, regularizers=None),
        select_unfrozen(backbone, str(tuning.unfreeze)),
    )
    network_copy = _copy_network(context, network)
    with ExitStack() as stack:
        datasets = [
            stack.enter_context(dataset)
            for dataset in open_datasets(plain_context, backbone, network_copy, unfrozen_params)
        ]
        fisher = compute_network_fisher(
            _make_trainer(plain_context, network_copy, initial_head, unfrozen_params, datasets), rows
        )
    return {name: np.asarray(value.cpu().numpy(), np.float32) for name, value in fisher.items()}


def _copy_network(context: FineTuneContext, network: nn.Module) -> nn.Module:
    network_copy = copy.deepcopy(network).to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cast(nn.Module, network_copy)


def _make_trainer(
    context: FineTuneContext,
    network: nn.Module,
    initial_head: InitialHead,
    unfrozen_params: UnfrozenParameters,
    datasets: Sequence[TrainingDataset],
) -> Trainer:
    loss_function = LossFunction(
        LINK_BY_TASK[context.model.task],
        "squares" if context.model.task == "regression" else "cross_entropy",
        adjustment=None if context.regularizers is None else context.regularizers.logit_adjustment,
    )
    return Trainer(
        network=network,
        head=initial_head.layers.to_module().to(context.device),
        unfrozen=unfrozen_params,
        train_data=datasets[0],
        validation_data=datasets[1],
        train_rows=context.splits.train,
        validation_rows=context.splits.validation,
        targets=_make_targets(context, initial_head),
        loss_function=loss_function,
        tuning=context.tuning,
        sample_ids=context.base_cache.ids,
        device=context.device,
        distributed=context.distributed,
        progress=context.progress,
        epoch_callback=context.epoch_callback,
        regularizers=context.regularizers,
        monitor_rows=context.monitor_rows,
    )


def _check_batch_norms(trainer: Trainer) -> None:
    """Of a batch of one there are no statistics."""
    min_piece_size = (
        min(len(rows) for rows in trainer.epoch_batches(0)) // trainer.tuning.accumulate // trainer.distributed.size
    )
    if min_piece_size < 2 and len(trainer.trained_tensors()) > len(trainer.trained_parameters()):
        raise ConfigError(
            f"batch_norm=trained: batch norms follow the batches, and a batch of one (of {trainer.tuning.batch} images, in "
            f"{trainer.tuning.accumulate * trainer.distributed.size} pieces) has no statistics; give a larger batch"
        )


def _start_or_resume(context: FineTuneContext, trainer: Trainer, resume: bool) -> TrainingState:
    """From the beginning, or from the checkpoint."""
    checkpoint_path, run_config = context.checkpoint_path, context.run_config
    if checkpoint_path is not None and resume and checkpoint_path.exists():
        state = checkpoint.load_checkpoint(checkpoint_path, trainer, run_config)
        context.progress(
            Progress("note", f"going on from {checkpoint_path}: epoch {state.epoch + 1}, step {state.step + 1}")
        )
    else:
        rate = context.tuning.learning_rate
        state = TrainingState.init(trainer, find_learning_rate(trainer) if isinstance(rate, str) else rate)

    def save(current_state: TrainingState) -> None:
        if checkpoint_path is not None and context.distributed.is_main:
            checkpoint.save_checkpoint(checkpoint_path, trainer, current_state, run_config)

    return run_training_loop(trainer, state, save)


def _make_targets(context: FineTuneContext, initial_head: InitialHead) -> TrainingTargets:
    y, train_rows = context.splits.y, context.splits.train
    if context.model.task == "regression":
        Y = torch.from_numpy((y - initial_head.target_mean) / initial_head.target_std).float()
    else:
        Y = torch.from_numpy(y.astype(np.int64 if context.model.task == "classification" else np.float32))
    sample_weights = np.ones(len(y))
    if (context.tuning.class_weight or context.tuning.sampling) and context.model.task != "classification":
        raise ConfigError(
            f"class_weight and sampling are for classes that exclude each other, not for {context.model.task}"
        )
    if context.regularizers is not None and context.regularizers.sample_weights is not None:
        sample_weights = context.regularizers.sample_weights
    if context.tuning.class_weight:
        counts = np.bincount(y[train_rows], minlength=len(context.model.classes))
        sample_weights = len(train_rows) / (len(counts) * np.maximum(counts, 1))[np.maximum(y, 0)]
    return TrainingTargets(Y, torch.from_numpy(sample_weights).float())
