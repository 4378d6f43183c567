"""Ten epochs of the last stage on cached feature maps, against a typical training loop and the bound.

The loop: ImageFolder, DataLoader with 2 workers, eager fp32, the frozen part under no_grad, AdamW; the same network,
trainable part, transform and batch size, norms frozen in both. All of its epochs cost the same, so two are timed.
featpipe: `finetune` on JPEGs in folders, from the selection of the boundary to the end of the last epoch, including
preparation, the extraction of the feature maps and validation. The bound is the least work: one pass of decoding and of
the frozen part, each measured alone, and ten epochs of the rest on tensors in memory. The preparation of the network,
some two seconds for any number of images, is not counted against the bound.

A backbone such as ``resnet18:bf16`` trains in that precision. Loop and bound stay in fp32, so the share of the bound
has no meaning then.

    python tests/benchmarks/boundary.py [images] [rounds] [backbone[:precision] ...]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from extraction import run_script, write_photographs

LOOP_SCRIPT = """
import json, sys, time, torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision import transforms as T
from featpipe import backbones
from featpipe.backbones.stages import find_stages
folder, name, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3])
loaded = backbones.load(name, weights=None if "lite" in name else "none")
network, facts = loaded.network, loaded.transform
*_, last = find_stages(network, facts.size)
if "lite" in name:
    lower = nn.Sequential(network.conv_stem, network.bn1, *network.blocks[:-1])
    upper = nn.Sequential(network.blocks[-1], network.conv_head, network.bn2, network.global_pool)
else:
    lower = nn.Sequential(*list(network.children())[:7])
    upper = nn.Sequential(network.layer4, network.avgpool, nn.Flatten())
assert {id(p) for p in upper.parameters()} == {id(p) for n, p in network.named_parameters() if n in last}
upper = nn.Sequential(upper, nn.Linear(loaded.width, 4))
upper.requires_grad_(True)
resize = T.Resize(facts.resize, T.InterpolationMode(facts.interpolation))
transform = T.Compose([resize, T.CenterCrop(facts.crop), T.ToTensor(), T.Normalize(facts.mean, facts.std)])
dataset = ImageFolder(folder, transform)
loader = DataLoader(dataset, batch_size=32, shuffle=True, num_workers=2)
optimizer = torch.optim.AdamW(upper.parameters(), lr=1e-4)
started = time.perf_counter()
for epoch in range(epochs):
    for images, labels in loader:
        with torch.no_grad():
            maps = lower(images)
        loss = nn.functional.cross_entropy(upper(maps), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(json.dumps((time.perf_counter() - started) / epochs / len(dataset)))
"""
FEATPIPE_SCRIPT = """
import copy, json, logging, math, shutil, sys, time, torch
from dataclasses import replace
from pathlib import Path
import numpy as np
import featpipe
from featpipe import backbones
from featpipe.backbones.partition import partition_network
from featpipe.backbones.outputs import resolve_outputs
from featpipe.backbones.stages import find_stages
from featpipe.inference import Engine, resolve_device
from featpipe.bench import _Benchmark, _combine_rates
from featpipe.config import ExtractionConfig
folder, out, name, epochs, precision = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
cache = featpipe.extract(folder, backbone=name, weights=None if "lite" in name else "none", cache=out, device="cpu")
model = featpipe.train(cache, head="logistic")
loaded, messages = model.backbone, []
class TimedHandler(logging.Handler):
    def emit(self, record):
        messages.append((time.perf_counter(), record.getMessage()))
logging.getLogger("featpipe").addHandler(TimedHandler())
logging.getLogger("featpipe").setLevel(logging.INFO)
settings = dict(unfreeze="last", epochs=epochs, batch=32, patience=0, cache_activations="yes", keep_worse=True)
settings |= dict(learning_rate=1e-4, test=0.02, validation=0.02, device="cpu", precision=precision)
featpipe.finetune(model, folder, cache=out, **settings)
start_time = next(time for time, text in messages if text.startswith("trained:"))
end_time = next(time for time, text in messages if text.startswith(f"epoch {epochs}: "))
seconds = end_time - start_time
outcome = next(text for _, text in messages if "kept" in text)
caches = [featpipe.FeatureCache(path) for path in Path(out).glob("boundary-*.h5")]
disk, images = sum(cache.path.stat().st_size for cache in caches), sum(len(cache.ids) for cache in caches)
ready = sum(cache.manifest["seconds"]["preparing"] for cache in caches)

*others, last = find_stages(loaded.network, loaded.transform.size)
network = copy.deepcopy(loaded.network).to(memory_format=torch.channels_last)
frozen_modules = [module for stage in others for module in stage.modules]
partition = partition_network(replace(loaded, network=network), frozen_modules)
below = replace(loaded, outputs=resolve_outputs(loaded.network, [partition.output], loaded.transform))
config = ExtractionConfig(backbone=below, device="cpu", engine="torch", outputs=(partition.output,))
bench = _Benchmark(config, resolve_device("cpu"), below, 20.0, lambda event: None)
pictures, decoding = bench.measure_decoding([path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))[:128]])
forward = bench._measure_forward(Engine(below, bench.device, kind="torch", images=10**6), pictures)
once = 1 / _combine_rates("cpu", math.inf, decoding, forward)
for key, parameter in network.named_parameters():
    parameter.requires_grad_(key in last)
