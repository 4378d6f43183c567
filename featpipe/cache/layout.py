"""What a cache holds and must hold, without HDF5: names, types, shapes, manifest and shards."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache.checks import CHECK_BYTES
from featpipe.cache.mapping import PAGE_BYTES
from featpipe.errors import CacheFormatError
from featpipe.fingerprint import fingerprint
from featpipe.labels import Labels, order_classes
from featpipe.status import Status
from featpipe.strings import Strings

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "GROUPS",
    "LABEL_DTYPES",
    "MANIFEST_BYTES_MAX",
    "SPLITS",
    "Shard",
    "Table",
    "check_columns",
    "narrowed",
    "parse_manifest",
    "parts_directory",
    "serves",
    "shards_directory",
    "shards_of",
    "version_of",
]

FORMAT = "featpipe-cache"
FORMAT_VERSION = "1.1"
SPLITS = ("none", "train", "validation", "test")
GROUPS = ("features", "samples", "labels", "checks")
LABEL_DTYPES = {"classification": "<i4", "regression": "<f8", "multilabel": "i1"}
MANIFEST_BYTES_MAX = 16 * 2**20  # parsed JSON takes up to fifty times its bytes

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
_INFORMATIVE: dict[str, tuple[tuple[type, ...], tuple[type, ...]]] = {
    # what it may hold besides, decides nothing, and is shown: types of the value, or null, and of what is in it
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
_SHARD = {"file": str, "bytes": int, "rows": list, "offsets": dict, "check": str}
_SHARD_FILE = re.compile(r"[^/\0]+\.shards/[0-9a-f]{24}\.h5")


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

    @property
    def ok(self) -> int:
        """How many rows have features."""
        return int(np.count_nonzero(self.status == Status.OK))

    def same_as(self, other: Table) -> bool:
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
    """One of the files over which the features of a large cache are spread.

    Attributes
    ----------
    file : str
        Relative to the folder of the cache: ``NAME.h5.shards/CHECK.h5``.
    nbytes : int
        Size of the file.
    start, stop : int
        Its rows.
    offsets : dict from output to int
        Where in the file the features of each output begin, in bytes.
    check : str
        Digest of the checks of its rows.
    """

    file: str
    nbytes: int
    start: int
    stop: int
    offsets: dict[str, int]
    check: str

    def facts(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {
            "file": self.file,
            "bytes": self.nbytes,
            "rows": [self.start, self.stop],
            "offsets": self.offsets,
            "check": self.check,
        }


def narrowed(facts: Mapping[str, Any], output: str) -> dict[str, Any]:
    """The facts that decide one output alone: two caches may share it and differ in their others."""
    backbone = dict(facts["backbone"])
    backbone["outputs"] = {output: backbone["outputs"].get(output)}
    return {**facts, "backbone": backbone}


def serves(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether embeddings of some facts can be copied for others: all wanted outputs are held, and made alike."""
    outputs = held["backbone"]["outputs"]
    return all(
        output in outputs and narrowed(held, output) == narrowed(wanted, output)
        for output in wanted["backbone"]["outputs"]
    )


def parts_directory(path: Path) -> Path:
    """Where the unfinished work of a cache lies."""
    return path.with_name(path.name + ".parts")


def shards_directory(path: Path) -> Path:
    """Where the shards of a cache lie that is too large for one file."""
    return path.with_name(path.name + ".shards")


def version_of(text: str) -> tuple[int, int]:
    """Major and minor version; others than those that this featpipe reads are an error."""
    ours = FORMAT_VERSION.split(".")[0]
    if not re.fullmatch(rf"{ours}\.[0-9]{{1,4}}", text):
        raise CacheFormatError(f"has format version {text!r}, this featpipe reads {ours}.x")
    major, minor = text.split(".")
    return int(major), int(minor)


def parse_manifest(text: NDArray[Any] | None) -> dict[str, Any]:
    """The manifest from its stored text."""
    if text is None or text.shape != () or text.dtype.kind != "S":
        raise CacheFormatError("the manifest is missing or not one text")
    if text.dtype.itemsize > MANIFEST_BYTES_MAX:
        raise CacheFormatError(f"the manifest has {text.dtype.itemsize} bytes, more than {MANIFEST_BYTES_MAX}")
    manifest = json.loads(text.tobytes().rstrip(b"\0").decode("utf-8"), parse_constant=_refuse_constant)
    _check_keys(manifest, _MANIFEST, "the manifest")
    _check_informative(manifest)
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
    if not 0 <= manifest["ok"] <= manifest["samples"]:
        raise CacheFormatError(f"{manifest['ok']} of {manifest['samples']} samples cannot be ok")
    for output, shape in manifest["outputs"].items():
        if not isinstance(shape, list) or not all(_is(size, (int,)) and size >= 0 for size in shape):
            raise CacheFormatError(f"the manifest gives no shape for output {output!r}")
    return manifest


