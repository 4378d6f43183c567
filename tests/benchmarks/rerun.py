"""A rerun of an extraction in which nothing changed, against ``find`` over the same files, in turns.

Many small JPEGs in 100 class folders, 200 different ones, fresh processes. ``find`` reads every file's size and time,
which is the minimum that a rerun must do. Reading an image is an error in the measured reruns. For comparison: what
every such command loads before it starts (Python, numpy, h5py and click), and the same rerun with torch imported, which
loads the network. Seconds of CPU (user and system) depend less on other work than wall time. Python's compiled files
are in a temporary folder, because some environments write none.

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
from collections.abc import Mapping, Sequence
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


def time_command(words: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Run a command; wall and CPU seconds."""
    start = perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, exit_status, usage = os.wait4(process.pid, 0)
    if exit_status:
        raise SystemExit(f"{' '.join(words)}: failed")
    return perf_counter() - start, usage.ru_utime + usage.ru_stime


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory(prefix="rerun") as name:
        folder, out = f"{name}/pictures", f"{name}/pictures.h5"
        write_images(Path(folder), n)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = f"{name}/compiled"
        arguments = ("extract", folder, "--out", out, *OPTIONS)
        seconds, _ = time_command((sys.executable, "-m", "featpipe", *arguments), environment)
        print(f"{n} images extracted in {seconds:.1f} s", flush=True)
        mtime_ns = Path(out).stat().st_mtime_ns
        rerun = (sys.executable, "-W", "ignore", "-c", RERUN)
        commands = {
            "find": ("find", folder, *FIND),
            "import numpy, h5py, click": (sys.executable, "-c", "import numpy, h5py, click"),
            "rerun": (*rerun, "recall", *arguments),
            "rerun that loads the network": (*rerun, "load", *arguments),
        }
        times: dict[str, list[tuple[float, float]]] = {}
        for _ in range(rounds):
            for label, command in commands.items():
                times.setdefault(label, []).append(time_command(command, environment))
        if Path(out).stat().st_mtime_ns != mtime_ns:
            raise SystemExit("the cache was written again")
    print("| | wall | ratio | CPU | ratio |\n|---|---|---|---|---|")
    for label, seconds_of_rounds in times.items():
        cells = []
        for values, find_values in zip(
            zip(*seconds_of_rounds, strict=True), zip(*times["find"], strict=True), strict=True
        ):
            ratio = statistics.median(value / find for value, find in zip(values, find_values, strict=True))
            cells += [f"{statistics.median(values):.2f} s", f"{ratio:.1f} ×"]
        print("|", label, "|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
