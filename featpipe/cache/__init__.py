"""The HDF5 format of a cache: the only reader and writer of HDF5. ``cache/README.md`` is its specification."""

from featpipe.cache.hdf5 import ALIGNMENT_BYTES
from featpipe.cache.layout import (
    FORMAT,
    FORMAT_VERSION,
    SPLITS,
    Table,
    narrowed,
    parts_directory,
    serves,
    shards_directory,
)
from featpipe.cache.reader import FeatureCache, Rows, View
from featpipe.cache.writer import write_cache

__all__ = [
    "ALIGNMENT_BYTES",
    "FORMAT",
    "FORMAT_VERSION",
    "SPLITS",
    "FeatureCache",
    "Rows",
    "Table",
    "View",
    "narrowed",
    "parts_directory",
    "serves",
    "shards_directory",
    "write_cache",
]
