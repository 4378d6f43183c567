"""From a folder of 500 × 375 JPEGs to features on disk: featpipe against the script that people write, in turns.

The peer: ImageFolder, DataLoader with 2 workers, eager fp32 under no_grad, a list, np.save; the same network, weights
and transform. Run on an otherwise idle machine:

    python tests/benchmarks/extraction.py [images]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

PEER = """
import sys, numpy as np, torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision import transforms as T
from featpipe import backbone
network = backbone.load("efficientnet_lite0").network
resize = T.Resize(256, T.InterpolationMode.BICUBIC)
transform = T.Compose([resize, T.CenterCrop(224), T.ToTensor(), T.Normalize([.5] * 3, [.5] * 3)])
loader = DataLoader(ImageFolder(sys.argv[1], transform), batch_size=32, num_workers=2)
features = []
with torch.no_grad():
    for images, _ in loader:
        features.append(network(images).numpy())
np.save(sys.argv[2] + "/features.npy", np.concatenate(features))
"""
OURS = "import sys; from featpipe import extract; extract(sys.argv[1], out=sys.argv[2] + '/features.h5')"
START = "from featpipe import backbone; import torchvision, featpipe.extraction; backbone.load('efficientnet_lite0')"
ROUNDS = 3


def photographs(folder: Path, n: int) -> None:
    """JPEGs of about 70 kB, cut from smooth noise with grain."""
    rng = np.random.default_rng(0)
    for i in range(n):
        (folder / f"class{i % 4}").mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = rng.normal(0, 12, (375, 500, 3))
        picture = Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8))
        picture.save(folder / f"class{i % 4}" / f"{i:05}.jpg", quality=85)


def seconds(code: str, *arguments: str) -> float:
    started = perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], check=True)
    return perf_counter() - started


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photographs"
        photographs(folder, n)
        times: dict[str, list[float]] = {"peer": [], "featpipe": []}
        for _ in range(ROUNDS):
            start = seconds(START)
            for who, code in (("peer", PEER), ("featpipe", OURS)):
                with tempfile.TemporaryDirectory() as out:
                    times[who].append(seconds(code, str(folder), out) - start)
        for who, values in times.items():
            print(f"{who:<10}{n / statistics.median(values):7.1f} images/s")
        ratios = [peer / ours for peer, ours in zip(times["peer"], times["featpipe"], strict=True)]
        print(f"ratio     {statistics.median(ratios):7.2f} ×   (start-up of the process subtracted)")


if __name__ == "__main__":
    main()
