"""Several caches of the same facts as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import SPLITS, FeatureCache, Table, write_cache
from featpipe.errors import CacheMismatchError, ConfigError
from featpipe.fingerprint import differences
from featpipe.labels import Labels, Task, order_classes
from featpipe.progress import Progress, Tell, quiet
from featpipe.recipe import Extraction
from featpipe.status import Status
from featpipe.strings import Strings
from featpipe.upkeep.copying import Copy, is_there, named, refuse_damaged_columns, writing

__all__ = ["merge"]


def merge(
    caches: Sequence[str | os.PathLike[str] | FeatureCache],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    shard_bytes: int = Extraction.shard_bytes,
    progress: Tell = quiet,
) -> FeatureCache:
    """One cache with the rows of several, one after the other.

    All must have been made from the same facts. A sample of the same id, the same image bytes and the same label (or
    none) in several of them is one row. An id that names another image, or the same one with another label, gets
    ``#2``, ``#3``, …. Rows are verified as they are copied; features are never all in memory.

    Classes are those of all caches, in their usual order. In a multi-label cache, a row that is labelled has 0 for the
    classes that only other caches know: whoever labelled it did not give it that label.

    Parameters
    ----------
    caches : sequence of path-like or FeatureCache
    out : path-like
        The new file, ``NAME.h5``; it may be one of ``caches``, with ``overwrite``.
    overwrite : bool
        Replace a cache of other rows at ``out``.
    shard_bytes : int
        Features larger than this are spread over several files of about this size.
    progress : callable
        Told what is going on, as :class:`featpipe.progress.Progress`.

    Returns
    -------
    FeatureCache

    Raises
    ------
    CacheMismatchError
        If facts, tasks or targets differ, if a sample is in two splits, or if ``out`` is a cache of other rows.
    CacheError
        If a row or a column is not as it was written, or the disk is full.

    Examples
    --------
    >>> cache = merge(["cache/a.h5", "cache/b.h5"], "cache/all.h5")              # doctest: +SKIP
    """
    opened = [cache if isinstance(cache, FeatureCache) else FeatureCache(cache) for cache in caches]
    if not opened:
        raise ConfigError("no cache to merge; give at least one")
    path = named(out)
    _refuse_others(opened)
    for cache in opened:
        refuse_damaged_columns(cache)
    rows = _Rows(opened)
    table = rows.table()
    progress(Progress("note", rows.told()))
    first = opened[0]
    with writing(path, first.fingerprint, progress):
        if is_there(path, first, table, one_file=False, overwrite=overwrite):
            progress(Progress("note", f"{path}: is there already, with the same rows"))
        else:
            copy = Copy(opened, rows.origin, rows.place, progress)
            facts, manifest = first.facts, _manifest(opened)
            write_cache(path, table, manifest, first.shapes, facts["storage"], copy.gather, shard_bytes)
    return FeatureCache(path)


def _refuse_others(caches: Sequence[FeatureCache]) -> None:
    """Only what was made from the same facts, and is labelled in the same way, is joined."""
    first = caches[0]
    for cache in caches[1:]:
        if cache.fingerprint != first.fingerprint or cache.shapes != first.shapes:
            differ = differences(cache.facts, first.facts, other=f"in {first.path}") or ["the shapes of its outputs"]
            raise CacheMismatchError(
                f"{cache.path}: was made otherwise ({'; '.join(differ)}); only caches of the same facts can be merged"
            )
    labelled = [cache for cache in caches if cache.task != "none"]
    for cache in labelled[1:]:
        if cache.task != labelled[0].task:
            raise CacheMismatchError(
                f"{cache.path}: its labels are {cache.task}, those of {labelled[0].path} {labelled[0].task}; "
                "extract both with labels of one kind"
            )
        if cache.task == "regression" and cache.classes != labelled[0].classes:
            raise CacheMismatchError(
                f"{cache.path}: its targets are {', '.join(cache.classes)}, those of {labelled[0].path} "
                f"{', '.join(labelled[0].classes)}; extract both with the same targets"
            )


def _manifest(caches: Sequence[FeatureCache]) -> dict[str, Any]:
    first = caches[0].manifest
    archives = [place for cache in caches for place in cache.manifest.get("archives") or []]
    return {
        "facts": first["facts"],
        "backbone": first.get("backbone"),
        "archives": list(dict.fromkeys(archives)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "merged_from": [
            {"cache": os.path.abspath(cache.path), "fingerprint": cache.fingerprint, "samples": len(cache)}
            for cache in caches
        ],
        "versions": {name: version(name) for name in ("featpipe", "h5py")},
    }


@dataclass(frozen=True, eq=False)
class _Joined:
    """The columns of some caches, one after the other."""

    status: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    stamps: NDArray[np.uint8]
    split: NDArray[np.uint8]
    labels: Labels

    @classmethod
    def of(cls, caches: Sequence[FeatureCache]) -> _Joined:
        return cls(
            np.concatenate([cache.status_codes for cache in caches]),
            np.concatenate([cache.digests for cache in caches]),
            np.concatenate([cache.stamps for cache in caches]),
            np.concatenate([cache.split for cache in caches]),
            _united([cache.label_table for cache in caches]),
        )


class _Rows:
    """Which rows of which caches become which rows of the new one.

    Attributes
    ----------
    origin, place : ndarray of shape (n,), int
        For each new row, the cache and the row there that its features come from.
    """

    def __init__(self, caches: Sequence[FeatureCache]) -> None:
        self._caches = caches
        self._starts = np.cumsum([0, *map(len, caches)])
        total = int(self._starts[-1])
        self._columns = _Joined.of(caches)
        self._known = self._columns.labels.known
        self._kept = np.ones(total, bool)
        self._features, self._label, self._split = np.arange(total), np.arange(total), np.arange(total)
        self._names: dict[int, str] = {}
        self._settle()
        taken = self._features[self._kept]
        self.origin = np.searchsorted(self._starts, taken, "right") - 1
        self.place = taken - self._starts[self.origin]

    def table(self) -> Table:
        columns, kept = self._columns, self._kept
        features = self._features[kept]
        return Table(
            self._ids(),
            columns.status[features],
            columns.digests[kept],
            columns.stamps[features],
            columns.split[self._split[kept]],
            columns.labels.take(self._label[kept]),
        )

    def told(self) -> str:
        doubles = int(np.count_nonzero(~self._kept))
        text = f"{np.count_nonzero(self._kept):,} rows of {len(self._caches)} cache{'s' * (len(self._caches) != 1)}"
        text += f"; {doubles:,} that several of them hold stand once" if doubles else ""
        return text + (f"; {len(self._names):,} ids that name other images got a #2" if self._names else "")

    def _ids(self) -> Strings:
        if self._kept.all() and not self._names:
            ends = np.cumsum([0, *(cache.ids.offsets[-1] for cache in self._caches)])
            pieces = [cache.ids.offsets[1:] + end for cache, end in zip(self._caches, ends, strict=False)]
            offsets = np.concatenate([np.zeros(1, np.int64), *pieces])
            return Strings(np.concatenate([cache.ids.data for cache in self._caches]), offsets)
        every = (name for cache in self._caches for name in cache.ids)
        kept = self._kept.tolist()
        return Strings.of(self._names.get(row, name) for row, name in enumerate(every) if kept[row])

    def _settle(self) -> None:
        """Join the rows that are one, and give the others of the same id names of their own."""
        groups: dict[str, list[int]] = {}
        for row in self._repeated():
            cache = int(np.searchsorted(self._starts, row, "right")) - 1
            name = self._caches[cache].ids[row - int(self._starts[cache])]
            group = groups.setdefault(name, [])
            same = next((first for first in group if self._are_one(first, row)), None)
            if same is None:
                group.append(row)
            else:
                self._join(same, row, name)
        others = [(row, name) for name, group in groups.items() for row in group[1:]]
        taken = {name for cache in self._caches for name in cache.ids} if others else set()
        for row, name in others:
            number = 2
            while f"{name}#{number}" in taken:
                number += 1
            self._names[row] = f"{name}#{number}"
            taken.add(self._names[row])

    def _repeated(self) -> list[int]:
        """The rows whose ids may be in several caches, ascending: mostly few, found without a set of all ids."""
        hashes = np.concatenate([np.fromiter(map(hash, cache.ids), np.int64, len(cache)) for cache in self._caches])
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        several = np.zeros(len(hashes), bool)
        several[order[1:][same]] = several[order[:-1][same]] = True
        return np.flatnonzero(several).tolist()

    def _are_one(self, first: int, row: int) -> bool:
        if not np.array_equal(self._columns.digests[first], self._columns.digests[row]):
            return False
        label = self._label[first]
        if not (self._known[label] and self._known[row]):
            return True
        values = self._columns.labels.values
        return np.array_equal(values[label], values[row])

    def _join(self, first: int, row: int, name: str) -> None:
        """What one cache does not know of a sample comes from the other."""
        self._kept[row] = False
        status, split = self._columns.status, self._columns.split
        if status[self._features[first]] != Status.OK and status[row] == Status.OK:
            self._features[first] = row
        if not self._known[self._label[first]]:
            self._label[first] = row
        here, there = split[self._split[first]], split[row]
        if not here:
            self._split[first] = row
        elif there not in (0, here):
            raise CacheMismatchError(
                f"{name}: is in split {SPLITS[here]} of one cache and {SPLITS[there]} of another; "
                "extract both with one table that says which"
            )


def _united(several: Sequence[Labels]) -> Labels:
    """Labels one after the other, under the classes of all."""
    task: Task = next((labels.task for labels in several if labels.task != "none"), "none")
    if task == "none":
        return Labels.none(sum(map(len, several)))
    classes = tuple(dict.fromkeys(name for labels in several for name in labels.classes))
    if task != "regression":
        classes = order_classes(classes)
    position = {name: code for code, name in enumerate(classes)}
    blocks = [
        _moved(labels, task, np.array([position[name] for name in labels.classes], np.int32), len(classes))
        for labels in several
    ]
    return Labels(task, np.concatenate(blocks), classes)


def _moved(labels: Labels, task: Task, codes: NDArray[np.int32], k: int) -> NDArray[Any]:
    """The values of some labels where class ``i`` of theirs is class ``codes[i]`` of ``k``."""
    n, known = len(labels), labels.known
    if task == "classification":
        values = np.full(n, -1, np.int32)
        values[known] = codes[labels.values[known]] if labels.task == task else 0
        return values
    if task == "regression":
        return labels.values if labels.task == task else np.full((n, k), np.nan)
    sets = np.full((n, k), -1, np.int8)
    if labels.task == task:
        sets[known] = 0
        sets[np.ix_(known, codes)] = labels.values[known]
    return sets
