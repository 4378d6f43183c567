"""Several caches of the same facts as one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import SPLIT_NAMES, FeatureCache, SampleTable, write_cache
from featpipe.config import ExtractionConfig
from featpipe.data import Labels, LabelTask, order_classes
from featpipe.errors import CacheMismatchError, ConfigError
from featpipe.maintenance.copy_rows import (
    RowCopier,
    check_columns,
    is_up_to_date,
    lock_for_writing,
    prepare_output_path,
)
from featpipe.runtime import ProgressCallback, ignore_progress
from featpipe.status import Status
from featpipe.storage import StringColumn, describe_differences

__all__ = ["merge"]

logger = logging.getLogger(__name__)


def merge(
    caches: Sequence[str | os.PathLike[str] | FeatureCache],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    shard_bytes: int = ExtractionConfig.shard_bytes,
    progress: ProgressCallback = ignore_progress,
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
        Told what is going on, as :class:`featpipe.runtime.progress.Progress`.

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
    sources = [cache if isinstance(cache, FeatureCache) else FeatureCache(cache) for cache in caches]
    if not sources:
        raise ConfigError("no cache to merge; give at least one")
    path = prepare_output_path(out)
    _check_compatible(sources)
    for cache in sources:
        check_columns(cache)
    merged_rows = _MergedRows(sources)
    table = merged_rows.table()
    logger.info(merged_rows.describe())
    first_source = sources[0]
    with lock_for_writing(path, first_source.fingerprint):
        if is_up_to_date(path, first_source, table, one_file=False, overwrite=overwrite):
            logger.info(f"{path}: is there already, with the same rows")
        else:
            copier = RowCopier(sources, merged_rows.source_indices, merged_rows.source_rows, progress)
            facts, manifest = first_source.facts, _manifest(sources)
            write_cache(path, table, manifest, first_source.shapes, facts["storage"], copier.gather, shard_bytes)
    return FeatureCache(path)


def _check_compatible(caches: Sequence[FeatureCache]) -> None:
    """Only what was made from the same facts, and is labelled in the same way, is joined."""
    first = caches[0]
    for cache in caches[1:]:
        if cache.fingerprint != first.fingerprint or cache.shapes != first.shapes:
            mismatches = describe_differences(cache.facts, first.facts, expected_label=f"in {first.path}") or [
                "the shapes of its outputs"
            ]
            raise CacheMismatchError(
                f"{cache.path}: was made otherwise ({'; '.join(mismatches)}); only caches of the same facts can be merged"
            )
    labeled = [cache for cache in caches if cache.task != "none"]
    for cache in labeled[1:]:
        if cache.task != labeled[0].task:
            raise CacheMismatchError(
                f"{cache.path}: its labels are {cache.task}, those of {labeled[0].path} {labeled[0].task}; "
                "extract both with labels of one kind"
            )
        if cache.task == "regression" and cache.classes != labeled[0].classes:
            raise CacheMismatchError(
                f"{cache.path}: its targets are {', '.join(cache.classes)}, those of {labeled[0].path} "
                f"{', '.join(labeled[0].classes)}; extract both with the same targets"
            )


def _manifest(caches: Sequence[FeatureCache]) -> dict[str, Any]:
    first = caches[0].manifest
    archive_paths = [archive_path for cache in caches for archive_path in cache.manifest.get("archives") or []]
    return {
        "facts": first["facts"],
        "backbone": first.get("backbone"),
        "archives": list(dict.fromkeys(archive_paths)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "merged_from": [
            {"cache": os.path.abspath(cache.path), "fingerprint": cache.fingerprint, "samples": len(cache)}
            for cache in caches
        ],
        "versions": {name: version(name) for name in ("featpipe", "h5py")},
    }


@dataclass(frozen=True, eq=False)
class _ConcatenatedColumns:
    """The columns of some caches, one after the other."""

    status: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    stamps: NDArray[np.uint8]
    split: NDArray[np.uint8]
    labels: Labels

    @classmethod
    def from_caches(cls, caches: Sequence[FeatureCache]) -> _ConcatenatedColumns:
        return cls(
            np.concatenate([cache.status_codes for cache in caches]),
            np.concatenate([cache.digests for cache in caches]),
            np.concatenate([cache.stamps for cache in caches]),
            np.concatenate([cache.split for cache in caches]),
            _merge_labels([cache.label_table for cache in caches]),
        )


class _MergedRows:
    """Which rows of which caches become which rows of the new one.

    Attributes
    ----------
    origin, place : ndarray of shape (n,), int
        For each new row, the cache and the row there that its features come from.
    """

    def __init__(self, caches: Sequence[FeatureCache]) -> None:
        self._caches = caches
        self._row_starts = np.cumsum([0, *map(len, caches)])
        n_rows = int(self._row_starts[-1])
        self._columns = _ConcatenatedColumns.from_caches(caches)
        self._is_labeled = self._columns.labels.known
        self._is_kept = np.ones(n_rows, bool)
        self._feature_rows, self._label_rows, self._split_rows = np.arange(n_rows), np.arange(n_rows), np.arange(n_rows)
        self._new_names: dict[int, str] = {}
        self._resolve_duplicates()
        feature_rows = self._feature_rows[self._is_kept]
        self.source_indices = np.searchsorted(self._row_starts, feature_rows, "right") - 1
        self.source_rows = feature_rows - self._row_starts[self.source_indices]

    def table(self) -> SampleTable:
        columns, is_kept = self._columns, self._is_kept
        feature_rows = self._feature_rows[is_kept]
        return SampleTable(
            self._ids(),
            columns.status[feature_rows],
            columns.digests[is_kept],
            columns.stamps[feature_rows],
            columns.split[self._split_rows[is_kept]],
            columns.labels.take(self._label_rows[is_kept]),
        )

    def describe(self) -> str:
        n_duplicates = int(np.count_nonzero(~self._is_kept))
        text = f"{np.count_nonzero(self._is_kept):,} rows of {len(self._caches)} cache{'s' * (len(self._caches) != 1)}"
        text += f"; {n_duplicates:,} that several of them hold stand once" if n_duplicates else ""
        return text + (f"; {len(self._new_names):,} ids that name other images got a #2" if self._new_names else "")

    def _ids(self) -> StringColumn:
        if self._is_kept.all() and not self._new_names:
            data_offsets = np.cumsum([0, *(cache.ids.offsets[-1] for cache in self._caches)])
            offset_blocks = [
                cache.ids.offsets[1:] + data_offset
                for cache, data_offset in zip(self._caches, data_offsets, strict=False)
            ]
            offsets = np.concatenate([np.zeros(1, np.int64), *offset_blocks])
            return StringColumn(np.concatenate([cache.ids.data for cache in self._caches]), offsets)
        all_ids = (sample_id for cache in self._caches for sample_id in cache.ids)
        is_kept = self._is_kept.tolist()
        return StringColumn.from_strings(
            self._new_names.get(row, sample_id) for row, sample_id in enumerate(all_ids) if is_kept[row]
        )

    def _resolve_duplicates(self) -> None:
        """Join the rows that are one, and give the others of the same id names of their own."""
        rows_by_id: dict[str, list[int]] = {}
        for row in self._find_repeated_ids():
            cache_index = int(np.searchsorted(self._row_starts, row, "right")) - 1
            sample_id = self._caches[cache_index].ids[row - int(self._row_starts[cache_index])]
            group = rows_by_id.setdefault(sample_id, [])
            duplicate = next((candidate for candidate in group if self._is_same_sample(candidate, row)), None)
            if duplicate is None:
                group.append(row)
            else:
                self._merge_row(duplicate, row, sample_id)
        renamed_rows = [(row, sample_id) for sample_id, group in rows_by_id.items() for row in group[1:]]
        used_names = {sample_id for cache in self._caches for sample_id in cache.ids} if renamed_rows else set()
        for row, sample_id in renamed_rows:
            suffix = 2
            while f"{sample_id}#{suffix}" in used_names:
                suffix += 1
            self._new_names[row] = f"{sample_id}#{suffix}"
            used_names.add(self._new_names[row])

    def _find_repeated_ids(self) -> list[int]:
        """The rows whose ids may be in several caches, ascending: mostly few, found without a set of all ids."""
        hashes = np.concatenate([np.fromiter(map(hash, cache.ids), np.int64, len(cache)) for cache in self._caches])
        order = np.argsort(hashes, kind="stable")
        is_repeated = hashes[order][1:] == hashes[order][:-1]
        is_candidate = np.zeros(len(hashes), bool)
        is_candidate[order[1:][is_repeated]] = is_candidate[order[:-1][is_repeated]] = True
        return np.flatnonzero(is_candidate).tolist()

    def _is_same_sample(self, first: int, row: int) -> bool:
        if not np.array_equal(self._columns.digests[first], self._columns.digests[row]):
            return False
        label_row = self._label_rows[first]
        if not (self._is_labeled[label_row] and self._is_labeled[row]):
            return True
        values = self._columns.labels.values
        return np.array_equal(values[label_row], values[row])

    def _merge_row(self, first: int, row: int, sample_id: str) -> None:
        """What one cache does not know of a sample comes from the other."""
        self._is_kept[row] = False
        status, split = self._columns.status, self._columns.split
        if status[self._feature_rows[first]] != Status.OK and status[row] == Status.OK:
            self._feature_rows[first] = row
        if not self._is_labeled[self._label_rows[first]]:
            self._label_rows[first] = row
        first_split, row_split = split[self._split_rows[first]], split[row]
        if not first_split:
            self._split_rows[first] = row
        elif row_split not in (0, first_split):
            raise CacheMismatchError(
                f"{sample_id}: is in split {SPLIT_NAMES[first_split]} of one cache and {SPLIT_NAMES[row_split]} of another; "
                "extract both with one table that says which"
            )


def _merge_labels(label_tables: Sequence[Labels]) -> Labels:
    """Labels one after the other, under the classes of all."""
    task: LabelTask = next((labels.task for labels in label_tables if labels.task != "none"), "none")
    if task == "none":
        return Labels.unlabeled(sum(map(len, label_tables)))
    classes = tuple(dict.fromkeys(name for labels in label_tables for name in labels.classes))
    if task != "regression":
        classes = order_classes(classes)
    class_index = {name: code for code, name in enumerate(classes)}
    blocks = [
        _remap_values(labels, task, np.array([class_index[name] for name in labels.classes], np.int32), len(classes))
        for labels in label_tables
    ]
    return Labels(task, np.concatenate(blocks), classes)


def _remap_values(labels: Labels, task: LabelTask, class_codes: NDArray[np.int32], k: int) -> NDArray[Any]:
    """The values of some labels where class ``i`` of theirs is class ``codes[i]`` of ``k``."""
    n, is_labeled = len(labels), labels.known
    if task == "classification":
        values = np.full(n, -1, np.int32)
        values[is_labeled] = class_codes[labels.values[is_labeled]] if labels.task == task else 0
        return values
    if task == "regression":
        return labels.values if labels.task == task else np.full((n, k), np.nan)
    label_matrix = np.full((n, k), -1, np.int8)
    if labels.task == task:
        label_matrix[is_labeled] = 0
        label_matrix[np.ix_(is_labeled, class_codes)] = labels.values[is_labeled]
    return label_matrix
