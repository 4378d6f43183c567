"""The HDF5 format of a cache: the only reader and writer of HDF5. ``cache/README.md`` is its specification."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from featpipe.errors import CacheError, CacheFormatError, CacheIncompleteError
from featpipe.fingerprint import fingerprint
from featpipe.labels import Labels
from featpipe.names import unknown
from featpipe.status import Status
from featpipe.strings import Strings

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "SPLITS",
    "FeatureCache",
    "Table",
    "fsync_directory",
    "narrowed",
    "parts_directory",
    "write_cache",
]

FORMAT = "featpipe-cache"
FORMAT_VERSION = "1.0"
SPLITS = ("none", "train", "validation", "test")
BLOCK_BYTES = 32 * 2**20
MANIFEST_BYTES_MAX = 64 * 2**20

_COLUMNS = {  # name → dtype, shape after n; n itself is told by the status column
    "samples/status": ("u1", ()),
    "samples/digest": ("u1", (32,)),
    "samples/stamp": ("u1", (16,)),
    "samples/split": ("u1", ()),
}
_LABEL_DTYPES = {"classification": "<i4", "regression": "<f8", "multilabel": "i1"}


@dataclass(frozen=True, eq=False)
class Table:
    """Everything of a cache but the features, all columns of n rows.

    Attributes
    ----------
    ids : Strings
    status : ndarray of shape (n,), uint8
        Codes of :class:`featpipe.status.Status`.
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes, zero where they could not be read.
    stamps : ndarray of shape (n, 16), uint8
        Digest of location, size and modification time when the bytes were read; zero when not to be trusted.
    split : ndarray of shape (n,), uint8
        Positions in ``SPLITS``.
    labels : Labels
    """

    ids: Strings
    status: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    stamps: NDArray[np.uint8]
    split: NDArray[np.uint8]
    labels: Labels


@dataclass(frozen=True)
class _Column:
    """Where an array lies in the file, so that it can be mapped without HDF5."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class FeatureCache:
    """The embeddings of an archive, read at memory speed.

    Opening reads the manifest and checks the layout; arrays are memory-mapped when first used. The object holds
    no open HDF5 handle: it can be pickled, forked and read by many processes.

    Parameters
    ----------
    path : path-like

    Attributes
    ----------
    X : ndarray of shape (m, d)
        Features of the first output in the rows that can be learnt from: status ``ok`` and, in a cache with
        labels, a label.
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

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise _absent(self.path)
        self.manifest, self._columns = _read_layout(self.path)

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return FeatureCache, (self.path,)

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.path)!r}, n={len(self)}, outputs={list(self.outputs)})"

    def __len__(self) -> int:
        return self._columns["samples/status"].shape[0]

    def _column(self, name: str) -> NDArray[Any]:
        column = self._columns[name]
        if 0 in column.shape:
            return np.empty(column.shape, column.dtype)
        try:
            return np.memmap(self.path, column.dtype, "r", column.offset, column.shape)
        except (OSError, ValueError) as error:
            raise CacheError(f"{self.path}: cannot be read any more ({error})") from None

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
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def task(self) -> str:
        return str(self.manifest["task"])

    @cached_property
    def ids(self) -> Strings:
        return Strings(self._column("samples/id_bytes"), self._column("samples/id_offsets"))

    @cached_property
    def status_codes(self) -> NDArray[np.uint8]:
        return self._column("samples/status")

    @property
    def status(self) -> NDArray[np.str_]:
        known = {status.value: status.word for status in Status}
        words = [known.get(code, f"status-{code}") for code in range(256)]
        return np.array(words)[self.status_codes]

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which rows have features, shape (n,)."""
        return np.asarray(self.status_codes == Status.OK)

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """SHA-256 of each image's bytes, shape (n, 32)."""
        return self._column("samples/digest")

    @cached_property
    def stamps(self) -> NDArray[np.uint8]:
        return self._column("samples/stamp")

    @cached_property
    def split(self) -> NDArray[np.uint8]:
        """The split that came with the labels, as positions in ``SPLITS``, shape (n,)."""
        return self._column("samples/split")

    @cached_property
    def label_table(self) -> Labels:
        """Labels as codes, targets or a 0/1 matrix, with the names of classes or targets."""
        if self.task == "none":
            return Labels.none(len(self))
        values = self._column("labels/values")
        if self.task == "classification" and len(values):
            lowest, highest = int(values.min()), int(values.max())
            if lowest < -1 or highest >= len(self.classes):
                raise CacheFormatError(f"{self.path}: labels/values holds codes that are no class")
        return Labels(self.task, values, self.classes)  # type: ignore[arg-type]

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
            NaN in the rows whose status is not ``ok``.
        """
        name = self.outputs[0] if output is None else output
        if name not in self.outputs:
            raise unknown("output", name, self.outputs)
        return self._column(f"features/{name}")

    @cached_property
    def usable(self) -> NDArray[np.intp]:
        """The rows that can be learnt from: status ``ok`` and, in a cache with labels, a label. Ascending."""
        return np.flatnonzero(self.ok if self.task == "none" else self.ok & self.label_table.known)

    @property
    def X(self) -> NDArray[np.floating]:
        features = self.features()
        return features if len(self.usable) == len(self) else features[self.usable]

    @property
    def y(self) -> NDArray[Any] | None:
        return None if self.task == "none" else self.label_table.take(self.usable).y

    def bad_rows(self) -> dict[str, int]:
        """How many rows have no features, by reason."""
        codes, counts = np.unique(self.status_codes, return_counts=True)
        return {Status(c).word: int(k) for c, k in zip(codes, counts, strict=True) if c != Status.OK}

    def table(self) -> Table:
        return Table(self.ids, self.status_codes, self.digests, self.stamps, self.split, self.label_table)


def narrowed(facts: Mapping[str, Any], output: str) -> dict[str, Any]:
    """The facts that decide one output alone: two caches may share it and differ in their others."""
    backbone = dict(facts["backbone"])
    backbone["outputs"] = {output: backbone["outputs"].get(output)}
    return {**facts, "backbone": backbone}


def parts_directory(path: Path) -> Path:
    """Where the unfinished work of a cache lies."""
    return path.with_name(path.name + ".parts")


def _absent(path: Path) -> CacheError:
    if path.is_dir():
        return CacheFormatError(f"{path}: is a folder; a cache is one .h5 file")
    if parts_directory(path).is_dir():
        return CacheIncompleteError(f"{path}: its extraction is not finished; run the same extract command again")
    return CacheError(f"{path}: there is no such file; `featpipe extract` makes caches and prints their path")


def write_cache(
    path: Path,
    table: Table,
    manifest: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    gather: Callable[[str, int, int], NDArray[np.floating]],
) -> None:
    """Write a whole cache and publish it under its name, replacing what was there in one step.

    Parameters
    ----------
    path : Path
    table : Table
    manifest : mapping
        Must hold ``facts``; format, fingerprint, outputs, task, classes and counts are added.
    shapes : mapping from output to the shape of one row
    dtype : {"float32", "float16"}
    gather : callable
        ``gather(output, start, stop)`` gives the features of those rows.

    Raises
    ------
    CacheError
        If the disk is full or not writable; nothing is left behind, and an older cache stays as it was.
    """
    complete = _complete(manifest, table, shapes)  # not canonical: the order of the outputs is theirs
    text = json.dumps(complete, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        _write_file(temporary, table, text, shapes, dtype, gather)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except (OSError, RuntimeError) as error:  # h5py reports a full disk as RuntimeError, sometimes only at close
        raise CacheError(f"{path}: cannot be written ({error}); free some space or choose another --cache") from None
    finally:
        temporary.unlink(missing_ok=True)


def fsync_directory(directory: Path) -> None:
    """Make a rename or a link in this folder survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _complete(manifest: Mapping[str, Any], table: Table, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        **manifest,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(manifest["facts"]),
        "outputs": {name: list(shape) for name, shape in shapes.items()},
        "task": table.labels.task,
        "classes": list(table.labels.classes),
        "samples": len(table.ids),
        "ok": int(np.count_nonzero(table.status == Status.OK)),
    }


