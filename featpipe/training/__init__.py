"""Cache + head → model; with an honest estimate of its quality from rows that it was not fitted on."""

from __future__ import annotations

from featpipe.training.comparison import HeadComparison, compare
from featpipe.training.rows import EmbeddingDataset, load_training_data
from featpipe.training.selection import METRICS, SearchResult
from featpipe.training.verb import train

__all__ = ["METRICS", "EmbeddingDataset", "HeadComparison", "SearchResult", "compare", "load_training_data", "train"]
