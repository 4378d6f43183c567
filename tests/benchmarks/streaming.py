"""Heads on features that do not fit into memory: speed against the disk's, and memory.

    python tests/benchmarks/streaming.py [ROWS] [WIDTH] [FOLDER] [HEAD]...

A cache of ROWS × WIDTH float16 in some classes is made in FOLDER (a temporary one if not given). Before each question
the file is dropped from the system's memory. The peer is reading as much of the file with read(2), 8 MiB at a time, in
the same run. Each head is trained in a process of its own, whose largest resident memory counts; a pass is one reading
of all features, of which heads take several. All seconds are those of labels, digests and what tells new images, too.
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
HEADS = {  # a few steps are enough to know the speed of one
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


def make(path: Path, n: int, d: int) -> None:
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


def dropped(path: Path) -> int:
    """An open file of which nothing is in the system's memory."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def read(path: Path, offset: int, nbytes: int) -> float:
    file, buffer = dropped(path), bytearray(8 << 20)
    started = perf_counter()
    os.lseek(file, offset, os.SEEK_SET)
    left = nbytes
    while left > 0:
        left -= os.readv(file, [buffer])
    os.close(file)
    return perf_counter() - started


class Counted:
    """A view that counts what is read of it."""

    rows = 0


def trained(path: str, head: str) -> None:
    """In a process of its own: seconds, passes and memory as JSON."""
    import torch  # noqa: F401

    from featpipe import heads
    from featpipe.cache import FeatureView
    from featpipe.training import train

    heads.fit_streamed, heads.build(head)  # what is imported when it is first needed is not of a pass

    fill = FeatureView._fill

    def counted(self: FeatureView, out: np.ndarray, numbers: np.ndarray) -> None:
        fill(self, out, numbers)
        Counted.rows += len(out)

    FeatureView._fill = counted  # type: ignore[method-assign]
    cache = FeatureCache(path)
    started = perf_counter()
    model = train(cache, head, params=HEADS[head], memory=1 << 30, tune=False)
    seconds = perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fit = model.history["seconds_to_fit"]
    print(json.dumps({"seconds": seconds, "fit": fit, "passes": Counted.rows / len(cache), "memory": memory}))


def main(n: int = 5_000_000, d: int = 512, folder: str | None = None, *heads: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "large.h5"
        make(path, n, d)
        cache = FeatureCache(path)
        nbytes = cache.features().nbytes
        del cache
        disk = statistics.median(read(path, path.stat().st_size - nbytes, nbytes) for _ in range(ROUNDS))
        speed = nbytes / disk / 1e6
        print(f"{n:,} × {d} float16, {nbytes / 1e9:.2f} GB; reading that much takes {disk:.1f} s, {speed:,.0f} MB/s\n")
        print("| head | passes | seconds | of the disk's speed | the fit alone | memory |\n|---|---|---|---|---|---|")
        for head in heads or HEADS:
            os.close(dropped(path))
            command = [sys.executable, __file__, "--train", str(path), head]
            quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # heads are stopped early on purpose
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=quiet)
            found = json.loads(done.stdout.splitlines()[-1])
            alone = disk * found["passes"]
            print(
                f"| {head} | {found['passes']:.1f} | {found['seconds']:.1f} | {alone / found['seconds']:.0%} "
                f"| {alone / found['fit']:.0%} | {found['memory'] / 2**20:,.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        trained(*sys.argv[2:4])
    else:
        main(*map(int, sys.argv[1:3]), *sys.argv[3:])
