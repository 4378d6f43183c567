"""Train a network from a fine-tuning context: from the start, or from a checkpoint."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe.backbones import Backbone, Partition, partition_network
from featpipe.errors import ConfigError
from featpipe.finetuning import checkpoint
from featpipe.finetuning.augmentation import Augmentation, AugmentedTransform
from featpipe.finetuning.batches import DecodedImageDataset, EmbeddingNetwork, TrainingDataset
from featpipe.finetuning.context import FineTuneContext
from featpipe.finetuning.feature_map_cache import MIXING_NOT_CACHEABLE, estimate_caching_gain, make_feature_map_dataset
from featpipe.finetuning.head_layers import InitialHead
from featpipe.finetuning.loop import run_training_loop
from featpipe.finetuning.lr_finder import find_learning_rate
from featpipe.finetuning.trained_network import TrainedNetwork
from featpipe.finetuning.trainer import Trainer, TrainingState, TrainingTargets
from featpipe.finetuning.unfreeze import UnfrozenParameters, select_unfrozen
from featpipe.heads import LossFunction

logger = logging.getLogger(__name__)

DatasetContext = AbstractContextManager[TrainingDataset]

LINK_BY_TASK: Mapping[str, Any] = {"classification": "softmax", "multilabel": "sigmoid", "regression": "identity"}
MIN_SAFE_CHANNELS = 16  # input channels of a channels-last 1×1 convolution with a stride


def train_network(
    context: FineTuneContext, backbone: Backbone, initial_head: InitialHead, resume: bool
) -> TrainedNetwork:
    """Train a copy of a backbone's network together with a head.

    Parameters
    ----------
    context : FineTuneContext
    backbone : Backbone
        With the one output that the head is on.
    initial_head : InitialHead
    resume : bool
        Resume from the checkpoint, if there is one.

    Raises
    ------
    ConfigError
        If nothing is left to train, or the checkpoint belongs to other settings.
    KeyboardInterrupt
        If the training was interrupted; the same call resumes it from the checkpoint.
    """
    unfrozen = select_unfrozen(backbone, str(context.tuning.unfreeze))
    logger.info(unfrozen.describe(backbone.network))
    with open_trainer(context, backbone, backbone.network, initial_head, unfrozen) as trainer:
        _check_batch_norms(trainer)
        context.distributed.broadcast_from_main(trainer.trained_tensors().values())
        state = _start_or_resume(context, trainer, resume)
    layers = initial_head.to_target_units(initial_head.layers.with_trained_weights(trainer.head))
    return TrainedNetwork(context, trainer.network, layers, tuple(state.curve), state.best_epoch)


@contextmanager
def open_trainer(
    context: FineTuneContext,
    backbone: Backbone,
    network: nn.Module,
    initial_head: InitialHead,
    unfrozen: UnfrozenParameters | None = None,
) -> Iterator[Trainer]:
    """Make a trainer for a copy of a network; its datasets are closed at the end.

    Parameters
    ----------
    context : FineTuneContext
    backbone : Backbone
        Before the training: it computes the feature maps of what stays frozen.
    network : Module
        The backbone's network, before or after training.
    initial_head : InitialHead
    unfrozen : UnfrozenParameters, optional
        As ``context.tuning.unfreeze`` selects them if not given.
    """
    unfrozen = unfrozen or select_unfrozen(backbone, str(context.tuning.unfreeze))
    memory_format = choose_memory_format(network, context.device)
    network = cast(nn.Module, copy.deepcopy(network).to(context.device, memory_format=memory_format))  # type: ignore[call-overload]
    loss_function = LossFunction(
        LINK_BY_TASK[context.model.task],
        "squares" if context.model.task == "regression" else "cross_entropy",
        adjustment=context.logit_adjustment,
    )
    with ExitStack() as stack:
        train_data, validation_data = map(stack.enter_context, open_datasets(context, backbone, network, unfrozen))
        yield Trainer(
            network=network,
            head=initial_head.layers.to_module().to(context.device),
            unfrozen=unfrozen,
            train_data=train_data,
            validation_data=validation_data,
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
            loss_terms=context.loss_terms,
            monitors=context.monitors,
            memory_format=memory_format,
        )


def choose_memory_format(network: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout of images and weights in training: channels last, which is the faster one, where it is safe.

    On a CPU, oneDNN writes out of bounds in the backward pass of a channels-last 1×1 convolution with a stride and few
    input channels (seen with torch 2.14 and AVX2: fewer than 8; a register of AVX-512 holds 16).
    """
    is_unsafe = device.type == "cpu" and any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < MIN_SAFE_CHANNELS
        for module in network.modules()
    )
    return torch.contiguous_format if is_unsafe else torch.channels_last


def _check_batch_norms(trainer: Trainer) -> None:
    """Refuse settings that would give a batch norm the statistics of a single image."""
    min_piece_size = (
        min(len(rows) for rows in trainer.epoch_batches(0)) // trainer.tuning.accumulate // trainer.distributed.size
    )
    if min_piece_size < 2 and len(trainer.trained_tensors()) > len(trainer.trained_parameters()):
        raise ConfigError(
            "batch_norm=trained: batch norms follow the batches, and a batch of one (of "
            f"{trainer.tuning.batch} images, in {trainer.tuning.accumulate * trainer.distributed.size} pieces) has no "
            "statistics; give a larger batch"
        )


