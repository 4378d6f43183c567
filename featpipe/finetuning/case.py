"""One model, the images that it is trained on further, and what is asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache
from featpipe.extraction import extract_index
from featpipe.finetuning.parallel import World
from featpipe.finetuning.past import Past
from featpipe.finetuning.sides import Sides
from featpipe.finetuning.state import Epoch
from featpipe.fingerprint import fingerprint
from featpipe.model import Model
from featpipe.progress import Tell
from featpipe.recipe import Extraction, FineTuning

__all__ = ["MACHINE", "Case", "checkpoint_of", "embedded"]

MACHINE = ("device", "workers", "keep_worse")  # settings that decide nothing in the training


@dataclass(frozen=True, eq=False)
class Case:
    """One model, the images that it is trained on further, and what is asked for.

    Attributes
    ----------
    model : Model
    index : Index
    before : FeatureCache
        The embeddings of all images by the model's own backbone.
    sides : Sides
    tuning : FineTuning
    device : torch.device
    world : World
    cache : path-like
        The folder of all caches.
    out : path-like or None
    tell : callable
    board : callable or None
        Told each epoch.
    past : Past or None
        Where classes have come to those that the model knew: the held-out rows are then watched after each epoch too.
    """

    model: Model
    index: Index
    before: FeatureCache
    sides: Sides
    tuning: FineTuning
    device: torch.device
    world: World
    cache: str | os.PathLike[str]
    out: str | os.PathLike[str] | None
    tell: Tell
    board: Callable[[Epoch], None] | None = None
    past: Past | None = None

    @property
    def beside(self) -> NDArray[np.int64]:
        """Rows that are looked at after each epoch and decide nothing."""
        return self.sides.held[:0] if self.past is None else self.sides.held

    @property
    def checkpoint(self) -> Path | None:
        return None if self.out is None else checkpoint_of(self.out)

    @property
    def asked(self) -> dict[str, Any]:
        """All that decides what comes of the training; JSON can hold it."""
        settings = {name: value for name, value in asdict(self.tuning).items() if name not in MACHINE}
        rows = hashlib.sha256()
        for side in (self.sides.train, self.sides.validation, self.sides.held):
            rows.update(self.before.digests[side].tobytes() + np.ascontiguousarray(self.sides.y[side]).tobytes() + b"|")
        past = {} if self.past is None else {"past": dict(self.past.facts or {})}
        return {
            **past,
            "settings": settings,
            "model": self.model.identity,
            "backbone": fingerprint(self.before.facts["backbone"]),
            "images": rows.hexdigest(),
        }

    @property
    def request(self) -> str:
        return fingerprint([self.asked, self.tuning.keep_worse])

    def extracted(self, backbone: Backbone) -> FeatureCache:
        """The embeddings of all images by a backbone."""
        return embedded(self.index, self.model, backbone, self.cache, self.tell)


def checkpoint_of(out: str | os.PathLike[str]) -> Path:
    """Beside the model that is going to be."""
    return Path(f"{os.fspath(out)}.checkpoint")


def embedded(index: Index, model: Model, backbone: Backbone, cache: Any, tell: Tell) -> FeatureCache:
    """The embeddings of an archive, made as those that a model was trained on."""
    settings = {**model.extraction(), "backbone": backbone, "cache": cache}
    return extract_index(index, backbone, Extraction.of(settings), tell)
