"""The cache as people use it: mapped arrays, read at memory speed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featpipe.cache.checks import check_rows, digest_of_column
from featpipe.cache.layout import SPLITS, Table, parts_directory, version_of
from featpipe.cache.mapping import expect, forget
from featpipe.cache.opening import Contents, open_cache
from featpipe.errors import CacheError, CacheFormatError, CacheIncompleteError, CacheMismatchError, ConfigError
from featpipe.labels import Labels
from featpipe.names import unknown
from featpipe.status import Status
from featpipe.strings import Strings

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["FeatureCache", "Rows", "View"]

Rows = slice | NDArray[np.bool_] | NDArray[np.integer[Any]] | list[int]
"""Some rows of a cache: a slice, a mask of shape (n,), or row numbers in any order."""

BLOCK_BYTES = 16 * 2**20
_ATTEMPTS = 3
ROWS_APART = 1024  # each brings the pages around it into memory
AHEAD = 8  # runs of rows that are on their way while one is worked on

_STATUSES = frozenset(Status)


class FeatureCache:
    """The embeddings of an archive, read at memory speed.

    Opening checks the layout, reads the manifest and maps the file into memory, in milliseconds whatever its size.
    The object holds no HDF5 handle: it can be forked, pickled (as its path) and read by many processes. It goes on
    showing the file that it opened when an extraction puts a new one in its place; unpickled after that it is an
    error, because the rows may be others.

    Parameters
    ----------
    path : path-like
    salvage : bool
        Open a cache of which shards are missing; :meth:`whole_rows` says which rows are not there.

    Attributes
    ----------
    X : ndarray of shape (m, d), float32
        Features of the first output in the rows that can be learnt from: status ``ok`` and, in a cache with
        labels, a label. Mapped where that is all rows of a float32 cache, else a copy.
    y : ndarray of shape (m,) or (m, k)
        Labels of the same rows: class names, targets, or a 0/1 matrix. None without labels.
    ids : Strings of length n
    labels : ndarray of n labels or None
        As ``y``, for all rows; None (classes) or NaN (targets) where there is no label.
    classes : tuple of str
    status : ndarray of shape (n,), str
        ``"ok"``, or the reason why the row has no features.
    manifest : dict

    Raises
    ------
    CacheIncompleteError
        If an extraction to this name was begun and not finished.
    CacheFormatError
        If the file is not a cache that this version reads.
    CacheError
        If there is no such file.

    Examples
    --------
    >>> cache = FeatureCache("cache/photos.h5")                    # doctest: +SKIP
    >>> LogisticRegression().fit(cache.X, cache.y)                 # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str], *, salvage: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise _absent(self.path)
        contents = self._open()
        if contents.lost and not salvage:
            raise CacheFormatError(
                f"{self.path}: {len(contents.lost)} of its {len(contents.shards)} shards are missing or damaged, the "
                f"first is {contents.lost[0]!r}; bring them back, or `featpipe verify --repair {self.path}` embeds "
                "their rows again"
            )
        self.manifest, self._columns = contents.manifest, contents.columns
        self._shards, self._shard_files = contents.shards, contents.found
        self.lost_shards = contents.lost
        self._digest = contents.digest

    def _open(self) -> Contents:
        """Read the file; once more if another was put in its place, and the shards of the first removed."""
        try:
            for _ in range(_ATTEMPTS):
                before = os.stat(self.path)
                contents = open_cache(self.path)
                if not contents.lost or os.path.samestat(before, os.stat(self.path)):
                    break
        except OSError as error:
            raise CacheError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        return contents

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.path.absolute(), self._digest, bool(self.lost_shards))

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}, n={len(self)}, outputs={list(self.outputs)})"

    def __len__(self) -> int:
        return len(self._columns["samples/status"])

    @property
    def fingerprint(self) -> str:
        """Digest of the facts that decide the embeddings, 64 hexadecimal digits."""
        return str(self.manifest["fingerprint"])

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that decide the embeddings: weights, transform, outputs, precision, extraction code."""
        return dict(self.manifest["facts"])

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
        """The files that hold the features of a cache too large for one; none for others."""
        return tuple(dict.fromkeys(self._shard_files))  # shards of the same rows are one file

    @property
    def shard_bytes(self) -> int | None:
        """Bytes of features in a shard, as :func:`write_cache` takes it; None for a cache in one file."""
        if not self._shards:
            return None
        first = self._shards[0]
        return sum(self.features(output)[first.start : first.stop].nbytes for output in self.outputs)

    @property
    def file_bytes(self) -> int:
        """Size on disk, with the shards."""
        return sum(file.stat().st_size for file in (self.path, *self.shard_files))

    @cached_property
    def ids(self) -> Strings:
        offsets = self._columns["samples/id_offsets"]
        self._refuse_unless(bool((offsets[1:] >= offsets[:-1]).all()), "samples/id_offsets does not ascend")
        return Strings(self._columns["samples/id_bytes"], offsets)

    @property
    def status_codes(self) -> NDArray[np.uint8]:
        return self._columns["samples/status"]

    @property
    def status(self) -> NDArray[np.str_]:
        return np.array([_word(code) for code in range(256)])[self.status_codes]

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which rows have features, shape (n,)."""
        return np.asarray(self.status_codes == Status.OK)

    @property
    def digests(self) -> NDArray[np.uint8]:
        """SHA-256 of each image's bytes, shape (n, 32)."""
        return self._columns["samples/digest"]

    @property
    def stamps(self) -> NDArray[np.uint8]:
        return self._columns["samples/stamp"]

    @cached_property
    def split(self) -> NDArray[np.uint8]:
        """The split that came with the labels, as positions in ``SPLITS``, shape (n,)."""
        split = self._columns["samples/split"]
        self._refuse_unless(not len(split) or int(split.max()) < len(SPLITS), "samples/split holds codes of no split")
        return split

    @cached_property
    def label_table(self) -> Labels:
        """Labels as codes, targets or a 0/1 matrix, with the names of classes or targets."""
        if self.task == "none":
            return Labels.none(len(self))
        values = self._columns["labels/values"]
        if self.task != "regression" and values.size:
            highest = 1 if self.task == "multilabel" else len(self.classes) - 1
            within = int(values.min()) >= -1 and int(values.max()) <= highest
            self._refuse_unless(within, "labels/values holds codes that are no class")
        return Labels(self.task, values, self.classes)  # type: ignore[arg-type]

    def _refuse_unless(self, true: bool, what: str) -> None:
        """For what takes time in n, and so is looked at when it is used and not on opening."""
        if not true:
            raise CacheFormatError(f"{self.path}: {what}; the file is damaged, extract again")

    @property
    def labels(self) -> NDArray[Any] | None:
        return None if self.task == "none" else self.label_table.y

    def features(self, output: str | None = None) -> NDArray[np.floating]:
        """All rows of one output, memory-mapped and read-only.

        Parameters
        ----------
        output : str, optional
            One of ``outputs``; the first if not given.

        Returns
        -------
        ndarray of shape (n, d), or (n, c, h, w) for feature maps
            As stored, float32 or float16; NaN in the rows whose status is not ``ok``.
        """
        return self._columns[f"features/{self._output(output)}"]

    def _output(self, output: str | None) -> str:
        name = self.outputs[0] if output is None else output
        if name not in self.outputs:
            raise unknown("output", name, self.outputs)
        return name

    def read(
        self, rows: Rows | None = None, output: str | None = None, dtype: DTypeLike = np.float32
    ) -> NDArray[np.floating]:
        """Some rows of one output, without loading the others.

        Parameters
        ----------
        rows : slice, mask of shape (n,), or row numbers; all if not given
        output : str, optional
            One of ``outputs``; the first if not given.
        dtype : dtype
            What is stored otherwise is converted block by block.

        Returns
        -------
        ndarray of shape (m, …)
            Mapped and read-only where ``rows`` is a slice and nothing is to be converted, else a copy.

        Examples
        --------
        >>> cache.read(slice(0, 256)).shape, cache.read(cache.split == 1).shape      # doctest: +SKIP
        ((256, 1280), (5120, 1280))
        """
        features = self.features(output)
        _check_dtype(dtype)
        chosen = _chosen(rows, len(self))
        if isinstance(chosen, slice):
            source = features[chosen]
            if source.dtype == np.dtype(dtype):
                return source
            result = np.empty(source.shape, dtype)
            for start, stop in _blocks(len(source), source[:1].nbytes):
                result[start:stop] = source[start:stop]
            return result
        result = np.empty((len(chosen), *features.shape[1:]), dtype)
        if result.dtype == features.dtype:
            return np.take(features, chosen, axis=0, out=result, mode="clip")  # "raise" would copy once more
        for start, stop in _blocks(len(chosen), features[:1].nbytes):
            result[start:stop] = np.take(features, chosen[start:stop], axis=0, mode="clip")
        return result

    def view(self, rows: Rows | None = None, output: str | None = None) -> View:
        """Some rows as one array that is read where it is sliced, for those that do not fit into memory.

        Parameters
        ----------
        rows : slice, mask of shape (n,), or row numbers; all if not given
        output : str, optional
            One of ``outputs``; the first if not given.
        """
        chosen = _chosen(rows, len(self))
        numbers = np.arange(len(self))[chosen] if isinstance(chosen, slice) else chosen
        return View(self.features(output), numbers, mapped=True)

    def batches(
        self,
        size: int,
        rows: Rows | None = None,
        output: str | None = None,
        seed: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.floating]]]:
        """Batches of rows with their row numbers.

        Parameters
        ----------
        size : int
            Rows in a batch; the last one may have fewer.
        rows : slice, mask of shape (n,), or row numbers
            ``usable`` if not given.
        output : str, optional
            One of ``outputs``; the first if not given.
        seed : int, optional
            Shuffles; in the order of ``rows`` if not given.
        dtype : dtype

        Yields
        ------
        rows : ndarray of shape (b,), int
        features : ndarray of shape (b, …)
        """
        if not isinstance(size, Integral) or size < 1:
            raise ConfigError(f"size of a batch is {size!r}; it must be a whole number of at least 1")
        output = self._output(output)
        _check_dtype(dtype)
        chosen = _chosen(self.usable if rows is None else rows, len(self))
        numbers = np.arange(len(self))[chosen] if isinstance(chosen, slice) else chosen
        if seed is not None:
            numbers = np.random.default_rng(seed).permutation(numbers)
        cuts = range(0, len(numbers), size)  # a generator expression: what is wrong is said here and not at the first
        return ((batch, self.read(batch, output, dtype)) for batch in (numbers[at : at + size] for at in cuts))

    @cached_property
    def usable(self) -> NDArray[np.intp]:
        """The rows that can be learnt from: status ``ok`` and, in a cache with labels, a label. Ascending."""
        return np.flatnonzero(self.ok if self.task == "none" else self.ok & self.label_table.known)

    @property
    def X(self) -> NDArray[np.floating]:
        return self.read(None if len(self.usable) == len(self) else self.usable)

    @property
    def y(self) -> NDArray[Any] | None:
        return None if self.task == "none" else self.label_table.take(self.usable).y

    def bad_rows(self) -> dict[str, int]:
        """How many rows have no features, by reason."""
        counts = np.bincount(self.status_codes, minlength=1)
        return {_word(code): int(k) for code, k in enumerate(counts) if k and code != Status.OK}

    def table(self) -> Table:
        return Table(self.ids, self.status_codes, self.digests, self.stamps, self.split, self.label_table)

    def to_frame(
        self, kind: Literal["pandas", "arrow"] = "pandas", *, features: bool = False, output: str | None = None
    ) -> pd.DataFrame | pa.Table:
        """All rows as a table: id, status, split, labels or targets, and on request the features.

        Parameters
        ----------
        kind : {"pandas", "arrow"}
            A :class:`pandas.DataFrame`, or a :class:`pyarrow.Table`, for which that package must be installed.
        features : bool
            With the features too: columns ``OUTPUT.0`` … of a data frame, one column of fixed-size lists in Arrow.
        output : str, optional
            One of ``outputs``; the first if not given.

        Raises
        ------
        ConfigError
            If the kind is unknown or its package is not installed.
        """
        from featpipe.cache.frames import to_frame

        return to_frame(self, kind, self._output(output) if features else None)

    @property
    def has_checks(self) -> bool:
        """Whether the file holds checks of its rows; those of format 1.0 do not."""
        return version_of(self.manifest["format_version"]) >= (1, 1)

    def damaged_columns(self) -> list[str]:
        """The datasets, features aside, whose bytes are not those that were written."""
        stated: dict[str, str] = self.manifest["columns"] if self.has_checks else {}
        damaged = [name for name, digest in stated.items() if not self._has_digest(name, digest)]
        if "samples/status" not in damaged and np.count_nonzero(self.ok) != self.manifest["ok"]:
            damaged.insert(0, "samples/status")
        return damaged

    def _has_digest(self, name: str, digest: object) -> bool:
        column = self._columns.get(name)
        return column is not None and digest_of_column(column) == digest

    def whole_rows(self, rows: NDArray[np.integer[Any]], output: str | None = None) -> NDArray[np.bool_]:
        """Which of some rows have the digest, the status and the features that were written.

        Parameters
        ----------
        rows : ndarray of shape (m,), int
        output : str, optional
            One of ``outputs``; the first if not given.

        Returns
        -------
        ndarray of shape (m,), bool
            All true in a file of format 1.0, which holds no checks.
        """
        whole = np.ones(len(rows), bool)
        if not self.has_checks:
            return whole
        features, checks = self.features(output), self._columns[f"checks/{self._output(output)}"]
        for start, stop in _blocks(len(rows), features[:1].nbytes):
            some = rows[start:stop]
            found = check_rows(self.digests[some], self.status_codes[some], features[some])
            whole[start:stop] = (found == checks[some]).all(axis=1)
        return whole


