"""Shuffled batches of 256 rows of a cache, against numpy's memory map of the same numbers, in turns.

    python tests/benchmarks/reading.py [rows]

The files are read once before, so that both read from memory and only the code differs.
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

WIDTH, BATCH_SIZE, ROUNDS = 1280, 256, 9


def make_facts(storage: str) -> dict[str, object]:
    backbone = {"name": "net", "source": "user", "weights": "0" * 64, "transform": {}, "outputs": {"pooled": {}}}
    return {"backbone": backbone, "precision": "fp32", "storage": storage, "extraction": 1}


def make_table(n: int) -> SampleTable:
    rng = np.random.default_rng(0)
    return SampleTable(
        ids=StringColumn.from_strings(f"{i}.jpg" for i in range(n)),
        status=np.zeros(n, np.uint8),
        digests=rng.integers(0, 256, (n, 32), np.uint8),
        stamps=np.zeros((n, 16), np.uint8),
        split=np.zeros(n, np.uint8),
        labels=Labels.unlabeled(n),
    )


def iter_memmap(path: Path, storage: str, n: int, seed: int) -> Iterator[NDArray[np.floating]]:
    """The usual code."""
    features = np.memmap(path, storage, "r", shape=(n, WIDTH))
    rows = np.random.default_rng(seed).permutation(n)
    for start in range(0, n, BATCH_SIZE):
        batch = features[rows[start : start + BATCH_SIZE]]
        yield batch if storage == "float32" else batch.astype(np.float32)


def iter_shard_list(path: Path, n: int, seed: int) -> Iterator[NDArray[np.floating]]:
    """The plain way to read shards: a list of maps, from each of which rows are gathered."""
    contents = open_cache(path)
    shards, dtype = contents.shards, contents.manifest["facts"]["storage"]
    maps = [
        np.memmap(path.parent / shard.file, dtype, "r", shard.offsets["pooled"], (shard.stop - shard.start, WIDTH))
        for shard in shards
    ]
    starts = np.array([shard.start for shard in shards])
    rows = np.random.default_rng(seed).permutation(n)
    for start in range(0, n, BATCH_SIZE):
        batch_rows = rows[start : start + BATCH_SIZE]
        batch = np.empty((len(batch_rows), WIDTH), np.float32)
        shard_numbers = np.searchsorted(starts, batch_rows, "right") - 1
        for number in np.unique(shard_numbers):
            places = np.flatnonzero(shard_numbers == number)
            batch[places] = maps[number][batch_rows[places] - starts[number]]
        yield batch


def iter_cache(path: Path, n: int, seed: int) -> Iterator[NDArray[np.floating]]:
    for _, batch in FeatureCache(path).batches(BATCH_SIZE, slice(None), seed=seed):
        yield batch


def measure_rate(n: int, batches: Iterator[NDArray[np.floating]]) -> float:
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
    manifest, shapes = {"facts": make_facts(storage)}, {"pooled": (WIDTH,)}
    for file, shard_bytes in (("one.h5", None), ("shards.h5", plain.nbytes // 7)):
        write_cache(folder / file, make_table(n), manifest, shapes, storage, lambda _, i, j: plain[i:j], shard_bytes)
    shards = len(FeatureCache(folder / "shards.h5").shard_files)
    readers: dict[str, Callable[[int], Iterator[NDArray[np.floating]]]] = {
        "numpy.memmap": lambda seed: iter_memmap(folder / "plain", storage, n, seed),
        "featpipe, one file": lambda seed: iter_cache(folder / "one.h5", n, seed),
        f"featpipe, {shards} shards": lambda seed: iter_cache(folder / "shards.h5", n, seed),
        f"a list of {shards} maps": lambda seed: iter_shard_list(folder / "shards.h5", n, seed),
    }
    rates: dict[str, list[float]] = {reader_name: [] for reader_name in readers}
    for round_number in range(ROUNDS + 1):
        for reader_name, make_batches in readers.items():
            rates[reader_name].append(measure_rate(n, make_batches(round_number)))
    memmap_rate = statistics.median(rates["numpy.memmap"][1:])
    for reader_name, rates_of_reader in rates.items():
        rate = statistics.median(rates_of_reader[1:])
        print(f"| {storage} | {reader_name} | {rate:,.0f} | {rate / memmap_rate:.2f} × |")


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    print(f"{n} rows of {WIDTH}, shuffled batches of {BATCH_SIZE}, medians of {ROUNDS} rounds in turns\n")
    print("| stored as | | rows/s | ratio |\n|---|---|---|---|")
    for storage in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), storage, n)


if __name__ == "__main__":
    main()
