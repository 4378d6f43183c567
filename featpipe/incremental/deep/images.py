"""The images of an expansion through the network, found by their bytes."""

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


def list_archives(*sources: Any) -> list[str | os.PathLike[str]]:
    """All archives of several arguments.

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
                f"{name}: is a cache, and --unfreeze trains on images, which a cache does not hold; give the archives"
            )
    return archives


@dataclass(frozen=True, eq=False)
class ExpansionImages:
    """All archives under one index.

    Attributes
    ----------
    index : Index
    embedding_cache : FeatureCache
        Embeddings of all images by the model's own backbone.
    """

    index: Index
    embedding_cache: FeatureCache

    @classmethod
    def from_archives(
        cls, model: Model, archives: Sequence[Any], labels: Any, cache_folder: Any, progress: ProgressCallback
    ) -> ExpansionImages:
        """Index archives, and embed the images that no cache contains."""
        index = data.index(archives, labels=labels, modality=model.modality)
        return cls(index, extract_for_model(index, model, model.backbone, cache_folder, progress))

    @cached_property
    def _row_by_digest(self) -> dict[bytes, int]:
        digests = self.embedding_cache.digests
        return {digests[row].tobytes(): row for row in np.flatnonzero(self.embedding_cache.ok)[::-1].tolist()}

    def find_rows(self, embeddings: LabeledEmbeddings) -> NDArray[np.int64]:
        """Rows of images in the index, by their bytes; the first of copies."""
        return np.array([self._row_by_digest[digest.tobytes()] for digest in embeddings.digests], np.int64)
