"""Zip archives: the central directory is checked before anything in it is believed."""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib

from featpipe.archive.listing import ArchiveLimits, Listing, Source, shown
from featpipe.archive.notes import LARGEST_NOTE_BYTES, is_note
from featpipe.errors import ArchiveError, SampleError
from featpipe.status import Status

__all__ = ["ZipReader", "list_zip"]

_LOCAL_HEADER = 30
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_ENCRYPTED, _PATCHED, _STRONGLY_ENCRYPTED = 0x1, 0x20, 0x40


def list_zip(source: Source, limits: ArchiveLimits) -> Listing:
    """List a zip in the order of its central directory."""
    listing = Listing(source, limits)
    with _opened(source) as archive:
        entries = archive.infolist()
        _check(source, archive, limits)
        for entry in entries:
            listing.count()
            # zipfile rewrites separators on some platforms; the name in the archive is the same on all.
            name = entry.orig_filename
            if name.endswith("/"):
                continue
            if listing.wants(name):
                listing.add(
                    name,
                    offset=entry.header_offset,
                    size=entry.file_size,
                    mtime_ns=source.mtime_ns,
                    fault=_fault(entry),
                )
            elif is_note(name) and _fault(entry) == Status.OK:
                try:
                    listing.note(name, _read(archive, entry, LARGEST_NOTE_BYTES + 1))
                except SampleError as error:
                    listing.bad_note(name, str(error))
    return listing


class ZipReader:
    """Reads members of one zip; any number of threads may do so at once.

    The directory is read again on first use, so that an index holds nothing but numbers.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._archive = _opened(source)
        self._entries = {entry.header_offset: entry for entry in self._archive.infolist()}

    def read(self, offset: int, size: int) -> bytes:
        entry = self._entries.get(offset)
        if entry is None or entry.file_size != size:
            raise ArchiveError(f"{self._source.path}: changed since it was listed; list it again")
        return _read(self._archive, entry, size)

    def close(self) -> None:
        self._archive.close()


def _opened(source: Source) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source.real)
    except Exception as error:
        # Damaged directories make zipfile raise almost anything.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArchiveError(
            f"{source.path}: not a readable zip, or truncated: {reason}; get the archive again"
        ) from error


def _fault(entry: zipfile.ZipInfo) -> Status:
    if stat.S_ISLNK(entry.external_attr >> 16):
        return Status.NOT_A_FILE
    refused = entry.flag_bits & (_ENCRYPTED | _PATCHED | _STRONGLY_ENCRYPTED)
    return Status.UNREADABLE if refused or entry.compress_type not in _METHODS else Status.OK


def _check(source: Source, archive: zipfile.ZipFile, limits: ArchiveLimits) -> None:
    """Refuse entries that share bytes, which is how a small file unfolds without end, and too high a ratio."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    starts = [entry.header_offset for entry in entries] + [archive.start_dir]
    for entry, following in zip(entries, starts[1:], strict=True):
        if entry.header_offset < 0 or entry.header_offset + _LOCAL_HEADER + entry.compress_size > following:
            raise ArchiveError(
                f"{source.path}: {shown(entry.orig_filename)} overlaps what follows it; not a zip to be trusted"
            )
    total, most = sum(entry.file_size for entry in entries), limits.unfolded_bytes(source.size_bytes)
    if total > most:
        raise ArchiveError(
            f"{source.path}: {source.size_bytes} bytes that unfold to {total}, at most {most} are accepted; "
            "raise the ratio if that is meant"
        )


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most_bytes: int) -> bytes:
    try:
        with archive.open(entry) as member:
            data = member.read(most_bytes)
            # The checksum is compared when the end is seen, one byte further.
            return data + member.read(1) if len(data) == entry.file_size else data
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        raise SampleError(f"damaged in the zip: {error}", status=Status.DAMAGED) from error
    except OSError as error:
        # Without a number it is bzip2's word for damage.
        status = Status.DAMAGED if error.errno is None else Status.UNREADABLE
        raise SampleError(f"cannot be read from the zip: {error}", status=status) from error
    except (RuntimeError, NotImplementedError) as error:
        raise SampleError(f"cannot be read from the zip: {error}", status=Status.UNREADABLE) from error
