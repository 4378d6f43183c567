"""The archives of an expansion as one: pictures that go through the network, found by their bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import archive
from featpipe.archive import Index
from featpipe.cache import FeatureCache
from featpipe.errors import ConfigError
from featpipe.expansion.arrivals import Side, each_of, is_cache
from featpipe.finetuning.case import embedded
from featpipe.model import Model
from featpipe.progress import Tell

__all__ = ["Pictures", "listed"]


def listed(*several: Any) -> list[str | os.PathLike[str]]:
    """The archives that are given, one after the other.

    Raises
    ------
    ConfigError
        If one is a cache.
    """
    found = [one for given in several for one in each_of(given)]
    for one in found:
        if is_cache(one):
            name = one.path if isinstance(one, FeatureCache) else one
            raise ConfigError(
                f"{name}: is a cache, and --unfreeze trains on pictures, which a cache does not hold; give the archives"
            )
    return found


@dataclass(frozen=True, eq=False)
class Pictures:
    """Archives as one.

    Attributes
    ----------
    index : Index
    before : FeatureCache
        Their embeddings by the model's own backbone.
    """

    index: Index
    before: FeatureCache

    @classmethod
    def of(cls, model: Model, archives: Sequence[Any], labels: Any, cache: Any, tell: Tell) -> Pictures:
        """Opened, and embedded where they are not yet."""
        index = archive.index(archives, labels=labels)
        return cls(index, embedded(index, model, model.backbone, cache, tell))

    @cached_property
    def _place(self) -> dict[bytes, int]:
        digests = self.before.digests
        return {digests[row].tobytes(): row for row in np.flatnonzero(self.before.ok)[::-1].tolist()}

    def rows(self, side: Side) -> NDArray[np.int64]:
        """Where images are, by their bytes; of copies the first."""
        return np.array([self._place[digest.tobytes()] for digest in side.digests], np.int64)
