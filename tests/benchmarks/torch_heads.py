"""The torch heads: seconds to fit alone and next to other work, and training from a file that is read in each pass.

    python tests/benchmarks/torch_heads.py fit | optimizers | stream [ROWS] [BATCH]

fit: with the threads that a head selects, and with all threads of torch, alone and next to a busy loop on each core.
optimizers: the first use and a step of torch.optim and of the heads' own AdamW, and a whole small fit; each in its own
process, with torch imported before; CPU seconds, medians.
stream: ROWS × 512 float16 numbers, a linear head, one pass; the baseline reads the same file from start to end. Memory
is the peak of the process, and its part before training.
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
def use_all_threads() -> Iterator[None]:
    original, threads.MIN_MULTITHREADED_MULTIPLICATIONS = threads.MIN_MULTITHREADED_MULTIPLICATIONS, 0
    try:
        yield
    finally:
        threads.MIN_MULTITHREADED_MULTIPLICATIONS = original


def time_fit(name: str) -> float:
    head, n, d, k = FITS[name]
    rng = np.random.default_rng(0)
    y = rng.integers(0, k, n)
    X = (rng.normal(size=(k, d))[y] + 3 * rng.normal(size=(n, d))).astype(np.float32)
    started = perf_counter()
    head.fit(X, y)
    return perf_counter() - started


def measure_fits() -> None:
    print(f"{torch.get_num_threads()} threads of torch; load {os.getloadavg()[0]:.1f}")
    for name in FITS:
        time_fit(name)
        times_by_setting = {key: [] for key in ("alone, chosen", "alone, all", "busy, chosen", "busy, all")}
        for _ in range(ROUNDS):
            times_by_setting["alone, chosen"].append(time_fit(name))
            with use_all_threads():
                times_by_setting["alone, all"].append(time_fit(name))
            with busy_loops():
                times_by_setting["busy, chosen"].append(time_fit(name))
                with use_all_threads():
                    times_by_setting["busy, all"].append(time_fit(name))
        print(name, *(f"{key} {median(times):.2f} s" for key, times in times_by_setting.items()), sep=" | ", flush=True)


OPTIMIZER_SCRIPT = """
import sys, time, warnings
import numpy as np, torch
from featpipe.heads import LinearClassifier
from featpipe.heads.neural.config import NetworkTrainingConfig
from featpipe.heads.neural.train import Optimizer

def seconds(function):
    started = time.process_time()
    function()
    return time.process_time() - started

weights, biases = [torch.zeros(1280, 10, requires_grad=True)], [torch.zeros(10, requires_grad=True)]
gradients = [torch.ones_like(parameter) for parameter in weights + biases]
rng = np.random.default_rng(0)
X, y = rng.normal(size=(300, 1280)).astype(np.float32), np.arange(300) % 10

def make_own():
    global optimizer
    optimizer = Optimizer(weights, biases, NetworkTrainingConfig())

def make_torch():
    global optimizer
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}], weight_decay=0.01)
    for parameter, gradient in zip(weights + biases, gradients):
        parameter.grad = gradient

if sys.argv[1] == "own":
    make, step = make_own, lambda: optimizer.step(gradients, 1e-3)
else:
    make, step = make_torch, lambda: optimizer.step()
first = seconds(lambda: (make(), step()))
steps = seconds(lambda: [step() for _ in range(1000)]) / 1000
LinearClassifier(epochs=1, random_state=0).fit(X, y)
fit = seconds(lambda: LinearClassifier(random_state=0).fit(X, y))
print(first, steps, fit)
"""


def measure_optimizers() -> None:
    for name in ("own", "torch.optim"):
        runs = [
            subprocess.run([sys.executable, "-c", OPTIMIZER_SCRIPT, name], capture_output=True, check=True, text=True)
            for _ in range(ROUNDS)
        ]
        first_use, step, fit_seconds = (
            median(column) for column in zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
        )
        print(
            f"{name}: first use {first_use:.3f} s, a step {1e6 * step:.0f} µs; "
            f"a fit of 300 × 1280 rows {fit_seconds:.3f} s"
        )


def resident_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def write_features(path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    block = rng.normal(size=(10_000, WIDTH)).astype(np.float16)
    with path.open("wb") as file:
        for start in range(0, n, len(block)):
            block[:, 0] = start / n
            file.write(block[: n - start].tobytes())


def time_reading(path: Path) -> float:
    started = perf_counter()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass
    return perf_counter() - started


def measure_streaming(n: int, batch: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "X"
        write_features(path, n)
        y = np.random.default_rng(0).integers(0, CLASSES, n)
        center, scale = np.zeros(WIDTH), np.ones(WIDTH)
        mib_before = resident_mib("VmRSS")
        source = np.memmap(path, np.float16, "r", shape=(n, WIDTH))
        head = LinearClassifier(batch_size=batch, epochs=1, random_state=0)
        started = perf_counter()
        head._fit_rows(source, y, None, center=center, scale=scale)
        training_seconds = perf_counter() - started
        rows = BatchSource(source, np.zeros(n), np.ones(n), center=center, scale=scale)
        started = perf_counter()
        for _ in rows.iter_shuffled(batch, torch.Generator().manual_seed(0)):
            pass
        batching_seconds = perf_counter() - started
        gib = n * WIDTH * 2 / 2**30
        print(f"{gib:.1f} GiB read from start to end at {gib / time_reading(path):.2f} GiB/s")
        print(f"shuffled batches of {batch} at {gib / batching_seconds:.2f} GiB/s")
        print(f"a pass of training {gib / training_seconds:.2f} GiB/s, {n / training_seconds:,.0f} rows/s")
        print(f"memory {resident_mib('VmHWM'):.0f} MiB, of which {mib_before:.0f} before")


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        measure_fits()
    elif sys.argv[1] == "optimizers":
        measure_optimizers()
    else:
        measure_streaming(*(int(argument) for argument in (*sys.argv[2:], *("1000000", "256")[len(sys.argv) - 2 :])))
