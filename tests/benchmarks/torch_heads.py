"""The torch heads: seconds to fit alone and beside other work, and training from a file that is read in each pass.

    python tests/benchmarks/torch_heads.py fit | stream [ROWS] [BATCH]

fit: with the threads that a head chooses, and with all that torch has, alone and beside a busy loop for each core.
stream: ROWS × 512 float16 numbers, a linear head, one pass; the peer reads the same file from start to end. The memory
is what the process had at most, and how much of it came with the imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

from featpipe.heads import LinearClassifier, MLPClassifier
from featpipe.heads.neural.batches import BatchSource
from featpipe.runtime import threads

FITS = {  # rows, width, classes, epochs
    "linear, 300 × 1280": (LinearClassifier(random_state=0), 300, 1280, 10),
    "linear, 5,000 × 512": (LinearClassifier(random_state=0, epochs=10), 5000, 512, 20),
    "mlp, 300 × 1280": (MLPClassifier(random_state=0), 300, 1280, 10),
    "mlp, 2,000 × 512": (MLPClassifier(random_state=0, epochs=10), 2000, 512, 20),
}
ROUNDS = 3
WIDTH, CLASSES = 512, 100


@contextmanager
def busy_loops() -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()


@contextmanager
def threads_of_torch() -> Iterator[None]:
    chosen, threads.MIN_MULTITHREADED_MULTIPLICATIONS = threads.MIN_MULTITHREADED_MULTIPLICATIONS, 0
    try:
        yield
    finally:
        threads.MIN_MULTITHREADED_MULTIPLICATIONS = chosen


def seconds(name: str) -> float:
    head, n, d, k = FITS[name]
    rng = np.random.default_rng(0)
    y = rng.integers(0, k, n)
    X = (rng.normal(size=(k, d))[y] + 3 * rng.normal(size=(n, d))).astype(np.float32)
    started = perf_counter()
    head.fit(X, y)
    return perf_counter() - started


def fit() -> None:
    print(f"{torch.get_num_threads()} threads of torch; load {os.getloadavg()[0]:.1f}")
    for name in FITS:
        seconds(name)
        found = {key: [] for key in ("alone, chosen", "alone, all", "busy, chosen", "busy, all")}
        for _ in range(ROUNDS):
            found["alone, chosen"].append(seconds(name))
            with threads_of_torch():
                found["alone, all"].append(seconds(name))
            with busy_loops():
                found["busy, chosen"].append(seconds(name))
                with threads_of_torch():
                    found["busy, all"].append(seconds(name))
        print(name, *(f"{key} {median(times):.2f} s" for key, times in found.items()), sep=" | ", flush=True)


def resident_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def make(path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    block = rng.normal(size=(10_000, WIDTH)).astype(np.float16)
    with path.open("wb") as file:
        for start in range(0, n, len(block)):
            block[:, 0] = start / n
            file.write(block[: n - start].tobytes())


def reading(path: Path) -> float:
    started = perf_counter()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass
    return perf_counter() - started


def stream(n: int, batch: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "X"
        make(path, n)
        y = np.random.default_rng(0).integers(0, CLASSES, n)
        center, scale = np.zeros(WIDTH), np.ones(WIDTH)
        before = resident_mib("VmRSS")
        source = np.memmap(path, np.float16, "r", shape=(n, WIDTH))
        head = LinearClassifier(batch_size=batch, epochs=1, random_state=0)
        started = perf_counter()
        head._fit_rows(source, y, None, center=center, scale=scale)
        took = perf_counter() - started
        rows = BatchSource(source, np.zeros(n), np.ones(n), center=center, scale=scale)
        started = perf_counter()
        for _ in rows.iter_shuffled(batch, torch.Generator().manual_seed(0)):
            pass
        batched = perf_counter() - started
        gib = n * WIDTH * 2 / 2**30
        print(f"{gib:.1f} GiB read from start to end at {gib / reading(path):.2f} GiB/s")
        print(f"shuffled batches of {batch} at {gib / batched:.2f} GiB/s")
        print(f"a pass of training {gib / took:.2f} GiB/s, {n / took:,.0f} rows/s")
        print(f"memory {resident_mib('VmHWM'):.0f} MiB, of which {before:.0f} before")


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        fit()
    else:
        stream(*(int(argument) for argument in (*sys.argv[2:], *("1000000", "256")[len(sys.argv) - 2 :])))