def _write_file(
    path: Path,
    table: Table,
    manifest: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    gather: Callable[[str, int, int], NDArray[np.floating]],
) -> None:
    import h5py

    n = len(table.ids)
    with h5py.File(path, "w-", libver=("v110", "v110"), track_order=False) as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        text_type = h5py.string_dtype("utf-8", len(manifest))
        file.create_dataset("manifest", data=np.array(manifest, dtype=text_type), dtype=text_type)
        columns = {
            "samples/id_bytes": np.asarray(table.ids.data, "u1"),
            "samples/id_offsets": np.asarray(table.ids.offsets, "<i8"),
            "samples/status": table.status,
            "samples/digest": table.digests,
            "samples/stamp": table.stamps,
            "samples/split": table.split,
        }
        if table.labels.task != "none":
            columns["labels/values"] = np.asarray(table.labels.values, _LABEL_DTYPES[table.labels.task])
        for name, column in columns.items():
            file.create_dataset(name, data=column, track_times=False)
        for output, shape in shapes.items():
            features = file.create_dataset(f"features/{output}", (n, *shape), dtype, track_times=False)
            rows = max(1, BLOCK_BYTES // max(1, int(np.prod(shape)) * 4))
            for start in range(0, n, rows):
                stop = min(n, start + rows)
                features[start:stop] = gather(output, start, stop)


def _read_layout(path: Path) -> tuple[dict[str, Any], dict[str, _Column]]:
    import h5py

    with _format_errors(path), h5py.File(path, "r") as file:
        version = _attribute(file, "format_version")
        if _attribute(file, "format") != FORMAT:
            raise CacheFormatError(f"{path}: is HDF5 but not a featpipe cache")
        if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
            raise CacheFormatError(
                f"{path}: has format version {version}, this featpipe reads {FORMAT_VERSION.split('.')[0]}.x"
            )
        size = path.stat().st_size
        columns = {name: _locate(dataset, name, size) for name, dataset in _datasets(file)}
        manifest = _read_manifest(path, columns)
    _check(manifest, columns)
    return manifest, columns


@contextmanager
def _format_errors(path: Path) -> Iterator[None]:
    """Whatever HDF5 says of a damaged file becomes one error with its name."""
    try:
        yield
    except CacheFormatError as error:
        text = str(error)
        raise CacheFormatError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except PermissionError:
        raise CacheError(f"{path}: may not be read; check its permissions") from None
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CacheFormatError(f"{path}: is not a readable featpipe cache ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _attribute(file: Any, name: str) -> str:
    value = file.attrs.get(name, "")
    return value if isinstance(value, str) else ""


def _datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """The datasets of a cache, through hard links alone: soft and external ones could read other files."""
    import h5py

    groups = [("", file)]
    for prefix, group in groups:
        for name in group:
            full = f"{prefix}{name}"
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise CacheFormatError(f"{full} is a link; a cache holds none")
            entry = group[name]
            if isinstance(entry, h5py.Dataset):
                yield full, entry
            elif isinstance(entry, h5py.Group) and prefix == "" and full in ("features", "samples", "labels"):
                groups.append((f"{full}/", entry))
            elif not isinstance(entry, h5py.Group):
                raise CacheFormatError(f"{full} is neither a dataset nor a group")


def _locate(dataset: Any, name: str, file_bytes: int) -> _Column:
    import h5py

    plist = dataset.id.get_create_plist()
    if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
        raise CacheFormatError(f"{name} is not stored in one contiguous piece of this file")
    kind = dataset.dtype
    if kind.hasobject or kind.kind not in "fiuS":
        raise CacheFormatError(f"{name} has the type {kind}, which no cache holds")
    nbytes = int(kind.itemsize) * int(np.prod(dataset.shape, dtype=object))
    offset = dataset.id.get_offset()
    if nbytes and (offset is None or offset + nbytes > file_bytes):
        raise CacheFormatError(f"{name} declares {nbytes} bytes, more than the file holds; it is truncated")
    return _Column(offset or 0, kind, tuple(dataset.shape))


def _read_manifest(path: Path, columns: Mapping[str, _Column]) -> dict[str, Any]:
    column = columns["manifest"]
    if column.shape != () or column.dtype.kind != "S" or column.dtype.itemsize > MANIFEST_BYTES_MAX:
        raise CacheFormatError("manifest is not one text")
    with open(path, "rb") as file:
        manifest = json.loads(_read_at(file, column.offset, column.dtype.itemsize))
    if not isinstance(manifest, dict):
        raise CacheFormatError("manifest is not a JSON object")
    return manifest


def _read_at(file: IO[bytes], offset: int, nbytes: int) -> str:
    file.seek(offset)
    return file.read(nbytes).rstrip(b"\0").decode("utf-8")


def _check(manifest: Mapping[str, Any], columns: Mapping[str, _Column]) -> None:
    """What the manifest says and what the file holds must agree."""
    n = columns["samples/status"].shape[0] if "samples/status" in columns else -1
    wanted = {name: (np.dtype(kind), (n, *rest)) for name, (kind, rest) in _COLUMNS.items()}
    wanted["samples/id_offsets"] = (np.dtype("<i8"), (n + 1,))
    for name, (dtype, shape) in wanted.items():
        if name not in columns or columns[name].dtype != dtype or columns[name].shape != shape:
            raise CacheFormatError(f"{name} is missing or not of type {dtype} and shape {shape}")
    for name, kind in (("facts", dict), ("outputs", dict), ("classes", list), ("task", str), ("fingerprint", str)):
        if not isinstance(manifest.get(name), kind):
            raise CacheFormatError(f"the manifest has no {name}")
    if manifest["fingerprint"] != fingerprint(manifest["facts"]):
        raise CacheFormatError("the fingerprint is not that of the facts in the manifest")
    if not manifest["outputs"]:
        raise CacheFormatError("the manifest names no output")
    for output, shape in manifest["outputs"].items():
        column = columns.get(f"features/{output}")
        if column is None or column.shape != (n, *shape) or column.dtype.kind != "f":
            raise CacheFormatError(f"features/{output} is missing or not of shape {(n, *shape)}")
    if manifest["task"] != "none":
        labels = columns.get("labels/values")
        if manifest["task"] not in _LABEL_DTYPES or labels is None or labels.shape[:1] != (n,):
            raise CacheFormatError(f"labels/values is missing or does not fit the task {manifest['task']!r}")
