"""Why a cache is not what a request asks for: the facts that differ, and the images that do. No image is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from featpipe import archive
from featpipe.archive import Index
from featpipe.cache import FeatureCache, serves
from featpipe.fingerprint import differences
from featpipe.known import Known, Source
from featpipe.recipe import AUTO, Extraction
from featpipe.status import Status

__all__ = ["Comparison", "Samples", "with_cache", "with_request"]


@dataclass(frozen=True)
class Samples:
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
class Comparison:
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
    samples: Samples | None = None


def with_request(cache: FeatureCache, settings: Extraction, archives: Sequence[str] = ()) -> Comparison:
    """Compare a cache with what an extraction would make of these settings and archives."""
    from featpipe.extraction import facts_of, load_backbone  # two caches are compared without torch

    index = archive.index(archives, labels=settings.labels) if archives else None
    if settings.precision == AUTO:  # it may have been chosen, and would be again
        settings = replace(settings, precision=cache.facts["precision"])
    facts = facts_of(load_backbone(settings), settings)
    samples = None if index is None else _samples(cache, index)
    return Comparison(differences(cache.facts, facts), serves(cache.facts, facts), samples)


def with_cache(cache: FeatureCache, other: FeatureCache) -> Comparison:
    """Compare the facts of two caches."""
    lines = differences(cache.facts, other.facts, other=f"in {other.path}")
    return Comparison(lines, not lines)


def _samples(cache: FeatureCache, index: Index) -> Samples:
    known = Known()
    known.add(Source.of_cache(cache, cache.outputs))
    source, place = known.by_stamp(index.stamps())
    unchanged = source >= 0
    rows = {name: row for row, name in enumerate(cache.ids)}
    row_of = np.array([rows.get(name, -1) for name in index.ids], np.int64)
    faulty = (index.fault != Status.OK) & (row_of >= 0)
    faulty &= cache.status_codes[row_of] == index.fault  # without a stamp, but as it was
    unchanged |= faulty
    there = np.zeros(len(cache), bool)
    there[place[source >= 0]] = True
    there[row_of[row_of >= 0]] = True
    same = cache.ids == index.ids and np.array_equal(cache.split, index.split)
    return Samples(
        images=len(index),
        unchanged=int(np.count_nonzero(unchanged)),
        changed=int(np.count_nonzero(~unchanged & (row_of >= 0))),
        new=int(np.count_nonzero(~unchanged & (row_of < 0))),
        gone=int(np.count_nonzero(~there)),
        same_table=bool(same and cache.label_table.same_as(index.labels)),
    )
