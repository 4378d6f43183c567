"""A cache written whole under another name, made durable, opened as a reader would, and only then given its name."""

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

from featpipe.cache.checks import CHECK_BYTES, check_of_shard, check_rows, digest_of_column
from featpipe.cache.hdf5 import created
from featpipe.cache.layout import (
    FORMAT,
    FORMAT_VERSION,
    LABEL_DTYPES,
    Shard,
    Table,
    parts_directory,
    shards_directory,
)
from featpipe.cache.mapping import HUGE_BYTES, PAGE_BYTES
from featpipe.cache.opening import one_line, open_cache
from featpipe.durable import fsync_directory
from featpipe.errors import CacheError, CacheFormatError
from featpipe.fingerprint import fingerprint
from featpipe.status import Status

__all__ = ["write_cache"]

BLOCK_BYTES = 32 * 2**20

Gather = Callable[[str, int, int], NDArray[np.floating]]


def write_cache(
    path: Path,
    table: Table,
    manifest: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    gather: Gather,
    shard_bytes: int | None = None,
) -> None:
    """Write a whole cache and publish it under its name, replacing what was there in one step.

    Parameters
    ----------
    path : Path
    table : Table
    manifest : mapping
        Must hold ``facts``; format, fingerprint, outputs, task, classes, counts and digests are added.
    shapes : mapping from output to the shape of one row
    dtype : {"float32", "float16"}
    gather : callable
        ``gather(output, start, stop)`` gives the features of those rows, NaN where their status is not ``ok``.
    shard_bytes : int, optional
        Features larger than this are spread over shards of about this size; one file if not given.

    Raises
    ------
    CacheError
        If the disk is full or not writable, or the result would not open; nothing is left behind, and an older
        cache stays as it was.
    """
    job = _Job(path, table, dict(shapes), dtype, gather)
    replaced = _shards_at(path)
    try:
        with _temporaries(path) as temporary:
            shards = [job.write_shard(temporary(), start, stop) for start, stop in job.runs(shard_bytes)]
            whole = temporary()
            with _durable(whole) as file:
                job.write_main(file, manifest, [shard for _, shard in shards])
            with _placed(path, shards):
                _refuse_lost(open_cache(whole, beside=path).lost)
                os.replace(whole, path)
                fsync_directory(path.parent)
    except CacheFormatError as error:
        raise CacheError(f"{path}: was not written, no one could open it ({error})") from None
    except (OSError, RuntimeError) as error:  # h5py reports some failures of its own as RuntimeError
        raise CacheError(
            f"{path}: cannot be written ({one_line(error)}); free some space or write to another disk"
        ) from None
    _remove_shards(path, replaced - {path.parent / shard.file for _, shard in shards})


