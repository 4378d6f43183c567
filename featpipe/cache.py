"""The HDF5 format of a cache: the only reader and writer of HDF5. ``cache/README.md`` is its specification."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featpipe.durable import fsync_directory
from featpipe.errors import CacheError, CacheFormatError, CacheIncompleteError
from featpipe.fingerprint import fingerprint
from featpipe.labels import Labels, order_classes
from featpipe.names import unknown
from featpipe.status import Status
from featpipe.strings import Strings

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "SPLITS",
    "FeatureCache",
    "Table",
    "narrowed",
    "parts_directory",
    "write_cache",
]

FORMAT = "featpipe-cache"
FORMAT_VERSION = "1.0"
SPLITS = ("none", "train", "validation", "test")
BLOCK_BYTES = 32 * 2**20
MANIFEST_BYTES_MAX = 16 * 2**20  # parsed JSON takes up to thirty times its bytes
ENTRIES_MAX = 4096  # in one group of a file; looking at each takes some 50 µs
SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUPERBLOCK_MIN = 2  # from here on HDF5 checks its own structures; it can loop for ever in damaged ones of before
ALIGNMENT_BYTES = 64  # arrays that begin anywhere are copied by BLAS and refused by some of torch's kernels

_STATUSES = frozenset(Status)
_LABEL_DTYPES = {"classification": "<i4", "regression": "<f8", "multilabel": "i1"}
_MANIFEST = {  # what a manifest must hold, and of which type
    "format": str,
    "format_version": str,
    "facts": dict,
    "fingerprint": str,
    "outputs": dict,
    "task": str,
    "classes": list,
    "samples": int,
    "ok": int,
}
_FACTS = {"backbone": dict, "precision": str, "storage": str, "extraction": int}
_BACKBONE_FACTS = {"name": str, "source": str, "weights": str, "transform": dict, "outputs": dict}


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


class FeatureCache:
    """The embeddings of an archive, read at memory speed.

    Opening checks the layout, reads the manifest and maps the file into memory, in milliseconds whatever its size.
    The object holds no HDF5 handle: it can be pickled, forked and read by many processes. It goes on showing the
    file that it opened when an extraction puts a new one in its place.

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
        try:
            with open(self.path, "rb") as file, _format_errors(self.path):
                self.manifest, self._columns = _read(file)
        except OSError as error:
            raise CacheError(f"{self.path}: cannot be read ({error.strerror or error})") from None

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return FeatureCache, (self.path.absolute(),)

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
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def task(self) -> str:
        return str(self.manifest["task"])

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
        self._refuse_unless(bool((split < len(SPLITS)).all()), "samples/split holds codes that are no split")
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
            NaN in the rows whose status is not ``ok``.
        """
        name = self.outputs[0] if output is None else output
        if name not in self.outputs:
            raise unknown("output", name, self.outputs)
        return self._columns[f"features/{name}"]

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
        return {_word(code): int(k) for code, k in zip(codes, counts, strict=True) if code != Status.OK}

    def table(self) -> Table:
        return Table(self.ids, self.status_codes, self.digests, self.stamps, self.split, self.label_table)


def _word(code: int) -> str:
    """The word of a status; a later version of the format may have more of them."""
    return Status(code).word if code in _STATUSES else f"status-{code}"


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
        ``gather(output, start, stop)`` gives the features of those rows, NaN where their status is not ``ok``.

    Raises
    ------
    CacheError
        If the disk is full or not writable, or the result would not open; nothing is left behind, and an older
        cache stays as it was.
    """
    complete = _complete(manifest, table, shapes)  # not canonical: the order of the outputs is theirs
    text = json.dumps(complete, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
    temporary = _temporary(path)
    try:
        with open(temporary, "xb+") as file:
            _write_file(file, table, text, shapes, dtype, gather)
            file.flush()
            os.fsync(file.fileno())
        FeatureCache(temporary)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except CacheFormatError as error:
        raise CacheError(f"{path}: was not written, no one could open it ({error})") from None
    except (OSError, RuntimeError) as error:  # h5py reports some failures of its own as RuntimeError
        raise CacheError(
            f"{path}: cannot be written ({_one_line(error)}); free some space or choose another --cache"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A name that no one reads; among the parts of the cache where there are any, and so removed with them."""
    parts = parts_directory(path)
    folder = parts if parts.is_dir() else path.parent
    return folder / f".{os.getpid()}.{os.urandom(6).hex()}.tmp"


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


class _Sink:
    """The file that HDF5 writes into. It hears of no failure, because it can crash when a disk is full; we do."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: BaseException | None = None

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _attempt(self, action: Callable[..., Any], *given: Any) -> Any:
        if self._error is None:
            try:
                return action(*given)
            except BaseException as error:  # an interrupt too: it is raised where HDF5 is done
                self._error = error
        return 0

    def read(self, size: int = -1) -> bytes:
        return self._attempt(self._file.read, size) or b""

    def readinto(self, buffer: Any) -> int:
        return self._attempt(self._file.readinto, buffer)  # type: ignore[attr-defined]

    def write(self, data: Any) -> int:
        return self._attempt(self._file.write, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._attempt(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._attempt(self._file.tell)

    def truncate(self, size: int | None = None) -> int:
        return self._attempt(self._file.truncate, size)

    def flush(self) -> None:
        self._attempt(self._file.flush)


@contextmanager
def _hdf5(file: Any, new: bool = False) -> Iterator[Any]:
    """A Python file as HDF5, of which nothing is left open however the block ends.

    What a traceback keeps alive of a Python file until the process ends, its access properties alone are enough, HDF5
    frees when there is no Python any more, and crashes.
    """
    import h5py

    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    try:
        access.set_fileobj_driver(h5py.h5fd.fileobj_driver, file)
        access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
        if new:
            access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
            access.set_alignment(1, ALIGNMENT_BYTES)
            opened = h5py.h5f.create(b"cache", h5py.h5f.ACC_TRUNC, fapl=access)
        else:
            opened = h5py.h5f.open(b"cache", h5py.h5f.ACC_RDONLY, fapl=access)
    finally:
        access.close()
    with h5py.File(opened) as hdf5:
        yield hdf5


def _write_file(
    target: BinaryIO,
    table: Table,
    manifest: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    gather: Callable[[str, int, int], NDArray[np.floating]],
) -> None:
    import h5py

    n = len(table.ids)
    sink = _Sink(target)
    with _hdf5(sink, new=True) as file:
        file.attrs["format"] = np.bytes_(FORMAT)
        file.attrs["format_version"] = np.bytes_(FORMAT_VERSION)
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
                block = gather(output, start, stop)
                if not np.isnan(block[table.status[start:stop] != Status.OK]).all():
                    raise ValueError(f"{output}: features of rows {start} to {stop} that are not ok must be NaN")
                features[start:stop] = block
                sink.raise_error()
    sink.raise_error()


def _read(file: BinaryIO) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The manifest and the mapped arrays of a file, all by the one handle: its name may get another file meanwhile."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(len(SIGNATURE) + 1)
    if start[:-1] != SIGNATURE:
        raise CacheFormatError("is not an HDF5 file" if size else "is empty")
    if start[-1] < SUPERBLOCK_MIN:
        raise CacheFormatError("is HDF5 of the oldest kind, without checksums; no cache is")
    with _hdf5(file) as hdf5:
        if _attribute(hdf5, "format") != FORMAT:
            raise CacheFormatError("is HDF5 but not a featpipe cache")
        version, ours = _attribute(hdf5, "format_version"), FORMAT_VERSION.split(".")[0]
        if not re.fullmatch(rf"{ours}\.[0-9]+", version):
            raise CacheFormatError(f"has format version {version!r}, this featpipe reads {ours}.x")
        located = {name: _locate(dataset, name, size) for name, dataset in _datasets(hdf5)}
    whole = np.memmap(file, np.uint8, "r")
    columns = {name: _view(whole, *place) for name, place in located.items()}
    manifest = _manifest(columns)
    _check_columns(manifest, columns)
    return manifest, columns


def _view(whole: NDArray[np.uint8], offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    nbytes = dtype.itemsize * math.prod(shape)
    return whole[offset : offset + nbytes].view(dtype).reshape(shape)


@contextmanager
def _format_errors(path: Path) -> Iterator[None]:
    """Whatever HDF5 says of a damaged file becomes one error with its name."""
    try:
        yield
    except CacheFormatError as error:
        raise CacheFormatError(f"{path}: {error}") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CacheFormatError(f"{path}: is not a readable featpipe cache ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _attribute(file: Any, name: str) -> str:
    """A short text attribute of fixed length, or nothing: HDF5 can loop for ever in a damaged heap of other texts."""
    if name not in file.attrs:
        return ""
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind != "S" or attribute.dtype.itemsize > 64:
        return ""
    return bytes(file.attrs[name]).decode("ascii")


def _datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """The datasets of a cache, through hard links alone: soft and external ones could read other files."""
    import h5py

    groups = [("", file)]
    for prefix, group in groups:
        if len(group) > ENTRIES_MAX:
            raise CacheFormatError(f"{prefix or '/'} has {len(group)} entries, more than {ENTRIES_MAX}")
        for name in group:
            full = f"{prefix}{name}"
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise CacheFormatError(f"{full!r} is a link; a cache holds none")
            entry = group[name]
            if isinstance(entry, h5py.Dataset):
                yield full, entry
            elif isinstance(entry, h5py.Group) and full in ("features", "samples", "labels"):
                groups.append((f"{full}/", entry))
            elif not isinstance(entry, h5py.Group):
                raise CacheFormatError(f"{full!r} is neither a dataset nor a group")


def _locate(dataset: Any, name: str, file_bytes: int) -> tuple[int, np.dtype[Any], tuple[int, ...]]:
    """Where an array lies in the file, so that it can be mapped without HDF5: offset, dtype and shape."""
    import h5py

    plist = dataset.id.get_create_plist()
    if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count() or plist.get_nfilters():
        raise CacheFormatError(f"{name!r} is not stored in one contiguous piece of this file")
    dtype, shape = _dtype(dataset.id.get_type(), name), dataset.shape
    if shape is None:
        raise CacheFormatError(f"{name!r} has no shape")
    nbytes = dtype.itemsize * math.prod(shape)
    offset = dataset.id.get_offset()
    if nbytes and (offset is None or offset + nbytes > file_bytes):
        raise CacheFormatError(f"{name!r} declares {nbytes} bytes, more than the file holds; it is truncated")
    return (offset if nbytes else 0), dtype, tuple(map(int, shape))


def _dtype(stored: Any, name: str) -> np.dtype[Any]:
    """The dtype whose bytes are exactly the stored ones: numpy knows no integers of 20 bits and no other floats."""
    from h5py import h5t

    if isinstance(stored, h5t.TypeStringID) and not stored.is_variable_str():
        return np.dtype(("S", stored.get_size()))
    if isinstance(stored, (h5t.TypeIntegerID, h5t.TypeFloatID)) and h5t.py_create(stored.dtype) == stored:
        return stored.dtype
    raise CacheFormatError(f"{name!r} has a type that no cache holds; expected integers, floats or byte strings")


def _manifest(columns: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    text = columns.get("manifest")
    if text is None or text.shape != () or text.dtype.kind != "S":
        raise CacheFormatError("the manifest is missing or not one text")
    if text.dtype.itemsize > MANIFEST_BYTES_MAX:
        raise CacheFormatError(f"the manifest has {text.dtype.itemsize} bytes, more than {MANIFEST_BYTES_MAX}")
    manifest = json.loads(text.tobytes().rstrip(b"\0").decode("utf-8"))
    _check_keys(manifest, _MANIFEST, "the manifest")
    facts = manifest["facts"]
    _check_keys(facts, _FACTS, "facts in the manifest")
    _check_keys(facts["backbone"], _BACKBONE_FACTS, "facts.backbone in the manifest")
    if manifest["fingerprint"] != fingerprint(facts):
        raise CacheFormatError("the fingerprint is not that of the facts in the manifest")
    if not manifest["outputs"] or manifest["outputs"].keys() != facts["backbone"]["outputs"].keys():
        raise CacheFormatError("the manifest names no output, or others than its facts")
    if facts["storage"] not in ("float32", "float16"):
        raise CacheFormatError(f"the features are stored as {facts['storage']!r}, expected float32 or float16")
    classes = manifest["classes"]
    if not all(isinstance(name, str) for name in classes):
        raise CacheFormatError("classes in the manifest are not text")
    if manifest["task"] in ("classification", "multilabel") and order_classes(classes) != tuple(classes):
        raise CacheFormatError("classes in the manifest are not in their order, or not unique")
    return manifest


def _check_keys(found: object, wanted: Mapping[str, type], where: str) -> None:
    if not isinstance(found, dict):
        raise CacheFormatError(f"{where}: is not a JSON object")
    for key, kind in wanted.items():
        if not isinstance(found.get(key), kind):
            raise CacheFormatError(f"{where}: {key} is missing or not of type {kind.__name__}")


def _check_columns(manifest: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> None:
    """What the manifest says and what the file holds must agree."""
    for name, (kind, shape) in _wanted_columns(manifest, columns).items():
        column = columns.get(name)
        if column is None:
            raise CacheFormatError(f"{name!r} is missing")
        if column.dtype != np.dtype(kind) or column.shape != shape:
            raise CacheFormatError(
                f"{name!r} is {column.dtype} of shape {column.shape}, expected {np.dtype(kind)} of shape {shape}"
            )
    offsets = columns["samples/id_offsets"]
    if offsets[0] != 0 or offsets[-1] != len(columns["samples/id_bytes"]):
        raise CacheFormatError("samples/id_offsets does not begin and end with samples/id_bytes")
    if not 0 <= manifest["ok"] <= manifest["samples"]:
        raise CacheFormatError(f"{manifest['ok']} of {manifest['samples']} samples cannot be ok")


def _wanted_columns(
    manifest: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    n, task, classes = manifest["samples"], manifest["task"], len(manifest["classes"])
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "samples/status": ("u1", (n,)),
        "samples/digest": ("u1", (n, 32)),
        "samples/stamp": ("u1", (n, 16)),
        "samples/split": ("u1", (n,)),
        "samples/id_offsets": ("<i8", (n + 1,)),
        "samples/id_bytes": ("u1", columns["samples/id_bytes"].shape[:1] if "samples/id_bytes" in columns else ()),
    }
    for output, shape in manifest["outputs"].items():
        if not isinstance(shape, list):
            raise CacheFormatError(f"the manifest gives no shape for output {output!r}")
        wanted[f"features/{output}"] = (np.dtype(manifest["facts"]["storage"]).newbyteorder("<").str, (n, *shape))
    if task in _LABEL_DTYPES:
        wanted["labels/values"] = (_LABEL_DTYPES[task], (n,) if task == "classification" else (n, classes))
    elif task != "none":
        raise CacheFormatError(f"the manifest has the unknown task {task!r}")
    return wanted
