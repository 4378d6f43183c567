"""Tar archives: headers are read with tarfile, bytes by offset, and nothing is ever extracted."""

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

from featpipe.archive.listing import ArchiveLimits, Listing, Source, shown
from featpipe.archive.notes import LARGEST_NOTE_BYTES, is_note
from featpipe.errors import ArchiveError, SampleError
from featpipe.status import Status

__all__ = ["PlainTarReader", "TarReader", "TarStream", "list_tar", "open_raw"]

_BLOCK = 512
_CHUNK = 2**20
_LARGEST_HEADER = 2**24


def open_raw(source: Source) -> IO[bytes]:
    """The bytes of a tar from its beginning, decompressed."""
    if source.compression == "gz":
        return cast(IO[bytes], gzip.open(source.real, "rb"))
    if source.compression == "bz2":
        return bz2.open(source.real, "rb")
    if source.compression == "xz":
        return lzma.open(source.real, "rb")
    return open(source.real, "rb")


class TarStream:
    """A tar read forwards only, within limits.

    It is what tarfile reads headers from: a header that is too long, points backwards or unfolds without end is
    refused here, whatever tarfile makes of it. The last block read is kept, because tarfile takes a damaged
    header in the middle of an archive for its end.
    """

    def __init__(self, source: Source, limits: ArchiveLimits) -> None:
        self._source = source
        self._raw = open_raw(source)
        self._position = 0
        self._most = limits.unfolded_bytes(source.size_bytes)
        self.last = b""

    def __enter__(self) -> TarStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise self._hostile(f"a header of {size} bytes")
        self.last = self.take(size)
        return self.last

    def take(self, size: int) -> bytes:
        """Read as many bytes as are asked for, fewer only at the end."""
        pieces = []
        while size > 0 and (piece := self._raw.read(min(size, _CHUNK))):
            pieces.append(piece)
            size -= len(piece)
            self._advance(len(piece))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def seek(self, position: int) -> int:
        if position < self._position:
            raise self._hostile("a header that points backwards")
        if not self._source.compression:
            self._position = self._raw.seek(position)
            return self._position
        while self._position < position:
            piece = self._raw.read(min(position - self._position, _CHUNK))
            if not piece:
                break
            self._advance(len(piece))
        return self._position

    def _advance(self, size: int) -> None:
        self._position += size
        if self._source.compression and self._position > self._most:
            raise self._hostile(f"more than {self._most} bytes from a file of {self._source.size_bytes}")

    def _hostile(self, found: str) -> ArchiveError:
        return ArchiveError(f"{self._source.path}: {found} at byte {self._position}; not a tar to be trusted")


def list_tar(source: Source, limits: ArchiveLimits) -> Listing:
    """List a tar in its own order.

    Raises
    ------
    ArchiveError
        If it is damaged or ends early: fewer samples than there were is never an answer.
    """
    listing = Listing(source, limits)
    links: dict[int, str] = {}
    with _opened(source, limits) as stream:
        for member in _members(source, stream):
            listing.count()
            if member.isdir():
                continue
            if listing.wants(member.name):
                if member.islnk():
                    links[len(listing)] = member.linkname
                plain_file = member.isreg() and not member.issparse()
                fault = Status.OK if plain_file else Status.NOT_A_FILE
                listing.add(
                    member.name,
                    offset=member.offset_data,
                    size=member.size,
                    mtime_ns=source.mtime_ns,
                    fault=fault,
                )
            elif is_note(member.name) and member.isreg() and not member.issparse():
                stream.seek(member.offset_data)
                listing.note(member.name, stream.take(min(member.size, LARGEST_NOTE_BYTES + 1)))
    if links:
        _resolve(listing, links)
    return listing


def _resolve(listing: Listing, links: dict[int, str]) -> None:
    """Give hard links the bytes of the earlier member they name; a second pass, so that names need not be kept."""
    wanted = set(links.values())
    places: dict[str, tuple[int, int]] = {}
    row = 0
    with _opened(listing.source, listing.limits) as stream:
        quiet = Listing(listing.source, listing.limits)
        for member in _members(listing.source, stream):
            if member.name in wanted and member.isreg() and not member.issparse():
                places[member.name] = (member.offset_data, member.size)
            if member.isdir() or not quiet.wants(member.name):
                continue
            if row in links and links[row] in places:
                offset, size = places[links[row]]
                listing.offset[row], listing.size[row] = offset, size
                listing.fault[row] = listing.fault_of(size)
                if member.name in wanted:
                    places[member.name] = (offset, size)
            row += 1


def _opened(source: Source, limits: ArchiveLimits) -> TarStream:
    try:
        return TarStream(source, limits)
    except OSError as error:
        raise ArchiveError(f"{source.path}: cannot be opened: {error.strerror or error}") from error


def _members(source: Source, stream: TarStream) -> Iterator[tarfile.TarInfo]:
    try:
        tar = tarfile.TarFile(source.real, fileobj=cast(Any, stream), encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            _check_extent(source, member)
            cast(Any, tar).members.clear()  # tarfile would keep an object for each of millions
            yield member
        _check_end(source, stream)
    except ArchiveError:
        raise
    except Exception as error:
        # Damaged or hostile headers and streams make tarfile and the decompressors raise almost anything.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArchiveError(
            f"{source.path}: damaged or truncated at about byte {stream.tell()}: {reason}; get the archive again"
        ) from error


def _check_extent(source: Source, member: tarfile.TarInfo) -> None:
    end = member.offset_data + (member.size if member.isreg() and not member.issparse() else 0)
    if member.size < 0 or end >= 2**63:
        raise ArchiveError(f"{source.path}: {shown(member.name)} declares {member.size} bytes; not to be trusted")
    if not source.compression and end > source.size_bytes:
        raise ArchiveError(
            f"{source.path}: truncated: {shown(member.name)} ends at byte {end}, the file at {source.size_bytes}; "
            "get the archive again"
        )


def _check_end(source: Source, stream: TarStream) -> None:
    """Tell the end of an archive from a place at which tarfile merely gave up."""
    if len(stream.last) < _BLOCK:
        raise ArchiveError(
            f"{source.path}: truncated: no end-of-archive marker at byte {stream.tell()}; get the archive again"
        )
    if stream.last.strip(b"\0"):
        raise ArchiveError(f"{source.path}: damaged header at byte {stream.tell() - _BLOCK}; get the archive again")
    while rest := stream.take(_CHUNK):
        if rest.strip(b"\0"):
            raise ArchiveError(
                f"{source.path}: more data after the end-of-archive marker, near byte {stream.tell()}; if archives "
                "were joined, give them one by one"
            )


class TarReader:
    """Reads the members of a compressed tar through one forward stream.

    Rows read in the order of the archive decompress it once; going back starts again from the beginning.
    """

    def __init__(self, source: Source, limits: ArchiveLimits) -> None:
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
                return self._stream.take(size)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                self.close()
                raise SampleError(f"cannot be decompressed: {error}", status=Status.UNREADABLE) from error

    def close(self) -> None:
        if self._stream is not None:
            self._stream.__exit__()
            self._stream = None


class PlainTarReader:
    """Reads the members of an uncompressed tar by their place, without a lock where the system can."""

    def __init__(self, source: Source) -> None:
        self._file = open(source.real, "rb", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        pieces = []
        try:
            while size > 0 and (piece := self._piece(offset, size)):
                pieces.append(piece)
                offset += len(piece)
                size -= len(piece)
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}", status=Status.UNREADABLE) from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size) or b""

    def close(self) -> None:
        self._file.close()
