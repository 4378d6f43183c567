"""Shuffled batches of 256 rows of a cache against numpy's own memory map of the same numbers, in turns.

    python tests/benchmarks/reading.py [rows]

The files are read once before, so that both read from memory and the difference is the code's.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from featpipe import FeatureCache
from featpipe.cache import SampleTable, write_cache
from featpipe.cache.open import open_cache
from featpipe.data import Labels
from featpipe.storage import StringColumn

WIDTH, SIZE, ROUNDS = 1280, 256, 9


def facts(storage: str) -> dict[str, object]:
    backbone = {"name": "net", "source": "user", "weights": "0" * 64, "transform": {}, "outputs": {"pooled": {}}}
    return {"backbone": backbone, "precision": "fp32", "storage": storage, "extraction": 1}


def table(n: int) -> SampleTable:
    rng = np.random.default_rng(0)
    return SampleTable(
        ids=StringColumn.from_strings(f"{i}.jpg" for i in range(n)),
        status=np.zeros(n, np.uint8),
        digests=rng.integers(0, 256, (n, 32), np.uint8),
        stamps=np.zeros((n, 16), np.uint8),
        split=np.zeros(n, np.uint8),
        labels=Labels.unlabeled(n),
    )


def of_memmap(path: Path, storage: str, n: int, seed: int) -> Iterator[NDArray[np.floating]]:
    """What people write."""
    features = np.memmap(path, storage, "r", shape=(n, WIDTH))
    rows = np.random.default_rng(seed).permutation(n)
    for start in range(0, n, SIZE):
        batch = features[rows[start : start + SIZE]]
        yield batch if storage == "float32" else batch.astype(np.float32)


def of_shard_list(path: Path, n: int, seed: int) -> Iterator[NDArray[np.floating]]:
    """The plain way to read shards: a list of maps, and rows gathered from each map that holds some."""
    contents = open_cache(path)
    shards, dtype = contents.shards, contents.manifest["facts"]["storage"]
    maps = [
        np.memmap(path.parent / shard.file, dtype, "r", shard.offsets["pooled"], (shard.stop - shard.start, WIDTH))
        for shard in shards
    ]
    starts = np.array([shard.start for shard in shards])
    rows = np.random.default_rng(seed).permutation(n)
    for start in range(0, n, SIZE):
        batch_rows = rows[start : start + SIZE]
        batch = np.empty((len(batch_rows), WIDTH), np.float32)
        shard_numbers = np.searchsorted(starts, batch_rows, "right") - 1
        for number in np.unique(shard_numbers):
            places = np.flatnonzero(shard_numbers == number)
            batch[places] = maps[number][batch_rows[places] - starts[number]]
        yield batch


def of_cache(path: Path, n: int, seed: int) -> Iterator[NDArray[np.floating]]:
    for _, batch in FeatureCache(path).batches(SIZE, slice(None), seed=seed):
        yield batch


def rows_per_second(n: int, batches: Iterator[NDArray[np.floating]]) -> float:
    started, total = perf_counter(), 0.0
    for batch in batches:
        total += float(batch[0, 0])
    return n / (perf_counter() - started)


def compare(folder: Path, storage: str, n: int) -> None:
    plain = np.memmap(folder / "plain", storage, "w+", shape=(n, WIDTH))
    rng = np.random.default_rng(0)
    for start in range(0, n, 8192):
        plain[start : start + 8192] = rng.normal(size=(min(8192, n - start), WIDTH))
    plain.flush()
    manifest, shapes = {"facts": facts(storage)}, {"pooled": (WIDTH,)}
    for file, shard_bytes in (("one.h5", None), ("shards.h5", plain.nbytes // 7)):
        write_cache(folder / file, table(n), manifest, shapes, storage, lambda _, i, j: plain[i:j], shard_bytes)
    shards = len(FeatureCache(folder / "shards.h5").shard_files)
    ways: dict[str, Callable[[int], Iterator[NDArray[np.floating]]]] = {
        "numpy.memmap": lambda seed: of_memmap(folder / "plain", storage, n, seed),
        "featpipe, one file": lambda seed: of_cache(folder / "one.h5", n, seed),
        f"featpipe, {shards} shards": lambda seed: of_cache(folder / "shards.h5", n, seed),
        f"a list of {shards} maps": lambda seed: of_shard_list(folder / "shards.h5", n, seed),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, batches in ways.items():
            rates[way].append(rows_per_second(n, batches(turn)))
    peer = statistics.median(rates["numpy.memmap"][1:])
    for way, way_rates in rates.items():
        rate = statistics.median(way_rates[1:])
        print(f"| {storage} | {way} | {rate:,.0f} | {rate / peer:.2f} × |")


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    print(f"{n} rows of {WIDTH}, shuffled batches of {SIZE}, medians of {ROUNDS} rounds in turns\n")
    print("| stored as | | rows/s | ratio |\n|---|---|---|---|")
    for storage in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), storage, n)


if __name__ == "__main__":
    main()
