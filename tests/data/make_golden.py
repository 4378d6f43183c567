"""Makes the golden files of a version of the format, which every later featpipe must open; run it once for each.

``python tests/data/make_golden.py`` writes beside itself, and never over a file that is there: a released golden file
is not made again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FORMAT_VERSION, SampleTable, write_cache
from featpipe.data.labels.labels import Labels
from featpipe.status import Status
from featpipe.storage import StringColumn

__all__ = ["make", "make_sharded"]

IDS = ("cat/1.jpg", "cat/2.jpg", "dog/é 3.jpg", "dog/4.jpg", "cow/5.jpg", "6.jpg")
STATUS = (Status.OK, Status.DAMAGED, Status.OK, Status.MISSING, Status.OK, Status.OK)
NAMES = ("cat", "cat", "dog", "dog", "cow", None)
SPLIT = (1, 1, 3, 3, 2, 0)
SHAPES = {"pooled": (4,), "layer2": (2, 2, 1)}
WIDE = 8192  # numbers of float16 in a row of the sharded file: four rows are a shard, the smallest that there can be
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
SHARDED_FACTS = {
    **FACTS,
    "backbone": {
        **FACTS["backbone"],
        "outputs": {"pooled": {"node": "pooled", "pool": "none", "prefix": 0, "shape": [WIDE]}},
    },
    "storage": "float16",
}


def make(path: Path) -> None:
    """Write the golden file: row i of an output of four numbers is 10 i, 10 i + 0.25, 10 i + 0.5, 10 i + 0.75."""
    manifest = {"facts": FACTS, "created": "2026-01-01T00:00:00+00:00", "archives": ["/golden"]}
    values = _values(4).astype(np.float32)
    write_cache(path, _table(), manifest, SHAPES, "float32", lambda o, i, j: values[i:j].reshape(-1, *SHAPES[o]))


def make_sharded(path: Path) -> None:
    """Write the golden file of rows 0 to 3 and 4 to 5 in two shards: the same four numbers, over and over."""
    manifest = {"facts": SHARDED_FACTS, "created": "2026-01-01T00:00:00+00:00", "archives": ["/golden"]}
    values = _values(WIDE).astype(np.float16)
    write_cache(path, _table(), manifest, {"pooled": (WIDE,)}, "float16", lambda o, i, j: values[i:j], 65536)


def _values(width: int) -> NDArray[np.floating]:
    values = 10.0 * np.arange(len(IDS))[:, None] + np.arange(width) % 4 / 4
    values[np.array(STATUS) != Status.OK] = np.nan
    return values


def _table() -> SampleTable:
    status = np.array(STATUS, np.uint8)
    digests = np.stack([np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8) for name in IDS])
    digests[status == Status.MISSING] = 0
    return SampleTable(
        ids=StringColumn.from_strings(IDS),
        status=status,
        digests=digests,
        stamps=np.where((digests != 0).any(axis=1)[:, None], digests[:, :16], 0).astype(np.uint8),
        split=np.array(SPLIT, np.uint8),
        labels=Labels.from_class_names(NAMES),
    )


if __name__ == "__main__":
    for golden, write in ((f"golden-{FORMAT_VERSION}.h5", make), (f"golden-{FORMAT_VERSION}-sharded.h5", make_sharded)):
        target = Path(__file__).with_name(golden)
        if target.exists():
            raise SystemExit(f"{target} is there; it is never made again")
        write(target)
