"""Folders and single files: listed with one look at each file, read by path."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter

from featpipe.archive.listing import ArchiveLimits, Listing, Source, is_hidden, is_sample
from featpipe.archive.notes import LARGEST_NOTE_BYTES, is_note, key_of, may_hold_notes
from featpipe.errors import ArchiveError, SampleError
from featpipe.status import Status

__all__ = ["list_files", "list_folder", "read_file"]

Identity = tuple[int, int]


def list_folder(source: Source, limits: ArchiveLimits) -> Listing:
    """List a folder by path components in code point order, following links but never in a circle."""
    listing = Listing(source, limits)
    # A stack of half-read folders rather than recursion: an archive may be nested deeper than Python.
    stack = [(_entries(listing, source.real, ""), "", frozenset({_identity(source.real)}))]
    while stack:
        entries, prefix, parents = stack[-1]
        folder = _take_files(listing, entries, prefix)
        if folder is None:
            stack.pop()
        elif is_hidden(folder.name) or folder.name == "__MACOSX":
            listing.ignored["hidden" if is_hidden(folder.name) else "__MACOSX"] += 1
        elif (identity := _identity(folder.path)) in parents:
            listing.ignored["link to a parent folder"] += 1
        else:
            below = f"{prefix}{folder.name}/"
            stack.append((_entries(listing, folder.path, below), below, parents | {identity}))
    return listing


def list_files(source: Source, names: Iterable[str], limits: ArchiveLimits) -> Listing:
    """List single files in the order given; what is not there gets the fault ``MISSING``."""
    listing = Listing(source, limits)
    for name in names:
        listing.count()
        _add(listing, name, partial(os.stat, os.path.join(source.real, name)))
    return listing


def read_file(path: bytes, most_bytes: int) -> bytes:
    """Read a regular file whole; SampleError with the status if that is not possible."""
    try:
        # Non-blocking, so that a pipe that took the place of an image cannot hang the reader.
        descriptor = os.open(os.fsdecode(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SampleError("not a regular file", status=Status.NOT_A_FILE)
            data = file.read(most_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SampleError("is not there any more", status=Status.MISSING) from error
    except IsADirectoryError as error:
        raise SampleError("a folder, expected a file", status=Status.NOT_A_FILE) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SampleError(f"cannot be read: {reason}", status=Status.UNREADABLE) from error
    if len(data) > most_bytes:
        raise SampleError(f"more than {most_bytes} bytes", status=Status.TOO_LARGE)
    return data


def _entries(listing: Listing, folder: str, prefix: str) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder in order. Sidecar files that belong to one of its images are taken at once."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=attrgetter("name"))
    except OSError as error:
        raise ArchiveError(
            f"{folder}: cannot be listed: {error.strerror}; grant access to it, or name its parts one by one"
        ) from error
    listing.count(len(entries))
    if may_hold_notes(entry.name for entry in entries):
        notes = [entry for entry in entries if is_note(entry.name) and not is_hidden(entry.name)]
        keys = {key_of(entry.name) for entry in entries if is_sample(entry.name)}
        for entry in notes:
            if key_of(entry.name) in keys:
                _take_note(listing, prefix + entry.name, entry.path)
            else:
                listing.ignore(entry.name)
    return iter(entries)


def _take_files(listing: Listing, entries: Iterator[os.DirEntry[str]], prefix: str) -> os.DirEntry[str] | None:
    """Add the files that come before the next folder; that folder, or None at the end."""
    for entry in entries:
        if _is_folder(entry):
            return entry
        if listing.wants(entry.name):
            _add(listing, prefix + entry.name, entry.stat)
    return None


def _take_note(listing: Listing, name: str, path: str) -> None:
    try:
        listing.note(name, read_file(os.fsencode(path), LARGEST_NOTE_BYTES))
    except SampleError as error:
        listing.bad_note(name, str(error))


def _add(listing: Listing, name: str, look: Callable[[], os.stat_result]) -> None:
    try:
        found = look()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        listing.add(name, size=0, fault=Status.MISSING)
    except OSError:
        listing.add(name, size=0, fault=Status.UNREADABLE)
    else:
        fault = Status.OK if stat.S_ISREG(found.st_mode) else Status.NOT_A_FILE
        listing.add(name, size=found.st_size, mtime_ns=found.st_mtime_ns, fault=fault)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(folder: str) -> Identity:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be listed: {error.strerror}; grant access to it") from error
    return found.st_dev, found.st_ino
