"""The archives of an expansion as one: pictures that go through the network, found by their bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import data
from featpipe.cache import FeatureCache
from featpipe.data import Index
from featpipe.errors import ConfigError
from featpipe.finetuning import extract_for_model
from featpipe.incremental.dataset import LabeledEmbeddings, as_list, is_cache
from featpipe.model import Model
from featpipe.runtime import ProgressCallback

__all__ = ["ExpansionImages", "list_archives"]


def list_archives(*sources: Any) -> list[str | os.PathLike[str]]:
    """The archives that are given, one after the other.

    Raises
    ------
    ConfigError
        If one is a cache.
    """
    archives = [item for source in sources for item in as_list(source)]
    for item in archives:
        if is_cache(item):
            name = item.path if isinstance(item, FeatureCache) else item
            raise ConfigError(
                f"{name}: is a cache, and --unfreeze trains on pictures, which a cache does not hold; give the archives"
            )
    return archives


@dataclass(frozen=True, eq=False)
class ExpansionImages:
    """Archives as one.

    Attributes
    ----------
    index : Index
    before : FeatureCache
        Their embeddings by the model's own backbone.
    """

    index: Index
    embedding_cache: FeatureCache

    @classmethod
    def from_archives(
        cls, model: Model, archives: Sequence[Any], labels: Any, cache_folder: Any, progress: ProgressCallback
    ) -> ExpansionImages:
        """Opened, and embedded where they are not yet."""
        index = data.index(archives, labels=labels)
        return cls(index, extract_for_model(index, model, model.backbone, cache_folder, progress))

    @cached_property
    def _row_by_digest(self) -> dict[bytes, int]:
        digests = self.embedding_cache.digests
        return {digests[row].tobytes(): row for row in np.flatnonzero(self.embedding_cache.ok)[::-1].tolist()}

    def find_rows(self, embeddings: LabeledEmbeddings) -> NDArray[np.int64]:
        """Where images are, by their bytes; of copies the first."""
        return np.array([self._row_by_digest[digest.tobytes()] for digest in embeddings.digests], np.int64)
