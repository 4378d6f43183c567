"""A rerun of an extraction in which nothing changed, against ``find`` over the same files, in turns.

Many small JPEGs in 100 class folders, 200 different ones, fresh processes. ``find`` looks at every file's size and
time, which is the least that a rerun must do. In the measured reruns reading an image is an error, and importing
torch too. For comparison the same rerun after torch was imported, which loads the network as every command did before
identities were remembered.

python tests/benchmarks/rerun.py [images] [rounds]
"""

from __future__ import annotations

import io
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

CLASSES = 100
DIFFERENT_IMAGES = 200
OPTIONS = ("--backbone", "efficientnet_lite0", "--storage", "float16")
RERUN = """
import sys
from featpipe import data
from featpipe.cli import main
data.SampleReader.read = None
if sys.argv.pop(1) == "load":
    import torch
main()
"""
FIND = ["-type", "f", "-size", "+0", "-printf", "%s %T@ %p\n"]


def write_images(folder: Path, n: int) -> None:
    """Small pictures with a comment that makes their bytes different."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 60)).save(file, "JPEG")
    data = file.getvalue()
    for i in range(n):
        if i < CLASSES:
            (folder / f"class{i:02}").mkdir(parents=True)
        comment = b"\xff\xfe" + struct.pack(">HQ", 10, i % DIFFERENT_IMAGES)
        path = folder / f"class{i % CLASSES:02}" / f"{i:07}.jpg"
        path.write_bytes(data[:2] + comment + data[2:])
        os.utime(path, (1e9, 1e9))


def time_command(*words: str) -> float:
    start = perf_counter()
    result = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return perf_counter() - start


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory(prefix="rerun") as name:
        folder, out = f"{name}/pictures", f"{name}/pictures.h5"
        write_images(Path(folder), n)
        arguments = ("extract", folder, "--out", out, *OPTIONS)
        print(f"{n} images extracted in {time_command(sys.executable, '-m', 'featpipe', *arguments):.1f} s", flush=True)
        mtime_ns = Path(out).stat().st_mtime_ns
        rerun = (sys.executable, "-W", "ignore", "-c", RERUN)
        commands = {
            "find": ("find", folder, *FIND),
            "help": (sys.executable, "-m", "featpipe", "extract", "--help"),
            "rerun": (*rerun, "recall", *arguments),
            "rerun that loads the network": (*rerun, "load", *arguments),
        }
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for label, command in commands.items():
                times.setdefault(label, []).append(time_command(*command))
        if Path(out).stat().st_mtime_ns != mtime_ns:
            raise SystemExit("the cache was written again")
    for label, values in times.items():
        ratio = statistics.median(value / find for value, find in zip(values, times["find"], strict=True))
        print(f"{label:<30}{statistics.median(values):7.2f} s{ratio:7.1f} ×")


if __name__ == "__main__":
    main()
