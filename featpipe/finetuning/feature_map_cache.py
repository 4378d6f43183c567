"""Feature maps at the frozen boundary: computed once into a cache, and trained on in place of the pictures.

What is frozen gives the same maps in every epoch. They are extracted as embeddings are, with the same engines, parts
and caches, so that a kill costs nothing and a second run computes none of them again; a view of a picture is part of
the transform, and so of what a cache is made of.
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

__all__ = [
    "CacheEstimate",
    "FeatureMapDataset",
    "estimate_caching_gain",
    "feature_map_bytes",
    "make_feature_map_dataset",
]

BACKWARD_COST = 2  # times the work of the forward pass, of a layer that is trained
MIN_CACHING_GAIN = 1.2  # times less work, for which disk is spent
MAX_DISK_SHARE = 0.5  # of what is free; parts and the cache that is made of them are there at once
MIXING_NOT_CACHEABLE = "mixup and cutmix mix pictures, and what is frozen would have to see each mixture"


@dataclass(frozen=True)
class CacheEstimate:
    """Whether feature maps are better computed once.

    Attributes
    ----------
    pays : bool
    why : str
        One sentence, for people.
    bytes : int
        On disk.
    gain : float
        How many times less work it is, by multiply-adds.
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
    """Whether it is less work, and fits on the disk, to compute what is below a cut once for each view.

    Parameters
    ----------
    backbone : Backbone
    cut : Cut
        Of its network.
    images, epochs, views : int
    folder : path-like
        Where the maps would be kept.
    storage : {"float16", "float32"}
    """
    n_views, truncated_backbone = min(n_views, n_epochs), _truncate_backbone(backbone, partition)
    needed_bytes = _map_bytes(truncated_backbone, storage) * n_images * n_views
    total_work, frozen_work = count_multiply_adds(backbone), count_multiply_adds(truncated_backbone)
    if not total_work or frozen_work is None:
        return CacheEstimate(False, "how much work the frozen part is could not be counted", needed_bytes, 1)
    trained_work = (1 + BACKWARD_COST) * max(0, total_work - frozen_work)
    gain = n_epochs * (frozen_work + trained_work) / (n_views * frozen_work + n_epochs * trained_work)
    frozen_part = f"the frozen part, {frozen_work / total_work:.0%} of a forward pass,"
    size_text, gain_text = f"{needed_bytes / 1e6:,.1f} MB", f"{gain:.1f} times less work"
    if gain < MIN_CACHING_GAIN:
        schedule_text = f"{n_epochs} epochs of {n_views} view{'s' * (n_views > 1)}"
        return CacheEstimate(
            False, f"computing {frozen_part} ahead for {schedule_text} would be {gain_text}", needed_bytes, gain
        )
    free_bytes = shutil.disk_usage(_existing_ancestor(folder)).free
    if needed_bytes > MAX_DISK_SHARE * free_bytes:
        reason = f"the maps of {frozen_part} would take {size_text}, and {free_bytes / 1e6:,.1f} MB are free"
        return CacheEstimate(False, reason, needed_bytes, gain)
    frequency_text = "once" if n_views == 1 else f"for {n_views} views"
    return CacheEstimate(
        True, f"{frozen_part} is computed {frequency_text} and kept, {size_text}: {gain_text}", needed_bytes, gain
    )


def feature_map_bytes(backbone: Backbone, partition: Partition, storage: str) -> int:
    """On disk, for one view of one image."""
    return _map_bytes(_truncate_backbone(backbone, partition), storage)


def _map_bytes(truncated_backbone: Backbone, storage: str) -> int:
    (shape,) = truncated_backbone.shapes.values()
    return math.prod(shape) * np.dtype(storage).itemsize


class FeatureMapDataset:
    """Batches of feature maps, in place of pictures.

    Parameters
    ----------
    network : Module
        The map at the cut → embeddings.
    caches : sequence of FeatureCache
        One for each view; epochs take turns.
    rows : ndarray of shape (m,), int64
        The rows of the archive that the caches hold, in their order.

    Raises
    ------
    ConfigError
        If a row has no map, because its numbers are too large for the storage.
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
                raise ConfigError(
                    f"{cache.path}: {len(failed_rows)} images have no feature map ({cache.ids[int(failed_rows[0])]}: {reason}); "
                    "train on pictures, with --cache-activations no"
                )

    def __enter__(self) -> FeatureMapDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        """The maps are mapped into memory, and go with the object."""

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Maps of shape (b, …), float32, of the view whose turn it is."""
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
    """Compute what is not known yet of the maps of some rows, and give them out in batches.

    Parameters
    ----------
    index : Index
    rows : ndarray of shape (m,), int64
        Of the index.
    backbone : Backbone
        As it was before any training.
    cut : Cut
        Of its network or of a copy, which is then trained.
    augmentation : Augmentation
    views : int
        How many of each picture, if there is any augmentation.
    seed : int
        Of the augmentation.
    settings : mapping
        Of :class:`featpipe.config.Extraction`, for what differs from its defaults. If nothing is said, maps are stored
        as float16, and embeddings, where nothing of the network trains, as float32.
    progress : callable
    """
    truncated_backbone = _truncate_backbone(backbone, partition)
    selected_index = index.take(rows)
    storage = "float16" if isinstance(partition.upper, UpperNetwork) else "float32"  # as embeddings are kept already
    caches = []
    for view_index in range(n_views if augmentation.is_active else 1):
        augmented_transform: Any = AugmentedTransform(backbone.transform, augmentation, view_index, seed)
        view_backbone = replace(truncated_backbone, transform=augmented_transform)
        view_settings = ExtractionConfig.from_settings(
            {"storage": storage, **(settings or {}), "backbone": view_backbone, "outputs": (partition.output,)}
        )
        extraction_settings = replace(view_settings, out=_cache_path(selected_index, view_backbone, view_settings))
        caches.append(
            extract_index(selected_index, view_backbone, extraction_settings, progress, require_readable=False)
        )
        with suppress(OSError):  # `featpipe clean` removes what has not been used for long
            os.utime(caches[-1].path)
    return FeatureMapDataset(partition.upper, caches, rows)


def _cache_path(index: Index, view_backbone: Backbone, settings: ExtractionConfig) -> Path:
    """A file for these images and this view: those of other rows of the same archive lie beside it."""
    path_digest = sha256(
        "\n".join([compute_fingerprint(make_facts(view_backbone, settings)), *list_archive_paths(index)]).encode(
            "utf-8", "replace"
        )
    )
    for name in index.ids:
        path_digest.update(name.encode("utf-8", "replace") + b"\n")
    return Path(settings.cache) / f"boundary-{path_digest.hexdigest()[:16]}.h5"


def _existing_ancestor(folder: str | os.PathLike[str]) -> Path:
    """The folder, or the one in which it will be made."""
    path = Path(folder).absolute()
    return next(ancestor for ancestor in (path, *path.parents) if ancestor.exists())


def _truncate_backbone(backbone: Backbone, partition: Partition) -> Backbone:
    """The backbone with the value at the cut as its only output."""
    outputs = resolve_outputs(backbone.network, [partition.output], backbone.transform.size)  # the cut may be of a copy
    return replace(backbone, outputs=outputs, request={**backbone.request, "outputs": [partition.output]})
