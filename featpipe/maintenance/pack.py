"""Pack a sharded cache into one portable file."""

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

logger = logging.getLogger(__name__)


def pack(
    cache: str | os.PathLike[str] | FeatureCache,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    progress: ProgressCallback = ignore_progress,
) -> FeatureCache:
    """Copy the rows of a cache, byte for byte, into one portable file.

    Each row is verified against its checksum before it is copied. After a kill or on a full disk the old files are
    unchanged.

    Parameters
    ----------
    cache : path-like or FeatureCache
    out : path-like, optional
        The new file. If not given, the file replaces the cache under its own name, and the shards are removed.
    overwrite : bool
        Replace another cache at ``out``.
    progress : callable
        Called with a :class:`featpipe.runtime.progress.Progress`.

    Returns
    -------
    FeatureCache

    Raises
    ------
    CacheError
        If a row or a column does not match its checksum, or the disk is full.
    CacheMismatchError
        If ``out`` is a cache with other rows.

    Examples
    --------
    >>> cache = pack("cache/photos.h5", "photos-portable.h5")                    # doctest: +SKIP
    """
    source = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
    path = source.path if out is None else prepare_output_path(out)
    in_place = path.exists() and path.samefile(source.path)
    with lock_for_writing(path, source.fingerprint):
        if in_place:
            source = FeatureCache(path)  # reopen: an extraction that held the lock may have replaced it
        if in_place and not source.shard_files:
            logger.info(f"{path}: is one file already")
        elif not in_place and is_up_to_date(path, source, source.table(), one_file=True, overwrite=overwrite):
            logger.info(f"{path}: up to date, with the same rows")
        else:
            check_columns(source)
            n = len(source)
            copier = RowCopier([source], np.zeros(n, np.intp), np.arange(n), progress)
            write_cache(path, source.table(), source.manifest, source.shapes, source.facts["storage"], copier.gather)
    return FeatureCache(path)