upper = torch.nn.Sequential(partition.upper, torch.nn.Linear(loaded.width, 4))
optimizer = torch.optim.AdamW([p for p in upper.parameters() if p.requires_grad], lr=1e-4)
maps = torch.rand(256, *below.shapes[partition.output])
maps = maps.contiguous(memory_format=torch.channels_last)
labels = torch.randint(0, 4, (256,))
passes = []
for _ in range(4):
    started = time.perf_counter()
    for start in range(0, 256, 32):
        loss = torch.nn.functional.cross_entropy(upper(maps[start : start + 32]), labels[start : start + 32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    passes.append((time.perf_counter() - started) / 256)
each = sorted(passes)[1]
print(json.dumps({"seconds": seconds / images, "once": once, "each": each, "bound": once + epochs * each,
    "ready": ready / images, "disk": disk / images, "images": images, "outcome": outcome}))
"""
EPOCHS = 10
TIMED_EPOCHS = 2  # of the loop


def compare(label: str, folder: Path, rounds: int) -> None:
    backbone, _, precision = label.partition(":")
    loop_seconds: list[float] = []
    results: list[dict[str, Any]] = []
    for _ in range(rounds):
        loop_seconds.append(run_script(LOOP_SCRIPT, folder, backbone, TIMED_EPOCHS) * EPOCHS)
        with tempfile.TemporaryDirectory() as out:
            results.append(run_script(FEATPIPE_SCRIPT, folder, out, backbone, EPOCHS, precision or "fp32"))
    seconds, extraction_milliseconds, epoch_milliseconds, bound = (
        1000 * statistics.median(result[key] for result in results) for key in ("seconds", "once", "each", "bound")
    )
    ratio = statistics.median(
        loop_value / result["seconds"] for loop_value, result in zip(loop_seconds, results, strict=True)
    )
    share = statistics.median(result["bound"] / (result["seconds"] - result["ready"]) for result in results)
    ready = statistics.median(result["ready"] * result["images"] for result in results)
    print(
        f"{label}: the loop {1000 * statistics.median(loop_seconds):.0f} ms an image, featpipe {seconds:.0f} ms: "
        f"{ratio:.2f} times faster, {share:.0%} of the bound "
        f"({bound:.0f} ms: {extraction_milliseconds:.1f} once, {epoch_milliseconds:.2f} an epoch), "
        f"ready in {ready:.1f} s; "
        f"{results[0]['disk'] / 1000:.1f} kB on disk an image; {results[0]['outcome']}",
        flush=True,
    )


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photographs"
        write_photographs(folder, n)
        for label in sys.argv[3:] or ["efficientnet_lite0", "resnet18"]:
            compare(label, folder, rounds)


if __name__ == "__main__":
    main()
