"""The cost of writing in an extraction: parts that are committed every few seconds, and the cache at the end.

The network is the fastest packaged one, so that the share of writing is largest:

    python tests/benchmarks/writing.py [images]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from time import perf_counter

from extraction import write_photographs

from featpipe import extract
from featpipe.extraction import plan


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    publishing = [0.0]
    write = plan.write_cache

    def write_and_time(*arguments: object) -> None:
        started = perf_counter()
        write(*arguments)  # type: ignore[arg-type]
        publishing[0] += perf_counter() - started

    plan.write_cache = write_and_time
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photographs"
        write_photographs(folder, n)
        started = perf_counter()
        cache = extract(folder, out=Path(name) / "a.h5")
        total = perf_counter() - started
        committing = cache.manifest["seconds"]["committing"]
    print(f"{n} images in {total:.1f} s: {committing:.2f} s in committing parts, {publishing[0]:.2f} s in publishing")
    print(f"writing is {100 * (committing + publishing[0]) / total:.2f} % of the extraction")


if __name__ == "__main__":
    main()
