"""Thumbnails of samples, decoded from the archives of a cache and encoded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from featpipe import data
from featpipe.cache import FeatureCache
from featpipe.data import get_modality
from featpipe.errors import ArchiveError, FeatpipeError
from featpipe.storage import digest

THUMBNAIL_PIXELS = 80
N_DECODING_THREADS = 4  # decoding releases the interpreter lock


class Thumbnails:
    """Thumbnails of rows of a cache whose samples can still be read and have not changed.

    Parameters
    ----------
    cache : FeatureCache
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        paths = cache.manifest.get("archives", [])
        try:
            index = data.index(paths, modality=cache.modality) if paths else None
        except FeatpipeError:
            index = None
        self._index_rows = {} if index is None else _match_index_rows(index.ids, cache.ids)
        self._index: Any = index if self._index_rows else None
        self._thumbnails: dict[int, bytes] = {}

    @property
    def is_available(self) -> bool:
        """Whether the archives are where they were and have samples of the cache."""
        return self._index is not None

    def load(self, rows: Sequence[int]) -> dict[int, bytes]:
        """Load the thumbnails of rows, by row number; rows without a thumbnail are missing."""
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
        encode_preview = get_modality(self._cache.modality).encode_preview
        with self._index.open() as reader:
            for row in rows:
                try:
                    encoded = reader.read(self._index_rows[row])
                    if digest(encoded) == self._cache.digests[row].tobytes():  # otherwise the image has changed since
                        thumbnails[row] = encode_preview(encoded, THUMBNAIL_PIXELS)
                except ArchiveError:
                    continue
        return thumbnails


def _match_index_rows(index_ids: Sequence[str], cache_ids: Sequence[str]) -> Mapping[int, int] | range:
    """Map rows of a cache to rows of an index by sample id, as a cache may have only some of the samples."""
    if index_ids == cache_ids:
        return range(len(cache_ids))
    index_row_by_id = {sample_id: row for row, sample_id in enumerate(index_ids)}
    return {row: index_row_by_id[sample_id] for row, sample_id in enumerate(cache_ids) if sample_id in index_row_by_id}
