"""Whether pictures are decoded in every epoch, or feature maps computed once: decided, opened, and said."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from featpipe.backbones import Backbone, Partition, partition_network
from featpipe.errors import ConfigError
from featpipe.finetuning.augmentation import Augmentation, AugmentedTransform
from featpipe.finetuning.batches import DecodedImageDataset, EmbeddingNetwork, TrainingDataset
from featpipe.finetuning.context import FineTuneContext
from featpipe.finetuning.feature_map_cache import (
    MIXING_NOT_CACHEABLE,
    CacheEstimate,
    estimate_caching_gain,
    make_feature_map_dataset,
)
from featpipe.finetuning.unfreeze import UnfrozenParameters

__all__ = ["open_datasets"]

logger = logging.getLogger(__name__)

DatasetContext = AbstractContextManager[TrainingDataset]


def open_datasets(
    context: FineTuneContext, backbone: Backbone, network: nn.Module, unfrozen_params: UnfrozenParameters
) -> tuple[DatasetContext, DatasetContext]:
    """The sources of what is trained on, and of what says when to stop, without augmentation.

    Parameters
    ----------
    case : Case
    backbone : Backbone
        Before the training.
    network : Module
        A copy of its network, which is trained.
    chosen : Unfrozen
    """
    augmentation, no_augmentation = Augmentation.from_dict(context.tuning.augmentation), Augmentation()
    partition = _find_boundary(context, backbone, network, unfrozen_params, augmentation)
    if partition is not None:
        try:
            return _open_feature_maps(context, backbone, partition, augmentation)
        except ConfigError as error:
            if context.tuning.cache_activations == "yes":
                raise
            logger.warning(str(error))
    return _open_images(context, backbone, network, augmentation), _open_images(
        context, backbone, network, no_augmentation
    )


def _open_feature_maps(
    context: FineTuneContext, backbone: Backbone, partition: Partition, augmentation: Augmentation
) -> tuple[DatasetContext, DatasetContext]:
    settings = {"cache": context.cache_folder, "device": str(context.device), "workers": context.tuning.workers}
    map_options: dict[str, Any] = {"settings": settings, "seed": context.tuning.seed, "progress": context.progress}
    map_options["views"] = min(context.tuning.views, context.tuning.epochs)

    def open_maps(rows: Any, map_augmentation: Augmentation) -> DatasetContext:
        return context.distributed.run_main_first(
            lambda: make_feature_map_dataset(
                context.index, rows, backbone, partition, augmentation=map_augmentation, **map_options
            )
        )

    evaluation_rows = np.concatenate([context.splits.validation, context.monitor_rows])
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
    """Where the network is cut; None where pictures are decoded, which is said."""
    cache_setting, tuning = context.tuning.cache_activations, context.tuning
    if cache_setting == "no":
        return None
    frozen_names = [name for name, _ in network.named_parameters() if name not in unfrozen_params.depth]
    try:
        if tuning.mixup or tuning.cutmix:
            raise ConfigError(MIXING_NOT_CACHEABLE)
        partition = partition_network(replace(backbone, network=network), frozen_names)
        estimate = _estimate_caching_gain(context, backbone, partition, augmentation)
    except ConfigError as error:
        if cache_setting == "yes":
            raise ConfigError(f"cache_activations=yes: {error}") from None
        logger.info(f"every epoch decodes the pictures: {error}")
        return None
    use_cache = estimate.worthwhile or cache_setting == "yes"
    prefix = (
        ""
        if estimate.worthwhile
        else "feature maps are kept, as was asked: "
        if use_cache
        else "every epoch decodes the pictures: "
    )
    logger.info(prefix + estimate.reason)
    return partition if use_cache else None


def _estimate_caching_gain(
    context: FineTuneContext, backbone: Backbone, partition: Partition, augmentation: Augmentation
) -> CacheEstimate:
    n_images = len(context.splits.train_and_validation) + len(context.monitor_rows)
    n_views = context.tuning.views if augmentation.is_active else 1
    return estimate_caching_gain(backbone, partition, n_images, context.tuning.epochs, n_views, context.cache_folder)
