"""Work that was begun in a folder of caches and that nobody goes on with: shown, and removed on request."""

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

from featpipe.cache import FeatureCache, parts_directory
from featpipe.commit import OURS, TEMPORARY, Parts
from featpipe.errors import CacheError

__all__ = ["Abandoned", "clean", "remove"]

SECONDS_MIN = 3600  # what is younger may be somebody's copy under way, or belong to a process of another machine

_PARTS = re.compile(r"\.(h5|csv|jsonl|parquet)\.parts$")  # of a cache or a file of predictions
_SHARD = re.compile(r"[0-9a-f]{24}\.h5")
_LOCK = re.compile(r"\.files-[0-9a-f]{8}\.lock")
_MAPS = re.compile(r"boundary-[0-9a-f]{16}\.h5")  # as featpipe.finetuning.boundary names them


@dataclass(frozen=True)
class Abandoned:
    """Something that nobody uses any more.

    Attributes
    ----------
    kind : {"parts", "maps", "shards", "temporary", "lock"}
        ``parts``: an extraction or a prediction that was not finished. ``maps``: feature maps that fine-tuning kept for
        its next run, and has not used for an hour. ``shards``: pieces that no cache of the folder names. ``temporary``:
        a file of a process that has ended. ``lock``: a lock that nobody holds.
    path : Path
    files : tuple of Path
        What is to be removed: ``path`` itself, or files in it.
    nbytes : int
    seconds : float
        How long ago it was last written, or used.
    rows : int
        Images of which the unfinished work has committed embeddings, or whose maps are kept: the same command would go
        on from there.
    renews : bool
        Whether the file that the work was for is there, from an earlier one.
    """

    kind: Literal["parts", "maps", "shards", "temporary", "lock"]
    path: Path
    files: tuple[Path, ...]
    nbytes: int
    seconds: float
    rows: int = 0
    renews: bool = False


