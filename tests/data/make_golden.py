"""Makes ``golden-1.0.h5``, the file that every later featpipe must open; run it once for each version of the format.

``python tests/data/make_golden.py`` writes beside itself, and never over a file that is there: a released golden file
is not made again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from featpipe.cache import FORMAT_VERSION, Table, write_cache
from featpipe.labels import Labels
from featpipe.status import Status
from featpipe.strings import Strings

__all__ = ["make"]

IDS = ("cat/1.jpg", "cat/2.jpg", "dog/é 3.jpg", "dog/4.jpg", "cow/5.jpg", "6.jpg")
STATUS = (Status.OK, Status.DAMAGED, Status.OK, Status.MISSING, Status.OK, Status.OK)
NAMES = ("cat", "cat", "dog", "dog", "cow", None)
SPLIT = (1, 1, 3, 3, 2, 0)
SHAPES = {"pooled": (4,), "layer2": (2, 2, 1)}
FACTS = {
    "backbone": {
        "name": "golden",
        "source": "user",
        "weights": hashlib.sha256(b"golden weights").hexdigest(),
        "transform": {"resize": 8, "crop": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "outputs": {
            "pooled": {"node": "pooled", "pool": "none", "prefix": 0, "shape": [4]},
            "layer2": {"node": "layer2", "pool": "none", "prefix": 0, "shape": [2, 2, 1]},
        },
    },
    "precision": "fp32",
    "storage": "float32",
    "extraction": 1,
}


def make(path: Path) -> None:
    """Write the golden file: row i of an output of four numbers is 10 i, 10 i + 0.25, 10 i + 0.5, 10 i + 0.75."""
    n = len(IDS)
    status = np.array(STATUS, np.uint8)
    values = (10 * np.arange(n)[:, None] + np.arange(4) / 4).astype(np.float32)
    values[status != Status.OK] = np.nan
    digests = np.stack([np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8) for name in IDS])
    digests[status == Status.MISSING] = 0
    table = Table(
        ids=Strings.of(IDS),
        status=status,
        digests=digests,
        stamps=np.where((digests != 0).any(axis=1)[:, None], digests[:, :16], 0).astype(np.uint8),
        split=np.array(SPLIT, np.uint8),
        labels=Labels.of_classes(NAMES),
    )
    manifest = {"facts": FACTS, "created": "2026-01-01T00:00:00+00:00", "archives": ["/golden"]}
    write_cache(path, table, manifest, SHAPES, "float32", lambda o, i, j: values[i:j].reshape(-1, *SHAPES[o]))


if __name__ == "__main__":
    golden = Path(__file__).with_name(f"golden-{FORMAT_VERSION}.h5")
    if golden.exists():
        raise SystemExit(f"{golden} is there; it is never made again")
    make(golden)
