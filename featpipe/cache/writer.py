"""Write a cache atomically: write to a temporary file, fsync, open it as a reader would, then rename it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featpipe.cache.format import (
    CHECKSUM_BYTES,
    FORMAT,
    FORMAT_VERSION,
    LABEL_DTYPES,
    SampleTable,
    Shard,
    compute_column_digest,
    compute_row_checksums,
    compute_shard_digest,
    parts_directory,
    shards_directory,
)
from featpipe.cache.hdf5 import create_hdf5
from featpipe.cache.mmap import HUGE_PAGE_BYTES, PAGE_BYTES
from featpipe.cache.open import open_cache
from featpipe.errors import CacheError, CacheFormatError
from featpipe.runtime import format_error
from featpipe.status import Status
from featpipe.storage import compute_fingerprint, fsync_directory, make_temporary_path

WRITE_BLOCK_BYTES = 32 * 2**20

GatherFeatures = Callable[[str, int, int], NDArray[np.floating]]


def write_cache(
    path: Path,
    table: SampleTable,
    manifest: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    gather: GatherFeatures,
    shard_bytes: int | None = None,
) -> None:
    """Write a whole cache and publish it at ``path``, replacing an existing cache atomically.

    Parameters
    ----------
    path : Path
    table : SampleTable
    manifest : mapping
        Must hold ``facts``; format, fingerprint, outputs, task, classes, counts and digests are added.
    shapes : mapping from output to the shape of one row
    dtype : {"float32", "float16"}
    gather : callable
        ``gather(output, start, stop)`` returns the features of these rows, NaN if the status is not ``ok``.
    shard_bytes : int, optional
        Features larger than this are split into shards of about this size; one file by default.

    Raises
    ------
    CacheError
        If the disk is full or not writable, or the result does not open. Nothing is left behind, and an existing
        cache is unchanged.
    """
    cache_writer = _CacheWriter(path, table, dict(shapes), dtype, gather)
    old_shard_files: set[Path] = set()
    with suppress(OSError, CacheFormatError):  # an unreadable cache is replaced
        old_shard_files = _list_shard_files(path)
    try:
        with _temporary_paths(path) as make_temporary_path:
            written_shards = [
                cache_writer.write_shard(make_temporary_path(), start, stop)
                for start, stop in cache_writer.compute_shard_ranges(shard_bytes)
            ]
            temporary_path = make_temporary_path()
            with _create_durable(temporary_path) as file:
                cache_writer.write_main(file, manifest, [shard for _, shard in written_shards])
            with _publish_shards(path, written_shards):
                lost_shards = open_cache(temporary_path, final_path=path).lost_shards
                if lost_shards:
                    raise CacheFormatError(f"its shard {lost_shards[0]} differs from what was written")
                os.replace(temporary_path, path)
                fsync_directory(path.parent)
    except CacheFormatError as error:
        raise CacheError(f"{path}: was not written, because the result cannot be opened ({error})") from None
    except (OSError, RuntimeError) as error:  # h5py raises some of its own errors as RuntimeError
        raise CacheError(
            f"{path}: cannot be written ({format_error(error)}); free some space or write to another disk"
        ) from None
    _remove_shards(path, old_shard_files - {path.parent / shard.file for _, shard in written_shards})


@dataclass
class _CacheWriter:
    """Writes the shards and the main file of one cache, and collects the row checksums."""

    path: Path
    table: SampleTable
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    gather: GatherFeatures
    checksums: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n = len(self.table.ids)
        self.checksums = {output: np.zeros((self.n, CHECKSUM_BYTES), np.uint8) for output in self.shapes}
        itemsize = np.dtype(self.dtype).itemsize
        self.row_bytes = {output: itemsize * math.prod(shape) for output, shape in self.shapes.items()}

    def compute_shard_ranges(self, shard_bytes: int | None) -> list[tuple[int, int]]:
        """Compute the range of rows (start, stop) of each shard; none if all rows go into one file.

        Each shard starts at a page boundary in the array of every output, so that consecutive shards can be mapped as
        one array.
        """
        total_row_bytes = sum(self.row_bytes.values())
        if shard_bytes is None or self.n * total_row_bytes <= shard_bytes:
            return []
        row_alignment = self._compute_row_alignment(HUGE_PAGE_BYTES)
        if row_alignment * total_row_bytes > shard_bytes // 4:  # shard sizes would be too coarse
            row_alignment = self._compute_row_alignment(PAGE_BYTES)
        rows_per_shard = max(1, shard_bytes // total_row_bytes // row_alignment) * row_alignment
        if rows_per_shard >= self.n:
            return []
        return [(start, min(self.n, start + rows_per_shard)) for start in range(0, self.n, rows_per_shard)]

    def _compute_row_alignment(self, page_bytes: int) -> int:
        """Compute the smallest number of rows that fill whole pages in every output."""
        return math.lcm(*(page_bytes // math.gcd(page_bytes, nbytes) for nbytes in self.row_bytes.values()))

    def iter_blocks(self, output: str, start: int, stop: int) -> Iterator[NDArray[np.floating]]:
        """Yield the features of a range of rows in blocks, and record their checksums."""
        block_rows = max(1, WRITE_BLOCK_BYTES // max(1, 4 * math.prod(self.shapes[output])))
        for block_start in range(start, stop, block_rows):
            block_stop = min(stop, block_start + block_rows)
            block = np.asarray(self.gather(output, block_start, block_stop), self.dtype)
            status = self.table.status[block_start:block_stop]
            if not np.isnan(block[status != Status.OK]).all():
                raise ValueError(
                    f"{output}: features of rows {block_start} to {block_stop} that are not ok must be NaN"
                )
            self.checksums[output][block_start:block_stop] = compute_row_checksums(
                self.table.digests[block_start:block_stop], status, block
            )
            yield block

    def write_shard(self, temporary: Path, start: int, stop: int) -> tuple[Path, Shard]:
        """Write one shard durably under a temporary name."""
        with _create_durable(temporary) as file:
            with create_hdf5(file, PAGE_BYTES) as hdf5:
                hdf5.write_attribute("format", f"{FORMAT}-shard")
                hdf5.write_attribute("format_version", FORMAT_VERSION)
                for output, shape in self.shapes.items():
                    blocks = self.iter_blocks(output, start, stop)
                    hdf5.write_blocks(f"features/{output}", (stop - start, *shape), self.dtype, blocks)
                offsets = {output: hdf5.get_offset(f"features/{output}") for output in self.shapes}
            file.flush()
            file_bytes = os.fstat(file.fileno()).st_size
        digest = compute_shard_digest(
            [checksums[start:stop] for checksums in self.checksums.values()], list(self.shapes.items())
        )
        name = f"{shards_directory(self.path).name}/{digest[:24]}.h5"
        return temporary, Shard(name, file_bytes, start, stop, offsets, digest)

    def write_main(self, file: BinaryIO, manifest: Mapping[str, Any], shards: Sequence[Shard]) -> None:
        """Write the main file: the whole cache, or everything except sharded features."""
        with create_hdf5(file) as hdf5:
            columns = self._make_columns()
            for name, column in columns.items():
                hdf5.write_array(name, column)
            sources = [(shard.file, shard.start, shard.stop) for shard in shards]
            for output, shape in self.shapes.items():
                if shards:
                    hdf5.write_virtual(f"features/{output}", (self.n, *shape), self.dtype, sources)
                else:
                    blocks = self.iter_blocks(output, 0, self.n)
                    hdf5.write_blocks(f"features/{output}", (self.n, *shape), self.dtype, blocks)
            for output, checksums in self.checksums.items():
                columns[f"checks/{output}"] = checksums
                hdf5.write_array(f"checks/{output}", checksums)
            text = self._serialize_manifest(manifest, columns, shards)
            hdf5.write_text("manifest", text)
            hdf5.write_attribute("format", FORMAT)
            hdf5.write_attribute("format_version", FORMAT_VERSION)
            hdf5.write_attribute("manifest_sha256", hashlib.sha256(text).hexdigest())

    def _make_columns(self) -> dict[str, NDArray[Any]]:
        table = self.table
        columns = {
            "samples/id_bytes": np.asarray(table.ids.data, "u1"),
            "samples/id_offsets": np.asarray(table.ids.offsets, "<i8"),
            "samples/status": table.status,
            "samples/digest": table.digests,
            "samples/stamp": table.stamps,
            "samples/split": table.split,
        }
        if table.labels.task != "none":
            columns["labels/values"] = np.asarray(table.labels.values, LABEL_DTYPES[table.labels.task])
        return columns

    def _serialize_manifest(
        self, manifest: Mapping[str, Any], columns: Mapping[str, NDArray[Any]], shards: Sequence[Shard]
    ) -> bytes:
        full_manifest = {
            **manifest,
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": compute_fingerprint(manifest["facts"]),
            "outputs": {name: list(shape) for name, shape in self.shapes.items()},
            "task": self.table.labels.task,
            "classes": list(self.table.labels.classes),
            "samples": self.n,
            "ok": self.table.ok,
            "columns": {name: compute_column_digest(column) for name, column in columns.items()},
            "shards": [shard.to_dict() for shard in shards],
        }
        if not shards:
            del full_manifest["shards"]
        # not canonical JSON: the outputs have an order
        text = json.dumps(full_manifest, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace")


@contextmanager
def _temporary_paths(path: Path) -> Iterator[Callable[[], Path]]:
    """Yield a function that makes temporary paths. Files that still have such a name at the end are removed."""
    parts_folder = parts_directory(path)
    # a temporary file in the parts folder, if there is one, is cleaned up with the parts
    folder = parts_folder if parts_folder.is_dir() else path.parent
    paths: list[Path] = []

    def make_path() -> Path:
        paths.append(make_temporary_path(folder))
        return paths[-1]

    try:
        yield make_path
    finally:
        for temporary in paths:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def _create_durable(temporary: Path) -> Iterator[BinaryIO]:
    """Create a file, and fsync it at the end of the block."""
    with open(temporary, "xb+") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _publish_shards(path: Path, shards: Sequence[tuple[Path, Shard]]) -> Iterator[None]:
    """Give the shards their final names, which nobody reads until a cache lists them. Remove them after an error."""
    new_files: set[Path] = set()
    folder = shards_directory(path)
    try:
        if shards:
            if folder.is_symlink():
                raise OSError(f"{folder.name} is a link; readers do not follow links")
            folder.mkdir(exist_ok=True)
            for temporary, shard in shards:
                target = path.parent / shard.file
                if not os.path.lexists(target):
                    new_files.add(target)
                os.replace(temporary, target)
            fsync_directory(folder)
            fsync_directory(path.parent)
        yield
    except BaseException:
        # if the error came after the rename, the cache at ``path`` uses the new shards
        with suppress(OSError, CacheFormatError):
            _remove_shards(path, new_files - _list_shard_files(path))
        raise


def _list_shard_files(path: Path) -> set[Path]:
    """List the shards of the cache at ``path`` that are in its own shard folder; other folders may have other users."""
    if not path.is_file():
        return set()
    folder = shards_directory(path)
    return {folder / Path(shard.file).name for shard in open_cache(path).shards}


def _remove_shards(path: Path, files: set[Path]) -> None:
    """Remove shards that no cache lists any more. Processes that have them mapped can still read them."""
    folder = shards_directory(path)
    if folder.is_symlink():
        return
    for file in files:
        with suppress(OSError):  # a leftover shard only costs disk space
            file.unlink()
    with suppress(OSError):
        folder.rmdir()
