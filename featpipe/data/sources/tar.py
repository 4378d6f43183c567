"""Tar archives: tarfile parses the headers, samples are read by offset, and nothing is extracted."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import threading
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from featpipe.data.sources.listing import ArchiveLimits, ArchiveSource, Listing, format_name
from featpipe.data.sources.sidecars import MAX_SIDECAR_BYTES, is_sidecar
from featpipe.errors import ArchiveError, SampleError
from featpipe.runtime import format_error
from featpipe.status import Status

_TAR_BLOCK_BYTES = 512
_READ_CHUNK_BYTES = 2**20
_MAX_HEADER_BYTES = 2**24


def open_decompressed(source: ArchiveSource) -> IO[bytes]:
    """Open the decompressed bytes of a tar."""
    if source.compression == "gz":
        return cast(IO[bytes], gzip.open(source.real_path, "rb"))
    if source.compression == "bz2":
        return bz2.open(source.real_path, "rb")
    if source.compression == "xz":
        return lzma.open(source.real_path, "rb")
    return open(source.real_path, "rb")


class TarStream:
    """A forward-only stream over a tar that enforces the limits.

    tarfile reads headers from this stream. A header that is too long, points backwards or decompresses beyond the
    limits is rejected here. The last block read is kept, because tarfile treats a damaged header in the middle of an
    archive as the end of the archive.
    """

    def __init__(self, source: ArchiveSource, limits: ArchiveLimits) -> None:
        self._source = source
        self._file = open_decompressed(source)
        self._position = 0
        self._max_bytes = limits.max_decompressed_bytes(source.size_bytes)
        self.last_block = b""

    def __enter__(self) -> TarStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise self._hostile_archive_error(f"a header of {size} bytes")
        self.last_block = self.read_fully(size)
        return self.last_block

    def read_fully(self, size: int) -> bytes:
        """Read exactly ``size`` bytes, fewer only at the end."""
        chunks = []
        while size > 0 and (chunk := self._file.read(min(size, _READ_CHUNK_BYTES))):
            chunks.append(chunk)
            size -= len(chunk)
            self._advance(len(chunk))
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def seek(self, position: int) -> int:
        if position < self._position:
            raise self._hostile_archive_error("a header that points backwards")
        if not self._source.compression:
            self._position = self._file.seek(position)
            return self._position
        while self._position < position:
            chunk = self._file.read(min(position - self._position, _READ_CHUNK_BYTES))
            if not chunk:
                break
            self._advance(len(chunk))
        return self._position

    def _advance(self, size: int) -> None:
        self._position += size
        if self._source.compression and self._position > self._max_bytes:
            raise self._hostile_archive_error(
                f"more than {self._max_bytes} bytes from a file of {self._source.size_bytes}"
            )

    def _hostile_archive_error(self, problem: str) -> ArchiveError:
        return ArchiveError(f"{self._source.path}: {problem} at byte {self._position}; the archive may be malicious")


def list_tar(source: ArchiveSource, limits: ArchiveLimits, suffixes: frozenset[str]) -> Listing:
    """List a tar in the order of its members.

    Raises
    ------
    ArchiveError
        If it is damaged or truncated; an incomplete list of samples is never returned.
    """
    listing = Listing(source, limits, suffixes)
    target_by_row: dict[int, str] = {}
    with _open_stream(source, limits) as stream:
        for member in _iter_members(source, stream):
            listing.count_members()
            if member.isdir():
                continue
            if listing.accepts(member.name):
                if member.islnk():
                    target_by_row[len(listing)] = member.linkname
                fault = Status.OK if _is_regular(member) else Status.NOT_A_FILE
                listing.add(
                    member.name,
                    offset=member.offset_data,
                    size=member.size,
                    mtime_ns=source.mtime_ns,
                    fault=fault,
                )
            elif is_sidecar(member.name) and _is_regular(member):
                stream.seek(member.offset_data)
                listing.add_sidecar(member.name, stream.read_fully(min(member.size, MAX_SIDECAR_BYTES + 1)))
    if target_by_row:
        _resolve_hard_links(listing, target_by_row)
    return listing


def _resolve_hard_links(listing: Listing, target_by_row: dict[int, str]) -> None:
    """Point hard links to the bytes of their targets; a second pass, so that a map of all names is not needed."""
    target_names = set(target_by_row.values())
    location_by_name: dict[str, tuple[int, int]] = {}
    row = 0
    with _open_stream(listing.source, listing.limits) as stream:
        scratch_listing = Listing(listing.source, listing.limits, listing.suffixes)
        for member in _iter_members(listing.source, stream):
            if member.name in target_names and _is_regular(member):
                location_by_name[member.name] = (member.offset_data, member.size)
            if member.isdir() or not scratch_listing.accepts(member.name):
                continue
            if row in target_by_row and target_by_row[row] in location_by_name:
                offset, size = location_by_name[target_by_row[row]]
                listing.offset[row], listing.size[row] = offset, size
                listing.fault[row] = Status.OK
                if member.name in target_names:
                    location_by_name[member.name] = (offset, size)
            row += 1


def _is_regular(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _open_stream(source: ArchiveSource, limits: ArchiveLimits) -> TarStream:
    try:
        return TarStream(source, limits)
    except OSError as error:
        raise ArchiveError(f"{source.path}: cannot be opened: {error.strerror or error}") from error


def _iter_members(source: ArchiveSource, stream: TarStream) -> Iterator[tarfile.TarInfo]:
    try:
        tar = tarfile.TarFile(source.real_path, fileobj=cast(Any, stream), encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            _check_extent(source, member)
            cast(Any, tar).members.clear()  # tarfile would keep one object per member
            yield member
        _check_end(source, stream)
    except ArchiveError:
        raise
    except Exception as error:
        # Damaged or hostile headers and streams make tarfile and the decompressors raise almost anything.
        raise ArchiveError(
            f"{source.path}: damaged or truncated at about byte {stream.tell()}: {format_error(error)}; "
            "get the archive again"
        ) from error


def _check_extent(source: ArchiveSource, member: tarfile.TarInfo) -> None:
    end = member.offset_data + (member.size if _is_regular(member) else 0)
    if member.size < 0 or end >= 2**63:
        raise ArchiveError(
            f"{source.path}: {format_name(member.name)} declares {member.size} bytes; the archive may be malicious"
        )
    if not source.compression and end > source.size_bytes:
        raise ArchiveError(
            f"{source.path}: truncated: {format_name(member.name)} ends at byte {end}, "
            f"the file at {source.size_bytes}; get the archive again"
        )


def _check_end(source: ArchiveSource, stream: TarStream) -> None:
    """Check that the archive ends here, and that tarfile did not stop at a damaged header."""
    if len(stream.last_block) < _TAR_BLOCK_BYTES:
        raise ArchiveError(
            f"{source.path}: truncated: no end-of-archive marker at byte {stream.tell()}; get the archive again"
        )
    if stream.last_block.strip(b"\0"):
        raise ArchiveError(
            f"{source.path}: damaged header at byte {stream.tell() - _TAR_BLOCK_BYTES}; get the archive again"
        )
    while trailing_bytes := stream.read_fully(_READ_CHUNK_BYTES):
        if trailing_bytes.strip(b"\0"):
            raise ArchiveError(
                f"{source.path}: more data after the end-of-archive marker, near byte {stream.tell()}; if archives "
                "were joined, pass them one by one"
            )


class TarReader:
    """Reads the members of a compressed tar through one forward stream.

    Reading rows in the order of the archive decompresses it once; seeking back restarts from the beginning.
    """

    def __init__(self, source: ArchiveSource, limits: ArchiveLimits) -> None:
        self._source = source
        self._limits = limits
        self._lock = threading.Lock()
        self._stream: TarStream | None = None

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            try:
                if self._stream is not None and self._stream.tell() > offset:
                    self.close()
                if self._stream is None:
                    self._stream = TarStream(self._source, self._limits)
                self._stream.seek(offset)
                return self._stream.read_fully(size)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                self.close()
                raise SampleError(f"cannot be decompressed: {error}", status=Status.UNREADABLE) from error

    def close(self) -> None:
        if self._stream is not None:
            self._stream.__exit__()
            self._stream = None


class PlainTarReader:
    """Reads the members of an uncompressed tar by offset, without a lock."""

    def __init__(self, source: ArchiveSource) -> None:
        self._file = open(source.real_path, "rb", buffering=0)  # noqa: SIM115

    def read(self, offset: int, size: int) -> bytes:
        chunks = []
        try:
            while size > 0 and (chunk := os.pread(self._file.fileno(), size, offset)):
                chunks.append(chunk)
                offset += len(chunk)
                size -= len(chunk)
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}", status=Status.UNREADABLE) from error
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def close(self) -> None:
        self._file.close()
