"""Why a row has no features: a fixed vocabulary, part of the cache format."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """The status of one row; the numbers are written to disk and never change their meaning.

    ``word`` is what people read; ``transient`` says that another attempt may end better, so that it is
    made again and never copied from an earlier cache.
    """

    OK = 0
    MISSING = 1  # named by the index, not there when it was read
    UNREADABLE = 2  # the bytes could not be had: permissions, input/output errors, encryption
    EMPTY = 3  # no bytes at all
    UNSUPPORTED = 4  # the bytes are none of the formats that are decoded
    DAMAGED = 5  # the right format, but it cannot be decoded
    TOO_LARGE = 6  # more pixels or bytes than the limits allow
    NOT_A_FILE = 7  # a link, a device or a sparse member of an archive
    OUT_OF_MEMORY = 8
    NOT_FINITE = 9  # the network answered with NaN or infinity

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", "-")

    @property
    def transient(self) -> bool:
        return self in (Status.MISSING, Status.UNREADABLE, Status.OUT_OF_MEMORY)
