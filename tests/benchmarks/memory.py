"""Peak resident memory of an extraction of few and of many images, each in its own process.

python tests/benchmarks/memory.py [few] [many] [engine]...
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import extraction

EXTRACT = """
import resource, sys
from featpipe import extract
# in its own folder, or the embeddings of the other engine would be copied
cache = extract(sys.argv[1], cache=sys.argv[2], engine=sys.argv[3], device="cpu")
print(len(cache), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, cache.manifest["images_per_second"])
"""


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:3]] or [2000, 20000]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photographs"
        extraction.write_photographs(folder, 100)
        for engine in sys.argv[3:] or ("torch", "openvino"):
            peaks = []
            for n in sizes:
                extraction.REPEATS = n // 100
                tar = Path(name) / "photographs.tar"
                extraction.pack_tar(folder, tar)
                command = [sys.executable, "-W", "ignore", "-c", EXTRACT, tar, Path(name) / f"{engine}{n}", engine]
                process = subprocess.run(command, check=True, capture_output=True, text=True)
                images, peak, rate = map(float, process.stdout.split())
                peaks.append(peak)
                print(f"{engine:<10}{images:>8.0f} images  peak {peak:7.0f} MiB  {rate:6.1f} images/s", flush=True)
            print(f"{engine:<10}{peaks[-1] / peaks[0]:.2f} × the memory for {sizes[-1] / sizes[0]:.0f} × the images")


if __name__ == "__main__":
    main()