@dataclass
class _Job:
    """One cache that is being written."""

    path: Path
    table: Table
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    gather: Gather
    checks: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n = len(self.table.ids)
        self.checks = {output: np.zeros((self.n, CHECK_BYTES), np.uint8) for output in self.shapes}
        itemsize = np.dtype(self.dtype).itemsize
        self.row_bytes = {output: itemsize * math.prod(shape) for output, shape in self.shapes.items()}

    def runs(self, shard_bytes: int | None) -> list[tuple[int, int]]:
        """First and last row of each shard; none if all rows go into one file.

        Each begins at a page in the array of every output, so that shards can be mapped one after the other.
        """
        width = sum(self.row_bytes.values())
        if shard_bytes is None or self.n * width <= shard_bytes:
            return []
        step = self._step(HUGE_BYTES)
        if step * width > shard_bytes // 4:  # too coarse
            step = self._step(PAGE_BYTES)
        rows = max(1, shard_bytes // width // step) * step
        return [(start, min(self.n, start + rows)) for start in range(0, self.n, rows)] if rows < self.n else []

    def _step(self, page: int) -> int:
        """The smallest number of rows that are whole pages in every output."""
        return math.lcm(*(page // math.gcd(page, nbytes) for nbytes in self.row_bytes.values()))

    def blocks(self, output: str, start: int, stop: int) -> Iterator[NDArray[np.floating]]:
        """Features of some rows, a few at a time; their checks are kept."""
        rows = max(1, BLOCK_BYTES // max(1, 4 * math.prod(self.shapes[output])))
        for first in range(start, stop, rows):
            last = min(stop, first + rows)
            block = np.asarray(self.gather(output, first, last), self.dtype)
            status = self.table.status[first:last]
            if not np.isnan(block[status != Status.OK]).all():
                raise ValueError(f"{output}: features of rows {first} to {last} that are not ok must be NaN")
            self.checks[output][first:last] = check_rows(self.table.digests[first:last], status, block)
            yield block

    def write_shard(self, temporary: Path, start: int, stop: int) -> tuple[Path, Shard]:
        """One shard under a temporary name, durable."""
        with _durable(temporary) as file:
            with created(file, PAGE_BYTES) as hdf5:
                hdf5.attribute("format", f"{FORMAT}-shard")
                hdf5.attribute("format_version", FORMAT_VERSION)
                for output, shape in self.shapes.items():
                    blocks = self.blocks(output, start, stop)
                    hdf5.blocks(f"features/{output}", (stop - start, *shape), self.dtype, blocks)
                offsets = {output: hdf5.offset(f"features/{output}") for output in self.shapes}
            file.flush()
            size = os.fstat(file.fileno()).st_size
        check = check_of_shard([checks[start:stop] for checks in self.checks.values()], list(self.shapes.items()))
        name = f"{shards_directory(self.path).name}/{check[:24]}.h5"
        return temporary, Shard(name, size, start, stop, offsets, check)

    def write_main(self, file: BinaryIO, manifest: Mapping[str, Any], shards: Sequence[Shard]) -> None:
        """The file that has the cache's name: all of it, or all but the features."""
        with created(file) as hdf5:
            columns = self._columns()
            for name, column in columns.items():
                hdf5.array(name, column)
            sources = [(shard.file, shard.start, shard.stop) for shard in shards]
            for output, shape in self.shapes.items():
                if shards:
                    hdf5.virtual(f"features/{output}", (self.n, *shape), self.dtype, sources)
                else:
                    blocks = self.blocks(output, 0, self.n)
                    hdf5.blocks(f"features/{output}", (self.n, *shape), self.dtype, blocks)
            for output, checks in self.checks.items():
                columns[f"checks/{output}"] = checks
                hdf5.array(f"checks/{output}", checks)
            text = self._manifest(manifest, columns, shards)
            hdf5.text("manifest", text)
            hdf5.attribute("format", FORMAT)
            hdf5.attribute("format_version", FORMAT_VERSION)
            hdf5.attribute("manifest_sha256", hashlib.sha256(text).hexdigest())

    def _columns(self) -> dict[str, NDArray[Any]]:
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

    def _manifest(
        self, manifest: Mapping[str, Any], columns: Mapping[str, NDArray[Any]], shards: Sequence[Shard]
    ) -> bytes:
        complete = {
            **manifest,
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint(manifest["facts"]),
            "outputs": {name: list(shape) for name, shape in self.shapes.items()},
            "task": self.table.labels.task,
            "classes": list(self.table.labels.classes),
            "samples": self.n,
            "ok": self.table.ok,
            "columns": {name: digest_of_column(column) for name, column in columns.items()},
            "shards": [shard.facts() for shard in shards],
        }
        if not shards:
            del complete["shards"]
        text = json.dumps(complete, ensure_ascii=False, allow_nan=False)  # not canonical: the outputs have an order
        return text.encode("utf-8", "backslashreplace")


@contextmanager
def _temporaries(path: Path) -> Iterator[Callable[[], Path]]:
    """Makes names that no one reads; what has one of them at the end is removed."""
    parts = parts_directory(path)
    folder = parts if parts.is_dir() else path.parent  # among the parts, where there are any, and so removed with them
    made: list[Path] = []

    def name() -> Path:
        made.append(folder / f".{os.getpid()}.{os.urandom(6).hex()}.tmp")
        return made[-1]

    try:
        yield name
    finally:
        for temporary in made:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def _durable(temporary: Path) -> Iterator[BinaryIO]:
    """A new file whose bytes survive a power cut once the block has ended."""
    with open(temporary, "xb+") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _placed(path: Path, shards: Sequence[tuple[Path, Shard]]) -> Iterator[None]:
    """Shards under their names, which nobody reads before a cache names them; removed again if none came to do so."""
    new: set[Path] = set()
    folder = shards_directory(path)
    try:
        if shards:
            if folder.is_symlink():
                raise OSError(f"{folder.name} is a link, and readers follow none")
            folder.mkdir(exist_ok=True)
            for temporary, shard in shards:
                target = path.parent / shard.file
                if not os.path.lexists(target):
                    new.add(target)
                os.replace(temporary, target)
            fsync_directory(folder)
            fsync_directory(path.parent)
        yield
    except BaseException:
        with suppress(OSError, CacheFormatError):  # what has the name is looked at: the failure may be after the rename
            _remove_shards(path, new - _named_shards(path))
        raise


def _refuse_lost(lost: Sequence[str]) -> None:
    if lost:
        raise CacheFormatError(f"its shard {lost[0]} is not as it was written")


def _shards_at(path: Path) -> set[Path]:
    """The shards of the cache that has a name now, if there is one."""
    try:
        return _named_shards(path)
    except (OSError, CacheFormatError):
        return set()


def _named_shards(path: Path) -> set[Path]:
    """In the folder of this name alone: what a renamed cache has in another may be another's too."""
    if not path.is_file():
        return set()
    folder = shards_directory(path)
    return {folder / Path(shard.file).name for shard in open_cache(path).shards}


def _remove_shards(path: Path, files: set[Path]) -> None:
    """Remove what no cache names any more; whoever has it mapped keeps it."""
    folder = shards_directory(path)
    if folder.is_symlink():
        return
    for file in files:
        with suppress(OSError):  # costs space, and nothing else
            file.unlink()
    with suppress(OSError):
        folder.rmdir()
