"""Train heads on the embeddings of a cache, and estimate their quality on rows that they were not fitted on."""

from __future__ import annotations

from featpipe.training.compare import HeadComparison, compare, compare_or_load
from featpipe.training.dataset import EmbeddingDataset, load_training_data
from featpipe.training.fit import FittedHead, fit_head
from featpipe.training.head_config import HeadConfig
from featpipe.training.inputs import as_list, is_cache, open_caches
from featpipe.training.novelty import fit_novelty, update_novelty
from featpipe.training.search import SearchResult, format_params
from featpipe.training.train import (
    get_head_params,
    get_package_versions,
    make_head_config,
    parse_policy,
    train,
    train_head,
    train_or_load,
)

__all__ = [
    "EmbeddingDataset",
    "FittedHead",
    "HeadComparison",
    "HeadConfig",
    "SearchResult",
    "as_list",
    "compare",
    "compare_or_load",
    "fit_head",
    "fit_novelty",
    "format_params",
    "get_head_params",
    "get_package_versions",
    "is_cache",
    "load_training_data",
    "make_head_config",
    "open_caches",
    "parse_policy",
    "train",
    "train_head",
    "train_or_load",
    "update_novelty",
]
