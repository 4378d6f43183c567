"""Atomic, durable file writes: a file gets its name only when it is complete, and survives a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from featpipe.errors import FeatpipeError

TEMPORARY_NAME = re.compile(r"\.[0-9]+\.[0-9a-f]{12}\.tmp")  # process id, then a random number


@contextlib.contextmanager
def atomic_write(path: Path, *, text: bool = False, folder: Path | None = None) -> Iterator[IO[Any]]:
    """Write a file atomically.

    The data go to a temporary file, which is renamed to ``path`` when the block ends without an error. After an error
    the previous file at ``path`` is unchanged. Missing folders are created.

    Parameters
    ----------
    path : Path
    text : bool
        Open the file as UTF-8 text without newline translation; otherwise as bytes.
    folder : Path, optional
        Folder of the temporary file, on the same file system as ``path``; the folder of ``path`` by default. If the
        process is killed, the temporary file stays there, so choose a folder that is cleaned up later.
    """
    temporary = make_temporary_path(folder or path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8", newline="") if text else open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be missing or unreadable
            temporary.unlink(missing_ok=True)


def make_temporary_path(folder: Path) -> Path:
    """Make the path of a new temporary file; the name matches :data:`TEMPORARY_NAME`."""
    return folder / f".{os.getpid()}.{os.urandom(6).hex()}.tmp"


def check_writable(path: Path) -> None:
    """Check that a file can be written at a path, before long work starts. Missing folders are created.

    Raises
    ------
    OSError
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = make_temporary_path(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch(exist_ok=False)
    temporary.unlink()


def fsync_directory(folder: Path) -> None:
    """Flush a folder to disk, so that a rename or a link in it survives a power cut where the file system can."""
    folder_fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot fsync folders
            raise
    finally:
        os.close(folder_fd)


def make_writable_folder(folder: Path, error_class: type[FeatpipeError], option: str) -> None:
    """Create a folder, and check that it is writable.

    Parameters
    ----------
    folder : Path
    error_class : type of FeatpipeError
        The class of the error to raise.
    option : str
        The option that sets the folder, named in the error message.

    Raises
    ------
    FeatpipeError
        Of ``error_class``, if the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise error_class(f"{folder}: cannot be created ({error.strerror or error}); choose another {option}") from None
    if not os.access(folder, os.W_OK):
        raise error_class(f"{folder}: may not be written; choose another {option}")
