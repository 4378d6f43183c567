"""The status of a row, which says why it has no features; part of the cache format."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """The status of a row; the numbers are written to disk and never change their meaning.

    ``word`` is the name in text. A ``transient`` status may differ at the next attempt, so the sample is read again and
    the status is never copied from an earlier cache.
    """

    OK = 0
    MISSING = 1  # in the index, but not in the archive when it was read
    UNREADABLE = 2  # the bytes cannot be read: permissions, input/output errors, encryption
    EMPTY = 3  # zero bytes
    UNSUPPORTED = 4  # not in a format that is decoded
    DAMAGED = 5  # in a supported format, but cannot be decoded
    TOO_LARGE = 6  # more pixels or bytes than the limits allow
    NOT_A_FILE = 7  # a link, a device or a sparse member of an archive
    OUT_OF_MEMORY = 8
    NOT_FINITE = 9  # the embedding has NaN or infinite values

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", "-")

    @property
    def transient(self) -> bool:
        return self in (Status.MISSING, Status.UNREADABLE, Status.OUT_OF_MEMORY)
