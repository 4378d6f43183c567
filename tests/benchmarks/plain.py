"""Plain and optimized implementations: CPU milliseconds an image of decoding, resizing and forward passes.

Process CPU time on one thread (OpenVINO: on its own threads), all variants in turns, medians over the rounds. The last
columns give what each optimization saves end to end: the time that would be added without it, as a share of decode +
resize + forward with it.

    python -m tests.benchmarks.plain [rounds] [network ...]
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from time import process_time
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from featpipe import backbones
from featpipe.backbones import Backbone
from featpipe.data import decode_image, jpeg
from featpipe.inference import candidate_precisions, compute_min_cosine, optimize
from featpipe.inference.devices import keep_freed_memory
from featpipe.inference.runner import EagerRunner
from tests.benchmarks.decoding import make_jpegs, resize_with_pillow, to_tensor

NETWORKS = ("efficientnet_lite0", "resnet18", "resnet50")
PRECISIONS = {"fp32": (torch.float32, 4), "bf16": (torch.bfloat16, 8)}  # dtype, and images in a batch


def measure(steps: Mapping[str, Callable[[], object]], rounds: int, images: int) -> dict[str, float]:
    """Median CPU milliseconds an image of each step."""
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            started = process_time()
            step()
            if round_number:  # the first round warms up
                milliseconds[name].append(1000 * (process_time() - started) / images)
    return {name: statistics.median(values) for name, values in milliseconds.items()}


def measure_pixels(rounds: int) -> dict[str, float]:
    """Decoding and resizing 500 × 375 JPEGs for Lite0's transform (bicubic to 256, the middle 224 × 224)."""
    files = make_jpegs(500, 375, 24)
    pictures = [decode_image(data) for data in files]
    transform = backbones.load("efficientnet_lite0").transform
    return measure(
        {
            "decode: Pillow": lambda: [decode_image(data) for data in files],
            "decode: torchvision's operator": lambda: [jpeg.decode_with_torchvision(data) for data in files],
            "resize: Pillow": lambda: [resize_with_pillow(picture) for picture in pictures],
            "resize: embedding bag": lambda: [transform.prepare(to_tensor(picture)) for picture in pictures],
        },
        3 * rounds,
        len(files),
    )


def fold_batch_norms(backbone: Backbone) -> Backbone:
    """torch's own folding, of each batch norm into the convolution that is declared before it."""
    network = copy.deepcopy(backbone.network)
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (convolution_name, convolution), (norm_name, norm) in pairwise(children):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, convolution_name, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, norm_name, nn.Sequential(*norm.children()))  # timm's has its activation within
    return replace(backbone, network=network)


def measure_forward(name: str, precision: str, rounds: int) -> dict[str, float]:
    dtype, batch = PRECISIONS[precision]
    loaded = backbones.load(name, weights=None if name.startswith("efficientnet") else "none")

    def make_eager(backbone: Backbone) -> EagerRunner:
        network: Any = copy.deepcopy(backbone.network)
        network = network.to(dtype=dtype, memory_format=torch.channels_last)
        return EagerRunner(replace(backbone, network=network), batch, dtype)

    eager = make_eager(loaded)
    candidates = {
        "eager, channels last": eager,
        "eager, batch norms folded by torch": make_eager(fold_batch_norms(loaded)),
        "own fusion": optimize.make_fused_runner(loaded, eager),
        "OpenVINO": optimize.make_openvino_runner(loaded, precision, eager, required=False),
    }
    for label in [label for label, runner in candidates.items() if runner is None]:
        print(f"{label}: not available in {precision} on this CPU")
    runners = {label: runner for label, runner in candidates.items() if runner is not None}
    images = torch.randint(0, 256, (batch, 3, *loaded.transform.size), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    for runner in runners.values():
        runner.enter_stream(1)
        assert compute_min_cosine(runner.submit(images)(), eager.submit(images)()) > 0.99, runner.name
    return measure(
        {label: lambda runner=runner: runner.submit(images)() for label, runner in runners.items()}, rounds, batch
    )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    networks = sys.argv[2:] or NETWORKS
    torch.set_num_threads(1)
    keep_freed_memory()
    pixels = measure_pixels(rounds)
    for step, value in pixels.items():
        print(f"{step:<40}{value:8.2f} ms")
    decode, resize = pixels["decode: torchvision's operator"], pixels["resize: embedding bag"]
    decode_gain, resize_gain = pixels["decode: Pillow"] - decode, pixels["resize: Pillow"] - resize
    for name in networks:
        for precision in PRECISIONS:
            if precision not in ("fp32", *candidate_precisions(torch.device("cpu"))):
                print(f"\n{name} {precision}: skipped, this CPU computes faster in fp32")
                continue
            print(f"\n{name} {precision:<22}{'forward':>12}{'decode saves':>13}{'resize saves':>13}")
            for label, forward in measure_forward(name, precision, rounds).items():
                total = decode + resize + forward
                print(f"{label:<40}{forward:8.2f} ms{decode_gain / total:12.1%}{resize_gain / total:13.1%}")


if __name__ == "__main__":
    main()
