"""Files that have their name only when they are complete, and keep it through a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from featpipe.errors import FeatpipeError

__all__ = ["atomic_write", "check_writable", "fsync_directory", "make_writable_folder"]


@contextlib.contextmanager
def atomic_write(path: Path, *, text: bool = False, folder: Path | None = None) -> Iterator[IO[Any]]:
    """A file to write, which takes its name when the block ends well; else what had the name is as it was.

    Missing folders are made.

    Parameters
    ----------
    path : Path
    text : bool
        UTF-8, with line ends as they are written; bytes if not.
    folder : Path, optional
        Of the same file system, where it lies until then: one that somebody clears, should this process be killed.
    """
    temporary = (folder or path.parent) / f".{os.getpid()}.{os.urandom(6).hex()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8", newline="") if text else open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the folder may be what is wrong
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Find out before the work whether a file can be written where it is wanted; missing folders are made.

    Raises
    ------
    OSError
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{os.getpid()}.{os.urandom(6).hex()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch(exist_ok=False)
    temporary.unlink()


def fsync_directory(folder: Path) -> None:
    """Make a rename or a link in this folder survive a power cut, where the file system can."""
    folder_fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(folder_fd)


def make_writable_folder(folder: Path, error_class: type[FeatpipeError], option: str) -> None:
    """A folder that can be written.

    Raises
    ------
    FeatpipeError
        What is given as ``error``, if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise error_class(f"{folder}: cannot be made ({error.strerror or error}); choose another {option}") from None
    if not os.access(folder, os.W_OK):
        raise error_class(f"{folder}: may not be written; choose another {option}")
