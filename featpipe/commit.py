"""Parts: finished pieces of an unfinished extraction, written whole, made durable, published; and found again.

A part is built in memory, written to a unique temporary name, fsynced, and renamed to a name that carries its
digest. Then a small record with name, size, digest, fingerprint and row count, and a checksum of its own, is
published with an exclusive ``link()`` and the directory fsynced. Readers trust records alone, and verify what they
name, so that a kill at any point loses at most the part in hand.

A part says what was embedded by the images' own digests and stamps, not by row numbers: an extraction that goes on
after images were added or renamed finds its finished work all the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from featpipe.cache import fsync_directory
from featpipe.errors import CacheError
from featpipe.fingerprint import fingerprint as digest_of

__all__ = ["Part", "Parts", "exclusive"]

RECORD_BYTES_MAX = 64 * 1024


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
        with safetensors.safe_open(self.path, framework="numpy") as file:
            return np.asarray(file.get_tensor(name))


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

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for one writer; a second one waits. The lock dies with its process."""
        while True:
            with self._errors():
                self.directory.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if not self._is_current(handle):  # the writer before us finished and removed the folder
                    continue
                yield
                return
            finally:
                os.close(handle)

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
        else:
            return False
        finally:
            os.close(handle)

    def commit(self, arrays: Mapping[str, NDArray[Any]]) -> Part:
        """Publish a part; when this returns, a power cut no longer loses it.

        Parameters
        ----------
        arrays : mapping from name to ndarray
            All with the same first axis, the part's rows.
        """
        data = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()})
        digest = hashlib.sha256(data).hexdigest()
        part = Part(self.directory / f"{digest[:24]}.part", len(next(iter(arrays.values()))))
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

    def remove(self) -> None:
        """Remove the folder and all that lies in it; called by the writer, after the cache is published."""
        for pattern in ("*.record", "*.part", ".*.tmp", "lock"):
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody's own file lies there: leave it to them
            self.directory.rmdir()

    def _verify(self, record: Path) -> Part | None:
        try:
            if record.stat().st_size > RECORD_BYTES_MAX:
                return None
            facts = json.loads(record.read_bytes())
            check = facts.pop("check")
            if check != digest_of(facts) or facts["fingerprint"] != self.fingerprint:
                return None
            path = record.with_suffix(".part")
            if facts["file"] != path.name or path.stat().st_size != facts["bytes"]:
                return None
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    return None
            return Part(path, int(facts["rows"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
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

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.directory / "lock"))
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self.directory}: cannot be written ({error.strerror or error}); what was committed is kept: "
                "free some space or choose another --cache, and run the same command again"
            ) from None


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file; whoever else wants it waits. The lock dies with its process."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _link_once(temporary: Path, path: Path) -> None:
    """Publish under a name that nobody holds. A record of this name can only be of the same bytes, or damaged."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        os.replace(temporary, path)