def _check_keys(found: object, wanted: Mapping[str, type], where: str) -> None:
    if not isinstance(found, dict):
        raise CacheFormatError(f"{where}: is not a JSON object")
    for key, kind in wanted.items():
        if not _is(found.get(key), (kind,)):
            raise CacheFormatError(f"{where}: {key} is missing or not of type {kind.__name__}")


def _check_informative(manifest: Mapping[str, Any]) -> None:
    """What decides nothing is of its type all the same, so that whoever shows it need not look."""
    for key, (kinds, inner) in _INFORMATIVE.items():
        value = manifest.get(key)
        if value is None:
            continue
        held = value.values() if isinstance(value, dict) else value
        if not _is(value, kinds) or (inner and not all(_is(item, inner) for item in held)):
            raise CacheFormatError(f"{key} in the manifest is not what it is to be")
    if not all(_is(source.get("cache"), (str,)) for source in manifest.get("merged_from") or ()):
        raise CacheFormatError("merged_from in the manifest is not what it is to be")


def _is(value: object, kinds: Sequence[type]) -> bool:
    """Whether a value of JSON is of one of some types; true and false are no numbers."""
    return isinstance(value, tuple(kinds)) and (bool in kinds or not isinstance(value, bool))


def _refuse_constant(text: str) -> None:
    raise CacheFormatError(f"the manifest holds {text}, which JSON does not have")


def shards_of(manifest: Mapping[str, Any]) -> tuple[Shard, ...]:
    """The shards that a manifest names, if they are all rows one after the other; none for a cache in one file."""
    stated = manifest.get("shards")
    if stated is None or version_of(manifest["format_version"]) < (1, 1):
        return ()
    if not isinstance(stated, list) or not stated:
        raise CacheFormatError("shards in the manifest are not a list of shards")
    itemsize = np.dtype(manifest["facts"]["storage"]).itemsize
    row_bytes = {output: itemsize * math.prod(shape) for output, shape in manifest["outputs"].items()}
    shards, at = [], 0
    for number, facts in enumerate(stated):
        _check_keys(facts, _SHARD, f"shard {number} in the manifest")
        rows, offsets = facts["rows"], facts["offsets"]
        if not _SHARD_FILE.fullmatch(facts["file"]) or facts["file"].startswith("."):
            raise CacheFormatError(f"shard {number} in the manifest lies elsewhere than in the cache's own folder")
        if len(rows) != 2 or rows[0] != at or not isinstance(rows[1], int) or rows[1] <= at:
            raise CacheFormatError(f"shard {number} in the manifest does not begin where the one before it ends")
        if offsets.keys() != row_bytes.keys() or not all(isinstance(offset, int) for offset in offsets.values()):
            raise CacheFormatError(f"shard {number} in the manifest does not hold the outputs")
        for output, offset in offsets.items():
            fits = offset >= 0 and offset + (rows[1] - at) * row_bytes[output] <= facts["bytes"]
            if not fits or offset % PAGE_BYTES or at * row_bytes[output] % PAGE_BYTES:
                raise CacheFormatError(f"shard {number} in the manifest has {output!r} where it cannot lie")
        shards.append(Shard(facts["file"], facts["bytes"], at, rows[1], dict(offsets), facts["check"]))
        at = rows[1]
    if at != manifest["samples"]:
        raise CacheFormatError(f"the shards in the manifest hold {at} of {manifest['samples']} samples")
    return tuple(shards)


def check_columns(manifest: Mapping[str, Any], columns: Mapping[str, NDArray[Any]], sharded: bool) -> None:
    """What the manifest says and what the file holds must agree."""
    for name, (kind, shape) in _wanted_columns(manifest, columns, sharded).items():
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


def _wanted_columns(
    manifest: Mapping[str, Any], columns: Mapping[str, NDArray[Any]], sharded: bool
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
        if sharded and f"features/{output}" in columns:
            raise CacheFormatError(f"'features/{output}' is in the file, and in shards too")
        if not sharded:
            kind = np.dtype(manifest["facts"]["storage"]).newbyteorder("<").str
            wanted[f"features/{output}"] = (kind, (n, *shape))
        if version_of(manifest["format_version"]) >= (1, 1):
            wanted[f"checks/{output}"] = ("u1", (n, CHECK_BYTES))
    if task in LABEL_DTYPES:
        wanted["labels/values"] = (LABEL_DTYPES[task], (n,) if task == "classification" else (n, classes))
    elif task != "none":
        raise CacheFormatError(f"the manifest has the unknown task {task[:40]!r}")
    if version_of(manifest["format_version"]) >= (1, 1):
        stated = manifest.get("columns")
        digested = {name for name in wanted if not name.startswith("features/")}
        if not isinstance(stated, dict) or not digested <= stated.keys():
            raise CacheFormatError("the manifest does not give a digest for each column")
    return wanted
