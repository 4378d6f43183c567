"""From bytes to the input of the network: milliseconds of each step, against Pillow and torchvision's v1 transforms.

Photographs of scikit-image as JPEGs; EfficientNet-Lite0's transform (bicubic to 256, the middle 224 × 224). First, the
results are checked to be equal to the bit. All steps run in turns, in one thread and in two at once. Run on an
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

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "brick", "grass", "gravel", "immunohistochemistry")
SIZES = {"500 × 375": 24, "1024 × 768": 12, "4000 × 3000": 3, "100 × 90": 24}
TRANSFORM = backbones.load("efficientnet_lite0").transform
TORCHVISION_TRANSFORM = T.Compose(
    [T.Resize(256, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)]
)


def make_jpegs(width: int, height: int, count: int) -> list[bytes]:
    encoded = []
    for name in islice(cycle(PHOTOGRAPHS), count):
        file = io.BytesIO()
        photograph = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        photograph.resize((width, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


def resize_with_pillow(picture: np.ndarray) -> torch.Tensor:
    """Resize and crop as `Transform` does without the embedding bag."""
    height, width = TRANSFORM._compute_resized_size(*picture.shape[:2])
    resized = resize_image(picture, height, width, "bicubic")
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    return to_tensor(resized)[:, top : top + 224, left : left + 224]


def normalize_by_formula(picture: torch.Tensor) -> torch.Tensor:
    half = torch.full((3, 1, 1), 0.5)
    return picture.to(torch.float32).div_(255).sub_(half).div_(half)


def transform_with_torchvision(data: bytes) -> torch.Tensor:
    return TORCHVISION_TRANSFORM(Image.open(io.BytesIO(data)).convert("RGB"))


def transform_with_pillow(data: bytes) -> torch.Tensor:
    digest(data)
    return normalize_by_formula(resize_with_pillow(decode_image(data)))


def transform_with_featpipe(data: bytes) -> torch.Tensor:
    digest(data)
    return TRANSFORM(to_tensor(jpeg.decode_with_torchvision(data)))


def measure_milliseconds(work: Callable[[Any], object], items: Sequence[Any], threads: int) -> float:
    """Milliseconds of an image in one thread, if each thread processes all of them."""

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
                times.setdefault((name, threads), []).append(measure_milliseconds(work, items, threads))
    for name in steps:
        print(f"{name:<48}{statistics.median(times[name, 1]):10.2f}{statistics.median(times[name, 2]):12.2f}")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    keep_freed_memory()  # as in an extraction
    assert jpeg.is_torchvision_exact()
    assert embedding_bag.is_exact()
    for size, count in SIZES.items():
        files = make_jpegs(*map(int, size.split(" × ")), count)
        for data in files:
            assert torch.equal(transform_with_featpipe(data), transform_with_pillow(data)), "other bits than Pillow"
            assert torch.equal(transform_with_featpipe(data), transform_with_torchvision(data)), (
                "other bits than torchvision"
            )
        pictures = [decode_image(data) for data in files]
        pillow_tensors = [resize_with_pillow(picture) for picture in pictures]
        featpipe_tensors = [TRANSFORM.prepare(to_tensor(picture)) for picture in pictures]
        steps = {
            "SHA-256": (digest, files),
            "decode: Pillow": (decode_image, files),
            "decode: featpipe": (jpeg.decode_with_torchvision, files),
            "resize and crop: Pillow": (resize_with_pillow, pictures),
            "resize and crop: featpipe": (lambda picture: TRANSFORM.prepare(to_tensor(picture)), pictures),
            "normalise: the formula": (normalize_by_formula, pillow_tensors),
            "normalise: featpipe": (TRANSFORM.normalize, featpipe_tensors),
            "all: Pillow, torchvision's v1 transforms": (transform_with_torchvision, files),
            "all: Pillow and the formula, with SHA-256": (transform_with_pillow, files),
            "all: featpipe, with SHA-256": (transform_with_featpipe, files),
        }
        compare(size, steps, rounds if count > 9 else max(1, rounds // 3))


if __name__ == "__main__":
    main()
