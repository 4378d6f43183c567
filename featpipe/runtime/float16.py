"""Conversion of float16 to float32 at memory bandwidth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_ELEMENTS = 1 << 20  # a block fits into the cache of a core
MIN_TORCH_ELEMENTS = 1 << 16


def convert_float(x: NDArray[Any], dtype: Any, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Convert an array to another float dtype.

    numpy converts float16 one number at a time, which is slower than reading the numbers from a disk. torch uses vector
    instructions.

    Parameters
    ----------
    x : ndarray of shape (b, d)
    dtype : dtype
    out : ndarray of shape (b, d) and of that dtype, optional
        Array to write the result to.

    Returns
    -------
    ndarray of shape (b, d)
        ``out``, if given; otherwise a new array, or ``x`` itself if it has the dtype already.
    """
    target_dtype = np.dtype(dtype)
    if x.dtype != np.float16 or x.size < MIN_TORCH_ELEMENTS or not x.flags.c_contiguous or target_dtype.itemsize < 4:
        if out is None:
            return np.asarray(x, target_dtype)
        out[...] = x
        return out
    import torch

    converted = np.empty(x.shape, target_dtype) if out is None else out
    source, target = torch.from_numpy(x if x.flags.writeable else x.copy()), torch.from_numpy(converted)
    block_rows = max(1, BLOCK_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, len(x), block_rows):
        target[start : start + block_rows] = source[start : start + block_rows]
    return converted
