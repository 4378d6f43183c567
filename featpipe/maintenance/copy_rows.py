"""Copy rows between caches: every row is verified, and the output is locked against other writers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache, SampleTable, parts_directory
from featpipe.errors import CacheError, CacheMismatchError, ConfigError
from featpipe.runtime import Progress, ProgressCallback
from featpipe.status import Status
from featpipe.storage import StagingArea, make_writable_folder

logger = logging.getLogger(__name__)

CHECK_BLOCK_ROWS = 65536
MAX_LISTED_IDS = 5  # in an error message


class RowCopier:
    """Gathers the features of rows of several caches in a new order.

    Parameters
    ----------
    caches : sequence of FeatureCache
    source_indices : ndarray of shape (n,), int
        Position in ``caches`` of the source of each new row.
    source_rows : ndarray of shape (n,), int
        Row of each new row in its source.
    progress : callable
    """

    def __init__(
        self,
        caches: Sequence[FeatureCache],
        source_indices: NDArray[np.integer],
        source_rows: NDArray[np.integer],
        progress: ProgressCallback,
    ) -> None:
        self._caches, self._source_indices, self._source_rows = caches, source_indices, source_rows
        self._progress = progress
        self._n_copied = 0

    def gather(self, output: str, start: int, stop: int) -> NDArray[np.floating]:
        """Gather a range of new rows; the callback of :func:`featpipe.cache.write_cache`.

        Raises
        ------
        CacheError
            If a row does not match its checksum.
        """
        first_cache = self._caches[0]
        values = np.empty((stop - start, *first_cache.shapes[output]), first_cache.facts["storage"])
        source_indices, source_rows = self._source_indices[start:stop], self._source_rows[start:stop]
        for source_index in np.unique(source_indices):
            cache, rows = self._caches[source_index], np.flatnonzero(source_indices == source_index)
            if not _find_intact_rows(cache, source_rows[rows], output).all():
                raise _make_damage_error(cache)
            values[rows] = cache.features(output)[source_rows[rows]]
        self._n_copied += stop - start
        total_rows = len(self._source_indices) * len(first_cache.outputs)
        self._progress(Progress("copying", self._n_copied, total_rows, "rows"))
        return values


def _find_intact_rows(cache: FeatureCache, rows: NDArray[np.integer], output: str) -> NDArray[np.bool_]:
    """Find which rows match their checksums; in any case, rows that are not ok must be NaN."""
    is_intact = cache.whole_rows(rows, output)
    bad_rows = np.flatnonzero(cache.status_codes[rows] != Status.OK)
    features = cache.features(output)[rows[bad_rows]]
    is_intact[bad_rows] &= np.isnan(features).all(axis=tuple(range(1, features.ndim)))
    return is_intact


def _make_damage_error(cache: FeatureCache) -> CacheError:
    """Make the error that names the damaged rows. The full search runs only after a damaged row was found."""
    damaged_blocks: list[NDArray[np.intp]] = []
    for start in range(0, len(cache), CHECK_BLOCK_ROWS):
        rows = np.arange(start, min(len(cache), start + CHECK_BLOCK_ROWS))
        is_intact = np.all([_find_intact_rows(cache, rows, output) for output in cache.outputs], axis=0)
        damaged_blocks.append(rows[~is_intact])
    damaged_rows = np.concatenate(damaged_blocks)
    names = ", ".join(cache.ids[int(row)] for row in damaged_rows[:MAX_LISTED_IDS])
    more_text = f" and {len(damaged_rows) - MAX_LISTED_IDS:,} more" if len(damaged_rows) > MAX_LISTED_IDS else ""
    return CacheError(
        f"{cache.path}: {len(damaged_rows):,} of its {len(cache):,} rows differ from what was written "
        f"({names}{more_text}); nothing was changed: `featpipe verify --repair` embeds them again"
    )


def check_columns(cache: FeatureCache) -> None:
    """Verify ids, labels and digests, which are small, before the first row is copied."""
    damaged_columns = cache.damaged_columns()
    if damaged_columns:
        verb = "is" if len(damaged_columns) == 1 else "are"
        raise CacheError(
            f"{cache.path}: {', '.join(damaged_columns)} {verb} damaged; nothing was changed: "
            "run `featpipe verify`, or extract again"
        )


def prepare_output_path(out: str | os.PathLike[str]) -> Path:
    """Check the path of a cache to be written, and create its folder."""
    path = Path(out)
    if path.suffix != ".h5":
        raise ConfigError(f"--out {path}: a cache is an HDF5 file; give it a name that ends in .h5")
    make_writable_folder(path.parent, CacheError, "--out")
    return path


@contextmanager
def lock_for_writing(path: Path, fingerprint: str) -> Iterator[None]:
    """Hold the writer's lock of a cache, as an extraction does. The parts of an unfinished extraction stay."""
    staging_area = StagingArea(parts_directory(path), fingerprint)
    if staging_area.is_locked():
        logger.info(f"{path}: another process is writing this cache; waiting for it")
    with staging_area.lock_for_writing():
        yield
        if not any(staging_area.directory.glob("*.record")):
            staging_area.remove()


def is_up_to_date(path: Path, source: FeatureCache, table: SampleTable, *, one_file: bool, overwrite: bool) -> bool:
    """Whether the output file is up to date. Another cache with that name is an error.

    Features are not compared: equal facts, images and status imply equal features.
    """
    if not path.exists() or overwrite:
        return False
    cache = FeatureCache(path, salvage=True)
    if cache.fingerprint == source.fingerprint and cache.outputs == source.outputs and cache.table().same_as(table):
        return not (one_file and cache.shard_files) and not cache.lost_shards
    raise CacheMismatchError(f"{path}: exists and has other rows; choose another --out, or pass --overwrite")
