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

from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.backbone.cutting import Above, Cut
from featpipe.backbone.output import resolve
from featpipe.cache import FeatureCache
from featpipe.engine.work import multiply_adds
from featpipe.errors import ConfigError
from featpipe.extraction import extract_index, facts_of
from featpipe.extraction.places import places_of
from featpipe.finetuning.views import Augmentation, View
from featpipe.fingerprint import fingerprint
from featpipe.progress import Tell, quiet
from featpipe.recipe import Extraction
from featpipe.status import Status

__all__ = ["MapSource", "Worth", "bytes_of", "map_source", "worth"]

BACKWARD = 2  # times the work of the forward pass, of a layer that is trained
GAIN_MIN = 1.2  # times less work, for which disk is spent
DISK_SHARE = 0.5  # of what is free; parts and the cache that is made of them are there at once
MIXED = "mixup and cutmix mix pictures, and what is frozen would have to see each mixture"


@dataclass(frozen=True)
class Worth:
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

    pays: bool
    why: str
    bytes: int
    gain: float


def worth(
    backbone: Backbone,
    cut: Cut,
    images: int,
    epochs: int,
    views: int,
    folder: str | os.PathLike[str],
    storage: str = "float16",
) -> Worth:
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
    views, maps = min(views, epochs), _maps_of(backbone, cut)
    needed = _bytes_of(maps, storage) * images * views
    whole, below = multiply_adds(backbone), multiply_adds(maps)
    if not whole or below is None:
        return Worth(False, "how much work the frozen part is could not be counted", needed, 1)
    above = (1 + BACKWARD) * max(0, whole - below)
    gain = epochs * (below + above) / (views * below + epochs * above)
    share = f"the frozen part, {below / whole:.0%} of a forward pass,"
    size, times = f"{needed / 1e6:,.1f} MB", f"{gain:.1f} times less work"
    if gain < GAIN_MIN:
        much = f"{epochs} epochs of {views} view{'s' * (views > 1)}"
        return Worth(False, f"computing {share} ahead for {much} would be {times}", needed, gain)
    free = shutil.disk_usage(_existing(folder)).free
    if needed > DISK_SHARE * free:
        why = f"the maps of {share} would take {size}, and {free / 1e6:,.1f} MB are free"
        return Worth(False, why, needed, gain)
    once = "once" if views == 1 else f"for {views} views"
    return Worth(True, f"{share} is computed {once} and kept, {size}: {times}", needed, gain)


def bytes_of(backbone: Backbone, cut: Cut, storage: str) -> int:
    """On disk, for one view of one image."""
    return _bytes_of(_maps_of(backbone, cut), storage)


def _bytes_of(maps: Backbone, storage: str) -> int:
    (shape,) = maps.shapes.values()
    return math.prod(shape) * np.dtype(storage).itemsize


class MapSource:
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
        self.bytes = sum(cache.features().nbytes for cache in caches)
        self._maps = [cache.features() for cache in caches]
        self._place = np.full(int(rows.max(initial=-1)) + 1, -1)
        self._place[rows] = np.arange(len(rows))
        for cache in caches:
            bad = np.flatnonzero(cache.status_codes != Status.OK)
            if len(bad):
                reason = Status(int(cache.status_codes[bad[0]])).word
                raise ConfigError(
                    f"{cache.path}: {len(bad)} images have no feature map ({cache.ids[int(bad[0])]}: {reason}); "
                    "train on pictures, with --cache-activations no"
                )

    def __enter__(self) -> MapSource:
        return self

    def __exit__(self, *exception: object) -> None:
        """The maps are mapped into memory, and go with the object."""

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Maps of shape (b, …), float32, of the view whose turn it is."""
        maps = self._maps[epoch % len(self._maps)]
        values = torch.from_numpy(np.take(maps, self._place[rows], axis=0))
        layout = torch.channels_last if values.ndim == 4 else torch.contiguous_format
        return values.to(torch.float32, memory_format=layout)


def map_source(
    index: Index,
    rows: NDArray[np.int64],
    backbone: Backbone,
    cut: Cut,
    *,
    augmentation: Augmentation,
    views: int = 1,
    seed: int = 0,
    settings: Any = None,
    progress: Tell = quiet,
) -> MapSource:
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
        Of :class:`featpipe.recipe.Extraction`, for what differs from its defaults. If nothing is said, maps are stored
        as float16, and embeddings, where nothing of the network trains, as float32.
    progress : callable
    """
    below = _maps_of(backbone, cut)
    some = index.take(rows)
    storage = "float16" if isinstance(cut.above, Above) else "float32"  # as embeddings are kept already
    caches = []
    for number in range(views if augmentation.changes else 1):
        view = replace(below, transform=View(backbone.transform, augmentation, number, seed))  # type: ignore[arg-type]
        given = Extraction.of({"storage": storage, **(settings or {}), "backbone": view, "outputs": (cut.output,)})
        settings_ = replace(given, out=_path(some, view, given))
        caches.append(extract_index(some, view, settings_, progress, refuse_all_bad=False))
        with suppress(OSError):  # `featpipe clean` removes what has not been used for long
            os.utime(caches[-1].path)
    return MapSource(cut.above, caches, rows)


def _path(index: Index, view: Backbone, settings: Extraction) -> Path:
    """A file for these images and this view: those of other rows of the same archive lie beside it."""
    made_from = sha256("\n".join([fingerprint(facts_of(view, settings)), *places_of(index)]).encode("utf-8", "replace"))
    for name in index.ids:
        made_from.update(name.encode("utf-8", "replace") + b"\n")
    return Path(settings.cache) / f"boundary-{made_from.hexdigest()[:16]}.h5"


def _existing(folder: str | os.PathLike[str]) -> Path:
    """The folder, or the one in which it will be made."""
    path = Path(folder).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _maps_of(backbone: Backbone, cut: Cut) -> Backbone:
    """The backbone with the value at the cut as its only output."""
    outputs = resolve(backbone.network, [cut.output], backbone.transform.size)  # the cut may be of a copy
    return replace(backbone, outputs=outputs, request={**backbone.request, "outputs": [cut.output]})
