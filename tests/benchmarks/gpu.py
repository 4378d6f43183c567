"""Extraction on a GPU, against the GPU alone in the same precision and the CPU cores alone, in the same run.

The cores only decode, and pass on images that are not resized; "forward" is copying, resizing and the network. The
seconds of the extraction are those of reading and decoding in all workers together, and of embedding in the thread that
waits for the GPU. Skipped without a CUDA device.

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
            benchmark = run_benchmark(
                device="cuda:0", backbone=name, weights=weights, precision=precision, seconds=seconds
            )
            forward = benchmark.forward[0]
            print(
                f"{name:<20}{precision:<6}batch {forward.batch:>4}  forward {forward.images_per_second:8.0f}/s  "
                f"decoding {benchmark.decoding:8.0f}/s  extraction {benchmark.extraction:8.0f}/s  "
                f"{benchmark.extraction / benchmark.bound:5.0%} of the bound  ({benchmark.bottleneck})",
                flush=True,
            )
            print(
                "  seconds: "
                + ", ".join(f"{step} {step_seconds:.2f}" for step, step_seconds in benchmark.seconds.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
