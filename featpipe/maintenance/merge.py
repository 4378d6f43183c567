"""Merge several caches with equal facts into one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
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

logger = logging.getLogger(__name__)


def merge(
    caches: Sequence[str | os.PathLike[str] | FeatureCache],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    shard_bytes: int = ExtractionConfig.shard_bytes,
    progress: ProgressCallback = ignore_progress,
) -> FeatureCache:
    """Concatenate the rows of several caches into one cache.

    All caches must have equal facts. A sample that occurs in several of them with the same id, image bytes and label
    (or no label) becomes one row. If an id is used for different images, or for the same image with different labels,
    its later rows get the suffix ``#2``, ``#3``, …. Rows are verified as they are copied; the features are never all in
    memory.

    The classes are the union over all caches, in their usual order. In a multi-label cache, a labelled row has 0 for
    the classes that only other caches have, because it was labelled without them.

    Parameters
    ----------
    caches : sequence of path-like or FeatureCache
    out : path-like
        The new file, ``NAME.h5``. With ``overwrite`` it may be one of ``caches``.
    overwrite : bool
        Replace a cache with other rows at ``out``.
    shard_bytes : int
        Features larger than this are split into several files of about this size.
    progress : callable
        Called with a :class:`featpipe.runtime.progress.Progress`.

    Returns
    -------
    FeatureCache

    Raises
    ------
    CacheMismatchError
        If facts, tasks or targets differ, if a sample is in two splits, or if ``out`` is a cache with other rows.
    CacheError
        If a row or a column does not match its checksum, or the disk is full.

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
            logger.info(f"{path}: up to date, with the same rows")
        else:
            copier = RowCopier(sources, merged_rows.source_indices, merged_rows.source_rows, progress)
            facts, manifest = first_source.facts, _make_manifest(sources)
            write_cache(path, table, manifest, first_source.shapes, facts["storage"], copier.gather, shard_bytes)
    return FeatureCache(path)


def _check_compatible(caches: Sequence[FeatureCache]) -> None:
    """Check that the caches have equal facts and the same label task and targets."""
    first = caches[0]
    for cache in caches[1:]:
        if cache.fingerprint != first.fingerprint or cache.shapes != first.shapes:
            mismatches = describe_differences(cache.facts, first.facts, expected_label=f"in {first.path}") or [
                "the shapes of its outputs"
            ]
            raise CacheMismatchError(
                f"{cache.path}: has other facts ({'; '.join(mismatches)}); only caches with equal facts can be merged"
            )
    labeled = [cache for cache in caches if cache.task != "none"]
    for cache in labeled[1:]:
        if cache.task != labeled[0].task:
            raise CacheMismatchError(
                f"{cache.path}: its labels are {cache.task}, those of {labeled[0].path} {labeled[0].task}; "
                "extract both with labels of the same task"
            )
        if cache.task == "regression" and cache.classes != labeled[0].classes:
            raise CacheMismatchError(
                f"{cache.path}: its targets are {', '.join(cache.classes)}, those of {labeled[0].path} "
                f"{', '.join(labeled[0].classes)}; extract both with the same targets"
            )


def _make_manifest(caches: Sequence[FeatureCache]) -> dict[str, Any]:
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


def _concatenate_tables(caches: Sequence[FeatureCache]) -> SampleTable:
    n_id_bytes = np.cumsum([0, *(cache.ids.offsets[-1] for cache in caches)])
    id_offsets = [cache.ids.offsets[1:] + start for cache, start in zip(caches, n_id_bytes[:-1], strict=True)]
    return SampleTable(
        StringColumn(
            np.concatenate([cache.ids.data for cache in caches]), np.concatenate([np.zeros(1, np.int64), *id_offsets])
        ),
        np.concatenate([cache.status_codes for cache in caches]),
        np.concatenate([cache.digests for cache in caches]),
        np.concatenate([cache.stamps for cache in caches]),
        np.concatenate([cache.split for cache in caches]),
        _merge_labels([cache.label_table for cache in caches]),
    )


