"""Digests of what a cache holds: of each row, so that damage has a row number, and of each column."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHECKSUM_BYTES", "compute_column_digest", "compute_row_checksums", "compute_shard_digest"]

CHECKSUM_BYTES = 16
_HASH_BLOCK_BYTES = 2**24


def compute_row_checksums(
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
        return np.zeros((0, CHECKSUM_BYTES), np.uint8)
    row_prefixes = memoryview(np.concatenate([digests, status[:, None]], axis=1).tobytes())
    feature_bytes = np.ascontiguousarray(features).reshape(-1).view(np.uint8).data
    prefix_bytes, row_bytes = len(row_prefixes) // b, len(feature_bytes) // b
    sha256 = hashlib.sha256
    checksums = bytearray()
    for row in range(b):
        hasher = sha256(row_prefixes[row * prefix_bytes : (row + 1) * prefix_bytes])
        hasher.update(feature_bytes[row * row_bytes : (row + 1) * row_bytes])
        checksums += hasher.digest()[:CHECKSUM_BYTES]
    return np.frombuffer(bytes(checksums), np.uint8).reshape(b, CHECKSUM_BYTES)


def compute_column_digest(column: NDArray[np.generic]) -> str:
    """The SHA-256 of a column's bytes, 64 hexadecimal digits."""
    hasher = hashlib.sha256()
    column_bytes = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
    for start in range(0, len(column_bytes), _HASH_BLOCK_BYTES):
        hasher.update(column_bytes[start : start + _HASH_BLOCK_BYTES].data)
    return hasher.hexdigest()


def compute_shard_digest(checksum_blocks: Iterable[NDArray[np.uint8]], shapes: Sequence[object]) -> str:
    """What names a shard: the SHA-256 of the checks of its rows, output after output, and of their shapes."""
    hasher = hashlib.sha256(repr(list(shapes)).encode())
    for checksums in checksum_blocks:
        hasher.update(np.ascontiguousarray(checksums).data)
    return hasher.hexdigest()
