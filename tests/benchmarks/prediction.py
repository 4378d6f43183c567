"""The speed of predict against extract on the same images, in turns.

500 × 375 JPEGs in a .tar, EfficientNet-Lite0 in fp32, from the listing of the archive to the finished file. All in one
process; the first round is not counted.

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
    with tempfile.TemporaryDirectory() as folder_name:
        home, tar = Path(folder_name), Path(folder_name) / "photographs.tar"
        extraction.write_photographs(home / "photographs", n // extraction.REPEATS)
        extraction.pack_tar(home / "photographs", tar)
        labelled = featpipe.extract(home / "photographs", out=home / "labelled.h5", device="cpu")
        model = featpipe.train(labelled, params={"C": 1.0}, cv=None)
        model.device = "cpu"
        second_model = featpipe.train(labelled, "knn", cv=None)
        calls: dict[str, Callable[[Path], object]] = {
            "extract": lambda out: featpipe.extract(tar, out=out / "a.h5", **model.extraction()),
            "into a file": lambda out: featpipe.predict(model, tar, out / "p.csv"),
            "by two models": lambda out: featpipe.predict(model, tar, out / "p.csv", also=[second_model]),
            "into a cache": lambda out: featpipe.predict(model, tar, out / "p.csv", cache=out),
            "from a cache": lambda out: featpipe.predict(model, tar, out / "p.csv", cache=home / "cache"),
            "again": lambda out: featpipe.predict(model, tar, home / "again.csv"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for round_number in range(rounds + 1):
            for name, call in calls.items():
                with tempfile.TemporaryDirectory(dir=home) as out:
                    started = perf_counter()
                    call(Path(out))
                    seconds[name] += [perf_counter() - started] if round_number else []
    for name, values in seconds.items():
        ratio = statistics.median(
            value / extract_value for value, extract_value in zip(values, seconds["extract"], strict=True)
        )
        median_seconds = statistics.median(values)
        print(
            f"{name:<16}{median_seconds:7.2f} s {n / median_seconds:9.1f} images/s {ratio:6.3f} × the time of extract",
            flush=True,
        )


if __name__ == "__main__":
    main()
