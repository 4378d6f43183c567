"""Memory-mapped arrays, including one array over several consecutive files."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 65536  # a multiple of the page size on every supported machine
HUGE_PAGE_BYTES = 2**21  # file and memory aligned alike within a huge page: faster to map and to access

_MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap module does not define it
_MAP_FAILED = ctypes.c_void_p(-1).value


def view_as_array(
    buffer: NDArray[np.uint8], offset: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> NDArray:
    """View mapped bytes from an offset on as an array."""
    nbytes = dtype.itemsize * math.prod(shape)
    return buffer[offset : offset + nbytes].view(dtype).reshape(shape)


def reserve_address_range(nbytes: int, offset: int) -> NDArray[np.uint8]:
    """Reserve a zero-filled address range into which segments of files can be mapped. It is freed with the array.

    Parameters
    ----------
    nbytes : int
    offset : int
        File offset of the first segment. The range gets the same alignment within a huge page.

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


def map_into(buffer: NDArray[np.uint8], start: int, descriptor: int, offset: int, nbytes: int) -> None:
    """Map a segment of a file into a reserved address range.

    Parameters
    ----------
    buffer : ndarray of uint8
    start : int
        Position in the buffer, a multiple of ``PAGE_BYTES``.
    descriptor : int
        Descriptor of the open file; it may be closed afterwards.
    offset : int
        Position in the file, a multiple of ``PAGE_BYTES``.
    nbytes : int
    """
    if not nbytes:
        return
    if start + nbytes > len(buffer) or start % mmap.PAGESIZE or offset % mmap.PAGESIZE:
        raise ValueError("a segment must begin at a page boundary and lie within the array")
    libc_mmap = ctypes.CDLL(None, use_errno=True).mmap
    libc_mmap.restype = ctypes.c_void_p
    libc_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    flags = mmap.MAP_SHARED | _MAP_FIXED
    address = libc_mmap(buffer.ctypes.data + start, nbytes, mmap.PROT_READ, flags, descriptor, offset)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def prefetch(array: NDArray) -> None:
    """Ask the system to read a mapped array ahead; otherwise it reads single pages on first access."""
    _advise_pages(array, "MADV_WILLNEED")


def release_pages(array: NDArray) -> None:
    """Release the pages of an array that is mapped from a file. The next access reads them again.

    Until they are released, pages that were read count as memory of the process, even if the system could reclaim
    them. Only use this on mapped arrays: other arrays would lose their values.
    """
    _advise_pages(array, "MADV_DONTNEED")


def _advise_pages(array: NDArray, advice: str) -> None:
    """Call ``madvise`` for the pages that lie completely within an array."""
    first_address = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    last_address = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last_address > first_address and hasattr(mmap, advice):
        _load_madvise()(first_address, last_address - first_address, getattr(mmap, advice))


@cache
def _load_madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
