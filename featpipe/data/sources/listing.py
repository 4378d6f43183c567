"""The common result of listing any kind of archive: sources, columns of samples, and the rule for sample names."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featpipe.data.sources.sidecars import MAX_SIDECAR_BYTES, SidecarLabel, get_sample_key, is_sidecar
from featpipe.errors import ArchiveError
from featpipe.runtime import format_error
from featpipe.status import Status

Compression = Literal["", "gz", "bz2", "xz"]

_MAX_INT64 = 2**63 - 1
_MAX_SUFFIX_LENGTH = 12
_MAX_IGNORED_SUFFIXES = 200


@dataclass(frozen=True)
class ArchiveLimits:
    """Limits on an archive; one that exceeds them is rejected.

    Attributes
    ----------
    max_members : int
        Files, folders and links in one archive.
    max_member_bytes : int
        Size of one sample in bytes; a larger one keeps its row with the status ``too-large``.
    max_ratio : int
        Maximum ratio of decompressed to compressed size of a .zip or compressed .tar; 256 MiB are always allowed.
    """

    max_members: int = 100_000_000
    max_member_bytes: int = 512 * 2**20
    max_ratio: int = 250

    def max_decompressed_bytes(self, archive_bytes: int) -> int:
        """The maximum decompressed size of an archive of this size, in bytes."""
        return max(256 * 2**20, self.max_ratio * archive_bytes)


DEFAULT_LIMITS = ArchiveLimits()


@dataclass(frozen=True)
class ArchiveSource:
    """One folder, one archive file, or the folder to which single files are relative.

    Attributes
    ----------
    path : Path
        As given by the caller.
    kind : {"folder", "tar", "zip", "files"}
    real_path : str
        The absolute path with links resolved.
    compression : {"", "gz", "bz2", "xz"}
        Compression of a tar; a compressed tar can only be read sequentially.
    size_bytes, mtime_ns : int
        Size and modification time of the archive file when it was listed; 0 for a folder.
    """

    path: Path
    kind: Literal["folder", "tar", "zip", "files"]
    real_path: str
    compression: Compression = ""
    size_bytes: int = 0
    mtime_ns: int = 0


class Listing:
    """Columns of the samples of one source, filled while it is listed.

    Parameters
    ----------
    source : ArchiveSource
    limits : ArchiveLimits
    suffixes : frozenset of str
        Lower-case suffixes that make a file a sample.

    Attributes
    ----------
    names : list of str
        The path within the source, unchanged; undecodable bytes as surrogate escapes.
    offset, size, mtime_ns : array of int64
    fault : bytearray
        One `Status` for each sample; its size is not taken into account.
    ignored : Counter
        Number of ignored files by kind: suffix, ``hidden``, ``__MACOSX``.
    sidecars : dict
        Sample key → the label of its sidecar file, or the error from reading it.
    """

    def __init__(self, source: ArchiveSource, limits: ArchiveLimits, suffixes: frozenset[str]) -> None:
        self.source = source
        self.limits = limits
        self.suffixes = suffixes
        self.names: list[str] = []
        self.offset = array("q")
        self.size = array("q")
        self.mtime_ns = array("q")
        self.fault = bytearray()
        self.ignored: Counter[str] = Counter()
        self.sidecars: dict[str, SidecarLabel | ArchiveError] = {}
        self._n_members = 0

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, *, offset: int = 0, size: int, mtime_ns: int = 0, fault: Status = Status.OK) -> None:
        """Append one sample; size in bytes."""
        self.names.append(name)
        self.offset.append(offset)
        self.size.append(size if size <= _MAX_INT64 else _MAX_INT64)
        self.mtime_ns.append(mtime_ns)
        self.fault.append(fault)

    def compute_faults(self) -> NDArray[np.uint8]:
        """The `Status` of each sample as far as the listing shows it, with the limits on its size applied."""
        faults, size = np.frombuffer(self.fault, np.uint8), np.frombuffer(self.size, np.int64)
        size_faults = np.select([size <= 0, size > self.limits.max_member_bytes], [Status.EMPTY, Status.TOO_LARGE])
        return np.where(faults == Status.OK, size_faults, faults).astype(np.uint8)

    def count_members(self, members: int = 1) -> None:
        """Count members, samples or not, against the limit."""
        self._n_members += members
        if self._n_members > self.limits.max_members:
            raise ArchiveError(
                f"{self.source.path}: more than {self.limits.max_members} members; raise `ArchiveLimits.max_members` "
                "if this is intended"
            )

    def accepts(self, name: str) -> bool:
        """Whether a file of this name is a sample; other files are counted as ignored, unless they may be sidecars."""
        suffix = name[name.rfind(".") :].lower()
        if suffix in self.suffixes and name[0] != "." and "/." not in name and "__MACOSX" not in name:
            return True  # fast path for most names: no splitting
        parts = name.split("/")
        if "__MACOSX" in parts:
            self.ignored["__MACOSX"] += 1
        elif any(is_hidden(part) for part in parts):
            self.ignored["hidden"] += 1
        elif self.is_sample(name):
            return True
        elif not is_sidecar(name):
            self.count_ignored(name)
        return False

    def is_sample(self, name: str) -> bool:
        """Whether the suffix makes a file a sample; the content is not checked."""
        return get_suffix(name) in self.suffixes

    def count_ignored(self, name: str) -> None:
        """Count an ignored file by its suffix."""
        suffix = get_suffix(name)
        is_counted = suffix in self.ignored or len(self.ignored) < _MAX_IGNORED_SUFFIXES
        if len(suffix) > _MAX_SUFFIX_LENGTH or not suffix.isprintable() or not is_counted:
            suffix = "other"
        self.ignored[suffix or "no suffix"] += 1

    def add_sidecar(self, name: str, data: bytes) -> None:
        """Add a sidecar file. An error in it is raised only if it belongs to a sample."""
        if len(data) > MAX_SIDECAR_BYTES:
            self.add_unreadable_sidecar(name, f"more than {MAX_SIDECAR_BYTES} bytes")
            return
        try:
            sidecar = SidecarLabel.parse(get_suffix(name), data)
        except ValueError as error:
            self.add_unreadable_sidecar(name, format_error(error))
            return
        if sidecar is None:
            self.count_ignored(name)
            return
        key = get_sample_key(name)
        self.sidecars[key] = sidecar.resolve_conflict(
            self.sidecars.get(key), f"{self.source.path}: {format_name(name)}"
        )

    def add_unreadable_sidecar(self, name: str, reason: str) -> None:
        """Record that a sidecar file cannot be read."""
        self.sidecars[get_sample_key(name)] = ArchiveError(
            f"{self.source.path}: {format_name(name)}: invalid label file: {reason}; correct or remove it"
        )


def is_hidden(part: str) -> bool:
    """Whether a path component begins with a dot and is not ``.`` or ``..``."""
    return part.startswith(".") and part not in (".", "..")


def get_suffix(name: str) -> str:
    """The suffix with its dot, in lower case; empty if there is none."""
    stem, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() if stem and stem[-1] != "/" and "/" not in suffix else ""


def format_name(name: str) -> str:
    """Format a name for messages: on one line, with bounded length."""
    return repr(name if len(name) <= 120 else f"{name[:80]}…{name[-30:]}")


def escape_name(name: str) -> str:
    """Convert a name to valid text: undecodable bytes and NUL become backslash escapes."""
    if name.isascii():
        return name.replace("\0", "\\x00")
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
