"""Thousands of kills, full disks, power cuts and flipped bits, counted.

    python tests/benchmarks/kills.py [N] [FOLDER]

N kills of the command at random moments, a fault at every call that changes a file, every folder that a power cut may
leave, and N flipped bits; each followed by the same work again, whose cache is compared byte for byte. FOLDER is on the
disk to try; a temporary one if not given. Linux, with a C compiler.
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
    "an extraction that goes on",
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
ALL = 10**9


def campaigns(kills: int) -> list[tuple[str, list[dict[str, Any]]]]:
    at_calls = [
        (title, [{"campaign": "at every call", "mode": mode, "scenario": name} for name in SCENARIOS])
        for mode, title in FAULTS.items()
    ]
    cuts = [{"campaign": "power cuts", "at_most": ALL, "scenario": name} for name in SCENARIOS[:5]]
    flips = [{"campaign": "flipped cache", "at_most": kills // 2, "scenario": SCENARIOS[i]} for i in (0, 3)]
    return [
        ("killed at random moments", [{"campaign": "random kills", "kills": kills, "scenario": "the command"}]),
        *at_calls,
        ("power cut between calls", cuts),
        ("two processes, killed or not", [{"campaign": "races", "trials": kills // 5, "scenario": "the command"}]),
        ("bit flipped in parts", [{"campaign": "flipped parts", "at_most": kills // 2, "scenario": SCENARIOS[1]}]),
        ("bit flipped in a cache", flips),
    ]


def main(kills: int = 1000, folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        library = compile_library(Path(place))
        if library is None:
            sys.exit("needs Linux and a C compiler")
        harness = Harness(library, Path(place) / "trials")
        print("| what happens | trials | wrong | seconds | found |\n|---|---|---|---|---|")
        for title, runs in campaigns(kills):
            started = time.perf_counter()
            outcomes = [harness.run(**given) for given in runs]
            counts = sum((Counter(outcome["counts"]) for outcome in outcomes), Counter())
            wrong = [text for outcome in outcomes for text in outcome["wrong"]]
            trials = sum(outcome["trials"] for outcome in outcomes)
            print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
            found = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
            seconds = time.perf_counter() - started
            print(f"| {title} | {trials:,} | {len(wrong)} | {seconds:.0f} | {found} |", flush=True)
        harness.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
