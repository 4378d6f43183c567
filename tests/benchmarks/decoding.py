"""From bytes to the network's input: milliseconds of each step, against Pillow and torchvision's v1 transforms.

Photographs of scikit-image as JPEGs; EfficientNet-Lite0's transform (bicubic to 256, the middle 224 × 224). The peers
do the same to the bit, which is checked first. Everything is done in turns, by one thread and by two at once. Run on an
otherwise idle machine:

    python tests/benchmarks/decoding.py [rounds]
"""

from __future__ import annotations

import io
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from time import perf_counter
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image
from torchvision import transforms as T

from featpipe import backbones
from featpipe.backbones.resize import embedding_bag
from featpipe.data import decode_image, jpeg, resize_image
from featpipe.inference.devices import keep_freed_memory
from featpipe.storage import digest

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "retina", "brick", "grass", "gravel", "immunohistochemistry")
SIZES = {"500 × 375": 24, "1024 × 768": 12, "4000 × 3000": 3, "100 × 90": 24}
TRANSFORM = backbones.load("efficientnet_lite0").transform
THEIRS = T.Compose(
    [T.Resize(256, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]
)


def jpegs(width: int, height: int, count: int) -> list[bytes]:
    encoded = []
    for name in islice(cycle(NAMES), count):
        file = io.BytesIO()
        photograph = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        photograph.resize((width, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


def tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


def pillow_resizes(picture: np.ndarray) -> torch.Tensor:
    """What `Transform.picture` does where it has no sums of its own."""
    height, width = TRANSFORM._compute_resized_size(*picture.shape[:2])
    resized = resize_image(picture, height, width, "bicubic")
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    return tensor(resized)[:, top : top + 224, left : left + 224]


def by_the_formula(picture: torch.Tensor) -> torch.Tensor:
    half = torch.full((3, 1, 1), 0.5)
    return picture.to(torch.float32).div_(255).sub_(half).div_(half)


def by_torchvision(data: bytes) -> torch.Tensor:
    return THEIRS(Image.open(io.BytesIO(data)).convert("RGB"))


def before(data: bytes) -> torch.Tensor:
    digest(data)
    return by_the_formula(pillow_resizes(decode_image(data)))


def now(data: bytes) -> torch.Tensor:
    digest(data)
    return TRANSFORM(tensor(jpeg.decode_with_torchvision(data)))


def milliseconds(work: Callable[[Any], object], items: Sequence[Any], threads: int) -> float:
    """Of one image in one thread, where each thread does all of them."""

    def run() -> None:
        torch.set_num_threads(1)
        start.wait()
        for item in items:
            work(item)

    start = threading.Barrier(threads + 1)
    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    start.wait()
    started = perf_counter()
    for worker in workers:
        worker.join()
    return 1000 * (perf_counter() - started) / len(items)


def compare(title: str, steps: dict[str, tuple[Callable[[Any], object], Sequence[Any]]], rounds: int) -> None:
    print(f"\n{title:<48}{'1 thread':>10}{'2 threads':>12}   ms an image and thread")
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for threads in (1, 2):
            for name, (work, items) in steps.items():
                times.setdefault((name, threads), []).append(milliseconds(work, items, threads))
    for name in steps:
        print(f"{name:<48}{statistics.median(times[name, 1]):10.2f}{statistics.median(times[name, 2]):12.2f}")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    keep_freed_memory()  # as in an extraction
    assert jpeg.is_torchvision_exact()
    assert embedding_bag.is_exact()
    for size, count in SIZES.items():
        files = jpegs(*map(int, size.split(" × ")), count)
        for data in files:
            assert torch.equal(now(data), before(data)), "other bits than before"
            assert torch.equal(now(data), by_torchvision(data)), "other bits than torchvision's"
        pictures = [decode_image(data) for data in files]
        theirs = [pillow_resizes(picture) for picture in pictures]
        ours = [TRANSFORM.prepare(tensor(picture)) for picture in pictures]
        steps = {
            "SHA-256": (digest, files),
            "decode: Pillow": (decode_image, files),
            "decode: featpipe": (jpeg.decode_with_torchvision, files),
            "resize and crop: Pillow": (pillow_resizes, pictures),
            "resize and crop: featpipe": (lambda picture: TRANSFORM.prepare(tensor(picture)), pictures),
            "normalise: the formula": (by_the_formula, theirs),
            "normalise: featpipe": (TRANSFORM.normalize, ours),
            "all: Pillow, torchvision's v1 transforms": (by_torchvision, files),
            "all: featpipe before, with SHA-256": (before, files),
            "all: featpipe, with SHA-256": (now, files),
        }
        compare(size, steps, rounds if count > 9 else max(1, rounds // 3))


if __name__ == "__main__":
    main()
