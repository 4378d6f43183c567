"""From a file on disk to mapped columns: everything is checked here that does not take time in the number of rows."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache.hdf5 import located
from featpipe.cache.layout import (
    Shard,
    check_columns,
    parse_manifest,
    shards_directory,
    shards_of,
    version_of,
)
from featpipe.cache.mapping import Piece, map_into, reserved, view
from featpipe.errors import CacheFormatError

__all__ = ["Contents", "one_line", "open_cache"]


@dataclass(frozen=True, eq=False)
class Contents:
    """A cache in memory.

    Attributes
    ----------
    manifest : dict
    columns : dict from name to ndarray
        Mapped, read-only.
    shards : tuple of Shard
    found : tuple of Path
        The files of the shards, without those that are lost.
    lost : tuple of str
        Shards that are missing or of another size; zeros stand where their rows were.
    digest : str
        SHA-256 of the manifest's text, which names the digests of all columns.
    """

    manifest: dict[str, Any]
    columns: dict[str, NDArray[Any]]
    digest: str
    shards: tuple[Shard, ...] = ()
    found: tuple[Path, ...] = ()
    lost: tuple[str, ...] = ()


def open_cache(path: Path, beside: Path | None = None) -> Contents:
    """Check a cache and map it, all by one handle: its name may get another file meanwhile.

    Parameters
    ----------
    path : Path
    beside : Path, optional
        The name beside which the shards lie; ``path`` if not given.

    Raises
    ------
    CacheFormatError
    OSError
        If the file cannot be read.
    """
    with open(path, "rb") as file, _format_errors(path):
        size = os.fstat(file.fileno()).st_size
        places, attributes = located(file, size)
        whole = np.memmap(file, np.uint8, "r")
        columns = {name: view(whole, *place) for name, place in places.items()}
        manifest = parse_manifest(columns.get("manifest"))
        if manifest["format_version"] != attributes["format_version"]:
            raise CacheFormatError("has another format version in its manifest")
        digest = hashlib.sha256(columns["manifest"].tobytes()).hexdigest()
        if version_of(manifest["format_version"]) >= (1, 1) and digest != attributes["manifest_sha256"]:
            raise CacheFormatError("the manifest does not have its digest; it is damaged")
        shards = shards_of(manifest)
        check_columns(manifest, columns, bool(shards))
        if not shards:
            return Contents(manifest, columns, digest)
        features, found = _joined_shards(manifest, shards, beside or path)
        lost = tuple(shard.file for shard, place in zip(shards, found, strict=True) if place is None)
        there = tuple(place for place in found if place)
        return Contents(manifest, columns | features, digest, shards, there, lost)


def _joined_shards(
    manifest: Mapping[str, Any], shards: Sequence[Shard], path: Path
) -> tuple[dict[str, NDArray[Any]], list[Path | None]]:
    """The features of a sharded cache, and where each shard was found; zeros stand for those that were not."""
    n, dtype = manifest["samples"], np.dtype(manifest["facts"]["storage"]).newbyteorder("<")
    row_bytes = {output: dtype.itemsize * math.prod(shape) for output, shape in manifest["outputs"].items()}
    flat = {output: reserved(n * nbytes, shards[0].offsets[output]) for output, nbytes in row_bytes.items()}
    found: list[Path | None] = []
    for shard in shards:  # one after the other: a process may have few files open
        with _open_shard(path, shard) as (file, place):
            found.append(None if file is None else place)
            if file is None:
                continue
            for output, nbytes in row_bytes.items():
                start, size = shard.start * nbytes, (shard.stop - shard.start) * nbytes
                map_into(flat[output], Piece(file, shard.offsets[output], start, size))
    columns = {f"features/{name}": flat[name].view(dtype).reshape(n, *manifest["outputs"][name]) for name in flat}
    return columns, found


@contextmanager
def _open_shard(path: Path, shard: Shard) -> Iterator[tuple[int | None, Path]]:
    """The descriptor of a shard, beside the cache as the manifest says or under the cache's present name."""
    places = (path.parent / shard.file, shards_directory(path) / Path(shard.file).name)
    for place in dict.fromkeys(places):
        try:
            if place.parent.is_symlink():
                continue  # a stranger's link could lead anywhere
            file = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = os.fstat(file)
            if stat.S_ISREG(found.st_mode) and found.st_size == shard.nbytes:
                yield file, place
                return
        finally:
            os.close(file)
    yield None, places[0]


@contextmanager
def _format_errors(path: Path) -> Iterator[None]:
    """Whatever HDF5 says of a damaged file becomes one error with its name."""
    try:
        yield
    except CacheFormatError as error:
        raise CacheFormatError(f"{path}: {error}") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CacheFormatError(f"{path}: is not a readable featpipe cache ({one_line(error)})") from None


def one_line(error: BaseException) -> str:
    """What an error says, short enough to be part of a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__
