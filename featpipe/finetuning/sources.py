"""Whether pictures are decoded in every epoch, or feature maps computed once: decided, opened, and said."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from featpipe.backbone import Backbone
from featpipe.backbone.cutting import Cut, cut
from featpipe.errors import ConfigError
from featpipe.finetuning.boundary import MIXED, Worth, map_source, worth
from featpipe.finetuning.case import Case
from featpipe.finetuning.source import Embedding, PictureSource, Source
from featpipe.finetuning.unfreezing import Unfrozen
from featpipe.finetuning.views import Augmentation, View
from featpipe.progress import Progress

__all__ = ["opened"]

Opened = AbstractContextManager[Source]


def opened(case: Case, backbone: Backbone, network: nn.Module, chosen: Unfrozen) -> tuple[Opened, Opened]:
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
    augmentation, plain = Augmentation.of(case.tuning.augmentation), Augmentation()
    found = _boundary(case, backbone, network, chosen, augmentation)
    if found is not None:
        try:
            return _maps(case, backbone, found, augmentation)
        except ConfigError as error:
            if case.tuning.cache_activations == "yes":
                raise
            case.tell(Progress("warning", str(error)))
    return _pictures(case, backbone, network, augmentation), _pictures(case, backbone, network, plain)


def _maps(case: Case, backbone: Backbone, found: Cut, augmentation: Augmentation) -> tuple[Opened, Opened]:
    settings = {"cache": case.cache, "device": str(case.device), "workers": case.tuning.workers}
    how: dict[str, Any] = {"settings": settings, "seed": case.tuning.seed, "progress": case.tell}
    how["views"] = min(case.tuning.views, case.tuning.epochs)

    def maps(rows: Any, changes: Augmentation) -> Opened:
        return case.world.in_turn(lambda: map_source(case.index, rows, backbone, found, augmentation=changes, **how))

    looked_at = np.concatenate([case.sides.validation, case.beside])
    if not augmentation.changes:
        both = maps(np.union1d(case.sides.train, looked_at), augmentation)
        return both, both
    return maps(case.sides.train, augmentation), maps(np.unique(looked_at), Augmentation())


def _pictures(case: Case, backbone: Backbone, network: nn.Module, augmentation: Augmentation) -> PictureSource:
    embedding = Embedding(network, backbone.outputs[0])

    def view(picture: Any, epoch: int) -> Any:
        return View(backbone.transform, augmentation, epoch, case.tuning.seed)(picture)

    return PictureSource(case.index, case.before.digests, embedding, view, case.tuning.workers)


def _boundary(
    case: Case, backbone: Backbone, network: nn.Module, chosen: Unfrozen, augmentation: Augmentation
) -> Cut | None:
    """Where the network is cut; None where pictures are decoded, which is said."""
    wish, tuning = case.tuning.cache_activations, case.tuning
    if wish == "no":
        return None
    frozen = [name for name, _ in network.named_parameters() if name not in chosen.depth]
    try:
        if tuning.mixup or tuning.cutmix:
            raise ConfigError(MIXED)
        found = cut(replace(backbone, network=network), frozen)
        pays = _worth(case, backbone, found, augmentation)
    except ConfigError as error:
        if wish == "yes":
            raise ConfigError(f"cache_activations=yes: {error}") from None
        case.tell(Progress("note", f"every epoch decodes the pictures: {error}"))
        return None
    keeps = pays.pays or wish == "yes"
    before = (
        "" if pays.pays else "feature maps are kept, as was asked: " if keeps else "every epoch decodes the pictures: "
    )
    case.tell(Progress("note", before + pays.why))
    return found if keeps else None


def _worth(case: Case, backbone: Backbone, found: Cut, augmentation: Augmentation) -> Worth:
    images = len(case.sides.seen) + len(case.beside)
    views = case.tuning.views if augmentation.changes else 1
    return worth(backbone, found, images, case.tuning.epochs, views, case.cache)
