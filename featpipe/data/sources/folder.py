"""List and read folders and single files; listing calls stat once per file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator

from featpipe.data.sources.listing import ArchiveLimits, ArchiveSource, Listing, is_hidden
from featpipe.data.sources.sidecars import MAX_SIDECAR_BYTES, get_sample_key, is_sidecar, may_hold_sidecars
from featpipe.errors import ArchiveError, SampleError
from featpipe.status import Status


def list_folder(source: ArchiveSource, limits: ArchiveLimits, suffixes: frozenset[str]) -> Listing:
    """List a folder by path components in code point order; links are followed, and cycles are detected."""
    listing = Listing(source, limits, suffixes)
    # A stack instead of recursion: folders may be nested deeper than Python's recursion limit.
    stack = [(_list_names(listing, ""), "", frozenset({_get_identity(source.real_path)}))]
    while stack:
        names, prefix, parent_identities = stack[-1]
        folder = _add_files_before_folder(listing, names, prefix)
        if folder is None:
            stack.pop()
        elif is_hidden(folder) or folder == "__MACOSX":
            listing.ignored["hidden" if is_hidden(folder) else "__MACOSX"] += 1
        elif (identity := _get_identity(os.path.join(source.real_path, prefix, folder))) in parent_identities:
            listing.ignored["link to a parent folder"] += 1
        else:
            prefix = f"{prefix}{folder}/"
            stack.append((_list_names(listing, prefix), prefix, parent_identities | {identity}))
    return listing


def list_files(source: ArchiveSource, names: Iterable[str], limits: ArchiveLimits, suffixes: frozenset[str]) -> Listing:
    """List single files in the order given; missing files get the fault ``MISSING``."""
    listing = Listing(source, limits, suffixes)
    for name in names:
        listing.count_members()
        try:
            _add_file(listing, name, os.stat(os.path.join(source.real_path, name)))
        except (OSError, ValueError) as error:
            _add_missing_file(listing, name, error)
    return listing


def read_file(path: bytes, max_bytes: int) -> bytes:
    """Read a whole regular file; raises SampleError with a status if it cannot be read."""
    try:
        # Non-blocking, so that a pipe that replaced an image cannot block the reader.
        descriptor = os.open(os.fsdecode(path), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SampleError("not a regular file", status=Status.NOT_A_FILE)
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SampleError("no longer exists", status=Status.MISSING) from error
    except IsADirectoryError as error:
        raise SampleError("a folder, expected a file", status=Status.NOT_A_FILE) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SampleError(f"cannot be read: {reason}", status=Status.UNREADABLE) from error
    if len(data) > max_bytes:
        raise SampleError(f"more than {max_bytes} bytes", status=Status.TOO_LARGE)
    return data


def _list_names(listing: Listing, prefix: str) -> Iterator[str]:
    """Return the names in a folder in order. Sidecar files of its images are read immediately."""
    folder = os.path.join(listing.source.real_path, prefix)
    try:
        names = sorted(os.listdir(folder))
        if not os.access(folder, os.X_OK):  # without search permission, files and folders in it cannot be distinguished
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ArchiveError(
            f"{folder}: cannot be listed: {error.strerror}; grant access to it, or list its other parts as arguments"
        ) from error
    listing.count_members(len(names))
    if may_hold_sidecars(names):
        sample_keys = {get_sample_key(name) for name in names if listing.is_sample(name)}
        for name in names:
            if not is_sidecar(name) or is_hidden(name):
                continue
            if get_sample_key(name) in sample_keys:
                _add_sidecar(listing, prefix + name, folder + name)
            else:
                listing.count_ignored(name)
    return iter(names)


def _add_files_before_folder(listing: Listing, names: Iterator[str], prefix: str) -> str | None:
    """Add the files before the next subfolder and return its name, or None at the end."""
    folder = os.path.join(listing.source.real_path, prefix)
    for name in names:
        try:
            file_stat = os.stat(folder + name)
        except (OSError, ValueError) as error:
            if listing.accepts(name):
                _add_missing_file(listing, prefix + name, error)
            continue
        if stat.S_ISDIR(file_stat.st_mode):
            return name
        if listing.accepts(name):
            _add_file(listing, prefix + name, file_stat)
    return None


def _add_sidecar(listing: Listing, name: str, path: str) -> None:
    try:
        listing.add_sidecar(name, read_file(os.fsencode(path), MAX_SIDECAR_BYTES))
    except SampleError as error:
        listing.add_unreadable_sidecar(name, str(error))


def _add_file(listing: Listing, name: str, file_stat: os.stat_result) -> None:
    fault = Status.OK if stat.S_ISREG(file_stat.st_mode) else Status.NOT_A_FILE
    listing.add(name, size=file_stat.st_size, mtime_ns=file_stat.st_mtime_ns, fault=fault)


def _add_missing_file(listing: Listing, name: str, error: OSError | ValueError) -> None:
    is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError))
    listing.add(name, size=0, fault=Status.MISSING if is_missing else Status.UNREADABLE)


def _get_identity(folder: str) -> tuple[int, int]:
    try:
        folder_stat = os.stat(folder)
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be listed: {error.strerror}; grant access to it") from error
    return folder_stat.st_dev, folder_stat.st_ino
