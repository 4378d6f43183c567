"""The allocator, kept from giving pages back."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from functools import cache

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


@cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks.

    It gives every large activation buffer back to the system and takes it again for the next layer; keeping them makes
    convolutional networks up to three times as fast on a CPU. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
