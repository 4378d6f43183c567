"""Object headers of HDF5, as far as they say how a dataset is stored, read without HDF5.

To open a dataset whose storage is virtual, or external, HDF5 decodes heaps that carry no checksum, and crashes or
loops for ever in damaged ones. So a dataset's header is looked at before HDF5 is asked to open it.
"""

from __future__ import annotations

import os
import struct

from featpipe.errors import CacheFormatError

__all__ = ["CONTIGUOUS", "VIRTUAL", "storage_of"]

CONTIGUOUS, VIRTUAL = 1, 3  # classes of layout, from the HDF5 File Format Specification 3.0, IV.A.2.i

_LAYOUT, _EXTERNAL, _FILTERS, _CONTINUATION = 0x08, 0x07, 0x0B, 0x10
_TIMES, _PHASES, _ORDERED, _SIZE = 0x20, 0x10, 0x04, 0x03  # flags of a header of version 2
_CHUNKS_MAX = 64
_CHUNK_BYTES_MAX = 2**20


def storage_of(file: int, address: int, name: str) -> int:
    """The class of layout of the dataset whose object header begins at an address.

    Parameters
    ----------
    file : int
        Descriptor of the file.
    address : int
        Where the header begins, as HDF5 says.
    name : str
        Of the dataset, for messages.

    Raises
    ------
    CacheFormatError
        If the header is older than version 2 or damaged, or the dataset has filters or external files.
    """
    head = os.pread(file, 64, address)
    if head[:5] != b"OHDR\x02":
        raise CacheFormatError(f"{name!r} has an object header of the oldest kind, without a checksum; no cache has")
    flags = head[5]
    start = 6 + (16 if flags & _TIMES else 0) + (4 if flags & _PHASES else 0)
    width = 1 << (flags & _SIZE)
    size = int.from_bytes(head[start : start + width], "little")
    chunks = [(address + start + width, size)]
    layouts: list[int] = []
    for begin, length in chunks:
        if len(chunks) > _CHUNKS_MAX or length > _CHUNK_BYTES_MAX:
            raise CacheFormatError(f"{name!r} has an object header that no cache has; it is damaged")
        for kind, data in _messages(os.pread(file, length, begin), bool(flags & _ORDERED)):
            if kind in (_EXTERNAL, _FILTERS):
                raise CacheFormatError(f"{name!r} has filters or lies in other files; a cache holds plain arrays")
            if kind == _LAYOUT:
                layouts.append(data[1] if len(data) > 1 and data[0] in (3, 4, 5) else -1)
            if kind == _CONTINUATION and len(data) >= 16:
                offset, length = struct.unpack("<QQ", data[:16])
                chunks.append((min(offset + 4, 2**62), max(0, length - 8)))  # within its signature and its checksum
    if len(layouts) != 1:
        raise CacheFormatError(f"{name!r} does not say how it is stored; it is damaged")
    return layouts[0]


def _messages(chunk: bytes, ordered: bool) -> list[tuple[int, bytes]]:
    """Types and contents of the messages in one piece of a header."""
    found, at, prefix = [], 0, 6 if ordered else 4
    while at + prefix <= len(chunk):
        kind, size = chunk[at], int.from_bytes(chunk[at + 1 : at + 3], "little")
        found.append((kind, chunk[at + prefix : at + prefix + size]))
        at += prefix + size
    return found
