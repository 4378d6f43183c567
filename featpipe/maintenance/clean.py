"""Find abandoned files in a cache folder, such as unfinished extractions, and remove them on request."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from featpipe.cache import FeatureCache, parts_directory, shards_directory
from featpipe.errors import CacheError
from featpipe.storage import PART_FILE_NAME, TEMPORARY_NAME, StagingArea

MIN_AGE_SECONDS = 3600  # a younger file may be a copy in progress, or belong to a process of another machine

_PARTS_NAME = re.compile(r"\.(h5|csv|jsonl|parquet)\.parts$")  # parts of a cache or of a prediction file
_SHARD_NAME = re.compile(r"[0-9a-f]{24}\.h5")
_LOCK_NAME = re.compile(r"\.files-[0-9a-f]{8}\.lock")
_FEATURE_MAPS_NAME = re.compile(r"boundary-[0-9a-f]{16}\.h5")  # as named by featpipe.finetuning.feature_map_cache


@dataclass(frozen=True)
class AbandonedFiles:
    """Files that no process uses any more.

    Attributes
    ----------
    kind : {"parts", "maps", "shards", "temporary", "lock"}
        ``parts``: an unfinished extraction or prediction. ``maps``: feature maps that fine-tuning cached for its next
        run and has not used for an hour. ``shards``: shards that no cache of the folder references. ``temporary``: a
        temporary file of a process that has ended. ``lock``: a lock file that no process holds.
    path : Path
    files : tuple of Path
        The files to remove: ``path`` itself, or files in it.
    nbytes : int
    seconds : float
        Time since the last write or use.
    rows : int
        Number of images with committed embeddings, or with cached feature maps; the same command would resume from
        them.
    renews : bool
        Whether an earlier version of the output file exists.
    """

    kind: Literal["parts", "maps", "shards", "temporary", "lock"]
    path: Path
    files: tuple[Path, ...]
    nbytes: int
    seconds: float
    rows: int = 0
    renews: bool = False


def clean(folder: str | os.PathLike[str] = "cache", *, yes: bool = False) -> list[AbandonedFiles]:
    """Find abandoned files in a cache folder, and remove them on request.

    Locked files, foreign files and caches of embeddings are never touched.

    Parameters
    ----------
    folder : path-like
        The cache folder; its subfolders are not searched.
    yes : bool
        Remove the abandoned files, including the committed rows of unfinished work; see :attr:`AbandonedFiles.rows`.

    Returns
    -------
    list of AbandonedFiles
        The abandoned files; with ``yes``, those that were removed.

    Raises
    ------
    CacheError
        If there is no such folder.

    Examples
    --------
    >>> clean("cache/")                                                         # doctest: +SKIP
    """
    path = Path(folder)
    try:
        abandoned = [
            *_find_parts(path),
            *_find_feature_maps(path),
            *_find_shards(path),
            *_find_temporary_files(path),
            *_find_locks(path),
        ]
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}; pass the folder of the caches") from None
    return remove_abandoned(abandoned) if yes else abandoned


def remove_abandoned(abandoned: Iterable[AbandonedFiles]) -> list[AbandonedFiles]:
    """Remove files that :func:`clean` found, if they are still abandoned. Return those that were removed."""
    removers = {
        "parts": _remove_parts,
        "maps": _remove_feature_maps,
        "shards": _remove_shards,
        "temporary": _remove_file,
        "lock": _remove_lock,
    }
    removed = []
    for item in abandoned:
        with suppress(OSError, CacheError):  # in use by now, or no permission: omitted from the result
            if removers[item.kind](item):
                removed.append(item)
    return removed


def _find_parts(folder: Path) -> Iterator[AbandonedFiles]:
    for path in sorted(folder.iterdir()):
        if not _PARTS_NAME.search(path.name) or path.is_symlink() or not path.is_dir():
            continue
        files = tuple(file for file in path.iterdir() if PART_FILE_NAME.fullmatch(file.name))
        staging_area = StagingArea(path, "")
        if not staging_area.is_locked() and (files or not any(path.iterdir())):
            output_path = path.with_name(path.name.removesuffix(".parts"))
            rows = staging_area.count_recorded_rows()
            yield AbandonedFiles(
                "parts", path, files, _sum_bytes(files), _compute_age([path, *files]), rows, output_path.is_file()
            )


def _remove_parts(item: AbandonedFiles) -> bool:
    staging_area = StagingArea(item.path, "")
    if not item.path.is_dir() or staging_area.is_locked():
        return False
    with staging_area.lock_for_writing():
        if staging_area.count_recorded_rows() != item.rows:
            return False  # another process resumed the work in the meantime
        staging_area.remove()
    return not any(file.exists() for file in item.files)


def _find_feature_maps(folder: Path) -> Iterator[AbandonedFiles]:
    for path in sorted(folder.iterdir()):
        if not _FEATURE_MAPS_NAME.fullmatch(path.name) or not _is_old_file(path):
            continue
        if not _make_staging_area(path).is_locked():
            with suppress(CacheError):  # a file that does not open as a cache is kept
                cache = FeatureCache(path, salvage=True)
                files = (path, *cache.shard_files)
                yield AbandonedFiles("maps", path, files, _sum_bytes(files), _compute_age([path]), len(cache))


def _remove_feature_maps(item: AbandonedFiles) -> bool:
    """Remove cached feature maps. A process that has the files open can still read them."""
    staging_area = _make_staging_area(item.path)
    if staging_area.is_locked() or not _is_old_file(item.path):
        return False
    with staging_area.lock_for_writing():
        item.path.unlink()
        shards = shards_directory(item.path)
        # a copy of the cache may still reference its shards
        for file in {*item.files} & {*_find_orphaned_shards(item.path.parent, shards)}:
            file.unlink()
        with suppress(OSError):
            shards.rmdir()
        if not staging_area.count_recorded_rows():
            staging_area.remove()
    return True


def _find_shards(folder: Path) -> Iterator[AbandonedFiles]:
    orphans = _find_orphaned_shards(folder)
    for path in sorted({file.parent for file in orphans}):
        files = tuple(sorted(file for file in orphans if file.parent == path))
        yield AbandonedFiles("shards", path, files, _sum_bytes(files), _compute_age(files))


def _find_orphaned_shards(folder: Path, locked_folder: Path | None = None) -> list[Path]:
    """Find shards that no cache of the folder references. If a cache is unreadable, find none: it may reference them.

    Shards are matched by file name only, because a renamed cache still names its previous shard folder. Folders that
    another process is writing are skipped; ``locked_folder`` is the shard folder that this process has locked.
    """
    shard_files = [
        file
        for path in folder.iterdir()
        if path.name.endswith(".h5.shards") and path.is_dir() and not path.is_symlink()
        if path == locked_folder or not _make_staging_area(path).is_locked()
        for file in path.iterdir()
        if _SHARD_NAME.fullmatch(file.name) and _is_old_file(file)
    ]
    referenced_names: set[str] = set()
    for path in folder.iterdir() if shard_files else ():
        if path.is_file() and (path.suffix == ".h5" or _is_hdf5(path)):
            try:
                cache = FeatureCache(path, salvage=True)
                referenced_names |= {file.name for file in (*cache.shard_files, *map(Path, cache.lost_shards))}
            except CacheError:
                return []
    return [file for file in shard_files if file.name not in referenced_names]


def _is_hdf5(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"\x89HDF"
    except OSError:
        return True  # unreadable: assume that it is


def _make_staging_area(path: Path) -> StagingArea:
    """Make the staging area of a cache, given its path or that of its shard folder."""
    return StagingArea(parts_directory(path.with_name(path.name.removesuffix(".shards"))), "")


def _remove_shards(item: AbandonedFiles) -> bool:
    staging_area = _make_staging_area(item.path)
    if staging_area.is_locked():
        return False
    # the lock excludes writers of this cache, so search again under it
    with staging_area.lock_for_writing():
        orphans = set(_find_orphaned_shards(item.path.parent, item.path))
        removed = [file for file in item.files if file in orphans]
        for file in removed:
            file.unlink()
        with suppress(OSError):
            item.path.rmdir()
        if not staging_area.count_recorded_rows():
            staging_area.remove()
    return len(removed) == len(item.files)


def _find_temporary_files(folder: Path) -> Iterator[AbandonedFiles]:
    for path in sorted(folder.iterdir()):
        if TEMPORARY_NAME.fullmatch(path.name) and _is_old_file(path) and not _is_alive(int(path.name.split(".")[1])):
            yield AbandonedFiles("temporary", path, (path,), _sum_bytes([path]), _compute_age([path]))


def _remove_file(item: AbandonedFiles) -> bool:
    item.path.unlink()
    return True


def _find_locks(folder: Path) -> Iterator[AbandonedFiles]:
    for path in sorted(folder.iterdir()):
        if _LOCK_NAME.fullmatch(path.name) and _is_old_file(path):
            with suppress(OSError):
                os.close(_acquire_lock(path))
                yield AbandonedFiles("lock", path, (path,), _sum_bytes([path]), _compute_age([path]))


def _remove_lock(item: AbandonedFiles) -> bool:
    handle = _acquire_lock(item.path)
    try:
        item.path.unlink()  # a waiting process notices that the name is gone, and creates a new lock
    finally:
        os.close(handle)
    return True


def _acquire_lock(lock: Path) -> int:
    """Acquire a lock without waiting. Raise an OSError if another process holds it."""
    handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _is_old_file(path: Path) -> bool:
    """Whether a path is a regular file that was created and last written long enough ago."""
    with suppress(OSError):
        file_stat = path.lstat()
        age_seconds = time.time() - max(file_stat.st_mtime, file_stat.st_ctime)
        return stat.S_ISREG(file_stat.st_mode) and age_seconds > MIN_AGE_SECONDS
    return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # the process of another user
    return True


def _sum_bytes(files: Iterable[Path]) -> int:
    return sum(file_stat.st_size for file_stat in _iter_stats(files))


def _compute_age(files: Iterable[Path]) -> float:
    """Compute the seconds since the most recent write to any of the files."""
    return max(0.0, time.time() - max((file_stat.st_mtime for file_stat in _iter_stats(files)), default=0.0))


def _iter_stats(files: Iterable[Path]) -> Iterator[os.stat_result]:
    for file in files:
        with suppress(FileNotFoundError):  # removed in the meantime
            yield file.lstat()
