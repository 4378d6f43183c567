"""A cache that is spread over shards, as one portable file."""

from __future__ import annotations

import logging
import os

import numpy as np

from featpipe.cache import FeatureCache, write_cache
from featpipe.maintenance.copy_rows import (
    RowCopier,
    check_columns,
    is_up_to_date,
    lock_for_writing,
    prepare_output_path,
)
from featpipe.runtime import ProgressCallback, ignore_progress

__all__ = ["pack"]

logger = logging.getLogger(__name__)


def pack(
    cache: str | os.PathLike[str] | FeatureCache,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> FeatureCache:
    """One portable file with the rows of a cache, byte for byte.

    Each row is verified by its check before it is copied. A kill or a full disk leaves the old files as they were.

    Parameters
    ----------
    cache : path-like or FeatureCache
    out : path-like, optional
        The new file. If not given, the cache becomes one file under its own name, and its shards are removed.
    overwrite : bool
        Replace another cache at ``out``.
    progress : callable
        Told what is going on, as :class:`featpipe.runtime.progress.Progress`.

    Returns
    -------
    FeatureCache

    Raises
    ------
    CacheError
        If a row or a column is not as it was written, or the disk is full.
    CacheMismatchError
        If ``out`` is a cache of other rows.

    Examples
    --------
    >>> cache = pack("cache/photos.h5", "photos-portable.h5")                    # doctest: +SKIP
    """
    source = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
    path = source.path if out is None else prepare_output_path(out)
    in_place = path.exists() and path.samefile(source.path)
    with lock_for_writing(path, source.fingerprint):
        if in_place:
            source = FeatureCache(path)  # what an extraction that held the lock may have made of it
        if in_place and not source.shard_files:
            logger.info(f"{path}: is one file already")
        elif not in_place and is_up_to_date(path, source, source.table(), one_file=True, overwrite=overwrite):
            logger.info(f"{path}: is there already, with the same rows")
        else:
            check_columns(source)
            n = len(source)
            copier = RowCopier([source], np.zeros(n, np.intp), np.arange(n), progress)
            write_cache(path, source.table(), source.manifest, source.shapes, source.facts["storage"], copier.gather)
    return FeatureCache(path)