def _start_or_resume(context: FineTuneContext, trainer: Trainer, resume: bool) -> TrainingState:
    checkpoint_path, run_config = context.checkpoint_path, context.run_config
    if checkpoint_path is not None and resume and checkpoint_path.exists():
        state = checkpoint.load_checkpoint(checkpoint_path, trainer, run_config)
        logger.info(f"resuming from {checkpoint_path}: epoch {state.epoch + 1}, step {state.step + 1}")
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
    sample_weights = np.ones(len(y)) if context.sample_weights is None else context.sample_weights
    if (context.tuning.class_weight or context.tuning.sampling) and context.model.task != "classification":
        raise ConfigError(
            f"class_weight and sampling are for single-label classification, not for {context.model.task}"
        )
    if context.tuning.class_weight:
        counts = np.bincount(y[train_rows], minlength=len(context.model.classes))
        sample_weights = len(train_rows) / (len(counts) * np.maximum(counts, 1))[np.maximum(y, 0)]
    return TrainingTargets(Y, torch.from_numpy(sample_weights).float())


def open_datasets(
    context: FineTuneContext, backbone: Backbone, network: nn.Module, unfrozen_params: UnfrozenParameters
) -> tuple[DatasetContext, DatasetContext]:
    """The dataset to train on, and the one without augmentation to evaluate on.

    Parameters
    ----------
    context : FineTuneContext
    backbone : Backbone
        Before the training.
    network : Module
        The copy of its network that is trained.
    unfrozen_params : UnfrozenParameters
    """
    augmentation = Augmentation.from_dict(context.tuning.augmentation)
    partition = _find_boundary(context, backbone, network, unfrozen_params, augmentation)
    if partition is not None:
        try:
            return _open_feature_maps(context, backbone, partition, augmentation)
        except ConfigError as error:
            if context.tuning.cache_activations == "yes":
                raise
            logger.warning(str(error))
    train_images, validation_images = (
        _open_images(context, backbone, network, changes) for changes in (augmentation, Augmentation())
    )
    return train_images, validation_images


def _open_feature_maps(
    context: FineTuneContext, backbone: Backbone, partition: Partition, augmentation: Augmentation
) -> tuple[DatasetContext, DatasetContext]:
    settings = {"cache": context.cache_folder, "device": str(context.device), "workers": context.tuning.workers}

    def open_maps(rows: NDArray[np.int64], map_augmentation: Augmentation) -> DatasetContext:
        return context.distributed.run_main_first(
            lambda: make_feature_map_dataset(
                context.index,
                rows,
                backbone,
                partition,
                augmentation=map_augmentation,
                n_views=min(context.tuning.views, context.tuning.epochs),
                seed=context.tuning.seed,
                settings=settings,
                progress=context.progress,
            )
        )

    evaluation_rows = context.evaluation_rows
    if not augmentation.is_active:
        shared_maps = open_maps(np.union1d(context.splits.train, evaluation_rows), augmentation)
        return shared_maps, shared_maps
    return open_maps(context.splits.train, augmentation), open_maps(np.unique(evaluation_rows), Augmentation())


def _open_images(
    context: FineTuneContext, backbone: Backbone, network: nn.Module, augmentation: Augmentation
) -> DecodedImageDataset:
    embedding_network = EmbeddingNetwork(network, backbone.outputs[0])

    def transform_image(image: Any, epoch: int) -> Any:
        return AugmentedTransform(backbone.transform, augmentation, epoch, context.tuning.seed)(image)

    return DecodedImageDataset(
        context.index, context.base_cache.digests, embedding_network, transform_image, context.tuning.workers
    )


def _find_boundary(
    context: FineTuneContext,
    backbone: Backbone,
    network: nn.Module,
    unfrozen_params: UnfrozenParameters,
    augmentation: Augmentation,
) -> Partition | None:
    """The boundary for cached feature maps; None if images are decoded in every epoch. A note says why."""
    cache_setting, tuning = context.tuning.cache_activations, context.tuning
    if cache_setting == "no":
        return None
    frozen_names = [name for name, _ in network.named_parameters() if name not in unfrozen_params.depth]
    try:
        if tuning.mixup or tuning.cutmix:
            raise ConfigError(MIXING_NOT_CACHEABLE)
        partition = partition_network(replace(backbone, network=network), frozen_names)
        n_images = len(context.splits.train) + len(context.evaluation_rows)
        n_views = tuning.views if augmentation.is_active else 1
        folder = context.cache_folder
        estimate = estimate_caching_gain(backbone, partition, n_images, tuning.epochs, n_views, folder)
    except ConfigError as error:
        if cache_setting == "yes":
            raise ConfigError(f"cache_activations=yes: {error}") from None
        logger.info(f"images are decoded in every epoch: {error}")
        return None
    if estimate.worthwhile:
        logger.info(estimate.reason)
    elif cache_setting == "yes":
        logger.info(f"feature maps are cached because of cache_activations=yes: {estimate.reason}")
    else:
        logger.info(f"images are decoded in every epoch: {estimate.reason}")
        return None
    return partition
