"""A rerun of an extraction in which nothing changed, against ``find`` over the same files, in turns.

Many small JPEGs in 100 class folders, a tiny network, fresh processes. ``find`` looks at every file's size and time,
which is the least that a rerun must do. In the measured reruns reading an image is an error.

    python tests/benchmarks/rerun.py [images] [rounds]
"""

from __future__ import annotations

import io
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, sleep
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = 100
PREPARE = "import sys, rerun; rerun.extract(sys.argv[1], sys.argv[2])"
RERUN = "import sys, rerun; print(rerun.again(sys.argv[1], sys.argv[2]))"
START = "import rerun; rerun.started()"
FIND = ["-type", "f", "-size", "+0", "-printf", "%s %T@ %p\n"]


def network() -> object:
    """A network that costs nothing, and its transform."""
    from torch import nn

    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 64)), to_float


def to_float(image: Tensor) -> Tensor:
    return image[:, :16, :16].float() / 255


def started() -> None:
    """Everything that does not depend on the archive: imports, and the network."""
    from featpipe import backbones

    backbones.load("rerun:network")


def extract(folder: str, out: str) -> None:
    from featpipe import extract

    extract(folder, backbone="rerun:network", out=out, storage="float16")


def again(folder: str, out: str) -> float:
    """Seconds of a rerun, apart from start-up; no image may be read."""
    from featpipe import data

    started()
    data.SampleReader.read = None  # type: ignore[assignment, method-assign]
    began = perf_counter()
    extract(folder, out)
    return perf_counter() - began


def pictures(folder: Path, n: int) -> None:
    """The same small picture n times, each with a comment of its own."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 60)).save(file, "JPEG")
    data = file.getvalue()
    for i in range(n):
        if i < CLASSES:
            (folder / f"class{i:02}").mkdir(parents=True)
        comment = b"\xff\xfe" + struct.pack(">HQ", 10, i)
        (folder / f"class{i % CLASSES:02}" / f"{i:07}.jpg").write_bytes(data[:2] + comment + data[2:])


def python(code: str, *arguments: str) -> tuple[float, str]:
    """Seconds of a whole process, and what it prints."""
    return command(sys.executable, "-W", "ignore", "-c", code, *arguments)


def command(*words: str) -> tuple[float, str]:
    started = perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise SystemExit(done.stderr)
    return perf_counter() - started, done.stdout


def find(folder: str) -> float:
    started = perf_counter()
    subprocess.run(["find", folder, *FIND], check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - started


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as name:
        folder, out = f"{name}/pictures", f"{name}/pictures.h5"
        pictures(Path(folder), n)
        sleep(2.5)  # a file that changed just now is read again by the next run
        print(f"{n} images extracted in {python(PREPARE, folder, out)[0]:.1f} s", flush=True)
        made = Path(out).stat().st_mtime_ns
        options = ("--backbone", "rerun:network", "--out", out, "--storage", "float16")
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for what, seconds in (
                ("find", find(folder)),
                ("rerun, in the process", float(python(RERUN, folder, out)[1])),
                ("start-up of the process", python(START)[0]),
                ("the whole command", command(sys.executable, "-m", "featpipe", "extract", folder, *options)[0]),
            ):
                times.setdefault(what, []).append(seconds)
        if Path(out).stat().st_mtime_ns != made:
            raise SystemExit("the cache was written again")
    for what, values in times.items():
        ratio = statistics.median(ours / least for ours, least in zip(values, times["find"], strict=True))
        print(f"{what:<26}{statistics.median(values):7.2f} s{ratio:7.1f} ×")


if __name__ == "__main__":
    main()
