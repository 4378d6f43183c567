"""The time of `featpipe --help`, against an empty click program, in turns.

python tests/benchmarks/help_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from time import perf_counter

ROUNDS = 15
EMPTY = "import click\n@click.group()\ndef cli(): pass\ncli(['--help'])"
COMMANDS = {
    "empty click program": [sys.executable, "-c", EMPTY],
    "featpipe --help": [sys.executable, "-m", "featpipe", "--help"],
    "featpipe heads": [sys.executable, "-m", "featpipe", "heads"],
}


def time_command(command: list[str]) -> float:
    started = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - started


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(time_command(command))
    empty_times = times["empty click program"]
    for name, values in times.items():
        ratio = statistics.median(value / base for value, base in zip(values, empty_times, strict=True))
        print(f"{name:<22}{statistics.median(values) * 1000:7.0f} ms  {ratio:5.2f} ×")


if __name__ == "__main__":
    main()
