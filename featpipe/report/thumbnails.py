"""Small re-encoded pictures of samples, from the archives that a cache remembers; never the original bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        Whether the archives are where they were, with samples of the cache. Others may have come, or been left out.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._index: Any = None
        paths = cache.manifest.get("archives", [])
        try:
            index = archive.index(paths) if paths else None
        except FeatpipeError:
            index = None
        places = {} if index is None else _places(index.ids, cache.ids)
        self._index = index if places else None
        self._places = places
        self._made: dict[int, bytes] = {}

    @property
    def found(self) -> bool:
        return self._index is not None

    def of(self, rows: Sequence[int]) -> dict[int, bytes]:
        """Thumbnails by row number."""
        wanted = [row for row in dict.fromkeys(rows) if row not in self._made and row in self._places]
        if self._index is not None and wanted:
            wanted.sort(key=self._places.__getitem__)
            blocks = [wanted[start::WORKERS] for start in range(WORKERS)]
            with ThreadPoolExecutor(WORKERS) as pool:
                for made in pool.map(self._read, [block for block in blocks if block]):
                    self._made |= made
        return {row: self._made[row] for row in rows if row in self._made}

    def _read(self, rows: Sequence[int]) -> dict[int, bytes]:
        made = {}
        with self._index.open() as reader:
            for row in rows:
                try:
                    data = reader.read(self._places[row])
                    if digest(data) == self._cache.digests[row].tobytes():  # else it is another picture by now
                        made[row] = image.preview(data, PIXELS)
                except ArchiveError:
                    continue
        return made


def _places(there: Sequence[str], ids: Sequence[str]) -> Mapping[int, int] | range:
    """Where in an index the samples of a cache are, by their rows; by id, since a cache may hold some of them."""
    if there == ids:
        return range(len(ids))
    rows = {name: row for row, name in enumerate(there)}
    return {row: rows[name] for row, name in enumerate(ids) if name in rows}
