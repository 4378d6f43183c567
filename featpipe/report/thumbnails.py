"""Small re-encoded pictures of samples, from the archives that a cache remembers; never the original bytes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from featpipe import archive, image
from featpipe.cache import FeatureCache
from featpipe.errors import ArchiveError, FeatpipeError
from featpipe.fingerprint import digest

__all__ = ["Thumbnails"]

PIXELS = 80
WORKERS = 4  # decoding lets go of the interpreter


class Thumbnails:
    """Pictures of rows of a cache; those that can still be read, and are still the same.

    Parameters
    ----------
    cache : FeatureCache

    Attributes
    ----------
    found : bool
        Whether the archives are where they were, with the same samples.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._index: Any = None
        places = cache.manifest.get("archives", [])
        try:
            index = archive.index(places) if places else None
        except FeatpipeError:
            index = None
        if index is not None and index.ids == cache.ids:
            self._index = index
        self._made: dict[int, bytes] = {}

    @property
    def found(self) -> bool:
        return self._index is not None

    def of(self, rows: Sequence[int]) -> dict[int, bytes]:
        """Thumbnails by row number."""
        wanted = [row for row in dict.fromkeys(rows) if row not in self._made]
        if self._index is not None and wanted:
            blocks = [wanted[start::WORKERS] for start in range(WORKERS)]
            with ThreadPoolExecutor(WORKERS) as pool:
                for made in pool.map(self._read, [sorted(block) for block in blocks if block]):
                    self._made |= made
        return {row: self._made[row] for row in rows if row in self._made}

    def _read(self, rows: Sequence[int]) -> dict[int, bytes]:
        made = {}
        with self._index.open() as reader:
            for row in rows:
                try:
                    data = reader.read(row)
                    if digest(data) == self._cache.digests[row].tobytes():  # else it is another picture by now
                        made[row] = image.preview(data, PIXELS)
                except ArchiveError:
                    continue
        return made
