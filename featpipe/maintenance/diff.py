"""Why a cache is not what a request asks for: the facts that differ, and the images that do. No image is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from featpipe import data
from featpipe.cache import EmbeddingLookup, EmbeddingSource, FeatureCache, can_reuse
from featpipe.config import AUTO, ExtractionConfig
from featpipe.data import Index
from featpipe.status import Status
from featpipe.storage import describe_differences

__all__ = ["CacheDiff", "SampleDiff", "diff_with_cache", "diff_with_request"]


@dataclass(frozen=True)
class SampleDiff:
    """The images of some archives beside those of a cache.

    Attributes
    ----------
    images : int
    unchanged : int
        In the cache, with the same place, size and time.
    changed : int
        In the cache under the same id, with another place, size or time, or to be tried again.
    new : int
    gone : int
        Rows of the cache that the archives have no more.
    same_table : bool
        Whether ids, labels and splits are the cache's, in its order.
    """

    images: int
    unchanged: int
    changed: int
    new: int
    gone: int
    same_table: bool


@dataclass(frozen=True)
class CacheDiff:
    """A cache beside a request or another cache.

    Attributes
    ----------
    differences : list of str
        One line for each fact that differs.
    usable : bool
        Whether the cache holds all outputs that are asked for, made from the facts that are asked for: an extraction
        then copies its embeddings, even if it holds others too.
    samples : Samples, optional
        With archives.
    """

    differences: list[str]
    usable: bool
    samples: SampleDiff | None = None


def diff_with_request(cache: FeatureCache, config: ExtractionConfig, archives: Sequence[str] = ()) -> CacheDiff:
    """Compare a cache with what an extraction would make of these settings and archives."""
    from featpipe.extraction import load_backbone, make_facts

    index = data.index(archives, labels=config.labels, modality=cache.modality) if archives else None
    if config.precision == AUTO:  # it may have been chosen, and would be again
        config = replace(config, precision=cache.facts["precision"])
    requested_facts = make_facts(load_backbone(config), config)
    samples = None if index is None else _diff_samples(cache, index)
    return CacheDiff(
        describe_differences(cache.facts, requested_facts), can_reuse(cache.facts, requested_facts), samples
    )


def diff_with_cache(cache: FeatureCache, other: FeatureCache) -> CacheDiff:
    """Compare the facts of two caches."""
    fact_differences = describe_differences(cache.facts, other.facts, expected_label=f"in {other.path}")
    return CacheDiff(fact_differences, not fact_differences)


def _diff_samples(cache: FeatureCache, index: Index) -> SampleDiff:
    lookup = EmbeddingLookup()
    lookup.add(EmbeddingSource.from_cache(cache, cache.outputs))
    source_indices, source_row = lookup.find_by_stamp(index.compute_stamps())
    is_unchanged = source_indices >= 0
    cache_row_by_id = {sample_id: row for row, sample_id in enumerate(cache.ids)}
    cache_rows = np.array([cache_row_by_id.get(sample_id, -1) for sample_id in index.ids], np.int64)
    is_same_fault = (index.fault != Status.OK) & (cache_rows >= 0)
    is_same_fault &= cache.status_codes[cache_rows] == index.fault  # without a stamp, but as it was
    is_unchanged |= is_same_fault
    is_present = np.zeros(len(cache), bool)
    is_present[source_row[source_indices >= 0]] = True
    is_present[cache_rows[cache_rows >= 0]] = True
    has_same_order = cache.ids == index.ids and np.array_equal(cache.split, index.split)
    return SampleDiff(
        images=len(index),
        unchanged=int(np.count_nonzero(is_unchanged)),
        changed=int(np.count_nonzero(~is_unchanged & (cache_rows >= 0))),
        new=int(np.count_nonzero(~is_unchanged & (cache_rows < 0))),
        gone=int(np.count_nonzero(~is_present)),
        same_table=bool(has_same_order and cache.label_table.same_as(index.labels)),
    )
