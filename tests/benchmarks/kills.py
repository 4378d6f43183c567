"""Thousands of kills, full disks, power cuts and flipped bits, counted.

    python tests/benchmarks/kills.py [N] [FOLDER]

N kills of the command at random moments, a fault at every call that changes a file, every state that a power cut can
leave, and N flipped bits. After each, the same work is repeated and its cache is compared byte for byte. FOLDER is on
the disk to test; by default a temporary folder. Needs Linux and a C compiler.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.harness import Harness, compile_library

SCENARIOS = (
    "an extraction",
    "a resumed extraction",
    "an extraction that replaces a cache",
    "an extraction of shards",
    "an extraction that replaces shards",
    "the command",
)
FAULTS = {
    "before": "killed before each call",
    "half": "killed half way through each call",
    "full": "disk full from each call on",
    "broken": "each call fails once",
}
UNLIMITED = 10**9


def list_campaigns(kills: int) -> list[tuple[str, list[dict[str, Any]]]]:
    faults_at_calls = [
        (title, [{"campaign": "at every call", "mode": mode, "scenario": name} for name in SCENARIOS])
        for mode, title in FAULTS.items()
    ]
    power_cuts = [{"campaign": "power cuts", "at_most": UNLIMITED, "scenario": name} for name in SCENARIOS[:5]]
    flips = [{"campaign": "flipped cache", "at_most": kills // 2, "scenario": SCENARIOS[i]} for i in (0, 3)]
    return [
        ("killed at random moments", [{"campaign": "random kills", "kills": kills, "scenario": "the command"}]),
        *faults_at_calls,
        ("power cut between calls", power_cuts),
        ("two processes, killed or not", [{"campaign": "races", "trials": kills // 5, "scenario": "the command"}]),
        ("bit flipped in parts", [{"campaign": "flipped parts", "at_most": kills // 2, "scenario": SCENARIOS[1]}]),
        ("bit flipped in a cache", flips),
    ]


def main(kills: int = 1000, folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as folder_name:
        library = compile_library(Path(folder_name))
        if library is None:
            sys.exit("needs Linux and a C compiler")
        harness = Harness(library, Path(folder_name) / "trials")
        print("| what happens | trials | wrong | seconds | found |\n|---|---|---|---|---|")
        for title, runs in list_campaigns(kills):
            started = time.perf_counter()
            outcomes = [harness.run(**settings) for settings in runs]
            counts = sum((Counter(outcome["counts"]) for outcome in outcomes), Counter())
            wrong_outcomes = [text for outcome in outcomes for text in outcome["wrong"]]
            trials = sum(outcome["trials"] for outcome in outcomes)
            print(*wrong_outcomes, sep="\n", end="\n" * bool(wrong_outcomes), file=sys.stderr)
            outcome_counts = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
            seconds = time.perf_counter() - started
            print(f"| {title} | {trials:,} | {len(wrong_outcomes)} | {seconds:.0f} | {outcome_counts} |", flush=True)
        harness.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
