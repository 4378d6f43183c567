"""Time of an evaluation and its report for 10,000 photographs, and coverage of prediction sets.

Photographs are crops of 500 × 375 from photographs of scikit-image, 1,000 of each of ten; the network is random, as
wide as EfficientNet-Lite0. Coverage and novelty are measured on the tiles of the demo, with many random splits.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch import nn

from featpipe import backbones, evaluate, extract, train
from featpipe.data.demo_tiles import _load_photograph
from featpipe.demo import write_tiles
from featpipe.report import write_report

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "retina",
    "hubble_deep_field",
    "brick",
    "grass",
    "gravel",
    "moon",
)
SPLITS = 20


class Random(nn.Module):
    """A random network as wide as EfficientNet-Lite0, and about as fast as reading the images."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.filters = nn.Conv2d(3, 1280, 5, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.filters(x).relu().mean((2, 3))


def resize_to_twelve(image: torch.Tensor) -> torch.Tensor:
    """Resize to 12 × 12 pixels."""
    return nn.functional.interpolate(image[None].float(), (12, 12), mode="area")[0] / 255


def write_photographs(folder: Path, n_by_part: dict[str, int]) -> None:
    """Write random crops as JPEGs of 500 × 375."""
    rng = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(_load_photograph(name)).convert("RGB")
        for part, n in n_by_part.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                width = int(rng.integers(100, 250))
                height = width * 3 // 4
                x, y = (
                    int(rng.integers(0, side - size)) for side, size in zip(picture.size, (width, height), strict=True)
                )
                crop = picture.crop((x, y, x + width, y + height)).resize((500, 375), Image.Resampling.BICUBIC)
                crop.save(folder / part / name / f"{i:05}.jpg", quality=90)


def measure_times(folder: Path) -> None:
    """Print the time of each step and the size of the report."""
    write_photographs(folder, {"train": 300, "test": 1000})
    network = backbones.load(Random(), transform=resize_to_twelve)
    caches = {part: extract(folder / part, backbone=network, cache=folder / "cache") for part in ("train", "test")}
    model = train(caches["train"], params={"C": 1.0}, cv=3)
    started = perf_counter()
    evaluation = evaluate(model, caches["test"], trained_on=caches["train"])
    seconds = {"scores with intervals": perf_counter() - started}
    for name in ("neighbourhood", "learning_curve", "findings"):
        step_started = perf_counter()
        getattr(evaluation, name)
        seconds[name.replace("_", " ")] = perf_counter() - step_started
    step_started = perf_counter()
    report = write_report(folder / "page.html", evaluation)
    seconds["page"] = perf_counter() - step_started
    for name, duration in seconds.items():
        print(f"{name:<24}{duration:6.1f} s")
    megabytes = report.stat().st_size / 1e6
    print(f"{'all':<24}{sum(seconds.values()):6.1f} s, {len(evaluation.rows):,} rows, {megabytes:.1f} MB")


def measure_coverage(folder: Path) -> None:
    """Print the coverage of prediction sets and the share of novel images over random halves."""
    tiles, labels = write_tiles(folder)
    text = labels.read_text().splitlines()
    coverages: dict[float, list[float]] = {}
    novel_shares = []
    for seed in range(SPLITS):
        rng = np.random.default_rng(seed)
        rows = [f"{line.rsplit(',', 1)[0]},{'train' if rng.random() < 0.5 else 'test'}" for line in text[1:]]
        table = folder / f"{seed}.csv"
        table.write_text("\n".join([text[0], *rows]) + "\n")
        cache = extract(tiles, labels=table, cache=folder / "cache")
        evaluation = evaluate(train(cache, params={"C": 0.01}, cv=5, random_state=seed), cache)
        for coverage in evaluation.coverage:
            coverages.setdefault(coverage.level, []).append(coverage.coverage.value)
        assert evaluation.novelty is not None
        novel_shares.append(float((evaluation.novelty >= 0.95).mean()))
    for level, values in coverages.items():
        print(f"sets at {level:.2f}: {np.mean(values):.3f} ± {np.std(values):.3f} contain the true class")
    mean, std = np.mean(novel_shares), np.std(novel_shares)
    print(f"novelty of 0.95 or more: {mean:.3f} ± {std:.3f} of the images, 0.050 expected")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as home:
        {"page": measure_times, "promises": measure_coverage}[sys.argv[1] if len(sys.argv) > 1 else "page"](Path(home))
