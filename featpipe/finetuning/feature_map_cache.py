"""Cached feature maps: the output of the frozen part of a network, computed once and trained on in place of images.

The frozen part gives the same maps in every epoch. They are extracted like embeddings, with the same engine and cache
format, so an interrupted run loses nothing and a second run reuses all of them. The view number is part of the
transform, and so of the cache's fingerprint.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featpipe.backbones import Backbone, Partition, UpperNetwork, resolve_outputs
from featpipe.cache import FeatureCache
from featpipe.config import ExtractionConfig
from featpipe.data import Index
from featpipe.errors import ConfigError
from featpipe.extraction import extract_index, list_archive_paths, make_facts
from featpipe.finetuning.augmentation import Augmentation, AugmentedTransform
from featpipe.inference import count_multiply_adds
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.status import Status
from featpipe.storage import compute_fingerprint

BACKWARD_COST = 2  # relative to the forward pass
MIN_CACHING_GAIN = 1.2  # a smaller reduction of work is not worth the disk space
MAX_DISK_SHARE = 0.5  # of the free space: parts and the cache that is made of them exist at the same time
MIXING_NOT_CACHEABLE = "mixup and cutmix mix images, so the frozen part has to process each mixture"


@dataclass(frozen=True)
class CacheEstimate:
    """Whether caching feature maps pays off.

    Attributes
    ----------
    worthwhile : bool
    reason : str
        An explanation.
    n_bytes : int
        On disk.
    gain : float
        Work without the cache divided by work with it, in multiply-adds.
    """

    worthwhile: bool
    reason: str
    n_bytes: int
    gain: float


def estimate_caching_gain(
    backbone: Backbone,
    partition: Partition,
    n_images: int,
    n_epochs: int,
    n_views: int,
    folder: str | os.PathLike[str],
    storage: str = "float16",
) -> CacheEstimate:
    """Estimate whether computing the frozen part once for each view is less work, and whether the maps fit on the disk.

    Parameters
    ----------
    backbone : Backbone
    partition : Partition
        Of its network.
    n_images, n_epochs, n_views : int
    folder : path-like
        Where the maps would be stored.
    storage : {"float16", "float32"}
    """
    n_views, truncated_backbone = min(n_views, n_epochs), _truncate_backbone(backbone, partition)
    (map_shape,) = truncated_backbone.shapes.values()
    needed_bytes = math.prod(map_shape) * np.dtype(storage).itemsize * n_images * n_views
    total_work, frozen_work = count_multiply_adds(backbone), count_multiply_adds(truncated_backbone)
    if not total_work or frozen_work is None:
        return CacheEstimate(False, "the work of the frozen part could not be counted", needed_bytes, 1)
    trained_work = (1 + BACKWARD_COST) * max(0, total_work - frozen_work)
    gain = n_epochs * (frozen_work + trained_work) / (n_views * frozen_work + n_epochs * trained_work)
    free_bytes = shutil.disk_usage(_find_existing_ancestor(folder)).free
    frozen_part = f"the frozen part, {frozen_work / total_work:.0%} of a forward pass,"
    size_text, gain_text = f"{needed_bytes / 1e6:,.1f} MB", f"{gain:.1f} times less work"
    worthwhile = False
    if gain < MIN_CACHING_GAIN:
        schedule_text = f"{n_epochs} epochs of {n_views} view{'s' * (n_views > 1)}"
        reason = f"caching {frozen_part} for {schedule_text} would save too little: {gain_text}"
    elif needed_bytes > MAX_DISK_SHARE * free_bytes:
        reason = f"the maps of {frozen_part} would take {size_text}, and {free_bytes / 1e6:,.1f} MB are free"
    else:
        worthwhile, frequency_text = True, "once" if n_views == 1 else f"for {n_views} views"
        reason = f"{frozen_part} is computed {frequency_text} and cached, {size_text}: {gain_text}"
    return CacheEstimate(worthwhile, reason, needed_bytes, gain)


class FeatureMapDataset:
    """Batches of cached feature maps.

    Parameters
    ----------
    network : Module
        Feature map → embeddings.
    caches : sequence of FeatureCache
        One for each view; epochs take turns.
    rows : ndarray of shape (m,), int64
        The rows of the archive that the caches contain, in their order.

    Raises
    ------
    ConfigError
        If a row has no map, because its values exceed the range of the storage type.
    """

    def __init__(self, network: nn.Module, caches: Sequence[FeatureCache], rows: NDArray[np.int64]) -> None:
        self.network = network
        self.n_bytes = sum(cache.features().nbytes for cache in caches)
        self._maps = [cache.features() for cache in caches]
        self._cache_rows = np.full(int(rows.max(initial=-1)) + 1, -1)
        self._cache_rows[rows] = np.arange(len(rows))
        for cache in caches:
            failed_rows = np.flatnonzero(cache.status_codes != Status.OK)
            if len(failed_rows):
                reason = Status(int(cache.status_codes[failed_rows[0]])).word
                example = f"{cache.ids[int(failed_rows[0])]}: {reason}"
                raise ConfigError(
                    f"{cache.path}: {len(failed_rows)} images have no feature map ({example}); train on images, with "
                    "--cache-activations no"
                )

    def __enter__(self) -> FeatureMapDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to close: the memory maps end with the object."""

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Maps of shape (b, …), float32, of the epoch's view."""
        feature_maps = self._maps[epoch % len(self._maps)]
        batch_maps = torch.from_numpy(np.take(feature_maps, self._cache_rows[rows], axis=0))
        layout = torch.channels_last if batch_maps.ndim == 4 else torch.contiguous_format
        return batch_maps.to(torch.float32, memory_format=layout)


