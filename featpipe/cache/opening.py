"""From a file on disk to mapped columns: everything is checked here that does not take time in the number of rows."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from featpipe.cache.mapping import Piece, joined, view
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
    lost : tuple of str
        Shards that are missing or of another size; zeros stand where their rows were.
    """

    manifest: dict[str, Any]
    columns: dict[str, NDArray[Any]]
    shards: tuple[Shard, ...] = ()
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
        text = columns.get("manifest")
        manifest = parse_manifest(text)
        if manifest["format_version"] != attributes["format_version"]:
            raise CacheFormatError("has another format version in its manifest")
        if version_of(manifest["format_version"]) >= (1, 1):
            assert text is not None  # parse_manifest  # noqa: S101
            if hashlib.sha256(text.tobytes()).hexdigest() != attributes["manifest_sha256"]:
                raise CacheFormatError("the manifest does not have its digest; it is damaged")
        shards = shards_of(manifest)
        check_columns(manifest, columns, bool(shards))
        lost: tuple[str, ...] = ()
        if shards:
            features, lost = _joined_shards(manifest, shards, beside or path)
            columns |= features
        return Contents(manifest, columns, shards, lost)


def _joined_shards(
    manifest: Mapping[str, Any], shards: Sequence[Shard], path: Path
) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    dtype = np.dtype(manifest["facts"]["storage"]).newbyteorder("<")
    with ExitStack() as stack:
        opened = {shard: _open_shard(path, shard, stack) for shard in shards}
        columns = {}
        for output, shape in manifest["outputs"].items():
            row_bytes = dtype.itemsize * math.prod(shape)
            pieces = [
                Piece(file, shard.offsets[output], shard.start * row_bytes, (shard.stop - shard.start) * row_bytes)
                for shard, file in opened.items()
                if file is not None
            ]
            flat = joined(pieces, manifest["samples"] * row_bytes)
            columns[f"features/{output}"] = flat.view(dtype).reshape(manifest["samples"], *shape)
    return columns, tuple(shard.file for shard, file in opened.items() if file is None)


def _open_shard(path: Path, shard: Shard, stack: ExitStack) -> int | None:
    """The descriptor of a shard, beside the cache as the manifest says or under the cache's present name."""
    for place in (path.parent / shard.file, shards_directory(path) / Path(shard.file).name):
        try:
            if place.parent.is_symlink():
                continue  # a stranger's link could lead anywhere
            file = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        stack.callback(os.close, file)
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_size == shard.nbytes:
            return file
    return None


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
    return " ".join(str(error).split())[:200] or type(error).__name__
