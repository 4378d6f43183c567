"""Choose whether to decode images in every epoch or to compute feature maps once, and open the datasets."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from featpipe.backbones import Backbone, Partition, partition_network
from featpipe.errors import ConfigError
from featpipe.finetuning.augmentation import Augmentation, AugmentedTransform
from featpipe.finetuning.batches import DecodedImageDataset, EmbeddingNetwork, TrainingDataset
from featpipe.finetuning.context import FineTuneContext
from featpipe.finetuning.feature_map_cache import (
    MIXING_NOT_CACHEABLE,
    estimate_caching_gain,
    make_feature_map_dataset,
)
from featpipe.finetuning.unfreeze import UnfrozenParameters

logger = logging.getLogger(__name__)

DatasetContext = AbstractContextManager[TrainingDataset]


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
