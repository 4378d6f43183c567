"""The public reader of a cache: memory-mapped arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featpipe.cache.format import (
    SPLIT_NAMES,
    SampleTable,
    compute_column_digest,
    compute_row_checksums,
    parse_version,
    parts_directory,
)
from featpipe.cache.mmap import prefetch, release_pages
from featpipe.cache.open import CacheContents, open_cache
from featpipe.config import unknown_name_error
from featpipe.data import DEFAULT_MODALITY, Labels
from featpipe.errors import CacheError, CacheFormatError, CacheIncompleteError, CacheMismatchError, ConfigError
from featpipe.status import Status
from featpipe.storage import StringColumn

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

RowSelector = slice | NDArray[np.bool_] | NDArray[np.integer[Any]] | list[int]
"""Some rows of a cache: a slice, a mask of shape (n,), or row numbers in any order."""

READ_BLOCK_BYTES = 16 * 2**20
_OPEN_ATTEMPTS = 3
SCATTERED_ROWS_PER_READ = 1024  # each row reads the pages around it into memory
PREFETCH_RUNS = 8  # blocks of rows that are read ahead

_KNOWN_STATUSES = frozenset(Status)


class FeatureCache:
    """The embeddings of an archive, memory-mapped from a cache file.

    Opening validates the layout, reads the manifest and maps the file into memory. It takes milliseconds for a file of
    any size. The object holds no HDF5 handle: it can be forked, pickled (as its path) and read by many processes. If an
    extraction replaces the file, an open cache still shows the old file. Unpickling it then is an error, because the
    rows may differ.

    Parameters
    ----------
    path : path-like
    salvage : bool
        Open a cache even if shards are missing; :meth:`whole_rows` tells which rows are intact.

    Attributes
    ----------
    X : ndarray of shape (m, d), float32
        Features of the first output in the usable rows: status ``ok`` and, in a cache with labels, a label. Mapped if
        these are all rows of a float32 cache, else a copy.
    y : ndarray of shape (m,) or (m, k)
        Labels of the same rows: class names, targets, or a 0/1 matrix. None without labels.
    ids : StringColumn of length n
    labels : ndarray of n labels or None
        Like ``y``, for all rows; None (classes) or NaN (targets) for rows without a label.
    classes : tuple of str
    status : ndarray of shape (n,), str
        ``"ok"``, or the reason why the row has no features.
    manifest : dict

    Raises
    ------
    CacheIncompleteError
        If an extraction to this path has not finished.
    CacheFormatError
        If the file is not a cache that this version can read.
    CacheError
        If the file does not exist.

    Examples
    --------
    >>> cache = FeatureCache("cache/photos.h5")                    # doctest: +SKIP
    >>> LogisticRegression().fit(cache.X, cache.y)                 # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str], *, salvage: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise _missing_cache_error(self.path)
        contents = self._load_contents()
        if contents.lost_shards and not salvage:
            raise CacheFormatError(
                f"{self.path}: {len(contents.lost_shards)} of its {len(contents.shards)} shards are missing "
                f"or damaged, such as {contents.lost_shards[0]!r}; restore them, or embed their rows again with "
                f"`featpipe verify --repair {self.path}`"
            )
        self.manifest, self._columns = contents.manifest, contents.columns
        self._shards, self._shard_files = contents.shards, contents.shard_files
        self.lost_shards = contents.lost_shards
        self._manifest_digest = contents.manifest_digest

    def _load_contents(self) -> CacheContents:
        """Open the file. Retry if it was replaced meanwhile and its old shards were removed."""
        try:
            for _ in range(_OPEN_ATTEMPTS):
                stat_before = os.stat(self.path)
                contents = open_cache(self.path)
                if not contents.lost_shards or os.path.samestat(stat_before, os.stat(self.path)):
                    break
        except OSError as error:
            raise CacheError(f"{self.path}: cannot be read ({error.strerror or error}); grant access to it") from None
        return contents

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_cache, (self.path.absolute(), self._manifest_digest, bool(self.lost_shards))

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}, n={len(self)}, outputs={list(self.outputs)})"

    def __len__(self) -> int:
        return len(self._columns["samples/status"])

    @property
    def fingerprint(self) -> str:
        """Digest of the facts that determine the embeddings, as 64 hexadecimal digits."""
        return str(self.manifest["fingerprint"])

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that determine the embeddings: weights, transform, outputs, precision, extraction code."""
        return dict(self.manifest["facts"])

    @property
    def modality(self) -> str:
        """The modality of the samples, a key of `featpipe.data.MODALITIES`."""
        return str(self.facts["backbone"].get("modality", DEFAULT_MODALITY))

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.manifest["outputs"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each output."""
        return {name: tuple(shape) for name, shape in self.manifest["outputs"].items()}

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def task(self) -> str:
        return str(self.manifest["task"])

    @property
    def shard_files(self) -> tuple[Path, ...]:
        """The shard files; empty for a cache in one file."""
        return tuple(dict.fromkeys(self._shard_files))  # shards with identical rows share a file

    @property
    def shard_bytes(self) -> int | None:
        """Bytes of features in a shard, as for :func:`write_cache`; None for a cache in one file."""
        if not self._shards:
            return None
        first_shard = self._shards[0]
        return sum(self.features(output)[first_shard.start : first_shard.stop].nbytes for output in self.outputs)

    @property
    def file_bytes(self) -> int:
        """Size on disk, including the shards."""
        return sum(file.stat().st_size for file in (self.path, *self.shard_files))

    @cached_property
    def ids(self) -> StringColumn:
        offsets = self._columns["samples/id_offsets"]
        self._require(bool((offsets[1:] >= offsets[:-1]).all()), "samples/id_offsets does not ascend")
        return StringColumn(self._columns["samples/id_bytes"], offsets)

    @property
    def status_codes(self) -> NDArray[np.uint8]:
        return self._columns["samples/status"]

    @property
    def status(self) -> NDArray[np.str_]:
        return np.array([_get_status_name(code) for code in range(256)])[self.status_codes]

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which rows have features, shape (n,)."""
        return np.asarray(self.status_codes == Status.OK)

    @property
    def digests(self) -> NDArray[np.uint8]:
        """SHA-256 of the bytes of each image, shape (n, 32)."""
        return self._columns["samples/digest"]

    @property
    def stamps(self) -> NDArray[np.uint8]:
        return self._columns["samples/stamp"]

    @cached_property
    def split(self) -> NDArray[np.uint8]:
        """The split given with the labels, as indices into ``SPLIT_NAMES``, shape (n,)."""
        split = self._columns["samples/split"]
        self._require(not len(split) or int(split.max()) < len(SPLIT_NAMES), "samples/split holds codes of no split")
        return split

    @cached_property
    def label_table(self) -> Labels:
        """The labels as codes, targets or a 0/1 matrix, with the names of classes or targets."""
        if self.task == "none":
            return Labels.unlabeled(len(self))
        values = self._columns["labels/values"]
        if self.task != "regression" and values.size:
            max_code = 1 if self.task == "multilabel" else len(self.classes) - 1
            in_range = int(values.min()) >= -1 and int(values.max()) <= max_code
            self._require(in_range, "labels/values holds codes that are no class")
        return Labels(self.task, values, self.classes)  # type: ignore[arg-type]

    def _require(self, condition: bool, problem: str) -> None:
        """Check a condition on first use, because the check takes time proportional to n."""
        if not condition:
            raise CacheFormatError(f"{self.path}: {problem}; the file is damaged: extract again")

    @property
    def labels(self) -> NDArray[Any] | None:
        return None if self.task == "none" else self.label_table.y

    def features(self, output: str | None = None) -> NDArray[np.floating]:
        """All rows of one output, memory-mapped and read-only.

        Parameters
        ----------
        output : str, optional
            One of ``outputs``; the first by default.

        Returns
        -------
        ndarray of shape (n, d), or (n, c, h, w) for feature maps
            In the stored dtype, float32 or float16; NaN in rows whose status is not ``ok``.
        """
        return self._columns[f"features/{self._resolve_output(output)}"]

    def _resolve_output(self, output: str | None) -> str:
        name = self.outputs[0] if output is None else output
        if name not in self.outputs:
            raise unknown_name_error("output", name, self.outputs)
        return name

    def read(
        self, rows: RowSelector | None = None, output: str | None = None, dtype: DTypeLike = np.float32
    ) -> NDArray[np.floating]:
        """Read selected rows of one output, without loading the others.

        Parameters
        ----------
        rows : slice, mask of shape (n,), or row numbers, optional
            All rows by default.
        output : str, optional
            One of ``outputs``; the first by default.
        dtype : dtype
            Features with another stored dtype are converted block by block.

        Returns
        -------
        ndarray of shape (m, …)
            Mapped and read-only if ``rows`` is a slice and the dtype is the stored one, else a copy.

        Examples
        --------
        >>> cache.read(slice(0, 256)).shape, cache.read(cache.split == 1).shape      # doctest: +SKIP
        ((256, 1280), (5120, 1280))
        """
        features = self.features(output)
        _check_dtype(dtype)
        selection = _resolve_rows(rows, len(self))
        if isinstance(selection, slice):
            source = features[selection]
            if source.dtype == np.dtype(dtype):
                return source
            result = np.empty(source.shape, dtype)
            for start, stop in _iter_blocks(len(source), source[:1].nbytes):
                result[start:stop] = source[start:stop]
            return result
        result = np.empty((len(selection), *features.shape[1:]), dtype)
        if result.dtype == features.dtype:
            return np.take(features, selection, axis=0, out=result, mode="clip")  # mode="raise" makes another copy
        for start, stop in _iter_blocks(len(selection), features[:1].nbytes):
            result[start:stop] = np.take(features, selection[start:stop], axis=0, mode="clip")
        return result

    def view(self, rows: RowSelector | None = None, output: str | None = None) -> FeatureView:
        """Make a lazy view of selected rows, for data that do not fit into memory. Slicing reads the rows.

        Parameters
        ----------
        rows : slice, mask of shape (n,), or row numbers, optional
            All rows by default.
        output : str, optional
            One of ``outputs``; the first by default.
        """
        selection = _resolve_rows(rows, len(self))
        row_indices = np.arange(len(self))[selection] if isinstance(selection, slice) else selection
        return FeatureView(self.features(output), row_indices, mapped=True)

    def batches(
        self,
        size: int,
        rows: RowSelector | None = None,
        output: str | None = None,
        seed: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.floating]]]:
        """Yield batches of rows with their row numbers.

        Parameters
        ----------
        size : int
            Rows in a batch; the last batch may have fewer.
        rows : slice, mask of shape (n,), or row numbers, optional
            ``usable`` by default.
        output : str, optional
            One of ``outputs``; the first by default.
        seed : int, optional
            Seed for shuffling. By default the batches keep the order of ``rows``.
        dtype : dtype
            Dtype of the features.

        Yields
        ------
        rows : ndarray of shape (b,), int
        features : ndarray of shape (b, …)
        """
        if not isinstance(size, Integral) or size < 1:
            raise ConfigError(f"size of a batch is {size!r}; it must be a whole number of at least 1")
        output = self._resolve_output(output)
        _check_dtype(dtype)
        selection = _resolve_rows(self.usable if rows is None else rows, len(self))
        row_indices = np.arange(len(self))[selection] if isinstance(selection, slice) else selection
        if seed is not None:
            row_indices = np.random.default_rng(seed).permutation(row_indices)
        starts = range(0, len(row_indices), size)
        # a generator expression, so that invalid arguments raise here and not at the first batch
        return (
            (batch_rows, self.read(batch_rows, output, dtype))
            for batch_rows in (row_indices[start : start + size] for start in starts)
        )

    @cached_property
    def usable(self) -> NDArray[np.intp]:
        """The rows usable for training, in ascending order: status ``ok`` and, in a cache with labels, a label."""
        return np.flatnonzero(self.ok if self.task == "none" else self.ok & self.label_table.known)

    @property
    def X(self) -> NDArray[np.floating]:
        return self.read(None if len(self.usable) == len(self) else self.usable)

    @property
    def y(self) -> NDArray[Any] | None:
        return None if self.task == "none" else self.label_table.take(self.usable).y

    def bad_rows(self) -> dict[str, int]:
        """Count the rows without features, by reason."""
        counts = np.bincount(self.status_codes, minlength=1)
        return {_get_status_name(code): int(count) for code, count in enumerate(counts) if count and code != Status.OK}

    def table(self) -> SampleTable:
        return SampleTable(self.ids, self.status_codes, self.digests, self.stamps, self.split, self.label_table)

    def to_frame(
        self, kind: Literal["pandas", "arrow"] = "pandas", *, features: bool = False, output: str | None = None
    ) -> pd.DataFrame | pa.Table:
        """Convert all rows to a table: id, status, split, labels or targets, and optionally the features.

        Parameters
        ----------
        kind : {"pandas", "arrow"}
            A :class:`pandas.DataFrame` or a :class:`pyarrow.Table`. The package must be installed.
        features : bool
            Include the features: as columns ``OUTPUT.0`` … of a data frame, or as one column of fixed-size lists in
            Arrow.
        output : str, optional
            One of ``outputs``; the first by default.

        Raises
        ------
        ConfigError
            If ``kind`` is unknown or its package is not installed.
        """
        from featpipe.cache.dataframe import to_frame

        return to_frame(self, kind, self._resolve_output(output) if features else None)

    @property
    def has_checks(self) -> bool:
        """Whether the file holds row checksums; files of format 1.0 do not."""
        return parse_version(self.manifest["format_version"]) >= (1, 1)

    def damaged_columns(self) -> list[str]:
        """List the datasets, except features, whose bytes do not match their digests."""
        column_digests: dict[str, str] = self.manifest["columns"] if self.has_checks else {}
        damaged = [
            name
            for name, digest in column_digests.items()
            if name not in self._columns or compute_column_digest(self._columns[name]) != digest
        ]
        if "samples/status" not in damaged and np.count_nonzero(self.ok) != self.manifest["ok"]:
            damaged.insert(0, "samples/status")
        return damaged

    def whole_rows(self, rows: NDArray[np.integer[Any]], output: str | None = None) -> NDArray[np.bool_]:
        """Find which rows are intact: digest, status and features match the checksum.

        Parameters
        ----------
        rows : ndarray of shape (m,), int
        output : str, optional
            One of ``outputs``; the first by default.

        Returns
        -------
        ndarray of shape (m,), bool
            All true for a file of format 1.0, which holds no checksums.
        """
        is_intact = np.ones(len(rows), bool)
        if not self.has_checks:
            return is_intact
        features, stored_checksums = self.features(output), self._columns[f"checks/{self._resolve_output(output)}"]
        for start, stop in _iter_blocks(len(rows), features[:1].nbytes):
            block_rows = rows[start:stop]
            checksums = compute_row_checksums(
                self.digests[block_rows], self.status_codes[block_rows], features[block_rows]
            )
            is_intact[start:stop] = (checksums == stored_checksums[block_rows]).all(axis=1)
        return is_intact


class FeatureView:
    """Rows of a cache that are read on demand. Their pages are released after each read.

    Parameters
    ----------
    features : ndarray of shape (n, d)
    rows : ndarray of shape (m,), int
    mapped : bool
        Whether the features are mapped from a file.

    Attributes
    ----------
    shape : tuple
        ``(m, d)``
    dtype : dtype
        The stored dtype.
    """

    def __init__(self, features: NDArray[np.floating], rows: NDArray[np.intp], mapped: bool = False) -> None:
        self._features, self._rows, self._mapped = features, rows, mapped
        self._next_row = 0  # the row after the last block that was read
        self.shape = (len(rows), *features.shape[1:])
        self.dtype = features.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | NDArray[np.bool_] | NDArray[np.integer[Any]]) -> NDArray[np.floating]:
        """Read rows into a new array of shape (b, d) and of the stored dtype."""
        row_indices = self._rows[rows]
        values = np.empty((len(row_indices), *self.shape[1:]), self.dtype)
        self._fill(values, row_indices)
        return values

    def read_into(self, out: NDArray[np.floating], rows: slice) -> None:
        """Read rows into ``out``, an array of shape (b, d) and of the stored dtype."""
        self._fill(out, self._rows[rows])

    def expect(self, rows: slice) -> None:
        """Prefetch rows that will be read soon."""
        row_slice = _as_slice(self._rows[rows])
        if self._mapped and row_slice is not None:
            prefetch(self._features[row_slice])

    def _fill(self, out: NDArray[np.floating], row_indices: NDArray[np.intp]) -> None:
        row_slice = _as_slice(row_indices)
        if row_slice is not None:
            if self._mapped:
                # Threads that share a sequential pass do not always read in order.
                if abs(row_slice.start - self._next_row) <= 2 * len(row_indices):
                    prefetch(self._features[row_slice.start : row_slice.stop + PREFETCH_RUNS * len(row_indices)])
                self._next_row = row_slice.stop
            out[...] = self._features[row_slice]
            if self._mapped:
                release_pages(self._features[row_slice])
            return
        for start in range(0, len(row_indices), SCATTERED_ROWS_PER_READ):
            block_rows = row_indices[start : start + SCATTERED_ROWS_PER_READ]
            np.take(self._features, block_rows, axis=0, out=out[start : start + SCATTERED_ROWS_PER_READ], mode="clip")
            if self._mapped:
                release_pages(self._features[block_rows.min() : block_rows.max() + 1])

    def take(self, rows: NDArray[np.bool_] | NDArray[np.integer[Any]]) -> FeatureView:
        """Make a view of a subset of the rows."""
        return FeatureView(self._features, self._rows[rows], self._mapped)


def _as_slice(row_indices: NDArray[np.intp]) -> slice | None:
    """Convert row numbers to a slice if they are consecutive."""
    if (
        not len(row_indices)
        or row_indices[-1] - row_indices[0] != len(row_indices) - 1
        or not (np.diff(row_indices) == 1).all()
    ):
        return None
    return slice(int(row_indices[0]), int(row_indices[-1]) + 1)


def _reopen_cache(path: Path, digest: str, salvage: bool) -> FeatureCache:
    cache = FeatureCache(path, salvage=salvage)
    if cache._manifest_digest != digest:
        raise CacheMismatchError(f"{path}: changed since this cache was pickled; open it again")
    return cache


def _check_dtype(dtype: DTypeLike) -> None:
    try:
        is_floating = np.issubdtype(np.dtype(dtype), np.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ConfigError(f"dtype is {dtype!r}; features are floating-point numbers: float32, float16 or float64")


def _get_status_name(code: int) -> str:
    """Get the name of a status code; later versions of the format may add codes."""
    return Status(code).word if code in _KNOWN_STATUSES else f"status-{code}"


def _resolve_rows(rows: RowSelector | None, n: int) -> slice | NDArray[np.intp]:
    """Convert a row selector to a slice, or to validated non-negative row numbers."""
    if rows is None:
        return slice(None)
    if isinstance(rows, slice):
        return rows
    row_indices = np.asarray(rows)
    if row_indices.dtype == bool:
        if row_indices.shape != (n,):
            raise ConfigError(f"a mask of shape {row_indices.shape} for {n} rows; expected ({n},)")
        return np.flatnonzero(row_indices)
    if row_indices.ndim != 1 or (row_indices.size and row_indices.dtype.kind not in "iu"):
        raise ConfigError(
            f"rows of type {row_indices.dtype} and shape {row_indices.shape}; expected numbers, a mask or a slice"
        )
    min_index, max_index = (int(row_indices.min()), int(row_indices.max())) if row_indices.size else (0, -1)
    if min_index < -n or max_index >= n:
        raise IndexError(f"row {min_index if min_index < -n else max_index} of a cache of {n} rows")
    row_indices = row_indices.astype(np.intp, copy=False)
    return np.where(row_indices < 0, row_indices + n, row_indices) if min_index < 0 else row_indices


def _iter_blocks(n: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    block_rows = max(1, READ_BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, n, block_rows):
        yield start, min(n, start + block_rows)


def _missing_cache_error(path: Path) -> CacheError:
    if path.is_dir():
        return CacheFormatError(f"{path}: is a folder; a cache is one .h5 file")
    if parts_directory(path).is_dir():
        return CacheIncompleteError(f"{path}: the extraction is not finished; run the same command again")
    return CacheError(f"{path}: there is no such file; `featpipe extract` writes caches and prints their paths")
