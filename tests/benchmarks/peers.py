"""Photographs to features on disk with one network: featpipe beside other tools, each used as its own guide shows.

Every tool embeds the same JPEGs of 500 × 375 with ResNet-50 in a process of its own; the weights are random, since none
can be fetched here, which changes no speed. Not counted are the start of the process and the making of the network.
What is not installed is left out. thingsvision needs old versions of torch and torchvision: name the interpreter of an
environment that has it.

    python tests/benchmarks/peers.py [images] [rounds] [--thingsvision PYTHON]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from extraction import PEER, photographs

CLOCK = """
import json, sys, time, warnings
from pathlib import Path
import numpy as np, torch
warnings.simplefilter("ignore")
folder, out = Path(sys.argv[1]), sys.argv[2] + "/features"
paths = sorted(map(str, folder.rglob("*.jpg")))
def done(features, started):
    assert len(features) == len(paths) and np.isfinite(features).all()
    print(json.dumps(len(paths) / (time.perf_counter() - started)))
"""
FEATPIPE = (
    CLOCK
    + """
from featpipe import extract
engine, precision = sys.argv[3:]
cache = extract(folder, backbone="resnet50", weights="none", engine=engine, precision=precision, device="cpu",
    out=out + ".h5")
print(json.dumps(cache.manifest["images_per_second"]))
"""
)
TIMM = (
    CLOCK
    + """
import timm
from timm.data import create_dataset, create_loader, resolve_data_config
network = timm.create_model("resnet50", pretrained=False, num_classes=0).eval()
started = time.perf_counter()
dataset = create_dataset(root=str(folder), name="")
config = resolve_data_config({}, model=network)
asked = dict(batch_size=32, use_prefetcher=False, num_workers=2, device=torch.device("cpu"))
loader = create_loader(dataset, **asked, **config)
features = []
with torch.inference_mode():
    for images, _ in loader:
        features.append(network(images).numpy())
np.save(out, np.concatenate(features))
done(np.concatenate(features), started)
"""
)
IMG2VEC = (
    CLOCK
    + """
import torchvision.models
from PIL import Image
made = torchvision.models.resnet50
torchvision.models.resnet50 = lambda weights=None, **more: made(weights=None, **more)
from img2vec_pytorch import Img2Vec
network = Img2Vec(cuda=False, model="resnet50")
network.layer_output_size = 2048
started = time.perf_counter()
features = []
for at in range(0, len(paths), 32):
    features.append(network.get_vec([Image.open(path).convert("RGB") for path in paths[at : at + 32]]))
np.save(out, np.concatenate(features))
done(np.concatenate(features), started)
"""
)
EMBETTER = (
    CLOCK
    + """
import timm
made = timm.create_model
timm.create_model = lambda name, pretrained=True, **more: made(name, pretrained=False, **more)
from embetter.vision import ImageLoader, TimmEncoder
from sklearn.pipeline import make_pipeline
network = make_pipeline(ImageLoader(), TimmEncoder("resnet50"))
network[1].model.eval()
started = time.perf_counter()
features = network.fit_transform(paths)
np.save(out, features)
done(features, started)
"""
)
THINGSVISION = (
    CLOCK
    + """
from thingsvision import get_extractor
from thingsvision.utils.data import DataLoader, ImageDataset
from thingsvision.utils.storing import save_features
network = get_extractor(model_name="resnet50", source="torchvision", device="cpu", pretrained=False)
started = time.perf_counter()
dataset = ImageDataset(root=str(folder), out_path=sys.argv[2], backend=network.get_backend(),
    transforms=network.get_transformations())
batches = DataLoader(dataset=dataset, batch_size=32, backend=network.get_backend())
features = network.extract_features(batches=batches, module_name="avgpool", flatten_acts=True, output_type="ndarray")
save_features(features, out_path=out, file_format="npy")
done(features, started)
"""
)
OTHERS = {"timm": TIMM, "img2vec_pytorch": IMG2VEC, "embetter": EMBETTER}
WAYS = [("torch", "fp32"), ("openvino", "fp32"), ("torch", "bf16"), ("openvino", "bf16")]


def rate(python: str, code: str, *arguments: object) -> float | None:
    """Images per second; None if what the code imports is not there."""
    command = [python, "-W", "ignore", "-c", code, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as out:
        command.insert(6, out)
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "ModuleNotFoundError" in done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def once(folder: Path, thingsvision: str | None) -> Iterator[tuple[str, float | None]]:
    """Every tool, one after the other."""
    yield "the script", rate(sys.executable, PEER, folder, "resnet50")
    for name, code in OTHERS.items():
        yield name, rate(sys.executable, code, folder)
    if thingsvision is not None:
        yield "thingsvision", rate(thingsvision, THINGSVISION, folder)
    for way in WAYS:
        yield f"featpipe, {' '.join(way)}", rate(sys.executable, FEATPIPE, folder, *way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="?", type=int, default=64)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--thingsvision", metavar="PYTHON")
    asked = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        photographs(Path(name), asked.images)
        for _ in range(asked.rounds):
            for tool, per_second in once(Path(name), asked.thingsvision):
                if per_second is not None:
                    found.setdefault(tool, []).append(per_second)
    script = statistics.median(found["the script"])
    for tool, rates in found.items():
        middle = statistics.median(rates)
        print(f"{tool:<24}{middle:7.1f} images/s {middle / script:6.2f} × the script", flush=True)


if __name__ == "__main__":
    main()
