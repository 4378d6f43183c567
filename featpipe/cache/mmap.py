"""Arrays of files in memory: mapped, not read; several files one after the other as one array."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HUGE_PAGE_BYTES",
    "PAGE_BYTES",
    "FileSegment",
    "map_into",
    "prefetch",
    "release_pages",
    "reserve_address_range",
    "view_as_array",
]

PAGE_BYTES = 65536  # a multiple of the size of a page on every machine that runs this
HUGE_PAGE_BYTES = 2**21  # what lies alike within such a piece in file and in memory is mapped at once, and found faster

_MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap does not name it
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class FileSegment:
    """Where the bytes of a run of rows lie.

    Attributes
    ----------
    file : int
        Descriptor of an open file.
    offset : int
        In it, a multiple of ``PAGE_BYTES``.
    start, nbytes : int
        Position and size in the array; ``start`` is a multiple of ``PAGE_BYTES``.
    """

    file: int
    offset: int
    start: int
    nbytes: int


def view_as_array(
    buffer: NDArray[np.uint8], offset: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> NDArray:
    """The array that begins at an offset of mapped bytes."""
    nbytes = dtype.itemsize * math.prod(shape)
    return buffer[offset : offset + nbytes].view(dtype).reshape(shape)


def reserve_address_range(nbytes: int, offset: int) -> NDArray[np.uint8]:
    """A range of addresses, all zeros, into which pieces of files can be mapped; it is given back with the array.

    Parameters
    ----------
    nbytes : int
    offset : int
        Where in its file the first piece begins; the range begins alike within a huge page.

    Returns
    -------
    ndarray of shape (nbytes,), uint8
        Read-only.
    """
    if not nbytes:
        return np.zeros(0, np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffer = np.frombuffer(mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=flags, prot=mmap.PROT_READ), np.uint8)
    padding = (offset - buffer.ctypes.data) % HUGE_PAGE_BYTES
    return buffer[padding : padding + nbytes]


def map_into(buffer: NDArray[np.uint8], segment: FileSegment) -> None:
    """Map a piece of a file to its place in a reserved range; its descriptor may be closed after that."""
    if not segment.nbytes:
        return
    if segment.start + segment.nbytes > len(buffer) or segment.start % mmap.PAGESIZE or segment.offset % mmap.PAGESIZE:
        raise ValueError("a piece does not lie at a page's beginning, within the array")
    libc_mmap = ctypes.CDLL(None, use_errno=True).mmap
    libc_mmap.restype = ctypes.c_void_p
    libc_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    flags = mmap.MAP_SHARED | _MAP_FIXED
    address = libc_mmap(
        buffer.ctypes.data + segment.start, segment.nbytes, mmap.PROT_READ, flags, segment.file, segment.offset
    )
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def prefetch(array: NDArray) -> None:
    """Have a mapped array read from its file, which the system does piece by piece and late if it is not told."""
    _advise_pages(array, "MADV_WILLNEED")


def release_pages(array: NDArray) -> None:
    """Give the pages of an array that is mapped from a file back; they are read again when they are wanted.

    What was read of a file counts as memory of the process until then, even where the system could take it back. Of
    an array that is not mapped the numbers would be lost.
    """
    _advise_pages(array, "MADV_DONTNEED")


def _advise_pages(array: NDArray, advice: str) -> None:
    """Tell the system of the whole pages of an array."""
    first_address = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    last_address = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last_address > first_address and hasattr(mmap, advice):
        _load_madvise()(first_address, last_address - first_address, getattr(mmap, advice))


@cache
def _load_madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
