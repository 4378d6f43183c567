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

from featpipe.cache.format import Shard, check_columns, parse_manifest, parse_shards, parse_version, shards_directory
from featpipe.cache.hdf5 import locate_arrays
from featpipe.cache.mmap import FileSegment, map_into, reserve_address_range, view_as_array
from featpipe.errors import CacheFormatError

__all__ = ["CacheContents", "format_error", "open_cache"]


@dataclass(frozen=True, eq=False)
class CacheContents:
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
    manifest_digest: str
    shards: tuple[Shard, ...] = ()
    shard_files: tuple[Path, ...] = ()
    lost_shards: tuple[str, ...] = ()


def open_cache(path: Path, final_path: Path | None = None) -> CacheContents:
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
    with open(path, "rb") as file, _wrap_format_errors(path):
        file_bytes = os.fstat(file.fileno()).st_size
        locations, attributes = locate_arrays(file, file_bytes)
        buffer = np.memmap(file, np.uint8, "r")
        columns = {name: view_as_array(buffer, *location) for name, location in locations.items()}
        manifest = parse_manifest(columns.get("manifest"))
        if manifest["format_version"] != attributes["format_version"]:
            raise CacheFormatError("has another format version in its manifest")
        manifest_digest = hashlib.sha256(columns["manifest"].tobytes()).hexdigest()
        if parse_version(manifest["format_version"]) >= (1, 1) and manifest_digest != attributes["manifest_sha256"]:
            raise CacheFormatError("the manifest does not have its digest; it is damaged")
        shards = parse_shards(manifest)
        check_columns(manifest, columns, bool(shards))
        if not shards:
            return CacheContents(manifest, columns, manifest_digest)
        features, shard_paths = _map_shards(manifest, shards, final_path or path)
        lost_shards = tuple(
            shard.file for shard, shard_path in zip(shards, shard_paths, strict=True) if shard_path is None
        )
        present_paths = tuple(shard_path for shard_path in shard_paths if shard_path)
        return CacheContents(manifest, columns | features, manifest_digest, shards, present_paths, lost_shards)


def _map_shards(
    manifest: Mapping[str, Any], shards: Sequence[Shard], path: Path
) -> tuple[dict[str, NDArray[Any]], list[Path | None]]:
    """The features of a sharded cache, and where each shard was found; zeros stand for those that were not."""
    n, dtype = manifest["samples"], np.dtype(manifest["facts"]["storage"]).newbyteorder("<")
    row_bytes = {output: dtype.itemsize * math.prod(shape) for output, shape in manifest["outputs"].items()}
    buffers = {
        output: reserve_address_range(n * nbytes, shards[0].offsets[output]) for output, nbytes in row_bytes.items()
    }
    shard_paths: list[Path | None] = []
    for shard in shards:  # one after the other: a process may have few files open
        with _open_shard(path, shard) as (descriptor, shard_path):
            shard_paths.append(None if descriptor is None else shard_path)
            if descriptor is None:
                continue
            for output, nbytes in row_bytes.items():
                start, size = shard.start * nbytes, (shard.stop - shard.start) * nbytes
                map_into(buffers[output], FileSegment(descriptor, shard.offsets[output], start, size))
    columns = {f"features/{name}": buffers[name].view(dtype).reshape(n, *manifest["outputs"][name]) for name in buffers}
    return columns, shard_paths


@contextmanager
def _open_shard(path: Path, shard: Shard) -> Iterator[tuple[int | None, Path]]:
    """The descriptor of a shard, beside the cache as the manifest says or under the cache's present name."""
    candidates = (path.parent / shard.file, shards_directory(path) / Path(shard.file).name)
    for candidate in dict.fromkeys(candidates):
        try:
            if candidate.parent.is_symlink():
                continue  # a stranger's link could lead anywhere
            descriptor = os.open(candidate, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            file_stat = os.fstat(descriptor)
            if stat.S_ISREG(file_stat.st_mode) and file_stat.st_size == shard.nbytes:
                yield descriptor, candidate
                return
        finally:
            os.close(descriptor)
    yield None, candidates[0]


@contextmanager
def _wrap_format_errors(path: Path) -> Iterator[None]:
    """Whatever HDF5 says of a damaged file becomes one error with its name."""
    try:
        yield
    except CacheFormatError as error:
        raise CacheFormatError(f"{path}: {error}") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CacheFormatError(f"{path}: is not a readable featpipe cache ({format_error(error)})") from None


def format_error(error: BaseException) -> str:
    """What an error says, short enough to be part of a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__
