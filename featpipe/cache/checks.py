"""Digests of what a cache holds: of each row, so that damage has a row number, and of each column."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHECK_BYTES", "check_of_shard", "check_rows", "digest_of_column"]

CHECK_BYTES = 16
_BLOCK_BYTES = 2**24


def check_rows(
    digests: NDArray[np.uint8], status: NDArray[np.uint8], features: NDArray[np.floating]
) -> NDArray[np.uint8]:
    """The checks of some rows: the SHA-256 of image digest, status and stored bytes, the first 16 bytes of it.

    Parameters
    ----------
    digests : ndarray of shape (b, 32), uint8
    status : ndarray of shape (b,), uint8
    features : ndarray of shape (b, …), as they are stored

    Returns
    -------
    ndarray of shape (b, 16), uint8
    """
    b = len(status)
    if not b:
        return np.zeros((0, CHECK_BYTES), np.uint8)
    heads = memoryview(np.concatenate([digests, status[:, None]], axis=1).tobytes())
    rows = np.ascontiguousarray(features).reshape(-1).view(np.uint8).data
    head, width = len(heads) // b, len(rows) // b
    sha256 = hashlib.sha256
    found = bytearray()
    for row in range(b):
        state = sha256(heads[row * head : (row + 1) * head])
        state.update(rows[row * width : (row + 1) * width])
        found += state.digest()[:CHECK_BYTES]
    return np.frombuffer(bytes(found), np.uint8).reshape(b, CHECK_BYTES)


def digest_of_column(column: NDArray[np.generic]) -> str:
    """The SHA-256 of a column's bytes, 64 hexadecimal digits."""
    state = hashlib.sha256()
    flat = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
    for start in range(0, len(flat), _BLOCK_BYTES):
        state.update(flat[start : start + _BLOCK_BYTES].data)
    return state.hexdigest()


def check_of_shard(checks: Iterable[NDArray[np.uint8]], shapes: Sequence[object]) -> str:
    """What names a shard: the SHA-256 of the checks of its rows, output after output, and of their shapes."""
    state = hashlib.sha256(repr(list(shapes)).encode())
    for rows in checks:
        state.update(np.ascontiguousarray(rows).data)
    return state.hexdigest()
