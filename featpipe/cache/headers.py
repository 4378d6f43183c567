"""Object headers of HDF5, as far as they say how a dataset is stored, read without HDF5.

To open a dataset whose storage is virtual, or external, HDF5 decodes heaps that carry no checksum, and crashes or
loops for ever in damaged ones. So a dataset's header is looked at before HDF5 is asked to open it.
"""

from __future__ import annotations

import os
import struct

from featpipe.errors import CacheFormatError

__all__ = ["CONTIGUOUS_LAYOUT", "VIRTUAL_LAYOUT", "read_layout_class"]

CONTIGUOUS_LAYOUT, VIRTUAL_LAYOUT = 1, 3  # classes of layout, from the HDF5 File Format Specification 3.0, IV.A.2.i

_LAYOUT_MESSAGE, _EXTERNAL_FILES_MESSAGE, _FILTERS_MESSAGE, _CONTINUATION_MESSAGE = 0x08, 0x07, 0x0B, 0x10
_TIMES_FLAG, _PHASE_CHANGE_FLAG, _CREATION_ORDER_FLAG, _CHUNK_SIZE_MASK = (
    0x20,
    0x10,
    0x04,
    0x03,
)  # flags of a header of version 2
_MAX_HEADER_CHUNKS = 64
_MAX_HEADER_CHUNK_BYTES = 2**20


def read_layout_class(descriptor: int, address: int, name: str) -> int:
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
    prefix = os.pread(descriptor, 64, address)
    if prefix[:5] != b"OHDR\x02":
        raise CacheFormatError(f"{name!r} has an object header of the oldest kind, without a checksum; no cache has")
    flags = prefix[5]
    size_offset = 6 + (16 if flags & _TIMES_FLAG else 0) + (4 if flags & _PHASE_CHANGE_FLAG else 0)
    size_field_bytes = 1 << (flags & _CHUNK_SIZE_MASK)
    first_chunk_bytes = int.from_bytes(prefix[size_offset : size_offset + size_field_bytes], "little")
    chunks = [(address + size_offset + size_field_bytes, first_chunk_bytes)]
    layout_classes: list[int] = []
    for chunk_offset, chunk_bytes in chunks:
        if len(chunks) > _MAX_HEADER_CHUNKS or chunk_bytes > _MAX_HEADER_CHUNK_BYTES:
            raise CacheFormatError(f"{name!r} has an object header that no cache has; it is damaged")
        for message_type, data in _parse_messages(
            os.pread(descriptor, chunk_bytes, chunk_offset), bool(flags & _CREATION_ORDER_FLAG)
        ):
            if message_type in (_EXTERNAL_FILES_MESSAGE, _FILTERS_MESSAGE):
                raise CacheFormatError(f"{name!r} has filters or lies in other files; a cache holds plain arrays")
            if message_type == _LAYOUT_MESSAGE:
                layout_classes.append(data[1] if len(data) > 1 and data[0] in (3, 4, 5) else -1)
            if message_type == _CONTINUATION_MESSAGE and len(data) >= 16:
                offset, chunk_bytes = struct.unpack("<QQ", data[:16])
                chunks.append(
                    (min(offset + 4, 2**62), max(0, chunk_bytes - 8))
                )  # within its signature and its checksum
    if len(layout_classes) != 1:
        raise CacheFormatError(f"{name!r} does not say how it is stored; it is damaged")
    return layout_classes[0]


def _parse_messages(chunk: bytes, has_creation_order: bool) -> list[tuple[int, bytes]]:
    """Types and contents of the messages in one piece of a header."""
    messages, position, prefix_bytes = [], 0, 6 if has_creation_order else 4
    while position + prefix_bytes <= len(chunk):
        message_type, size = chunk[position], int.from_bytes(chunk[position + 1 : position + 3], "little")
        messages.append((message_type, chunk[position + prefix_bytes : position + prefix_bytes + size]))
        position += prefix_bytes + size
    return messages
