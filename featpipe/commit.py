"""Parts: finished pieces of an unfinished extraction, written whole, made durable, published; and found again.

A part is built in memory, written to a unique temporary name, fsynced, and renamed to a name that carries its
digest. Then a small record with name, size, digest, fingerprint and row count, and a checksum of its own, is
published with an exclusive ``link()`` and the directory fsynced. Readers trust records alone, and verify what they
name, so that a kill at any point loses at most the part in hand.

A part says what was embedded by the images' own digests and stamps, not by row numbers: an extraction that goes on
after images were added or renamed finds its finished work all the same. It also carries the fingerprint of the facts
it was made from, so that equal arrays made from other facts are another part.
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

from featpipe.durable import fsync_directory
from featpipe.errors import CacheError
from featpipe.fingerprint import fingerprint as digest_of

__all__ = ["OURS", "TEMPORARY", "Part", "Parts", "exclusive"]

RECORD_BYTES_MAX = 64 * 1024

TEMPORARY = re.compile(r"\.[0-9]+\.[0-9a-f]{12}\.tmp")  # whose second word is the process
OURS = re.compile(rf"{TEMPORARY.pattern}|[0-9a-f]{{24}}\.(part|record)|lock")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_COLUMNS = {"digest": ("U8", (32,)), "stamp": ("U8", (16,)), "status": ("U8", ())}
_FEATURES = ("F32", "F16")
_TORN = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError)


@dataclass(frozen=True)
class Part:
    """A published part whose record and bytes agree.

    Attributes
    ----------
    path : Path
    rows : int
    """

    path: Path
    rows: int

    def read(self, name: str) -> NDArray[Any]:
        """One array of the part: ``digest``, ``stamp``, ``status`` or ``features/OUTPUT``."""
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                return np.asarray(file.get_tensor(name))
        except (OSError, safetensors.SafetensorError) as error:
            raise CacheError(
                f"{self.path}: {name} cannot be read any more ({error}); run the same command again"
            ) from None


class Parts:
    """The parts of one cache, in a folder beside its final name.

    Parameters
    ----------
    directory : Path
    fingerprint : str
        Parts made from other facts are not seen.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        self.fingerprint = fingerprint

    @property
    def repairs(self) -> Path:
        """Where rows lie that are computed again to mend a cache; removed with the parts."""
        return self.directory / "repair"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for one writer; a second one waits. The lock dies with its process.

        A writer that fails before it committed anything leaves no folder behind.
        """
        while True:
            with self._errors():
                handle = self._locked()
            if handle is None:
                continue
            try:
                self._sweep(TEMPORARY)  # whoever began these held the lock, and is gone
                yield
                return
            except BaseException:
                if not any(self.directory.glob("*.record")) and not self.repairs.exists():  # nothing to go on from
                    self.remove()
                raise
            finally:
                os.close(handle)

    def _locked(self) -> int | None:
        """The lock, once it is ours, or None if the writer before us finished and removed it with the folder."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISDIR(self.directory.lstat().st_mode):
                    raise
            return None  # removed between the two looks that mkdir takes
        fsync_directory(self.directory.parent)  # what is committed in a folder is lost with the folder
        try:
            handle = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, self.directory / "lock"):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def busy(self) -> bool:
        """Whether another process is writing parts here now."""
        try:
            handle = os.open(self.directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # no locks on this file system: writing() will say so
        else:
            return False
        finally:
            os.close(handle)

    def commit(self, arrays: Mapping[str, NDArray[Any]]) -> Part:
        """Publish a part; when this returns, a power cut no longer loses it.

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
            If the disk is full or not writable; what was committed before is still there.
        """
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        data = safetensors.numpy.save(contiguous, {"fingerprint": self.fingerprint})
        digest = hashlib.sha256(data).hexdigest()
        part = Part(self.directory / f"{digest[:24]}.part", len(arrays["status"]))
        facts = {
            "file": part.path.name,
            "bytes": len(data),
            "sha256": digest,
            "fingerprint": self.fingerprint,
            "rows": part.rows,
        }
        record = json.dumps({**facts, "check": digest_of(facts)}).encode()
        with self._errors():
            self._publish(data, part.path, os.replace)
            self._publish(record, part.path.with_suffix(".record"), _link_once)
        return part

    def committed(self) -> list[Part]:
        """The parts of this fingerprint whose records and bytes are whole, in the order of their names."""
        if not self.directory.is_dir():
            return []
        found = (self._verify(record) for record in sorted(self.directory.glob("*.record")))
        return [part for part in found if part is not None]

    def recorded_rows(self) -> int:
        """How many rows the records name, whatever facts they were made from; the parts are not looked at."""
        rows = 0
        for record in self.directory.glob("*.record"):
            with contextlib.suppress(*_TORN):
                rows += int(_read_record(record)["rows"])
        return rows

    def remove(self) -> None:
        """Remove the parts and their folder; called by the writer, after the cache is published.

        What is not a part's stays, and the folder with it.
        """
        self._sweep(OURS)
        shutil.rmtree(self.repairs, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody's own file lies there
            self.directory.rmdir()

    def _sweep(self, names: re.Pattern[str]) -> None:
        for path in self.directory.glob("*"):
            if names.fullmatch(path.name):
                with contextlib.suppress(OSError):  # what cannot be removed does no harm
                    path.unlink()

    def _verify(self, record: Path) -> Part | None:
        path = record.with_suffix(".part")
        try:
            facts = _read_record(record)
            if facts["fingerprint"] != self.fingerprint:
                return None
            if facts["file"] != path.name or _file_bytes(path) != facts["bytes"]:
                return None
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    return None
            return Part(path, int(facts["rows"])) if _is_laid_out(path, facts["rows"]) else None
        except _TORN:
            return None  # a torn or foreign file is not a part; its images are embedded again

    def _publish(self, data: bytes, path: Path, place: Callable[[Path, Path], None]) -> None:
        temporary = self.directory / f".{os.getpid()}.{os.urandom(6).hex()}.tmp"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            place(temporary, path)
            fsync_directory(self.directory)
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self.directory}: cannot be written ({error.strerror or error}); what was committed is kept: "
                "free some space, or choose another --cache or --out, and run the same command again"
            ) from None


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file; whoever else wants it waits. The lock dies with its process."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CacheError(f"{path}: cannot be locked ({error.strerror}); choose another --cache") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, path):
                yield
                return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether a lock still has its name: whoever held it before us may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _read_record(path: Path) -> dict[str, Any]:
    """What a record says, if it is whole."""
    if _file_bytes(path) > RECORD_BYTES_MAX:
        raise ValueError("too large")
    facts: dict[str, Any] = json.loads(path.read_bytes())
    check = facts.pop("check")
    if check != digest_of(facts):
        raise ValueError("damaged")
    return facts


def _file_bytes(path: Path) -> int:
    """The size of a regular file; a link or a pipe laid in its place is not one."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(path)
    return found.st_size


def _is_laid_out(path: Path, rows: int) -> bool:
    """Whether a part holds what a part must, each array with this many rows."""
    with safetensors.safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        held = {name: (array.get_dtype(), tuple(array.get_shape())) for name, array in slices.items()}
    columns = {name: held.pop(name, None) for name in _COLUMNS}
    wanted = {name: (dtype, (rows, *shape)) for name, (dtype, shape) in _COLUMNS.items()}
    return columns == wanted and all(
        name.startswith("features/") and dtype in _FEATURES and shape[:1] == (rows,)
        for name, (dtype, shape) in held.items()
    )


def _link_once(temporary: Path, path: Path) -> None:
    """Publish under a name that nobody holds. A record of this name can only be of the same part, or damaged."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.replace(temporary, path)  # a file system without links; the lock keeps other writers away
