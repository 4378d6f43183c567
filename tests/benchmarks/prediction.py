"""Whether predictions come as fast as embeddings: the same images through extract and through predict, in turns.

500 × 375 JPEGs in a .tar, EfficientNet-Lite0 in fp32, from the listing of the archive to the finished file. All in one
process, whose first round is not counted.

    python tests/benchmarks/prediction.py [images] [rounds]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import extraction

import featpipe


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 800
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as name:
        home, tar = Path(name), Path(name) / "photographs.tar"
        extraction.photographs(home / "photographs", n // extraction.REPEATS)
        extraction.pack(home / "photographs", tar)
        labelled = featpipe.extract(home / "photographs", out=home / "labelled.h5", device="cpu")
        model = featpipe.train(labelled, params={"C": 1.0}, cv=None)
        model.device = "cpu"
        other = featpipe.train(labelled, "knn", cv=None)
        ways: dict[str, Callable[[Path], object]] = {
            "extract": lambda out: featpipe.extract(tar, out=out / "a.h5", **model.extraction()),
            "into a file": lambda out: featpipe.predict(model, tar, out / "p.csv"),
            "by two models": lambda out: featpipe.predict(model, tar, out / "p.csv", also=[other]),
            "into a cache": lambda out: featpipe.predict(model, tar, out / "p.csv", cache=out),
            "from a cache": lambda out: featpipe.predict(model, tar, out / "p.csv", cache=home / "cache"),
            "again": lambda out: featpipe.predict(model, tar, home / "again.csv"),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, call in ways.items():
                with tempfile.TemporaryDirectory(dir=home) as out:
                    started = perf_counter()
                    call(Path(out))
                    seconds[way] += [perf_counter() - started] if number else []
    for way, values in seconds.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, seconds["extract"], strict=True))
        middle = statistics.median(values)
        print(f"{way:<16}{middle:7.2f} s {n / middle:9.1f} images/s {ratio:6.3f} × the time of extract", flush=True)


if __name__ == "__main__":
    main()
