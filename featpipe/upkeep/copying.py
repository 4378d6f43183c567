"""Rows copied from cache to cache, each verified on its way, into a file that nobody else is writing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache, Table, parts_directory
from featpipe.commit import Parts
from featpipe.errors import CacheError, CacheMismatchError, ConfigError
from featpipe.progress import Progress, Tell
from featpipe.status import Status

__all__ = ["Copy", "is_there", "named", "refuse_damaged_columns", "writing"]

ROWS_AT_ONCE = 65536
NAMED_MAX = 5  # ids in an error message


class Copy:
    """Features of rows of some caches, in a new order.

    Parameters
    ----------
    caches : sequence of FeatureCache
    origin : ndarray of shape (n,), int
        Which cache each new row comes from.
    place : ndarray of shape (n,), int
        Its row there.
    progress : callable
    """

    def __init__(
        self,
        caches: Sequence[FeatureCache],
        origin: NDArray[np.integer],
        place: NDArray[np.integer],
        progress: Tell,
    ) -> None:
        self._caches, self._origin, self._place = caches, origin, place
        self._progress = progress
        self._done = 0

    def gather(self, output: str, start: int, stop: int) -> NDArray[np.floating]:
        """What :func:`featpipe.cache.write_cache` asks for.

        Raises
        ------
        CacheError
            If a row is not as it was written.
        """
        first = self._caches[0]
        values = np.empty((stop - start, *first.shapes[output]), first.facts["storage"])
        origin, place = self._origin[start:stop], self._place[start:stop]
        for number in np.unique(origin):
            cache, rows = self._caches[number], np.flatnonzero(origin == number)
            if not _whole(cache, place[rows], output).all():
                raise _damaged(cache)
            values[rows] = cache.features(output)[place[rows]]
        self._done += stop - start
        total = len(self._origin) * len(first.outputs)
        self._progress(Progress("bar", "copying", self._done, total, "rows"))
        return values


def _whole(cache: FeatureCache, rows: NDArray[np.integer], output: str) -> NDArray[np.bool_]:
    """Which rows are as they were written; what has no checks must at least be NaN where it is not ok."""
    whole = cache.whole_rows(rows, output)
    bad = np.flatnonzero(cache.status_codes[rows] != Status.OK)
    features = cache.features(output)[rows[bad]]
    whole[bad] &= np.isnan(features).all(axis=tuple(range(1, features.ndim)))
    return whole


def _damaged(cache: FeatureCache) -> CacheError:
    """The error that names the damaged rows, all of which are looked for only when there is one."""
    found: list[NDArray[np.intp]] = []
    for start in range(0, len(cache), ROWS_AT_ONCE):
        rows = np.arange(start, min(len(cache), start + ROWS_AT_ONCE))
        whole = np.all([_whole(cache, rows, output) for output in cache.outputs], axis=0)
        found.append(rows[~whole])
    damaged = np.concatenate(found)
    names = ", ".join(cache.ids[int(row)] for row in damaged[:NAMED_MAX])
    more = f" and {len(damaged) - NAMED_MAX:,} more" if len(damaged) > NAMED_MAX else ""
    return CacheError(
        f"{cache.path}: {len(damaged):,} of its {len(cache):,} rows are not as they were written ({names}{more}); "
        "nothing was changed: `featpipe verify --repair` embeds them again"
    )


def refuse_damaged_columns(cache: FeatureCache) -> None:
    """Ids, labels and digests are small: they are verified before the first row is copied."""
    damaged = cache.damaged_columns()
    if damaged:
        raise CacheError(
            f"{cache.path}: {', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} not as written; "
            "nothing was changed: see `featpipe verify`, or extract again"
        )


def named(out: str | os.PathLike[str]) -> Path:
    """The name of a cache to be written; its folder is made."""
    path = Path(out)
    if path.suffix != ".h5":
        raise ConfigError(f"--out {path}: a cache is an HDF5 file; give it a name that ends in .h5")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{path.parent}: cannot be made ({error.strerror}); choose another --out") from None
    return path


@contextmanager
def writing(path: Path, fingerprint: str, progress: Tell) -> Iterator[None]:
    """Hold the writer's lock of a cache, as an extraction does; the parts of an unfinished one stay."""
    parts = Parts(parts_directory(path), fingerprint)
    if parts.busy():
        progress(Progress("note", f"{path}: another process writes this cache; waiting for it"))
    with parts.writing():
        yield
        if not any(parts.directory.glob("*.record")):
            parts.remove()


def is_there(path: Path, source: FeatureCache, table: Table, *, one_file: bool, overwrite: bool) -> bool:
    """Whether a file is already what would be written; another cache of that name is an error.

    Equal facts, images and status mean equal features.
    """
    if not path.exists() or overwrite:
        return False
    cache = FeatureCache(path, salvage=True)
    if cache.fingerprint == source.fingerprint and cache.outputs == source.outputs and cache.table().same_as(table):
        return not (one_file and cache.shard_files) and not cache.lost_shards
    raise CacheMismatchError(f"{path}: is there already and holds other rows; choose another --out, or --overwrite")
