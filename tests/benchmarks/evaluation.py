"""How long an evaluation and its page take for 10,000 photographs, and whether sets of answers hold what they promise.

Photographs are cuts of 500 × 375 of scikit-image's own, 1,000 of each of ten; the network is a random one, as wide as
EfficientNet-Lite0. Sets and novelty are those of the demonstration's tiles, split at random many times.
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
    """As wide as EfficientNet-Lite0, and about as quick as reading is."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.filters = nn.Conv2d(3, 1280, 5, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.filters(x).relu().mean((2, 3))


def twelve(image: torch.Tensor) -> torch.Tensor:
    """Twelve by twelve pixels."""
    return nn.functional.interpolate(image[None].float(), (12, 12), mode="area")[0] / 255


def photographs(folder: Path, each: dict[str, int]) -> None:
    """Cuts of different size and place, as JPEGs of 500 × 375."""
    rng = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(_load_photograph(name)).convert("RGB")
        for part, n in each.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                width = int(rng.integers(100, 250))
                height = width * 3 // 4
                x, y = (int(rng.integers(0, side - of)) for side, of in zip(picture.size, (width, height), strict=True))
                cut = picture.crop((x, y, x + width, y + height)).resize((500, 375), Image.Resampling.BICUBIC)
                cut.save(folder / part / name / f"{i:05}.jpg", quality=90)


def page(folder: Path) -> None:
    """Seconds and size."""
    photographs(folder, {"train": 300, "test": 1000})
    network = backbones.load(Random(), transform=twelve)
    caches = {part: extract(folder / part, backbone=network, cache=folder / "cache") for part in ("train", "test")}
    model = train(caches["train"], params={"C": 1.0}, cv=3)
    started = perf_counter()
    evaluation = evaluate(model, caches["test"], trained_on=caches["train"])
    seconds = {"scores with intervals": perf_counter() - started}
    for name in ("neighbourhood", "learning_curve", "findings"):
        before = perf_counter()
        getattr(evaluation, name)
        seconds[name.replace("_", " ")] = perf_counter() - before
    before = perf_counter()
    made = write_report(folder / "page.html", evaluation)
    seconds["page"] = perf_counter() - before
    for name, taken in seconds.items():
        print(f"{name:<24}{taken:6.1f} s")
    print(
        f"{'all':<24}{sum(seconds.values()):6.1f} s, {len(evaluation.rows):,} rows, {made.stat().st_size / 1e6:.1f} MB"
    )


def promises(folder: Path) -> None:
    """Coverage of sets and uniformity of novelty over random halves."""
    tiles, labels = write_tiles(folder)
    text = labels.read_text().splitlines()
    found: dict[float, list[float]] = {}
    above = []
    for seed in range(SPLITS):
        rng = np.random.default_rng(seed)
        rows = [f"{line.rsplit(',', 1)[0]},{'train' if rng.random() < 0.5 else 'test'}" for line in text[1:]]
        table = folder / f"{seed}.csv"
        table.write_text("\n".join([text[0], *rows]) + "\n")
        cache = extract(tiles, labels=table, cache=folder / "cache")
        evaluation = evaluate(train(cache, params={"C": 0.01}, cv=5, random_state=seed), cache)
        for coverage in evaluation.coverage:
            found.setdefault(coverage.level, []).append(coverage.coverage.value)
        assert evaluation.novelty is not None
        above.append(float((evaluation.novelty >= 0.95).mean()))
    for level, values in found.items():
        print(f"sets at {level:.2f}: {np.mean(values):.3f} ± {np.std(values):.3f} hold the right class")
    print(f"novelty of 0.95 or more: {np.mean(above):.3f} ± {np.std(above):.3f} of the images, 0.050 expected")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as home:
        {"page": page, "promises": promises}[sys.argv[1] if len(sys.argv) > 1 else "page"](Path(home))
