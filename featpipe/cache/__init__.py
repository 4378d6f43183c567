"""The HDF5 cache format, its only reader and writer. ``cache/README.md`` is the specification."""

from __future__ import annotations

from featpipe.cache.format import (
    FORMAT,
    FORMAT_VERSION,
    SPLIT_NAMES,
    SampleTable,
    can_reuse,
    parts_directory,
    restrict_facts_to_output,
    shards_directory,
)
from featpipe.cache.hdf5 import ALIGNMENT_BYTES
from featpipe.cache.lookup import EmbeddingLookup, EmbeddingSource
from featpipe.cache.reader import FeatureCache, FeatureView, RowSelector
from featpipe.cache.writer import write_cache

__all__ = [
    "ALIGNMENT_BYTES",
    "FORMAT",
    "FORMAT_VERSION",
    "SPLIT_NAMES",
    "EmbeddingLookup",
    "EmbeddingSource",
    "FeatureCache",
    "FeatureView",
    "RowSelector",
    "SampleTable",
    "can_reuse",
    "parts_directory",
    "restrict_facts_to_output",
    "shards_directory",
    "write_cache",
]
