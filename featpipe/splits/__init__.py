"""Train, validation and test splits, folds and groups; an image is never on two sides of a split."""

from __future__ import annotations

from featpipe.splits.groups import (
    find_listed_rows,
    load_column,
    load_groups,
    load_times,
    parse_table_column,
    parse_time,
)
from featpipe.splits.seeds import SplitSeed
from featpipe.splits.splits import (
    apply_predefined_split,
    compute_group_keys,
    compute_keys,
    find_cutoff_time,
    make_folds,
    make_holdout,
)

__all__ = [
    "SplitSeed",
    "apply_predefined_split",
    "compute_group_keys",
    "compute_keys",
    "find_cutoff_time",
    "find_listed_rows",
    "load_column",
    "load_groups",
    "load_times",
    "make_folds",
    "make_holdout",
    "parse_table_column",
    "parse_time",
]
