"""From 500 × 375 JPEGs to features on disk: featpipe against a typical script, and against the bound.

The script: ImageFolder, DataLoader with 2 workers, eager fp32 under no_grad, a list, np.save; the same network, weights
and transform. featpipe: from a .tar to a published cache, each engine and precision in its own process. Process start
and preparation of the network are not counted. The bound is the throughput that decoding alone and forward passes alone
allow together, measured in the same process directly afterwards. Cosines are the minimum over the images, to the
features of the script.

    python tests/benchmarks/extraction.py [images] [rounds] [backbone ...]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCRIPT = """
import sys, time, numpy as np, torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision import transforms as T
from featpipe import backbones
loaded = backbones.load(sys.argv[3], weights=None if "lite" in sys.argv[3] else "none")
network, facts = loaded.network, loaded.transform
resize = T.Resize(facts.resize, T.InterpolationMode(facts.interpolation))
transform = T.Compose([resize, T.CenterCrop(facts.crop), T.ToTensor(), T.Normalize(facts.mean, facts.std)])
started = time.perf_counter()
dataset = ImageFolder(sys.argv[1], transform)
loader = DataLoader(dataset, batch_size=32, num_workers=2)
features = []
with torch.no_grad():
    for images, _ in loader:
        features.append(network(images).numpy())
np.save(sys.argv[2] + "/features.npy", np.concatenate(features))
print(len(dataset) / (time.perf_counter() - started))
"""
FEATPIPE_SCRIPT = """
import json, sys, numpy as np
from featpipe import extract
from featpipe.inference import resolve_device
from featpipe.extraction import load_backbone
from featpipe.bench import _Benchmark, _combine_rates
from featpipe.runtime import ignore_progress
from featpipe.config import ExtractionConfig
tar, out, name, engine, precision, peer = sys.argv[1:]
weights = None if "lite" in name else "none"
settings = dict(backbone=name, weights=weights, engine=engine, precision=precision, device="cpu")
cache = extract(tar, out=out + "/f.h5", **settings)
expected = np.load(peer)
features = cache.features()[: len(expected)].astype(np.float64)
cosine = (features * expected).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(expected, axis=1)
config = ExtractionConfig(**settings)
bench = _Benchmark(config, resolve_device("cpu"), load_backbone(config), 27.0)
import tarfile
with tarfile.open(tar) as archive:
    images = [archive.extractfile(member).read() for member in archive.getmembers()[:128]]
pictures, decoding = bench.measure_decoding(images)
from featpipe.inference import Engine
inference_engine = Engine(bench.backbone, bench.device, precision, kind=engine, images=10**6)
forward = bench._measure_forward(inference_engine, pictures)
print(json.dumps({"engine": cache.manifest["engine"], "rate": cache.manifest["images_per_second"], "decoding": decoding,
    "forward": forward, "bound": _combine_rates("cpu", float("inf"), decoding, forward), "cosine": float(cosine.min()),
    "preparing": cache.manifest["seconds"]["preparing"], "seconds": cache.manifest["seconds"]}))
"""
VARIANTS = [("torch", "fp32"), ("openvino", "fp32"), ("torch", "bf16"), ("openvino", "bf16")]
REPEATS = 4  # of the images in the .tar, as different files, because featpipe is faster than the script


def write_photographs(folder: Path, n: int) -> None:
    """Write JPEGs of about 65 kB: smooth noise with grain."""
    rng = np.random.default_rng(0)
    for i in range(n):
        (folder / f"class{i * 4 // n}").mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = rng.normal(0, 12, (375, 500, 3))
        picture = Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8))
        picture.save(folder / f"class{i * 4 // n}" / f"{i:05}.jpg", quality=85)


def pack_tar(folder: Path, path: Path) -> None:
    files = sorted(folder.rglob("*.jpg"))
    with tarfile.open(path, "w") as tar:
        for repeat in range(REPEATS):
            for number, file in enumerate(files):
                data = file.read_bytes() + repeat.to_bytes(4, "big")
                member = tarfile.TarInfo(f"images/{repeat}-{number:05}.jpg")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))


def run_script(code: str, *arguments: object) -> Any:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare(backbone: str, folder: Path, tar: Path, rounds: int) -> None:
    script_rates: list[float] = []
    results_by_variant: dict[tuple[str, str], list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            script_rates.append(run_script(SCRIPT, folder, out, backbone))
            for variant in VARIANTS:
                with tempfile.TemporaryDirectory() as featpipe_out:
                    results_by_variant[variant].append(
                        run_script(FEATPIPE_SCRIPT, tar, featpipe_out, backbone, *variant, f"{out}/features.npy")
                    )
    print(f"{backbone}\n{'the script':<28}{statistics.median(script_rates):7.1f} images/s")
    for (_, precision), results in results_by_variant.items():
        ratio = statistics.median(
            result["rate"] / script_rate for result, script_rate in zip(results, script_rates, strict=True)
        )
        share = statistics.median(result["rate"] / result["bound"] for result in results)
        medians = {
            name: statistics.median(result[name] for result in results)
            for name in ("rate", "decoding", "forward", "preparing")
        }
        print(
            f"{results[0]['engine'] + ', ' + precision:<28}{medians['rate']:7.1f} images/s {ratio:6.2f} × the script "
            f"{share:6.0%} of the bound (decoding {medians['decoding']:.0f}/s, forward {medians['forward']:.0f}/s); "
            f"1 - minimum cosine {1 - min(result['cosine'] for result in results):.1e}; "
            f"ready in {medians['preparing']:.1f} s",
            flush=True,
        )


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as name:
        folder, tar = Path(name) / "photographs", Path(name) / "photographs.tar"
        write_photographs(folder, n)
        pack_tar(folder, tar)
        for backbone in sys.argv[3:] or ["efficientnet_lite0", "resnet50"]:
            compare(backbone, folder, tar, rounds)


if __name__ == "__main__":
    main()