class _MergedRows:
    """The mapping from rows of the source caches to rows of the merged cache.

    Attributes
    ----------
    source_indices, source_rows : ndarray of shape (n,), int
        For each new row, the position of the source cache and the row in it whose features are copied.
    """

    def __init__(self, caches: Sequence[FeatureCache]) -> None:
        self._n_caches = len(caches)
        self._table = _concatenate_tables(caches)
        n_rows = len(self._table.ids)
        self._is_labeled = self._table.labels.known
        self._is_kept = np.ones(n_rows, bool)
        self._feature_rows, self._label_rows, self._split_rows = np.arange(n_rows), np.arange(n_rows), np.arange(n_rows)
        self._new_names: dict[int, str] = {}
        self._resolve_duplicates()
        feature_rows, row_starts = self._feature_rows[self._is_kept], np.cumsum([0, *map(len, caches)])
        self.source_indices = np.searchsorted(row_starts, feature_rows, "right") - 1
        self.source_rows = feature_rows - row_starts[self.source_indices]

    def table(self) -> SampleTable:
        table, is_kept = self._table, self._is_kept
        feature_rows, ids = self._feature_rows[is_kept], table.ids
        if self._new_names or not is_kept.all():
            ids = StringColumn.from_strings(
                self._new_names.get(row, sample_id)
                for row, (sample_id, kept) in enumerate(zip(ids, is_kept.tolist(), strict=True))
                if kept
            )
        return SampleTable(
            ids,
            table.status[feature_rows],
            table.digests[is_kept],
            table.stamps[feature_rows],
            table.split[self._split_rows[is_kept]],
            table.labels.take(self._label_rows[is_kept]),
        )

    def describe(self) -> str:
        n_duplicates = int(np.count_nonzero(~self._is_kept))
        text = f"{np.count_nonzero(self._is_kept):,} rows of {self._n_caches} cache{'s' * (self._n_caches != 1)}"
        text += f"; {n_duplicates:,} duplicate rows were merged" if n_duplicates else ""
        return text + (
            f"; {len(self._new_names):,} ids of different images got a number such as #2" if self._new_names else ""
        )

    def _resolve_duplicates(self) -> None:
        """Merge the rows of the same sample, and rename different samples that share an id."""
        rows_by_id: dict[str, list[int]] = {}
        for row in self._find_repeated_ids():
            sample_id = self._table.ids[row]
            group = rows_by_id.setdefault(sample_id, [])
            duplicate = next((candidate for candidate in group if self._is_same_sample(candidate, row)), None)
            if duplicate is None:
                group.append(row)
            else:
                self._merge_row(duplicate, row, sample_id)
        renamed_rows = [(row, sample_id) for sample_id, group in rows_by_id.items() for row in group[1:]]
        used_names = set(self._table.ids) if renamed_rows else set()
        for row, sample_id in renamed_rows:
            suffix = 2
            while f"{sample_id}#{suffix}" in used_names:
                suffix += 1
            self._new_names[row] = f"{sample_id}#{suffix}"
            used_names.add(self._new_names[row])

    def _find_repeated_ids(self) -> list[int]:
        """Find rows whose ids may be repeated, in ascending order. Comparing hashes avoids a set of all ids."""
        hashes = np.fromiter(map(hash, self._table.ids), np.int64, len(self._table.ids))
        order = np.argsort(hashes, kind="stable")
        is_repeated = hashes[order][1:] == hashes[order][:-1]
        is_candidate = np.zeros(len(hashes), bool)
        is_candidate[order[1:][is_repeated]] = is_candidate[order[:-1][is_repeated]] = True
        return np.flatnonzero(is_candidate).tolist()

    def _is_same_sample(self, first: int, row: int) -> bool:
        if not np.array_equal(self._table.digests[first], self._table.digests[row]):
            return False
        label_row = self._label_rows[first]
        if not (self._is_labeled[label_row] and self._is_labeled[row]):
            return True
        values = self._table.labels.values
        return np.array_equal(values[label_row], values[row])

    def _merge_row(self, first: int, row: int, sample_id: str) -> None:
        """Merge a duplicate row: features, label and split come from the later cache where the first has none."""
        self._is_kept[row] = False
        status, split = self._table.status, self._table.split
        if status[self._feature_rows[first]] != Status.OK and status[row] == Status.OK:
            self._feature_rows[first] = row
        if not self._is_labeled[self._label_rows[first]]:
            self._label_rows[first] = row
        first_split, row_split = split[self._split_rows[first]], split[row]
        if not first_split:
            self._split_rows[first] = row
        elif row_split not in (0, first_split):
            raise CacheMismatchError(
                f"{sample_id}: is in split {SPLIT_NAMES[first_split]} in one cache and {SPLIT_NAMES[row_split]} in "
                "another; extract both with the same table of splits"
            )


def _merge_labels(label_tables: Sequence[Labels]) -> Labels:
    """Concatenate labels under the union of their classes."""
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
    """Map label values to ``k`` new classes: class ``i`` of ``labels`` becomes class ``class_codes[i]``."""
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
