"""Compare a cache with a request: the facts and the images that differ. No image is read."""

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


@dataclass(frozen=True)
class SampleDiff:
    """The images of archives compared with those of a cache.

    Attributes
    ----------
    images : int
        Number of images in the archives.
    unchanged : int
        Images in the cache with the same location, size and modification time.
    changed : int
        Images whose id is in the cache, but with another location, size or modification time, or with a status to
        retry.
    new : int
        Images that are not in the cache.
    gone : int
        Rows of the cache whose images are no longer in the archives.
    same_table : bool
        Whether ids, labels and splits equal those of the cache, in the same order.
    """

    images: int
    unchanged: int
    changed: int
    new: int
    gone: int
    same_table: bool


@dataclass(frozen=True)
class CacheDiff:
    """The result of comparing a cache with a request or with another cache.

    Attributes
    ----------
    differences : list of str
        One line for each fact that differs.
    usable : bool
        Whether the cache holds all requested outputs with equal facts. An extraction then copies its embeddings, even
        if the cache holds further outputs.
    samples : SampleDiff, optional
        The compared images, if archives were given.
    """

    differences: list[str]
    usable: bool
    samples: SampleDiff | None = None


def diff_with_request(cache: FeatureCache, config: ExtractionConfig, archives: Sequence[str] = ()) -> CacheDiff:
    """Compare a cache with the result of an extraction with these settings and archives."""
    from featpipe.extraction import load_backbone, make_facts

    index = data.index(archives, labels=config.labels, modality=cache.modality) if archives else None
    if config.precision == AUTO:  # the cached precision may be the automatic choice
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
    # an image with a fault has no stamp; it is unchanged if its status is
    has_fault = (index.fault != Status.OK) & (cache_rows >= 0)
    is_unchanged |= has_fault & (cache.status_codes[cache_rows] == index.fault)
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
