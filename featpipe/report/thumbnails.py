"""Small re-encoded pictures of samples, from the archives that a cache remembers; never the original bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from featpipe import data
from featpipe.cache import FeatureCache
from featpipe.data import encode_preview
from featpipe.errors import ArchiveError, FeatpipeError
from featpipe.storage import digest

__all__ = ["Thumbnails"]

THUMBNAIL_PIXELS = 80
N_DECODING_THREADS = 4  # decoding lets go of the interpreter


class Thumbnails:
    """Pictures of rows of a cache; those that can still be read, and are still the same.

    Parameters
    ----------
    cache : FeatureCache

    Attributes
    ----------
    found : bool
        Whether the archives are where they were, with samples of the cache. Others may have come, or been left out.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._index: Any = None
        paths = cache.manifest.get("archives", [])
        try:
            index = data.index(paths) if paths else None
        except FeatpipeError:
            index = None
        index_rows = {} if index is None else _match_index_rows(index.ids, cache.ids)
        self._index = index if index_rows else None
        self._index_rows = index_rows
        self._thumbnails: dict[int, bytes] = {}

    @property
    def is_available(self) -> bool:
        return self._index is not None

    def load(self, rows: Sequence[int]) -> dict[int, bytes]:
        """Thumbnails by row number."""
        missing_rows = [row for row in dict.fromkeys(rows) if row not in self._thumbnails and row in self._index_rows]
        if self._index is not None and missing_rows:
            missing_rows.sort(key=self._index_rows.__getitem__)
            row_blocks = [missing_rows[start::N_DECODING_THREADS] for start in range(N_DECODING_THREADS)]
            with ThreadPoolExecutor(N_DECODING_THREADS) as pool:
                for loaded in pool.map(self._load_thumbnails, [block for block in row_blocks if block]):
                    self._thumbnails |= loaded
        return {row: self._thumbnails[row] for row in rows if row in self._thumbnails}

    def _load_thumbnails(self, rows: Sequence[int]) -> dict[int, bytes]:
        thumbnails = {}
        with self._index.open() as reader:
            for row in rows:
                try:
                    data = reader.read(self._index_rows[row])
                    if digest(data) == self._cache.digests[row].tobytes():  # else it is another picture by now
                        thumbnails[row] = encode_preview(data, THUMBNAIL_PIXELS)
                except ArchiveError:
                    continue
        return thumbnails


def _match_index_rows(index_ids: Sequence[str], cache_ids: Sequence[str]) -> Mapping[int, int] | range:
    """Where in an index the samples of a cache are, by their rows; by id, since a cache may hold some of them."""
    if index_ids == cache_ids:
        return range(len(cache_ids))
    index_row_by_id = {sample_id: row for row, sample_id in enumerate(index_ids)}
    return {row: index_row_by_id[sample_id] for row, sample_id in enumerate(cache_ids) if sample_id in index_row_by_id}
