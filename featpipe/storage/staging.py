"""The staging area: durable parts of an unfinished extraction, from which the next run resumes.

A part is built in memory, written to a unique temporary name, fsynced, and renamed to a name that contains its digest.
Then a small record is published with an exclusive ``link()``, and the directory is fsynced. The record holds the name,
size, digest, fingerprint and row count of the part, and a checksum of its own. Readers trust only records, and verify
the files that they name; so a kill at any point loses at most the part in progress.

A part identifies images by their digests and stamps, not by row numbers, so an extraction that resumes after images
were added or renamed still finds its finished work. A part also holds the fingerprint of its facts, so equal arrays
with different facts are different parts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from featpipe.errors import CacheError
from featpipe.storage.atomic import TEMPORARY_NAME, fsync_directory, make_temporary_path
from featpipe.storage.hashing import compute_fingerprint

MAX_RECORD_BYTES = 64 * 1024
PART_FILE_NAME = re.compile(rf"{TEMPORARY_NAME.pattern}|[0-9a-f]{{24}}\.(part|record)|lock")
_LINK_UNSUPPORTED_ERRNOS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_PART_COLUMNS = {"digest": ("U8", (32,)), "stamp": ("U8", (16,)), "status": ("U8", ())}
_FEATURE_DTYPES = ("F32", "F16")
_DAMAGED_PART_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    safetensors.SafetensorError,
)


@dataclass(frozen=True)
class Part:
    """A published part that matches its record.

    Attributes
    ----------
    path : Path
    rows : int
    """

    path: Path
    rows: int

    def read(self, name: str) -> NDArray[Any]:
        """Read one array of the part: ``digest``, ``stamp``, ``status`` or ``features/OUTPUT``."""
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                return np.asarray(file.get_tensor(name))
        except (OSError, safetensors.SafetensorError) as error:
            raise CacheError(
                f"{self.path}: {name} can no longer be read ({error}); run the same command again, which embeds its "
                "images again"
            ) from None


class StagingArea:
    """The parts of one cache, in a folder beside its final name.

    Parameters
    ----------
    directory : Path
    fingerprint : str
        Fingerprint of the facts; parts with another fingerprint are ignored.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        self.fingerprint = fingerprint

    @property
    def repair_folder(self) -> Path:
        """Folder of the rows that a repair recomputes; removed together with the parts."""
        return self.directory / "repair"

    @contextlib.contextmanager
    def lock_for_writing(self) -> Iterator[None]:
        """Lock the folder for one writer; a second writer waits. The lock ends with its process.

        If a writer fails before it commits a part, the folder is removed.
        """
        while True:
            with self._wrap_os_errors():
                lock_fd = self._acquire_lock()
            if lock_fd is None:
                continue
            try:
                self._remove_matching(TEMPORARY_NAME)  # their writer held the lock and has ended
                yield
                return
            except BaseException:
                has_work = any(self.directory.glob("*.record")) or self.repair_folder.exists()
                if not has_work:
                    self.remove()
                raise
            finally:
                os.close(lock_fd)

    def _acquire_lock(self) -> int | None:
        """Wait for the lock. Return None if the previous writer finished and removed it with the folder."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISDIR(self.directory.lstat().st_mode):
                    raise
            return None  # removed between the two system calls of mkdir
        fsync_directory(self.directory.parent)  # otherwise a power cut could lose the folder and its parts
        try:
            lock_fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
            if _is_current_lock(lock_fd, self.directory / "lock"):
                return lock_fd
        except BaseException:
            os.close(lock_fd)
            raise
        os.close(lock_fd)
        return None

    def is_locked(self) -> bool:
        """Whether a process holds the writer's lock."""
        try:
            lock_fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # no locks on this file system: lock_for_writing() reports that
        else:
            return False
        finally:
            os.close(lock_fd)

    def commit(self, arrays: Mapping[str, NDArray[Any]]) -> Part:
        """Publish a part. When this method returns, the part survives a power cut.

        Parameters
        ----------
        arrays : mapping from name to ndarray
            ``digest`` (r, 32), ``stamp`` (r, 16) and ``status`` (r,), uint8, and one ``features/OUTPUT`` (r, …),
            float32 or float16, for each output.

        Returns
        -------
        Part

        Raises
        ------
        CacheError
            If the disk is full or not writable; parts committed earlier are unaffected.
        """
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        part_bytes = safetensors.numpy.save(contiguous, {"fingerprint": self.fingerprint})
        digest = hashlib.sha256(part_bytes).hexdigest()
        part = Part(self.directory / f"{digest[:24]}.part", len(arrays["status"]))
        record_fields = {
            "file": part.path.name,
            "bytes": len(part_bytes),
            "sha256": digest,
            "fingerprint": self.fingerprint,
            "rows": part.rows,
        }
        record_bytes = json.dumps({**record_fields, "check": compute_fingerprint(record_fields)}).encode()
        with self._wrap_os_errors():
            self._publish(part_bytes, part.path, os.replace)
            self._publish(record_bytes, part.path.with_suffix(".record"), _link_or_replace)
        return part

    def load_committed(self) -> list[Part]:
        """Load the intact parts with this fingerprint, sorted by name."""
        if not self.directory.is_dir():
            return []
        parts = (self._load_verified(record_path) for record_path in sorted(self.directory.glob("*.record")))
        return [part for part in parts if part is not None]

    def count_recorded_rows(self) -> int:
        """Count the rows of all records, of any fingerprint. The parts themselves are not read."""
        n_rows = 0
        for record_path in self.directory.glob("*.record"):
            with contextlib.suppress(*_DAMAGED_PART_ERRORS):
                n_rows += int(_read_record(record_path)["rows"])
        return n_rows

    def remove(self) -> None:
        """Remove the parts and their folder. The writer calls this after it publishes the cache.

        Files that are not parts stay, and then the folder stays too.
        """
        self._remove_matching(PART_FILE_NAME)
        shutil.rmtree(self.repair_folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folder holds other files
            self.directory.rmdir()

    def _remove_matching(self, name_pattern: re.Pattern[str]) -> None:
        for path in self.directory.glob("*"):
            if name_pattern.fullmatch(path.name):
                with contextlib.suppress(OSError):  # a leftover file is harmless
                    path.unlink()

    def _load_verified(self, record_path: Path) -> Part | None:
        part_path = record_path.with_suffix(".part")
        try:
            record_fields = _read_record(record_path)
            if record_fields["fingerprint"] != self.fingerprint:
                return None
            if record_fields["file"] != part_path.name or _get_file_size(part_path) != record_fields["bytes"]:
                return None
            with open(part_path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record_fields["sha256"]:
                    return None
            if not _has_valid_layout(part_path, record_fields["rows"]):
                return None
            return Part(part_path, int(record_fields["rows"]))
        except _DAMAGED_PART_ERRORS:
            return None  # a torn or foreign file is ignored; its images are embedded again

    def _publish(self, data: bytes, path: Path, move_into_place: Callable[[Path, Path], None]) -> None:
        temporary = make_temporary_path(self.directory)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            move_into_place(temporary, path)
            fsync_directory(self.directory)
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _wrap_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self.directory}: cannot be written ({error.strerror or error}); what was committed is kept: "
                "free some space, or choose another --cache or --out, and run the same command again"
            ) from None


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock file; other processes wait. The lock ends with its process."""
    while True:
        try:
            lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CacheError(f"{path}: cannot be locked ({error.strerror}); choose another --cache") from None
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
            if _is_current_lock(lock_fd, path):
                yield
                return
        finally:
            os.close(lock_fd)


def _is_current_lock(lock_fd: int, path: Path) -> bool:
    """Whether a locked file still has its name: the previous holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(lock_fd), os.stat(path))
    except FileNotFoundError:
        return False


