"""On a GPU: an extraction, what the GPU does alone in the same precision, and what the cores do alone, in the same run.

Decoding is what is left to the cores, who hand pictures over unresized; forward is copying, resizing and the network.
Then the seconds of the extraction: reading and decoding of all workers together, embedding of the thread that waits for
the GPU. Skips without a CUDA device.

    python tests/benchmarks/gpu.py [seconds for each]
"""

from __future__ import annotations

import sys

import torch

from featpipe.bench import run_benchmark

BACKBONES = {"resnet50": "none", "vit_b_16": "none", "efficientnet_lite0": None}


def main() -> None:
    if not torch.cuda.is_available():
        print("there is no CUDA device that torch can use")
        return
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 40.0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, weights in BACKBONES.items():
        for precision in ("fp32", "bf16", "fp16"):
            found = run_benchmark(device="cuda:0", backbone=name, weights=weights, precision=precision, seconds=seconds)
            taken = found.forward[0]
            print(
                f"{name:<20}{precision:<6}batch {taken.batch:>4}  forward {taken.images_per_second:8.0f}/s  "
                f"decoding {found.decoding:8.0f}/s  extraction {found.extraction:8.0f}/s  "
                f"{found.extraction / found.bound:5.0%} of the bound  ({found.bottleneck})",
                flush=True,
            )
            print("  seconds: " + ", ".join(f"{step} {spent:.2f}" for step, spent in found.seconds.items()), flush=True)


if __name__ == "__main__":
    main()
