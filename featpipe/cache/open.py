"""Open a cache file as mapped columns. All checks run here, except those whose time grows with the number of rows."""

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
from featpipe.cache.mmap import map_into, reserve_address_range, view_as_array
from featpipe.errors import CacheFormatError
from featpipe.runtime import format_error


@dataclass(frozen=True, eq=False)
class CacheContents:
    """The content of an open cache.

    Attributes
    ----------
    manifest : dict
    columns : dict from name to ndarray
        Mapped, read-only.
    manifest_digest : str
        SHA-256 of the text of the manifest, which lists the digests of all columns.
    shards : tuple of Shard
    shard_files : tuple of Path
        The files of the shards, without lost ones.
    lost_shards : tuple of str
        Shards that are missing or have the wrong size; their rows are zeros.
    """

    manifest: dict[str, Any]
    columns: dict[str, NDArray[Any]]
    manifest_digest: str
    shards: tuple[Shard, ...] = ()
    shard_files: tuple[Path, ...] = ()
    lost_shards: tuple[str, ...] = ()


def open_cache(path: Path, final_path: Path | None = None) -> CacheContents:
    """Validate a cache and map it, through one file handle, because the file may be replaced in the meantime.

    Parameters
    ----------
    path : Path
    final_path : Path, optional
        Path of the finished cache, beside which the shards lie; ``path`` by default.

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
            raise CacheFormatError(
                "the format version in the manifest differs from that of the file; the file is damaged"
            )
        manifest_digest = hashlib.sha256(columns["manifest"].tobytes()).hexdigest()
        if parse_version(manifest["format_version"]) >= (1, 1) and manifest_digest != attributes["manifest_sha256"]:
            raise CacheFormatError("the manifest does not match its digest; the file is damaged")
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
    """Map the features of a sharded cache; return them and the path of each shard.

    The path of a lost shard is None, and its rows are zeros.
    """
    n, dtype = manifest["samples"], np.dtype(manifest["facts"]["storage"]).newbyteorder("<")
    row_bytes = {output: dtype.itemsize * math.prod(shape) for output, shape in manifest["outputs"].items()}
    buffers = {
        output: reserve_address_range(n * nbytes, shards[0].offsets[output]) for output, nbytes in row_bytes.items()
    }
    shard_paths: list[Path | None] = []
    for shard in shards:  # one at a time, because the number of open files is limited
        with _open_shard(path, shard) as (descriptor, shard_path):
            shard_paths.append(None if descriptor is None else shard_path)
            if descriptor is None:
                continue
            for output, nbytes in row_bytes.items():
                start, size = shard.start * nbytes, (shard.stop - shard.start) * nbytes
                map_into(buffers[output], start, descriptor, shard.offsets[output], size)
    columns = {f"features/{name}": buffers[name].view(dtype).reshape(n, *manifest["outputs"][name]) for name in buffers}
    return columns, shard_paths


@contextmanager
def _open_shard(path: Path, shard: Shard) -> Iterator[tuple[int | None, Path]]:
    """Open a shard at the path in the manifest, or in the shard folder of the present name of the cache."""
    candidates = (path.parent / shard.file, shards_directory(path) / Path(shard.file).name)
    for candidate in dict.fromkeys(candidates):
        try:
            if candidate.parent.is_symlink():
                continue  # a link in an untrusted folder could point anywhere
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
    """Convert every error caused by a damaged file into a CacheFormatError that names the file."""
    try:
        yield
    except CacheFormatError as error:
        raise CacheFormatError(f"{path}: {error}") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CacheFormatError(f"{path}: is not a readable featpipe cache ({format_error(error)})") from None
