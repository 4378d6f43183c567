"""The bytes of samples, from wherever they lie."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Protocol

from featpipe.archive.folders import read_file
from featpipe.archive.listing import Source, shown
from featpipe.archive.tars import PlainTarReader, TarReader
from featpipe.archive.zips import ZipReader
from featpipe.errors import ArchiveError, SampleError
from featpipe.status import Status

if TYPE_CHECKING:
    from featpipe.archive.indexing import Index

__all__ = ["Reader"]

_REASONS = {
    Status.MISSING: "was not there when the archive was listed",
    Status.UNREADABLE: "cannot be read: encrypted, of an unknown compression, or without permission",
    Status.EMPTY: "empty: there are no bytes",
    Status.TOO_LARGE: "more bytes than the limit for one image",
    Status.NOT_A_FILE: "a link, a device, a folder or a sparse file, expected a regular file",
}


class _Opened(Protocol):
    def read(self, offset: int, size: int) -> bytes: ...
    def close(self) -> None: ...


class Reader:
    """Reads samples by row; any number of threads may share one.

    Archive files are opened when they are first needed and closed together. Nothing is cached.

    Parameters
    ----------
    index : Index
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._opened: dict[int, _Opened] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._opened:
                self._opened.popitem()[1].close()

    def read(self, row: int) -> bytes:
        """The bytes of one sample, whole.

        Raises
        ------
        SampleError
            If this sample has no bytes to be had; its status says why.
        ArchiveError
            If the archive itself is gone, or changed since it was listed.
        """
        index = self._index
        source = index.sources[index.source[row]]
        try:
            fault = Status(int(index.fault[row]))
            if fault != Status.OK:
                raise SampleError(_REASONS[fault], status=fault)
            if source.kind in ("folder", "files"):
                path = os.path.join(os.fsencode(source.real), index.raw_name(row))
                return read_file(path, index.limits.member_bytes)
            return self._member(row)
        except SampleError as error:
            raise self._placed(str(error), error.status, row) from error
        except MemoryError as error:
            raise self._placed("not enough memory to read it", Status.OUT_OF_MEMORY, row) from error

    def _member(self, row: int) -> bytes:
        index, size = self._index, int(self._index.size[row])
        data = self._archive(int(index.source[row])).read(int(index.offset[row]), size)
        if len(data) != size:
            raise SampleError(f"ends after {len(data)} of {size} bytes", status=Status.UNREADABLE)
        return data

    def _placed(self, reason: str, status: Status, row: int) -> SampleError:
        archive = str(self._index.sources[self._index.source[row]].path)
        sample_id = self._index.ids[row]
        return SampleError(
            f"{archive}: {shown(sample_id)}: {reason}", status=status, archive=archive, sample_id=sample_id
        )

    def _archive(self, which: int) -> _Opened:
        with self._lock:
            if which not in self._opened:
                self._opened[which] = self._open(self._index.sources[which])
            return self._opened[which]

    def _open(self, source: Source) -> _Opened:
        try:
            now = os.stat(source.real)
        except OSError as error:
            raise ArchiveError(f"{source.path}: cannot be opened: {error.strerror}") from error
        if (now.st_size, now.st_mtime_ns) != (source.size_bytes, source.mtime_ns):
            raise ArchiveError(f"{source.path}: changed since it was listed; list it again")
        if source.kind == "zip":
            return ZipReader(source)
        return TarReader(source, self._index.limits) if source.compression else PlainTarReader(source)
