"""Parts of an unfinished cache with known content."""

from __future__ import annotations

import numpy as np

from featpipe.storage import Part

FINGERPRINT = "1" * 64


Arrays = dict[str, np.ndarray]


def make_arrays(seed: int = 0, rows: int = 3) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "digest": rng.integers(0, 256, (rows, 32), np.uint8),
        "stamp": rng.integers(0, 256, (rows, 16), np.uint8),
        "status": rng.integers(0, 10, rows, np.uint8),
        "features/pooled": rng.normal(size=(rows, 5)).astype(np.float32),
        "features/layer2": rng.normal(size=(rows, 2, 2, 2)).astype(np.float16),
    }


def has_arrays(part: Part, expected: Arrays) -> bool:
    return part.rows == len(expected["status"]) and all(
        part.read(name).dtype == value.dtype and np.array_equal(part.read(name), value)
        for name, value in expected.items()
    )
