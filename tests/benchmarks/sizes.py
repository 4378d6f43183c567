"""A cache of very many samples: seconds and memory of queries, and the speed of writing.

    python tests/benchmarks/sizes.py [samples] [rows to write]

Each query runs in its own process. Own memory is anonymous pages; mapped pages of the file are listed separately,
because the system can reclaim them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from featpipe.cache import SampleTable, write_cache, writer
from featpipe.data import Labels
from featpipe.storage import StringColumn

FACTS = {
    "backbone": {"name": "net", "source": "user", "weights": "0" * 64, "transform": {}, "outputs": {"pooled": {}}},
    "precision": "fp32",
    "storage": "float32",
    "extraction": 1,
}
QUERIES = {
    "open": "",
    "ids: one of them": "cache.ids[len(cache) // 2]",
    "ids: all of them, one after the other": "sum(map(len, cache.ids))",
    "bad_rows()": "cache.bad_rows()",
    "usable": "cache.usable",
    "split == train": "np.flatnonzero(cache.split == 1)",
    "label codes": "cache.label_table.values.sum()",
    "labels (an object array)": "values = cache.labels",
    "status (an array of texts)": "values = cache.status",
    "ids, status, labels, bad_rows(), usable": (
        "values = cache.status, cache.labels, cache.bad_rows(), cache.usable, sum(map(len, cache.ids))"
    ),
    "damaged_columns()": "cache.damaged_columns()",
    "a batch of 256": "next(cache.batches(256, seed=0))",
}
QUERY_SCRIPT = """
import resource, sys, time
import numpy as np
import h5py
from featpipe import FeatureCache

def resident(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) * 1024

before = {kind: resident(kind) for kind in ("RssAnon", "RssFile")}
started = time.perf_counter()
cache = FeatureCache(sys.argv[1])
opened = time.perf_counter() - started
%s
print(opened, time.perf_counter() - started - opened, *(resident(kind) - before[kind] for kind in before))
"""


def make_table(n: int) -> SampleTable:
    rng = np.random.default_rng(0)
    length = np.full(n, 30)
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(length, out=offsets[1:])
    ids = np.empty((n, 30), np.uint8)
    ids[:] = np.frombuffer(b"photos/class_000/00000000000.jpg"[2:], np.uint8)
    remaining_number = np.arange(n)
    for place in range(25, 14, -1):
        ids[:, place] = 48 + remaining_number % 10
        remaining_number //= 10
    codes = rng.integers(-1, 1000, n).astype(np.int32)
    return SampleTable(
        ids=StringColumn(ids.reshape(-1), offsets),
        status=np.where(rng.random(n) < 0.01, 5, 0).astype(np.uint8),
        digests=rng.integers(0, 256, (n, 32), np.uint8),
        stamps=rng.integers(0, 256, (n, 16), np.uint8),
        split=rng.integers(0, 4, n, np.uint8),
        labels=Labels("classification", codes, tuple(sorted(f"class {i:03}" for i in range(1000)))),
    )


def make_features(rows: SampleTable, width: int) -> np.ndarray:
    features = np.empty((len(rows.ids), width), np.float32)
    features[:] = np.random.default_rng(0).normal(size=width)
    features += np.arange(len(features), dtype=np.float32)[:, None]
    features[rows.status != 0] = np.nan
    return features


def time_writing(path: Path, rows: SampleTable, features: np.ndarray) -> float:
    shapes = {"pooled": features.shape[1:]}
    started = perf_counter()
    write_cache(path, rows, {"facts": FACTS}, shapes, "float32", lambda _, start, stop: features[start:stop])
    return perf_counter() - started


def measure_queries(path: Path, n: int) -> None:
    print("| query | seconds | own memory, bytes a sample | mapped, bytes a sample |\n|---|---|---|---|")
    for label, code in QUERIES.items():
        process = subprocess.run(
            [sys.executable, "-c", QUERY_SCRIPT % code, str(path)], capture_output=True, text=True, check=True
        )
        opened, seconds, own_bytes, mapped_bytes = map(float, process.stdout.split())
        print(f"| {label} | {seconds if code else opened:.3f} | {own_bytes / n:.1f} | {mapped_bytes / n:.1f} |")


def measure_writing(folder: Path, n: int) -> None:
    """Writing a cache, its share for the checksums of rows, and numpy.save of the same numbers, in turns."""
    rows, width, rounds = make_table(n), 1280, 7
    seconds: dict[str, list[float]] = {
        "numpy.save and fsync": [],
        "write_cache": [],
        "of it, the checksums of rows": [],
    }
    compute_checksums, checksum_seconds = writer.compute_row_checksums, [0.0]

    def compute_and_time(*columns: np.ndarray) -> np.ndarray:
        started = perf_counter()
        checksums = compute_checksums(*columns)
        checksum_seconds[0] += perf_counter() - started
        return checksums

    writer.compute_row_checksums = compute_and_time
    features = make_features(rows, width)
    for _ in range(rounds):
        checksum_seconds[0] = 0.0
        seconds["write_cache"].append(time_writing(folder / "a.h5", rows, features))
        seconds["of it, the checksums of rows"].append(checksum_seconds[0])
        started = perf_counter()
        with open(folder / "a.npy", "wb") as file:
            np.save(file, features)
            file.flush()
            os.fsync(file.fileno())
        seconds["numpy.save and fsync"].append(perf_counter() - started)
    print("| written | seconds | MB/s |\n|---|---|---|")
    for label, values in seconds.items():
        median = statistics.median(values)
        print(f"| {label} | {median:.2f} | {n * width * 4 / median / 1e6:,.0f} |")


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "many.h5"
        large_table = make_table(samples)
        seconds = time_writing(path, large_table, make_features(large_table, 2))
        del large_table
        print(f"{samples:,} samples: written in {seconds:.0f} s, {path.stat().st_size / samples:.0f} bytes each\n")
        measure_queries(path, samples)
        path.unlink()
        print(f"\n{rows:,} rows of 1280 float32:\n")
        measure_writing(Path(name), rows)


if __name__ == "__main__":
    main()