def _read_record(path: Path) -> dict[str, Any]:
    """Read a record, and verify its checksum."""
    if _get_file_size(path) > MAX_RECORD_BYTES:
        raise ValueError("too large")
    record_fields: dict[str, Any] = json.loads(path.read_bytes())
    checksum = record_fields.pop("check")
    if checksum != compute_fingerprint(record_fields):
        raise ValueError("damaged")
    return record_fields


def _get_file_size(path: Path) -> int:
    """Get the size of a regular file; a link or a pipe in its place is an error."""
    file_stat = path.lstat()
    if not stat.S_ISREG(file_stat.st_mode):
        raise FileNotFoundError(path)
    return file_stat.st_size


def _has_valid_layout(path: Path, n_rows: int) -> bool:
    """Whether a part holds all required arrays, each with ``n_rows`` rows."""
    with safetensors.safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        features = {name: (array.get_dtype(), tuple(array.get_shape())) for name, array in slices.items()}
    columns = {name: features.pop(name, None) for name in _PART_COLUMNS}
    expected_columns = {name: (dtype, (n_rows, *shape)) for name, (dtype, shape) in _PART_COLUMNS.items()}
    return columns == expected_columns and all(
        name.startswith("features/") and dtype in _FEATURE_DTYPES and shape[:1] == (n_rows,)
        for name, (dtype, shape) in features.items()
    )


def _link_or_replace(temporary: Path, path: Path) -> None:
    """Publish a record. An existing record with this name belongs to the same part, or is damaged."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _LINK_UNSUPPORTED_ERRNOS:
            raise
        os.replace(temporary, path)  # the file system has no hard links; the lock excludes other writers
