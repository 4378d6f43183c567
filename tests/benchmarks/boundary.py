"""Ten epochs of the last stage: on feature maps computed once, against the loop that people write and the bound.

The loop: ImageFolder, DataLoader with 2 workers, eager fp32, the frozen part under no_grad, AdamW; the same network,
trainable part, transform and size of batch, norms frozen in both. All of its epochs cost the same, so two are timed.
featpipe: `finetune` on JPEGs in folders, from before the boundary is looked for to the end of the last epoch, with
making ready, the extraction of the maps and its validation. The bound is what the saved work allows: one pass of
decoding and of the part below, each measured alone, and ten epochs of the part above on tensors in memory; the making
ready of the network, some two seconds whatever the number of images, is not counted against it.

A backbone as ``resnet18:bf16`` trains in that precision: loop and bound stay fp32, and so the share of the bound says
nothing then.

    python tests/benchmarks/boundary.py [images] [rounds] [backbone[:precision] ...]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from extraction import answer, photographs

PEER = """
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
OURS = """
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
from featpipe.bench import _Benchmark, _combined_rate
from featpipe.config import ExtractionConfig
folder, out, name, epochs, precision = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
cache = featpipe.extract(folder, backbone=name, weights=None if "lite" in name else "none", cache=out, device="cpu")
model = featpipe.train(cache, head="logistic")
loaded, noted = model.backbone, []
class Noting(logging.Handler):
    def emit(self, record):
        noted.append((time.perf_counter(), record.getMessage()))
logging.getLogger("featpipe").addHandler(Noting())
logging.getLogger("featpipe").setLevel(logging.INFO)
settings = dict(unfreeze="last", epochs=epochs, batch=32, patience=0, cache_activations="yes", keep_worse=True)
settings |= dict(learning_rate=1e-4, test=0.02, validation=0.02, device="cpu", precision=precision)
featpipe.finetune(model, folder, cache=out, **settings)
began = next(at for at, text in noted if text.startswith("trained:"))
ended = next(at for at, text in noted if text.startswith(f"epoch {epochs}: "))
seconds = ended - began
said = next(text for at, text in noted if "kept" in text)
caches = [featpipe.FeatureCache(path) for path in Path(out).glob("boundary-*.h5")]
disk, images = sum(cache.path.stat().st_size for cache in caches), sum(len(cache.ids) for cache in caches)
ready = sum(cache.manifest["seconds"]["preparing"] for cache in caches)

*others, last = find_stages(loaded.network, loaded.transform.size)
network = copy.deepcopy(loaded.network).to(memory_format=torch.channels_last)
found = partition_network(replace(loaded, network=network), [module for stage in others for module in stage.modules])
below = replace(loaded, outputs=resolve_outputs(loaded.network, [found.output], loaded.transform))
asked = ExtractionConfig(backbone=below, device="cpu", engine="torch", outputs=(found.output,))
bench = _Benchmark(asked, resolve_device("cpu"), below, 20.0, lambda event: None)
pictures, decoding = bench.measure_decoding([path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))[:128]])
forward = bench._measure_forward(Engine(below, bench.device, kind="torch", images=10**6), pictures)
once = 1 / _combined_rate("cpu", math.inf, decoding, forward)
for key, parameter in network.named_parameters():
    parameter.requires_grad_(key in last)
upper = torch.nn.Sequential(found.upper, torch.nn.Linear(loaded.width, 4))
optimizer = torch.optim.AdamW([p for p in upper.parameters() if p.requires_grad], lr=1e-4)
maps = torch.rand(256, *below.shapes[found.output])
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
    "ready": ready / images, "disk": disk / images, "images": images, "said": said}))
"""
EPOCHS = 10
TIMED = 2  # of the loop's


def compare(what: str, folder: Path, rounds: int) -> None:
    backbone, _, precision = what.partition(":")
    script: list[float] = []
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        script.append(answer(PEER, folder, backbone, TIMED) * EPOCHS)
        with tempfile.TemporaryDirectory() as out:
            found.append(answer(OURS, folder, out, backbone, EPOCHS, precision or "fp32"))
    seconds, once, each, bound = (
        1000 * statistics.median(one[key] for one in found) for key in ("seconds", "once", "each", "bound")
    )
    ratio = statistics.median(s / one["seconds"] for s, one in zip(script, found, strict=True))
    share = statistics.median(one["bound"] / (one["seconds"] - one["ready"]) for one in found)
    ready = statistics.median(one["ready"] * one["images"] for one in found)
    print(
        f"{what}: the loop {1000 * statistics.median(script):.0f} ms an image, featpipe {seconds:.0f} ms: "
        f"{ratio:.2f} times faster, {share:.0%} of the bound ({bound:.0f} ms: {once:.1f} once, {each:.2f} an epoch), "
        f"ready in {ready:.1f} s; "
        f"{found[0]['disk'] / 1000:.1f} kB on disk an image; {found[0]['said']}",
        flush=True,
    )


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photographs"
        photographs(folder, n)
        for what in sys.argv[3:] or ["efficientnet_lite0", "resnet18"]:
            compare(what, folder, rounds)


if __name__ == "__main__":
    main()
