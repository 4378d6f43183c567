"""List and read folders and single files; listing calls stat once per file."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter

from featpipe.data.sources.listing import ArchiveLimits, ArchiveSource, Listing, is_hidden
from featpipe.data.sources.sidecars import MAX_SIDECAR_BYTES, get_sample_key, is_sidecar, may_hold_sidecars
from featpipe.errors import ArchiveError, SampleError
from featpipe.status import Status

FileIdentity = tuple[int, int]


def list_folder(source: ArchiveSource, limits: ArchiveLimits, suffixes: frozenset[str]) -> Listing:
    """List a folder by path components in code point order; links are followed, and cycles are detected."""
    listing = Listing(source, limits, suffixes)
    # A stack instead of recursion: folders may be nested deeper than Python's recursion limit.
    stack = [(_list_entries(listing, source.real_path, ""), "", frozenset({_get_identity(source.real_path)}))]
    while stack:
        entries, prefix, parent_identities = stack[-1]
        folder = _add_files_before_folder(listing, entries, prefix)
        if folder is None:
            stack.pop()
        elif is_hidden(folder.name) or folder.name == "__MACOSX":
            listing.ignored["hidden" if is_hidden(folder.name) else "__MACOSX"] += 1
        elif (identity := _get_identity(folder.path)) in parent_identities:
            listing.ignored["link to a parent folder"] += 1
        else:
            subfolder_prefix = f"{prefix}{folder.name}/"
            stack.append(
                (
                    _list_entries(listing, folder.path, subfolder_prefix),
                    subfolder_prefix,
                    parent_identities | {identity},
                )
            )
    return listing


def list_files(source: ArchiveSource, names: Iterable[str], limits: ArchiveLimits, suffixes: frozenset[str]) -> Listing:
    """List single files in the order given; missing files get the fault ``MISSING``."""
    listing = Listing(source, limits, suffixes)
    for name in names:
        listing.count_members()
        _add_file(listing, name, partial(os.stat, os.path.join(source.real_path, name)))
    return listing


def read_file(path: bytes, max_bytes: int) -> bytes:
    """Read a whole regular file; raises SampleError with a status if it cannot be read."""
    try:
        # Non-blocking, so that a pipe that replaced an image cannot block the reader.
        descriptor = os.open(os.fsdecode(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SampleError("not a regular file", status=Status.NOT_A_FILE)
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SampleError("is not there any more", status=Status.MISSING) from error
    except IsADirectoryError as error:
        raise SampleError("a folder, expected a file", status=Status.NOT_A_FILE) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SampleError(f"cannot be read: {reason}", status=Status.UNREADABLE) from error
    if len(data) > max_bytes:
        raise SampleError(f"more than {max_bytes} bytes", status=Status.TOO_LARGE)
    return data


def _list_entries(listing: Listing, folder: str, prefix: str) -> Iterator[os.DirEntry[str]]:
    """Return the entries of a folder in order. Sidecar files of its images are read immediately."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=attrgetter("name"))
    except OSError as error:
        raise ArchiveError(
            f"{folder}: cannot be listed: {error.strerror}; grant access to it, or name its parts one by one"
        ) from error
    listing.count_members(len(entries))
    if may_hold_sidecars(entry.name for entry in entries):
        sidecars = [entry for entry in entries if is_sidecar(entry.name) and not is_hidden(entry.name)]
        sample_keys = {get_sample_key(entry.name) for entry in entries if listing.is_sample(entry.name)}
        for entry in sidecars:
            if get_sample_key(entry.name) in sample_keys:
                _add_sidecar(listing, prefix + entry.name, entry.path)
            else:
                listing.count_ignored(entry.name)
    return iter(entries)


def _add_files_before_folder(
    listing: Listing, entries: Iterator[os.DirEntry[str]], prefix: str
) -> os.DirEntry[str] | None:
    """Add the files before the next folder and return that folder, or None at the end."""
    for entry in entries:
        if _is_folder(entry):
            return entry
        if listing.accepts(entry.name):
            _add_file(listing, prefix + entry.name, entry.stat)
    return None


def _add_sidecar(listing: Listing, name: str, path: str) -> None:
    try:
        listing.add_sidecar(name, read_file(os.fsencode(path), MAX_SIDECAR_BYTES))
    except SampleError as error:
        listing.add_unreadable_sidecar(name, str(error))


def _add_file(listing: Listing, name: str, get_stat: Callable[[], os.stat_result]) -> None:
    try:
        file_stat = get_stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        listing.add(name, size=0, fault=Status.MISSING)
    except OSError:
        listing.add(name, size=0, fault=Status.UNREADABLE)
    else:
        fault = Status.OK if stat.S_ISREG(file_stat.st_mode) else Status.NOT_A_FILE
        listing.add(name, size=file_stat.st_size, mtime_ns=file_stat.st_mtime_ns, fault=fault)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _get_identity(folder: str) -> FileIdentity:
    try:
        folder_stat = os.stat(folder)
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be listed: {error.strerror}; grant access to it") from error
    return folder_stat.st_dev, folder_stat.st_ino
