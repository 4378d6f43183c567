"""HDF5 access for caches: write new files, and locate arrays in untrusted files."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featpipe.cache.format import FORMAT, HDF5_GROUPS, parse_version
from featpipe.errors import CacheFormatError

ALIGNMENT_BYTES = 64  # BLAS copies unaligned arrays, and some torch kernels reject them
MAX_GROUP_ENTRIES = 4096  # checking an entry takes some 50 µs
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
MIN_SUPERBLOCK_VERSION = 2  # older structures have no checksums: HDF5 can loop forever in damaged ones

ArrayLocation = tuple[int, np.dtype[Any], tuple[int, ...]]
"""Offset in the file, dtype and shape of an array."""


class _GuardedFile:
    """A file for HDF5 to write into that records I/O errors and hides them: HDF5 can crash when a disk is full."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: BaseException | None = None

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _attempt(self, action: Callable[..., Any], *args: Any) -> Any:
        if self._error is None:
            try:
                return action(*args)
            except BaseException as error:  # interrupts too: raise_error() raises them outside HDF5
                self._error = error
        return 0

    def read(self, size: int = -1) -> bytes:
        return self._attempt(self._file.read, size) or b""

    def readinto(self, buffer: Any) -> int:
        return self._attempt(self._file.readinto, buffer)  # type: ignore[attr-defined]

    def write(self, data: Any) -> int:
        return self._attempt(self._file.write, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._attempt(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._attempt(self._file.tell)

    def truncate(self, size: int | None = None) -> int:
        return self._attempt(self._file.truncate, size)

    def flush(self) -> None:
        self._attempt(self._file.flush)


class HDF5Writer:
    """A new HDF5 file under construction."""

    def __init__(self, file: Any, guarded_file: _GuardedFile) -> None:
        self._file = file
        self._guarded_file = guarded_file

    def write_attribute(self, name: str, text: str) -> None:
        self._file.attrs[name] = np.bytes_(text)

    def write_array(self, name: str, column: NDArray[Any]) -> None:
        self._file.create_dataset(name, data=column, track_times=False)
        self._guarded_file.raise_error()

    def write_text(self, name: str, data: bytes) -> None:
        import h5py

        string_dtype = h5py.string_dtype("utf-8", len(data))
        self._file.create_dataset(name, data=np.array(data, dtype=string_dtype), dtype=string_dtype)

    def write_blocks(self, name: str, shape: tuple[int, ...], dtype: str, blocks: Iterator[NDArray[Any]]) -> None:
        """Write an array from consecutive blocks of rows."""
        dataset = self._file.create_dataset(name, shape, dtype, track_times=False)
        start = 0
        for block in blocks:
            dataset[start : start + len(block)] = block
            start += len(block)
            self._guarded_file.raise_error()

    def write_virtual(
        self, name: str, shape: tuple[int, ...], dtype: str, row_ranges: list[tuple[str, int, int]]
    ) -> None:
        """Write a virtual dataset over datasets of the same name in other files.

        Each row range is the name of a file, its first row, and its last row + 1.
        """
        import h5py

        layout = h5py.VirtualLayout(shape, dtype)
        for file, start, stop in row_ranges:
            layout[start:stop] = h5py.VirtualSource(file, name, (stop - start, *shape[1:]), dtype)
        self._file.create_virtual_dataset(name, layout, fillvalue=np.nan)

    def get_offset(self, name: str) -> int:
        """Get the offset of an array in the file, in bytes."""
        return int(self._file[name].id.get_offset() or 0)


@contextmanager
def create_hdf5(raw_file: BinaryIO, alignment_bytes: int = ALIGNMENT_BYTES) -> Iterator[HDF5Writer]:
    """Create an HDF5 file in an open file. Write errors are raised at the end of the block at the latest."""
    guarded_file = _GuardedFile(raw_file)
    with _open_hdf5(guarded_file, alignment_bytes) as hdf5:
        yield HDF5Writer(hdf5, guarded_file)
    guarded_file.raise_error()


@contextmanager
def _open_hdf5(file: Any, alignment_bytes: int = 0) -> Iterator[Any]:
    """Open a Python file as HDF5, and close every HDF5 handle however the block ends.

    A traceback can keep a handle alive until the process ends, even if it is only the access property list. HDF5 then
    frees the Python file after the interpreter has shut down, and crashes.
    """
    import h5py

    access_properties = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    try:
        access_properties.set_fileobj_driver(h5py.h5fd.fileobj_driver, file)
        access_properties.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
        if alignment_bytes:
            access_properties.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
            access_properties.set_alignment(1, alignment_bytes)
            creation_properties = h5py.h5p.create(h5py.h5p.FILE_CREATE)
            creation_properties.set_obj_track_times(False)  # reproducible: equal rows give equal bytes
            file_id = h5py.h5f.create(b"cache", h5py.h5f.ACC_TRUNC, fcpl=creation_properties, fapl=access_properties)
        else:
            file_id = h5py.h5f.open(b"cache", h5py.h5f.ACC_RDONLY, fapl=access_properties)
    finally:
        access_properties.close()
    with h5py.File(file_id) as hdf5:
        yield hdf5


def locate_arrays(file: BinaryIO, file_bytes: int) -> tuple[dict[str, ArrayLocation], dict[str, str]]:
    """Locate the arrays of a cache in its file, and read the root attributes.

    Returns
    -------
    locations : dict from name to ArrayLocation
        Without virtual datasets, which are not opened.
    attributes : dict
        ``format``, ``format_version`` and ``manifest_sha256``; an attribute that is not a short text is empty.

    Raises
    ------
    CacheFormatError
        If the file is not a cache, or violates the format.
    """
    header = file.read(len(HDF5_SIGNATURE) + 3)
    if header[: len(HDF5_SIGNATURE)] != HDF5_SIGNATURE:
        raise CacheFormatError("is not an HDF5 file" if file_bytes else "is empty")
    if header[-3] < MIN_SUPERBLOCK_VERSION:
        raise CacheFormatError("has an old HDF5 superblock without checksum; expected version 2 or later")
    if header[-2:] != b"\x08\x08":
        raise CacheFormatError("is HDF5 with addresses of another size than eight bytes; expected eight")
    with _open_hdf5(file) as hdf5:
        attributes = {name: _read_attribute(hdf5, name) for name in ("format", "format_version", "manifest_sha256")}
        if attributes["format"] != FORMAT:
            raise CacheFormatError("is HDF5 but not a featpipe cache")
        parse_version(attributes["format_version"])
        locations = {
            name: _locate_array(dataset, name, file_bytes) for name, dataset in _iter_datasets(hdf5, file.fileno())
        }
    return locations, attributes


def _read_attribute(file: Any, name: str) -> str:
    """Read a short fixed-length text attribute, or return "". HDF5 can loop forever in the heap of other texts."""
    if name not in file.attrs:
        return ""
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind != "S" or attribute.dtype.itemsize > 64:
        return ""
    return bytes(file.attrs[name]).decode("ascii")


def _iter_datasets(file: Any, descriptor: int) -> Iterator[tuple[str, Any]]:
    """Yield the datasets of a cache. Only hard links are followed: soft and external ones could read other files."""
    import h5py

    groups = [("", file)]
    for prefix, group in groups:
        if len(group) > MAX_GROUP_ENTRIES:
            raise CacheFormatError(f"{prefix or '/'} has {len(group)} entries, more than {MAX_GROUP_ENTRIES}")
        for name in group:
            full_name = f"{prefix}{name}"
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise CacheFormatError(f"{full_name!r} is a link; a cache may not contain links")
            # h5o.get_info would decode the heap of a virtual dataset to compute its size
            object_info = h5py.h5g.get_objinfo(group.id, name.encode("utf-8", "surrogateescape"))
            if object_info.type == h5py.h5g.DATASET:
                layout_class = read_layout_class(
                    descriptor, object_info.objno[0] | object_info.objno[1] << 32, full_name
                )
                if layout_class == CONTIGUOUS_LAYOUT:
                    yield full_name, group[name]
                elif layout_class != VIRTUAL_LAYOUT or prefix != "features/":
                    raise CacheFormatError(f"{full_name!r} is not stored contiguously in this file")
            elif object_info.type != h5py.h5g.GROUP:
                raise CacheFormatError(f"{full_name!r} is neither a dataset nor a group")
            elif full_name in HDF5_GROUPS:
                groups.append((f"{full_name}/", group[name]))


def _locate_array(dataset: Any, name: str, file_bytes: int) -> ArrayLocation:
    """Locate an array in the file, so that it can be mapped without HDF5."""
    dtype, shape = _to_numpy_dtype(dataset.id.get_type(), name), dataset.shape
    if shape is None:
        raise CacheFormatError(f"{name!r} has no shape")
    nbytes = dtype.itemsize * math.prod(shape)
    offset = dataset.id.get_offset()
    if nbytes and (offset is None or offset + nbytes > file_bytes):
        raise CacheFormatError(f"{name!r} declares {nbytes} bytes, more than the file holds; it is truncated")
    return (offset if nbytes else 0), dtype, tuple(map(int, shape))


def _to_numpy_dtype(hdf5_type: Any, name: str) -> np.dtype[Any]:
    """Convert a type to the dtype with exactly the stored bytes; HDF5 also has types that numpy lacks."""
    from h5py import h5t

    if isinstance(hdf5_type, h5t.TypeStringID) and not hdf5_type.is_variable_str():
        return np.dtype(("S", hdf5_type.get_size()))
    if isinstance(hdf5_type, (h5t.TypeIntegerID, h5t.TypeFloatID)) and h5t.py_create(hdf5_type.dtype) == hdf5_type:
        return hdf5_type.dtype
    raise CacheFormatError(f"{name!r} has an unsupported type; expected integers, floats or byte strings")


CONTIGUOUS_LAYOUT, VIRTUAL_LAYOUT = 1, 3  # HDF5 File Format Specification 3.0, IV.A.2.i

_LAYOUT_MESSAGE, _EXTERNAL_FILES_MESSAGE, _FILTERS_MESSAGE, _CONTINUATION_MESSAGE = 0x08, 0x07, 0x0B, 0x10
# flags of an object header of version 2
_TIMES_FLAG, _PHASE_CHANGE_FLAG, _CREATION_ORDER_FLAG, _CHUNK_SIZE_MASK = 0x20, 0x10, 0x04, 0x03
_MAX_HEADER_CHUNKS = 64
_MAX_HEADER_CHUNK_BYTES = 2**20


def read_layout_class(descriptor: int, address: int, name: str) -> int:
    """Read the layout class of a dataset from its object header.

    Parameters
    ----------
    descriptor : int
        Descriptor of the file.
    address : int
        Offset of the object header in the file, as reported by HDF5.
    name : str
        Name of the dataset, for messages.

    Raises
    ------
    CacheFormatError
        If the header is older than version 2 or damaged, or the dataset has filters or external files.
    """
    prefix = os.pread(descriptor, 64, address)
    if prefix[:5] != b"OHDR\x02":
        raise CacheFormatError(f"{name!r} has an object header of version 1, without checksum; expected version 2")
    flags = prefix[5]
    size_offset = 6 + (16 if flags & _TIMES_FLAG else 0) + (4 if flags & _PHASE_CHANGE_FLAG else 0)
    size_field_bytes = 1 << (flags & _CHUNK_SIZE_MASK)
    first_chunk_bytes = int.from_bytes(prefix[size_offset : size_offset + size_field_bytes], "little")
    chunks = [(address + size_offset + size_field_bytes, first_chunk_bytes)]
    layout_classes: list[int] = []
    for chunk_offset, chunk_bytes in chunks:
        if len(chunks) > _MAX_HEADER_CHUNKS or chunk_bytes > _MAX_HEADER_CHUNK_BYTES:
            raise CacheFormatError(f"{name!r} has an invalid object header; the file is damaged")
        for message_type, data in _parse_messages(
            os.pread(descriptor, chunk_bytes, chunk_offset), bool(flags & _CREATION_ORDER_FLAG)
        ):
            if message_type in (_EXTERNAL_FILES_MESSAGE, _FILTERS_MESSAGE):
                raise CacheFormatError(f"{name!r} has filters or is stored in external files; expected a plain array")
            if message_type == _LAYOUT_MESSAGE:
                layout_classes.append(data[1] if len(data) > 1 and data[0] in (3, 4, 5) else -1)
            if message_type == _CONTINUATION_MESSAGE and len(data) >= 16:
                offset, chunk_bytes = struct.unpack("<QQ", data[:16])
                # without the signature (4 bytes) and the checksum (4 bytes) of the chunk
                chunks.append((min(offset + 4, 2**62), max(0, chunk_bytes - 8)))
    if len(layout_classes) != 1:
        raise CacheFormatError(f"{name!r} has no valid layout message; the file is damaged")
    return layout_classes[0]


def _parse_messages(chunk: bytes, has_creation_order: bool) -> list[tuple[int, bytes]]:
    """Parse the types and contents of the messages in one chunk of an object header."""
    messages, position, prefix_bytes = [], 0, 6 if has_creation_order else 4
    while position + prefix_bytes <= len(chunk):
        message_type, size = chunk[position], int.from_bytes(chunk[position + 1 : position + 3], "little")
        messages.append((message_type, chunk[position + prefix_bytes : position + prefix_bytes + size]))
        position += prefix_bytes + size
    return messages
