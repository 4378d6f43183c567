"""The cache format, independent of HDF5: names, dtypes and shapes of datasets, manifest and shards."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache.mmap import PAGE_BYTES
from featpipe.data import Labels, order_classes
from featpipe.errors import CacheFormatError
from featpipe.status import Status
from featpipe.storage import StringColumn, compute_fingerprint

FORMAT = "featpipe-cache"
FORMAT_VERSION = "1.1"
SPLIT_NAMES = ("none", "train", "validation", "test")
HDF5_GROUPS = ("features", "samples", "labels", "checks")
LABEL_DTYPES = {"classification": "<i4", "regression": "<f8", "multilabel": "i1"}
MAX_MANIFEST_BYTES = 16 * 2**20  # parsed JSON can take fifty times as much memory

_MANIFEST_TYPES = {  # required keys
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
_FACTS_TYPES = {"backbone": dict, "precision": str, "storage": str, "extraction": int}
_BACKBONE_FACTS_TYPES = {"name": str, "source": str, "weights": str, "transform": dict, "outputs": dict}
_OPTIONAL_TYPES: dict[str, tuple[tuple[type, ...], tuple[type, ...]]] = {
    # optional keys, which are only displayed: types of the value, which may also be null, and of its items
    "archive_kinds": ((list,), (str,)),
    "archives": ((list,), (str,)),
    "backbone": ((dict,), ()),
    "batch": ((int,), ()),
    "created": ((str,), ()),
    "device": ((str,), ()),
    "embedded": ((int,), ()),
    "engine": ((str,), ()),
    "fidelity": ((dict,), ()),
    "ignored": ((dict,), (int,)),
    "images_per_second": ((int, float), ()),
    "machine": ((str,), ()),
    "merged_from": ((list,), (dict,)),
    "repaired": ((list,), (dict,)),
    "seconds": ((dict,), (int, float)),
    "versions": ((dict,), (str,)),
}
_SHARD_TYPES = {"file": str, "bytes": int, "rows": list, "offsets": dict, "check": str}
_SHARD_FILE_PATTERN = re.compile(r"[^/\0]+\.shards/[0-9a-f]{24}\.h5")


@dataclass(frozen=True, eq=False)
class SampleTable:
    """All columns of a cache except the features, each with n rows.

    Attributes
    ----------
    ids : StringColumn
    status : ndarray of shape (n,), uint8
        Codes of :class:`featpipe.status.Status`.
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of the bytes of each image; zero if they could not be read.
    stamps : ndarray of shape (n, 16), uint8
        Digest of location, size and modification time at the time of reading; zero if the stamp cannot be trusted.
    split : ndarray of shape (n,), uint8
        Indices into ``SPLIT_NAMES``.
    labels : Labels
    """

    ids: StringColumn
    status: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    stamps: NDArray[np.uint8]
    split: NDArray[np.uint8]
    labels: Labels

    @property
    def ok(self) -> int:
        """Number of rows that have features."""
        return int(np.count_nonzero(self.status == Status.OK))

    def same_as(self, other: SampleTable) -> bool:
        """Whether all columns are equal."""
        return (
            self.ids == other.ids
            and np.array_equal(self.status, other.status)
            and np.array_equal(self.digests, other.digests)
            and np.array_equal(self.stamps, other.stamps)
            and np.array_equal(self.split, other.split)
            and self.labels.same_as(other.labels)
        )


@dataclass(frozen=True)
class Shard:
    """One of the files that hold the features of a large cache.

    Attributes
    ----------
    file : str
        Path relative to the folder of the cache: ``NAME.h5.shards/CHECK.h5``.
    nbytes : int
        Size of the file.
    start, stop : int
        Its range of rows.
    offsets : dict from output to int
        Offset in the file of the features of each output, in bytes.
    digest : str
        SHA-256 over the checksums of its rows; see :func:`compute_shard_digest`.
    """

    file: str
    nbytes: int
    start: int
    stop: int
    offsets: dict[str, int]
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """The entry in the manifest."""
        return {
            "file": self.file,
            "bytes": self.nbytes,
            "rows": [self.start, self.stop],
            "offsets": self.offsets,
            "check": self.digest,
        }


def restrict_facts_to_output(facts: Mapping[str, Any], output: str) -> dict[str, Any]:
    """Restrict facts to one output. Two caches may share an output and differ in others."""
    backbone = dict(facts["backbone"])
    backbone["outputs"] = {output: backbone["outputs"].get(output)}
    return {**facts, "backbone": backbone}


def can_reuse(cached_facts: Mapping[str, Any], requested_facts: Mapping[str, Any]) -> bool:
    """Whether a cache with ``cached_facts`` has all requested outputs, with equal facts, so that they can be copied."""
    outputs = cached_facts["backbone"]["outputs"]
    return all(
        output in outputs
        and restrict_facts_to_output(cached_facts, output) == restrict_facts_to_output(requested_facts, output)
        for output in requested_facts["backbone"]["outputs"]
    )


def parts_directory(path: Path) -> Path:
    """Folder of the parts of an unfinished cache."""
    return path.with_name(path.name + ".parts")


def shards_directory(path: Path) -> Path:
    """Folder of the shards of a cache that is too large for one file."""
    return path.with_name(path.name + ".shards")


def parse_version(text: str) -> tuple[int, int]:
    """Parse a format version into major and minor. A version that this featpipe cannot read is an error."""
    supported_major = FORMAT_VERSION.split(".")[0]
    if not re.fullmatch(rf"{supported_major}\.[0-9]{{1,4}}", text):
        raise CacheFormatError(f"has format version {text!r}, this featpipe reads {supported_major}.x")
    major, minor = text.split(".")
    return int(major), int(minor)


def parse_manifest(text: NDArray[Any] | None) -> dict[str, Any]:
    """Parse and validate the stored text of a manifest."""
    if text is None or text.shape != () or text.dtype.kind != "S":
        raise CacheFormatError("the manifest is missing or not a single text")
    if text.dtype.itemsize > MAX_MANIFEST_BYTES:
        raise CacheFormatError(f"the manifest has {text.dtype.itemsize} bytes, more than {MAX_MANIFEST_BYTES}")
    manifest = json.loads(text.tobytes().rstrip(b"\0").decode("utf-8"), parse_constant=_reject_constant)
    _check_keys(manifest, _MANIFEST_TYPES, "the manifest")
    _check_optional_keys(manifest)
    facts = manifest["facts"]
    _check_keys(facts, _FACTS_TYPES, "facts in the manifest")
    _check_keys(facts["backbone"], _BACKBONE_FACTS_TYPES, "facts.backbone in the manifest")
    if manifest["fingerprint"] != compute_fingerprint(facts):
        raise CacheFormatError("the fingerprint in the manifest does not match its facts")
    if not manifest["outputs"] or manifest["outputs"].keys() != facts["backbone"]["outputs"].keys():
        raise CacheFormatError("the outputs in the manifest are empty or differ from its facts")
    if facts["storage"] not in ("float32", "float16"):
        raise CacheFormatError(f"the features are stored as {facts['storage']!r}, expected float32 or float16")
    classes = manifest["classes"]
    if not all(isinstance(name, str) for name in classes):
        raise CacheFormatError("classes in the manifest are not text")
    if manifest["task"] in ("classification", "multilabel") and order_classes(classes) != tuple(classes):
        raise CacheFormatError("classes in the manifest are not sorted or not unique")
    if not 0 <= manifest["ok"] <= manifest["samples"]:
        raise CacheFormatError(f"the manifest counts {manifest['ok']} ok samples of {manifest['samples']}")
    for output, shape in manifest["outputs"].items():
        if not isinstance(shape, list) or not all(_is_instance(size, (int,)) and size >= 0 for size in shape):
            raise CacheFormatError(f"the manifest gives no shape for output {output!r}")
    return manifest


def _check_keys(document: object, expected_types: Mapping[str, type], where: str) -> None:
    if not isinstance(document, dict):
        raise CacheFormatError(f"{where}: not a JSON object")
    for key, expected_type in expected_types.items():
        if not _is_instance(document.get(key), (expected_type,)):
            raise CacheFormatError(f"{where}: {key} is missing or not of type {expected_type.__name__}")


def _check_optional_keys(manifest: Mapping[str, Any]) -> None:
    """Check the types of optional keys, so that code that displays them need not."""
    for key, (value_types, item_types) in _OPTIONAL_TYPES.items():
        value = manifest.get(key)
        if value is None:
            continue
        items = value.values() if isinstance(value, dict) else value
        if not _is_instance(value, value_types) or (
            item_types and not all(_is_instance(item, item_types) for item in items)
        ):
            raise CacheFormatError(f"{key} in the manifest has the wrong type")
    if not all(_is_instance(source.get("cache"), (str,)) for source in manifest.get("merged_from") or ()):
        raise CacheFormatError("merged_from in the manifest has the wrong type")


def _is_instance(value: object, types: Sequence[type]) -> bool:
    """Whether a JSON value has one of the types. Booleans are not numbers."""
    return isinstance(value, tuple(types)) and (bool in types or not isinstance(value, bool))


def _reject_constant(text: str) -> None:
    raise CacheFormatError(f"the manifest contains {text}, which is not valid JSON")


def parse_shards(manifest: Mapping[str, Any]) -> tuple[Shard, ...]:
    """Parse the shards of a manifest, and check that they cover all rows in order; empty for a cache in one file."""
    entries = manifest.get("shards")
    if entries is None or parse_version(manifest["format_version"]) < (1, 1):
        return ()
    if not isinstance(entries, list) or not entries:
        raise CacheFormatError("shards in the manifest are not a non-empty list")
    itemsize = np.dtype(manifest["facts"]["storage"]).itemsize
    row_bytes = {output: itemsize * math.prod(shape) for output, shape in manifest["outputs"].items()}
    shards, start = [], 0
    for shard_number, entry in enumerate(entries):
        _check_keys(entry, _SHARD_TYPES, f"shard {shard_number} in the manifest")
        row_range, offsets = entry["rows"], entry["offsets"]
        if not _SHARD_FILE_PATTERN.fullmatch(entry["file"]) or entry["file"].startswith("."):
            raise CacheFormatError(f"shard {shard_number} in the manifest is not in the shard folder of the cache")
        if len(row_range) != 2 or row_range[0] != start or not isinstance(row_range[1], int) or row_range[1] <= start:
            raise CacheFormatError(f"shard {shard_number} in the manifest does not begin where the previous shard ends")
        if offsets.keys() != row_bytes.keys() or not all(isinstance(offset, int) for offset in offsets.values()):
            raise CacheFormatError(f"shard {shard_number} in the manifest does not contain the outputs of the cache")
        for output, offset in offsets.items():
            fits = offset >= 0 and offset + (row_range[1] - start) * row_bytes[output] <= entry["bytes"]
            if not fits or offset % PAGE_BYTES or start * row_bytes[output] % PAGE_BYTES:
                raise CacheFormatError(f"shard {shard_number} in the manifest has an impossible offset for {output!r}")
        shards.append(Shard(entry["file"], entry["bytes"], start, row_range[1], dict(offsets), entry["check"]))
        start = row_range[1]
    if start != manifest["samples"]:
        raise CacheFormatError(f"the shards in the manifest cover {start} of {manifest['samples']} samples")
    return tuple(shards)


def check_columns(manifest: Mapping[str, Any], columns: Mapping[str, NDArray[Any]], is_sharded: bool) -> None:
    """Check the dtypes and shapes of all datasets against the manifest."""
    for name, (dtype, shape) in _expected_columns(manifest, columns, is_sharded).items():
        column = columns.get(name)
        if column is None:
            raise CacheFormatError(f"{name!r} is missing")
        if column.dtype != np.dtype(dtype) or column.shape != shape:
            raise CacheFormatError(
                f"{name!r} is {column.dtype} of shape {column.shape}, expected {np.dtype(dtype)} of shape {shape}"
            )
    offsets = columns["samples/id_offsets"]
    if offsets[0] != 0 or offsets[-1] != len(columns["samples/id_bytes"]):
        raise CacheFormatError("samples/id_offsets does not match samples/id_bytes")


def _expected_columns(
    manifest: Mapping[str, Any], columns: Mapping[str, NDArray[Any]], is_sharded: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    n, task, n_classes = manifest["samples"], manifest["task"], len(manifest["classes"])
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "samples/status": ("u1", (n,)),
        "samples/digest": ("u1", (n, 32)),
        "samples/stamp": ("u1", (n, 16)),
        "samples/split": ("u1", (n,)),
        "samples/id_offsets": ("<i8", (n + 1,)),
        "samples/id_bytes": ("u1", columns["samples/id_bytes"].shape[:1] if "samples/id_bytes" in columns else ()),
    }
    for output, shape in manifest["outputs"].items():
        if is_sharded and f"features/{output}" in columns:
            raise CacheFormatError(f"'features/{output}' is in the file and in shards")
        if not is_sharded:
            dtype = np.dtype(manifest["facts"]["storage"]).newbyteorder("<").str
            expected[f"features/{output}"] = (dtype, (n, *shape))
        if parse_version(manifest["format_version"]) >= (1, 1):
            expected[f"checks/{output}"] = ("u1", (n, CHECKSUM_BYTES))
    if task in LABEL_DTYPES:
        expected["labels/values"] = (LABEL_DTYPES[task], (n,) if task == "classification" else (n, n_classes))
    elif task != "none":
        raise CacheFormatError(f"the manifest has the unknown task {task[:40]!r}")
    if parse_version(manifest["format_version"]) >= (1, 1):
        column_digests = manifest.get("columns")
        digested_names = {name for name in expected if not name.startswith("features/")}
        if not isinstance(column_digests, dict) or not digested_names <= column_digests.keys():
            raise CacheFormatError("the manifest does not give a digest for each column")
    return expected


CHECKSUM_BYTES = 16
_HASH_BLOCK_BYTES = 2**24


def compute_row_checksums(
    digests: NDArray[np.uint8], status: NDArray[np.uint8], features: NDArray[np.floating]
) -> NDArray[np.uint8]:
    """Compute the checksum of each row: the first 16 bytes of the SHA-256 of image digest, status and features.

    Parameters
    ----------
    digests : ndarray of shape (b, 32), uint8
    status : ndarray of shape (b,), uint8
    features : ndarray of shape (b, …)
        In the stored dtype.

    Returns
    -------
    ndarray of shape (b, 16), uint8
    """
    b = len(status)
    if not b:
        return np.zeros((0, CHECKSUM_BYTES), np.uint8)
    row_prefixes = memoryview(np.concatenate([digests, status[:, None]], axis=1).tobytes())
    feature_bytes = np.ascontiguousarray(features).reshape(-1).view(np.uint8).data
    prefix_bytes, row_bytes = len(row_prefixes) // b, len(feature_bytes) // b
    sha256 = hashlib.sha256
    checksums = bytearray()
    for row in range(b):
        hasher = sha256(row_prefixes[row * prefix_bytes : (row + 1) * prefix_bytes])
        hasher.update(feature_bytes[row * row_bytes : (row + 1) * row_bytes])
        checksums += hasher.digest()[:CHECKSUM_BYTES]
    return np.frombuffer(bytes(checksums), np.uint8).reshape(b, CHECKSUM_BYTES)


def compute_column_digest(column: NDArray[np.generic]) -> str:
    """SHA-256 of the bytes of a column, as 64 hexadecimal digits."""
    hasher = hashlib.sha256()
    column_bytes = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
    for start in range(0, len(column_bytes), _HASH_BLOCK_BYTES):
        hasher.update(column_bytes[start : start + _HASH_BLOCK_BYTES].data)
    return hasher.hexdigest()


def compute_shard_digest(checksum_blocks: Iterable[NDArray[np.uint8]], shapes: Sequence[object]) -> str:
    """SHA-256 over the row checksums of a shard, output by output, and the row shapes. It names the shard file."""
    hasher = hashlib.sha256(repr(list(shapes)).encode())
    for checksums in checksum_blocks:
        hasher.update(np.ascontiguousarray(checksums).data)
    return hasher.hexdigest()