def clean(folder: str | os.PathLike[str] = "cache", *, yes: bool = False) -> list[Abandoned]:
    """Find what was abandoned in a folder of caches, and remove it on request.

    What a process holds, files of others, and caches of embeddings are never touched.

    Parameters
    ----------
    folder : path-like
        Where caches are kept; folders in it are not looked into.
    yes : bool
        Remove what is found; also finished work of what is not finished, see :attr:`Abandoned.rows`.

    Returns
    -------
    list of Abandoned
        What was found, or what was removed.

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
        found = [*_parts(path), *_maps(path), *_shards(path), *_temporaries(path), *_locks(path)]
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}; give the folder where caches are kept") from None
    return remove(found) if yes else found


def remove(found: Iterable[Abandoned]) -> list[Abandoned]:
    """Remove what :func:`clean` found, where that is still abandoned; what was removed."""
    removals = {
        "parts": _remove_parts,
        "maps": _remove_maps,
        "shards": _remove_shards,
        "temporary": _remove_file,
        "lock": _remove_lock,
    }
    removed = []
    for thing in found:
        with suppress(OSError, CacheError):  # somebody else's by now, or not ours to remove: it is not in the answer
            if removals[thing.kind](thing):
                removed.append(thing)
    return removed


def _parts(folder: Path) -> Iterator[Abandoned]:
    for path in sorted(folder.iterdir()):
        if not _PARTS.search(path.name) or path.is_symlink() or not path.is_dir():
            continue
        files = tuple(file for file in path.iterdir() if OURS.fullmatch(file.name))
        parts = Parts(path, "")
        if not parts.busy() and (files or not any(path.iterdir())):
            cache = path.with_name(path.name.removesuffix(".parts"))
            rows = parts.recorded_rows()
            yield Abandoned("parts", path, files, _bytes(files), _age([path, *files]), rows, cache.is_file())


def _remove_parts(thing: Abandoned) -> bool:
    parts = Parts(thing.path, "")
    if not thing.path.is_dir() or parts.busy():
        return False
    with parts.writing():
        if parts.recorded_rows() != thing.rows:
            return False  # somebody went on with it since it was shown
        parts.remove()
    return not any(file.exists() for file in thing.files)


def _maps(folder: Path) -> Iterator[Abandoned]:
    for path in sorted(folder.iterdir()):
        if _MAPS.fullmatch(path.name) and _is_old_file(path) and not _parts_of_cache(path).busy():
            with suppress(CacheError):  # what does not open as a cache is not ours to judge
                cache = FeatureCache(path, salvage=True)
                files = (path, *cache.shard_files)
                yield Abandoned("maps", path, files, _bytes(files), _age([path]), len(cache))


def _remove_maps(thing: Abandoned) -> bool:
    """Who has them open goes on reading: the files have no name any more, and are there until they are closed."""
    parts = _parts_of_cache(thing.path)
    if parts.busy() or not _is_old_file(thing.path):
        return False
    with parts.writing():
        thing.path.unlink()
        shards = thing.path.with_name(thing.path.name + ".shards")
        for file in {*thing.files} & {*_orphans(thing.path.parent, shards)}:  # no copy of the cache names them
            file.unlink()
        with suppress(OSError):
            shards.rmdir()
        if not parts.recorded_rows():
            parts.remove()
    return True


def _shards(folder: Path) -> Iterator[Abandoned]:
    orphans = _orphans(folder)
    for path in sorted({file.parent for file in orphans}):
        files = tuple(sorted(file for file in orphans if file.parent == path))
        yield Abandoned("shards", path, files, _bytes(files), _age(files))


def _orphans(folder: Path, held: Path | None = None) -> list[Path]:
    """Shards whose names no cache of the folder knows; none if a file there cannot be read and so may know them.

    A shard is looked up by its own name alone, because a cache that was renamed still names the folder of before.
    What another process writes now is left out; ``held`` is the folder of shards whose lock is ours.
    """
    files = [
        file
        for path in folder.iterdir()
        if path.name.endswith(".h5.shards") and path.is_dir() and not path.is_symlink()
        if path == held or not _parts_of(path).busy()
        for file in path.iterdir()
        if _SHARD.fullmatch(file.name) and _is_old_file(file)
    ]
    named: set[str] = set()
    for path in folder.iterdir() if files else ():
        if path.is_file() and (path.suffix == ".h5" or _is_hdf5(path)):
            try:
                cache = FeatureCache(path, salvage=True)
                named |= {file.name for file in (*cache.shard_files, *map(Path, cache.lost_shards))}
            except CacheError:
                return []
    return [file for file in files if file.name not in named]


def _is_hdf5(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"\x89HDF"
    except OSError:
        return True  # who knows


def _parts_of(shards: Path) -> Parts:
    return _parts_of_cache(shards.with_name(shards.name.removesuffix(".shards")))


def _parts_of_cache(cache: Path) -> Parts:
    return Parts(parts_directory(cache), "")


def _remove_shards(thing: Abandoned) -> bool:
    parts = _parts_of(thing.path)
    if parts.busy():
        return False
    with parts.writing():  # no cache of this name is written meanwhile; another look, now that this is so
        orphans = set(_orphans(thing.path.parent, thing.path))
        gone = [file for file in thing.files if file in orphans]
        for file in gone:
            file.unlink()
        with suppress(OSError):
            thing.path.rmdir()
        if not parts.recorded_rows():
            parts.remove()
    return len(gone) == len(thing.files)


def _temporaries(folder: Path) -> Iterator[Abandoned]:
    for path in sorted(folder.iterdir()):
        if TEMPORARY.fullmatch(path.name) and _is_old_file(path) and not _is_alive(int(path.name.split(".")[1])):
            yield Abandoned("temporary", path, (path,), _bytes([path]), _age([path]))


def _remove_file(thing: Abandoned) -> bool:
    thing.path.unlink()
    return True


def _locks(folder: Path) -> Iterator[Abandoned]:
    for path in sorted(folder.iterdir()):
        if _LOCK.fullmatch(path.name) and _is_old_file(path):
            with suppress(OSError):
                os.close(_taken(path))
                yield Abandoned("lock", path, (path,), _bytes([path]), _age([path]))


def _remove_lock(thing: Abandoned) -> bool:
    handle = _taken(thing.path)
    try:
        thing.path.unlink()  # whoever waits for it finds that its name is gone, and makes another
    finally:
        os.close(handle)
    return True


def _taken(lock: Path) -> int:
    """The lock, if nobody holds it; else an OSError."""
    handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _is_old_file(path: Path) -> bool:
    """Whether it is a file that came here, or was written, long enough ago."""
    with suppress(OSError):
        found = path.lstat()
        return stat.S_ISREG(found.st_mode) and time.time() - max(found.st_mtime, found.st_ctime) > SECONDS_MIN
    return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _bytes(files: Iterable[Path]) -> int:
    return sum(found.st_size for found in _stats(files))


def _age(files: Iterable[Path]) -> float:
    """Seconds since the last of some files was written."""
    return max(0.0, time.time() - max((found.st_mtime for found in _stats(files)), default=0.0))


def _stats(files: Iterable[Path]) -> Iterator[os.stat_result]:
    for file in files:
        with suppress(FileNotFoundError):  # what is gone meanwhile has no size
            yield file.lstat()
