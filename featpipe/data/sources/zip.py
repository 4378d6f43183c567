"""Zip archives: the central directory is validated before it is used."""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib

from featpipe.data.sources.listing import ArchiveLimits, ArchiveSource, Listing, format_name
from featpipe.data.sources.sidecars import MAX_SIDECAR_BYTES, is_sidecar
from featpipe.errors import ArchiveError, SampleError
from featpipe.runtime import format_error
from featpipe.status import Status

_LOCAL_HEADER_BYTES = 30
_SUPPORTED_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_ENCRYPTED_FLAG, _PATCHED_FLAG, _STRONGLY_ENCRYPTED_FLAG = 0x1, 0x20, 0x40


def list_zip(source: ArchiveSource, limits: ArchiveLimits, suffixes: frozenset[str]) -> Listing:
    """List a zip in the order of its central directory."""
    listing = Listing(source, limits, suffixes)
    with _open_zip(source) as archive:
        entries = archive.infolist()
        _check_entries(source, archive, limits)
        for entry in entries:
            listing.count_members()
            # zipfile rewrites separators on some platforms; the name in the archive is the same on all.
            name = entry.orig_filename
            if name.endswith("/"):
                continue
            if listing.accepts(name):
                listing.add(
                    name,
                    offset=entry.header_offset,
                    size=entry.file_size,
                    mtime_ns=source.mtime_ns,
                    fault=_find_fault(entry),
                )
            elif is_sidecar(name) and _find_fault(entry) == Status.OK:
                try:
                    listing.add_sidecar(name, _read_entry(archive, entry, MAX_SIDECAR_BYTES + 1))
                except SampleError as error:
                    listing.add_unreadable_sidecar(name, str(error))
    return listing


class ZipReader:
    """Reads members of one zip; thread-safe.

    The central directory is read again on first use, so that an index holds only arrays.
    """

    def __init__(self, source: ArchiveSource) -> None:
        self._source = source
        self._archive = _open_zip(source)
        self._entries = {entry.header_offset: entry for entry in self._archive.infolist()}

    def read(self, offset: int, size: int) -> bytes:
        entry = self._entries.get(offset)
        if entry is None or entry.file_size != size:
            raise ArchiveError(f"{self._source.path}: changed since it was listed; list it again")
        return _read_entry(self._archive, entry, size)

    def close(self) -> None:
        self._archive.close()


def _open_zip(source: ArchiveSource) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source.real_path)
    except Exception as error:
        # Damaged directories make zipfile raise almost anything.
        raise ArchiveError(
            f"{source.path}: not a readable zip, or truncated: {format_error(error)}; get the archive again"
        ) from error


def _find_fault(entry: zipfile.ZipInfo) -> Status:
    if stat.S_ISLNK(entry.external_attr >> 16):
        return Status.NOT_A_FILE
    unsupported_flags = entry.flag_bits & (_ENCRYPTED_FLAG | _PATCHED_FLAG | _STRONGLY_ENCRYPTED_FLAG)
    return Status.UNREADABLE if unsupported_flags or entry.compress_type not in _SUPPORTED_METHODS else Status.OK


def _check_entries(source: ArchiveSource, archive: zipfile.ZipFile, limits: ArchiveLimits) -> None:
    """Reject overlapping entries, which zip bombs use, and entries with too high a compression ratio."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    boundaries = [entry.header_offset for entry in entries] + [archive.start_dir]
    for entry, next_start in zip(entries, boundaries[1:], strict=True):
        if entry.header_offset < 0 or entry.header_offset + _LOCAL_HEADER_BYTES + entry.compress_size > next_start:
            raise ArchiveError(
                f"{source.path}: {format_name(entry.orig_filename)} overlaps the next entry; "
                "the archive may be malicious"
            )
    total_bytes, max_bytes = sum(entry.file_size for entry in entries), limits.max_decompressed_bytes(source.size_bytes)
    if total_bytes > max_bytes:
        raise ArchiveError(
            f"{source.path}: {source.size_bytes} bytes that decompress to {total_bytes}; "
            f"at most {max_bytes} are allowed; raise `ArchiveLimits.max_ratio` if this is intended"
        )


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, max_bytes: int) -> bytes:
    try:
        with archive.open(entry) as member:
            data = member.read(max_bytes)
            # zipfile compares the checksum only when the end is reached, one byte further.
            return data + member.read(1) if len(data) == entry.file_size else data
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        raise SampleError(f"damaged in the zip: {error}", status=Status.DAMAGED) from error
    except OSError as error:
        # An OSError without errno is bzip2's error for damaged data.
        status = Status.DAMAGED if error.errno is None else Status.UNREADABLE
        raise SampleError(f"cannot be read from the zip: {error}", status=status) from error
    except (RuntimeError, NotImplementedError) as error:
        raise SampleError(f"cannot be read from the zip: {error}", status=Status.UNREADABLE) from error
