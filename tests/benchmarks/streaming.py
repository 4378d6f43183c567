"""Heads on features that do not fit into memory: speed relative to the disk, and memory.

    python tests/benchmarks/streaming.py [ROWS] [WIDTH] [FOLDER] [HEAD]...

Writes a cache of ROWS × WIDTH float16 in FOLDER (by default a temporary folder). Before each measurement the file is
dropped from the page cache. The baseline is reading the same number of bytes with read(2), 8 MiB at a time, in the same
run. Each head is trained in its own process, whose peak resident memory is printed. A pass reads all features once;
heads take several. The total seconds include reading labels and digests, and fitting the novelty score.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from featpipe.cache import FeatureCache, SampleTable, write_cache
from featpipe.data import Labels
from featpipe.storage import StringColumn

CLASSES = 10
HEADS = {  # a few steps are enough to measure the speed
    "centroid": {},
    "ridge": {},
    "logistic": {"max_iter": 8},
    "linear": {"epochs": 1, "batch_size": 4096},
}
ROUNDS = 3
FACTS = {
    "backbone": {"name": "x", "source": "user", "weights": "0", "transform": {}, "outputs": {"pooled": {}}},
    "precision": "fp32",
    "storage": "float16",
    "extraction": 1,
}


def write_cache_file(path: Path, n: int, d: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, CLASSES, n).astype(np.int32)
    means = rng.normal(size=(CLASSES, d)).astype(np.float32)

    def gather(output: str, start: int, stop: int) -> np.ndarray:
        noise = np.random.default_rng(start).standard_normal((stop - start, d), np.float32)
        return (means[codes[start:stop]] + 2 * noise).astype(np.float16)

    digests = rng.integers(0, 256, (n, 32), np.uint8)
    text = np.char.zfill(np.arange(n).astype("S8"), 8)
    table = SampleTable(
        ids=StringColumn(text.view(np.uint8), np.arange(0, 8 * n + 1, 8, dtype=np.int64)),
        status=np.zeros(n, np.uint8),
        digests=digests,
        stamps=np.zeros((n, 16), np.uint8),
        split=np.zeros(n, np.uint8),
        labels=Labels("classification", codes, tuple(f"{i:03}" for i in range(CLASSES))),
    )
    manifest = {"facts": FACTS, "backbone": {"name": "x:y", "outputs": ["pooled"]}}
    write_cache(path, table, manifest, {"pooled": (d,)}, "float16", gather)


def open_uncached(path: Path) -> int:
    """Open a file, and drop it from the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def time_reading(path: Path, offset: int, nbytes: int) -> float:
    file, buffer = open_uncached(path), bytearray(8 << 20)
    started = perf_counter()
    os.lseek(file, offset, os.SEEK_SET)
    remaining_bytes = nbytes
    while remaining_bytes > 0:
        remaining_bytes -= os.readv(file, [buffer])
    os.close(file)
    return perf_counter() - started


class ReadCounter:
    """The number of rows that were read."""

    rows = 0


def train_and_print(path: str, head: str) -> None:
    """Train a head; print seconds, passes and memory as JSON."""
    import torch  # noqa: F401

    from featpipe import heads
    from featpipe.cache import FeatureView
    from featpipe.training import train

    heads.fit_streamed, heads.build(head)  # so that these imports are not part of a pass

    fill = FeatureView._fill

    def fill_and_count(self: FeatureView, out: np.ndarray, numbers: np.ndarray) -> None:
        fill(self, out, numbers)
        ReadCounter.rows += len(out)

    FeatureView._fill = fill_and_count  # type: ignore[method-assign]
    cache = FeatureCache(path)
    started = perf_counter()
    model = train(cache, head, params=HEADS[head], memory=1 << 30, tune=False)
    seconds = perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fit = model.history["seconds_to_fit"]
    print(json.dumps({"seconds": seconds, "fit": fit, "passes": ReadCounter.rows / len(cache), "memory": memory}))


def main(n: int = 5_000_000, d: int = 512, folder: str | None = None, *heads: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as folder_name:
        path = Path(folder_name) / "large.h5"
        write_cache_file(path, n, d)
        cache = FeatureCache(path)
        nbytes = cache.features().nbytes
        del cache
        disk_seconds = statistics.median(
            time_reading(path, path.stat().st_size - nbytes, nbytes) for _ in range(ROUNDS)
        )
        megabytes_per_second = nbytes / disk_seconds / 1e6
        print(
            f"{n:,} × {d} float16, {nbytes / 1e9:.2f} GB; reading that much takes {disk_seconds:.1f} s, "
            f"{megabytes_per_second:,.0f} MB/s\n"
        )
        print("| head | passes | seconds | of the disk's speed | the fit alone | memory |\n|---|---|---|---|---|---|")
        for head in heads or HEADS:
            os.close(open_uncached(path))
            command = [sys.executable, __file__, "--train", str(path), head]
            environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # the heads stop early on purpose
            process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            measurement = json.loads(process.stdout.splitlines()[-1])
            passes, seconds = measurement["passes"], measurement["seconds"]
            reading_seconds = disk_seconds * passes
            print(
                f"| {head} | {passes:.1f} | {seconds:.1f} | {reading_seconds / seconds:.0%} "
                f"| {reading_seconds / measurement['fit']:.0%} | {measurement['memory'] / 2**20:,.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_and_print(*sys.argv[2:4])
    else:
        main(*map(int, sys.argv[1:3]), *sys.argv[3:])