class View:
    """Rows of a cache that are read when they are asked for, and leave nothing in memory.

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
        As stored.
    """

    def __init__(self, features: NDArray[np.floating], rows: NDArray[np.intp], mapped: bool = False) -> None:
        self._features, self._rows, self._mapped = features, rows, mapped
        self._next = 0  # the row after those that were read last
        self.shape = (len(rows), *features.shape[1:])
        self.dtype = features.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | NDArray[np.bool_] | NDArray[np.integer[Any]]) -> NDArray[np.floating]:
        """A copy of some rows, shape (b, d), as stored."""
        numbers = self._rows[rows]
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        self._fill(found, numbers)
        return found

    def read_into(self, out: NDArray[np.floating], rows: slice) -> None:
        """Some rows to a place for them, shape (b, d), of the type that is stored."""
        self._fill(out, self._rows[rows])

    def expect(self, rows: slice) -> None:
        """Have rows read from the file that are going to be asked for."""
        run = _run(self._rows[rows])
        if self._mapped and run is not None:
            expect(self._features[run])

    def _fill(self, out: NDArray[np.floating], numbers: NDArray[np.intp]) -> None:
        run = _run(numbers)
        if run is not None:
            if self._mapped:
                # Threads that go through the rows together are not always in order.
                if abs(run.start - self._next) <= 2 * len(numbers):
                    expect(self._features[run.start : run.stop + AHEAD * len(numbers)])
                self._next = run.stop
            out[...] = self._features[run]
            if self._mapped:
                forget(self._features[run])
            return
        for start in range(0, len(numbers), ROWS_APART):
            some = numbers[start : start + ROWS_APART]
            np.take(self._features, some, axis=0, out=out[start : start + ROWS_APART], mode="clip")
            if self._mapped:
                forget(self._features[some.min() : some.max() + 1])

    def take(self, rows: NDArray[np.bool_] | NDArray[np.integer[Any]]) -> View:
        """A view of some of its rows."""
        return View(self._features, self._rows[rows], self._mapped)