def make_feature_map_dataset(
    index: Index,
    rows: NDArray[np.int64],
    backbone: Backbone,
    partition: Partition,
    *,
    augmentation: Augmentation,
    n_views: int = 1,
    seed: int = 0,
    settings: Any = None,
    progress: ProgressCallback = ignore_progress,
) -> FeatureMapDataset:
    """Open the feature maps of some rows, and compute those that no cache has.

    Parameters
    ----------
    index : Index
    rows : ndarray of shape (m,), int64
        Of the index.
    backbone : Backbone
        Before any training.
    partition : Partition
        Of its network, or of a copy that is then trained.
    augmentation : Augmentation
    n_views : int
        Views of each image, if there is any augmentation.
    seed : int
        Of the augmentation.
    settings : mapping
        Of :class:`featpipe.config.ExtractionConfig`, where they differ from its defaults. Maps are stored as float16
        by default; embeddings, if nothing of the network is trained, as float32.
    progress : callable
    """
    truncated_backbone = _truncate_backbone(backbone, partition)
    selected_index = index.take(rows)
    storage = "float16" if isinstance(partition.upper, UpperNetwork) else "float32"  # like embeddings
    caches = []
    for view_index in range(n_views if augmentation.is_active else 1):
        augmented_transform: Any = AugmentedTransform(backbone.transform, augmentation, view_index, seed)
        view_backbone = replace(truncated_backbone, transform=augmented_transform)
        view_settings = ExtractionConfig.from_settings(
            {"storage": storage, **(settings or {}), "backbone": view_backbone, "outputs": (partition.output,)}
        )
        extraction_settings = replace(view_settings, out=_make_cache_path(selected_index, view_backbone, view_settings))
        caches.append(
            extract_index(selected_index, view_backbone, extraction_settings, progress, require_readable=False)
        )
        with suppress(OSError):  # mark as used: `featpipe clean` removes old ones
            os.utime(caches[-1].path)
    return FeatureMapDataset(partition.upper, caches, rows)


def _make_cache_path(index: Index, view_backbone: Backbone, settings: ExtractionConfig) -> Path:
    identity = [compute_fingerprint(make_facts(view_backbone, settings)), *list_archive_paths(index)]
    path_digest = sha256("\n".join(identity).encode("utf-8", "replace"))
    for name in index.ids:
        path_digest.update(name.encode("utf-8", "replace") + b"\n")
    return Path(settings.cache) / f"boundary-{path_digest.hexdigest()[:16]}.h5"


def _find_existing_ancestor(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).absolute()
    return next(ancestor for ancestor in (path, *path.parents) if ancestor.exists())


def _truncate_backbone(backbone: Backbone, partition: Partition) -> Backbone:
    """The backbone with the feature map at the boundary as its only output."""
    # the partition may be of a copy of the network
    outputs = resolve_outputs(backbone.network, [partition.output], backbone.transform)
    return replace(backbone, outputs=outputs, request={**backbone.request, "outputs": [partition.output]})
