"""The verb: go back into the network, from where the probe ended, and say whether that helped."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe import backbones, data
from featpipe.backbones import Backbone
from featpipe.config import FineTuneConfig, FineTuneOptions
from featpipe.errors import ConfigError, ModelError
from featpipe.finetuning import checkpoint
from featpipe.finetuning.batches import TrainingDataset
from featpipe.finetuning.choose_source import open_datasets
from featpipe.finetuning.context import FineTuneContext, extract_for_model
from featpipe.finetuning.distributed import join_distributed
from featpipe.finetuning.head_layers import HeadLayers, InitialHead, initialize_head
from featpipe.finetuning.loop import make_tensorboard_logger, run_training_loop
from featpipe.finetuning.lr_finder import find_learning_rate
from featpipe.finetuning.regularizers import compute_network_fisher
from featpipe.finetuning.result import (
    FineTuningResult,
    compare_models,
    make_finetuned_backbone,
    make_finetuned_model,
    predict_rows,
)
from featpipe.finetuning.split import make_dataset, make_splits, refit_without
from featpipe.finetuning.trainer import Trainer, TrainingState, TrainingTargets
from featpipe.finetuning.unfreeze import UnfrozenParameters, select_unfrozen
from featpipe.heads import LossFunction
from featpipe.inference import keep_freed_memory, resolve_device
from featpipe.model import Model, load_model
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.storage import Receipt

__all__ = ["compute_network_importances", "finetune", "finetune_network", "prepare_start", "resolve_process_device"]

logger = logging.getLogger(__name__)


def finetune(
    model: Model | str | os.PathLike[str],
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    labels: Any = None,
    cache: str | os.PathLike[str] = "cache",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    tensorboard: str | os.PathLike[str] | None = None,
    progress: ProgressCallback = ignore_progress,
    **settings: Unpack[FineTuneOptions],
) -> FineTuningResult:
    """Train some of a model's backbone together with its head, and compare with the head alone.

    The new layer starts as the model's own head, so that the first answers are the model's. Images of the archive are
    held out, by which model and fine-tuned model are compared at the end; if the model was trained on some of those,
    the same head is fitted again without them first.

    Parameters
    ----------
    model : Model or path of one
    archives : path-like or sequence of path-like
        Labelled images of the model's classes, as :func:`featpipe.extract` takes them.
    labels : path-like or Table, optional
    cache : path-like
        The folder where embeddings of both backbones are kept.
    out : path-like, optional
        Where the model is saved, with its backbone's weights; a checkpoint lies beside it until then. If that file is
        what these very arguments gave before, no work is done.
    resume : bool
        Go on from the checkpoint, if there is one.
    tensorboard : path-like, optional
        A folder for losses and scores by epoch, for TensorBoard.
    progress : callable
    **settings
        The fields of :class:`featpipe.config.FineTuneConfig`.

    Returns
    -------
    FineTuningResult
        Its ``model`` is the fine-tuned one; the one before, if fine-tuning was worse on the held-out images.

    Raises
    ------
    ConfigError
        If a setting is unknown, nothing is left to train, the labels are not of the model's classes, or the checkpoint
        is of a run that was asked for otherwise.
    CacheError
        If the images have no labels.
    KeyboardInterrupt
        If the work was interrupted; the same call goes on from its checkpoint.

    Examples
    --------
    >>> finetune("photos.model", "photos/", unfreeze="last", out="photos.tuned.model")       # doctest: +SKIP
    """
    tuning = FineTuneConfig.from_settings(settings)
    model = model if isinstance(model, Model) else load_model(model)
    if out is not None:
        Model.check_target(out)
    device = resolve_process_device(tuning.device)
    with join_distributed(device) as distributed:
        if not distributed.is_main:
            progress = ignore_progress
        index = data.index(archives, labels=labels)
        base_cache = distributed.run_main_first(
            lambda: extract_for_model(index, model, model.backbone, cache, progress)
        )
        splits = make_splits(model, base_cache, tuning)
        epoch_callback = (
            None if tensorboard is None or not distributed.is_main else make_tensorboard_logger(tensorboard)
        )
        context = FineTuneContext(
            model, index, base_cache, splits, tuning, device, distributed, cache, out, progress, epoch_callback
        )
        logger.info(splits.description)
        if (finished := _load_finished(context)) is not None:
            logger.info(f"{out}: is what is asked for already")
            return finished
        start_model, initial_head, backbone = prepare_start(context)
        network, layers, state = finetune_network(context, backbone, initial_head, resume)
        return distributed.run_main_first(
            lambda: _compare_and_save(context, start_model, initial_head, network, layers, state)
        )


def resolve_process_device(name: str) -> torch.device:
    """Of several processes on one machine each has a GPU of its own."""
    device = resolve_device(name)
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _load_finished(context: FineTuneContext) -> FineTuningResult | None:
    """What is at the target already, if it came of this request."""
    if context.out is None or not Path(context.out).is_file():
        return None
    try:
        saved_model = load_model(context.out)
    except ModelError:
        return None
    record = saved_model.history.get("finetuning") or {}
    if not Receipt(record.get("request", "")).is_current(context.run_digest):
        return None
    return FineTuningResult.from_dict(saved_model, record["result"])


def _compare_and_save(
    context: FineTuneContext,
    start_model: Model,
    initial_head: InitialHead,
    network: nn.Module,
    layers: HeadLayers,
    state: TrainingState,
) -> FineTuningResult:
    """Compare on the held-out rows, and keep what is better."""
    model, splits = context.model, context.splits
    weights = None if context.out is None else os.path.abspath(context.out)
    backbone = make_finetuned_backbone(model.backbone, network, weights)
    finetuned_cache = context.extract_embeddings(backbone)
    history = {"finetuning": {"from": model.identity, "request": context.run_digest}}
    finetuned = make_finetuned_model(model, start_model, backbone, finetuned_cache, splits, layers, state, history)
    probe = refit_without(model, context.base_cache, splits, splits.test, splits.train_and_validation)
    truth = _ground_truth(model, splits.y[splits.test])
    predictions = (
        predict_rows(probe, context.base_cache, splits.test),
        predict_rows(finetuned, finetuned_cache, splits.test),
    )
    comparison = compare_models(model.task, truth, *predictions, model.classes)
    keep_finetuned = context.tuning.keep_worse or (comparison.gain >= 0 and state.best_epoch.number > 0)
    notes: tuple[str, ...] = (splits.description, initial_head.description)
    if state.best_epoch.number == 0:
        notes += ("no epoch was better on the validation images than the start, which is what is compared",)
        logger.info(notes[-1])
    selected_model = (
        finetuned if keep_finetuned else replace(model, history=dict(model.history), scores=dict(model.scores))
    )
    result = FineTuningResult(
        selected_model,
        "fine-tuned" if keep_finetuned else "probe",
        comparison,
        [epoch.to_dict() for epoch in state.curve],
        state.best_epoch.number,
        notes,
    )
    selected_model.history["finetuning"] = {**history["finetuning"], "result": result.to_dict()}
    if keep_finetuned:
        selected_model.scores["finetuning"] = {
            "how": f"{len(splits.test)} images held out",
            "metrics": {row["name"]: _interval_to_dict(row["tuned"]) for row in comparison.metrics},
        }
    _save(context, selected_model)
    return result


def _save(context: FineTuneContext, model: Model) -> None:
    if context.out is None:
        return
    if context.distributed.is_main:
        model.save(context.out)
        if context.checkpoint_path is not None:
            context.checkpoint_path.unlink(missing_ok=True)
    model.path = Path(context.out)


def _ground_truth(model: Model, y: NDArray[Any]) -> NDArray[Any]:
    """As scores take it."""
    if model.task == "classification":
        return np.array(model.classes, dtype=object)[y]
    return y[:, 0] if model.task == "regression" and y.shape[1] == 1 else y


def _interval_to_dict(values: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip(("value", "low", "high"), values, strict=True))


LINK_BY_TASK: Mapping[str, Any] = {"classification": "softmax", "multilabel": "sigmoid", "regression": "identity"}


def prepare_start(context: FineTuneContext) -> tuple[Model, InitialHead, Backbone]:
    """The model that is started from, its layers, and the backbone that is trained."""
    model, splits, tuning = context.model, context.splits, context.tuning
    (output,) = (output for output in model.backbone.outputs if output.name == model.output)
    backbone = replace(model.backbone, outputs=(output,))
    excluded_rows = np.concatenate([splits.validation, splits.test])
    start_model = refit_without(model, context.base_cache, splits, excluded_rows, splits.train)
    train_set = make_dataset(model, context.base_cache, splits.y, splits.train)
    initial_head = initialize_head(start_model, np.asarray(train_set.X), train_set.y)
    if tuning.weights == "none":
        layers = HeadLayers.zeros(train_set.X.shape[1], len(model.classes))
        initial_head = replace(
            initial_head, layers=layers, description="an untrained network and a new layer: the architecture alone"
        )
        backbone = _load_untrained_backbone(context, backbone)
    logger.info(initial_head.description)
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
    logger.info(unfrozen_params.describe(backbone.network))
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
        logger.info(f"going on from {checkpoint_path}: epoch {state.epoch + 1}, step {state.step + 1}")
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
