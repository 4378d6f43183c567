"""What writing costs an extraction: parts that are durable every few seconds, and the cache at the end.

The network is the quickest of those that come along, so that writing weighs most:

    python tests/benchmarks/writing.py [images]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from time import perf_counter

from extraction import photographs

from featpipe import extract, extraction


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    publishing = [0.0]
    write = extraction.write_cache

    def timed(*given: object) -> None:
        started = perf_counter()
        write(*given)  # type: ignore[arg-type]
        publishing[0] += perf_counter() - started

    extraction.write_cache = timed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photographs"
        photographs(folder, n)
        started = perf_counter()
        cache = extract(folder, out=Path(name) / "a.h5")
        total = perf_counter() - started
        committing = cache.manifest["seconds"]["committing"]
    print(f"{n} images in {total:.1f} s: {committing:.2f} s in committing parts, {publishing[0]:.2f} s in publishing")
    print(f"writing is {100 * (committing + publishing[0]) / total:.2f} % of the extraction")


if __name__ == "__main__":
    main()