def _run(numbers: NDArray[np.intp]) -> slice | None:
    """Row numbers as a slice, if they are one."""
    if not len(numbers) or numbers[-1] - numbers[0] != len(numbers) - 1 or not (np.diff(numbers) == 1).all():
        return None
    return slice(int(numbers[0]), int(numbers[-1]) + 1)


def _opened_again(path: Path, digest: str, salvage: bool) -> FeatureCache:
    """The cache that was pickled."""
    cache = FeatureCache(path, salvage=salvage)
    if cache._digest != digest:
        raise CacheMismatchError(f"{path}: was written anew since this cache was pickled; open it again")
    return cache


def _check_dtype(dtype: DTypeLike) -> None:
    try:
        fits = np.issubdtype(np.dtype(dtype), np.floating)
    except TypeError:
        fits = False
    if not fits:
        raise ConfigError(f"dtype is {dtype!r}; features are floating-point numbers: float32, float16 or float64")


def _word(code: int) -> str:
    """The word of a status; a later version of the format may have more of them."""
    return Status(code).word if code in _STATUSES else f"status-{code}"


def _chosen(rows: Rows | None, n: int) -> slice | NDArray[np.intp]:
    """Rows as a slice, or as row numbers that are all within the cache."""
    if rows is None:
        return slice(None)
    if isinstance(rows, slice):
        return rows
    numbers = np.asarray(rows)
    if numbers.dtype == bool:
        if numbers.shape != (n,):
            raise ConfigError(f"a mask of shape {numbers.shape} for {n} rows; expected ({n},)")
        return np.flatnonzero(numbers)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ConfigError(
            f"rows of type {numbers.dtype} and shape {numbers.shape}; expected numbers, a mask or a slice"
        )
    lowest, highest = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, -1)
    if lowest < -n or highest >= n:
        raise IndexError(f"row {lowest if lowest < -n else highest} of a cache of {n} rows")
    numbers = numbers.astype(np.intp, copy=False)
    return np.where(numbers < 0, numbers + n, numbers) if lowest < 0 else numbers


def _blocks(n: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, n, rows):
        yield start, min(n, start + rows)


def _absent(path: Path) -> CacheError:
    if path.is_dir():
        return CacheFormatError(f"{path}: is a folder; a cache is one .h5 file")
    if parts_directory(path).is_dir():
        return CacheIncompleteError(f"{path}: was begun and is not finished; run the same command again")
    return CacheError(f"{path}: there is no such file; `featpipe extract` makes caches and prints their path")
