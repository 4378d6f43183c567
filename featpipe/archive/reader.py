"""The bytes of samples, from wherever they lie."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Protocol

from featpipe.archive.folders import read_file
from featpipe.archive.listing import ArchiveSource, format_name
from featpipe.archive.tars import PlainTarReader, TarReader
from featpipe.archive.zips import ZipReader
from featpipe.errors import ArchiveError, SampleError
from featpipe.status import Status

if TYPE_CHECKING:
    from featpipe.archive.indexing import Index

__all__ = ["SampleReader"]

_FAULT_REASONS = {
    Status.MISSING: "was not there when the archive was listed",
    Status.UNREADABLE: "cannot be read: encrypted, of an unknown compression, or without permission",
    Status.EMPTY: "empty: there are no bytes",
    Status.TOO_LARGE: "more bytes than the limit for one image",
    Status.NOT_A_FILE: "a link, a device, a folder or a sparse file, expected a regular file",
}


class _ArchiveReader(Protocol):
    def read(self, offset: int, size: int) -> bytes: ...
    def close(self) -> None: ...


class SampleReader:
    """Reads samples by row; any number of threads may share one.

    Archive files are opened when they are first needed and closed together. Nothing is cached.

    Parameters
    ----------
    index : Index
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._archive_readers: dict[int, _ArchiveReader] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._archive_readers:
                self._archive_readers.popitem()[1].close()

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
                raise SampleError(_FAULT_REASONS[fault], status=fault)
            if source.kind in ("folder", "files"):
                path = os.path.join(os.fsencode(source.real), index.raw_name(row))
                return read_file(path, index.limits.max_member_bytes)
            return self._read_member(row)
        except SampleError as error:
            raise self._make_sample_error(str(error), error.status, row) from error
        except MemoryError as error:
            raise self._make_sample_error("not enough memory to read it", Status.OUT_OF_MEMORY, row) from error

    def _read_member(self, row: int) -> bytes:
        index, size = self._index, int(self._index.size[row])
        data = self._get_archive_reader(int(index.source[row])).read(int(index.offset[row]), size)
        if len(data) != size:
            raise SampleError(f"ends after {len(data)} of {size} bytes", status=Status.UNREADABLE)
        return data

    def _make_sample_error(self, reason: str, status: Status, row: int) -> SampleError:
        archive = str(self._index.sources[self._index.source[row]].path)
        sample_id = self._index.ids[row]
        return SampleError(
            f"{archive}: {format_name(sample_id)}: {reason}", status=status, archive=archive, sample_id=sample_id
        )

    def _get_archive_reader(self, source_number: int) -> _ArchiveReader:
        with self._lock:
            if source_number not in self._archive_readers:
                self._archive_readers[source_number] = self._open_archive(self._index.sources[source_number])
            return self._archive_readers[source_number]

    def _open_archive(self, source: ArchiveSource) -> _ArchiveReader:
        try:
            current_stat = os.stat(source.real_path)
        except OSError as error:
            raise ArchiveError(f"{source.path}: cannot be opened: {error.strerror}") from error
        if (current_stat.st_size, current_stat.st_mtime_ns) != (source.size_bytes, source.mtime_ns):
            raise ArchiveError(f"{source.path}: changed since it was listed; list it again")
        if source.kind == "zip":
            return ZipReader(source)
        return TarReader(source, self._index.limits) if source.compression else PlainTarReader(source)
