"""Photographs to features on disk with one network: featpipe and other tools, each used as in its documentation.

Every tool embeds the same JPEGs of 500 × 375 with ResNet-50 in its own process; the weights are random, which does not
change the speed. The start of the process and the construction of the network are not counted. Tools that are not
installed are skipped. thingsvision needs old versions of torch and torchvision: give the interpreter of an environment
that has it.

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

from extraction import SCRIPT, write_photographs

TIMER_SCRIPT = """
import json, sys, time, warnings
from pathlib import Path
import numpy as np, torch
warnings.simplefilter("ignore")
folder, out = Path(sys.argv[1]), sys.argv[2] + "/features"
paths = sorted(map(str, folder.rglob("*.jpg")))
def print_rate(features, started):
    assert len(features) == len(paths) and np.isfinite(features).all()
    print(json.dumps(len(paths) / (time.perf_counter() - started)))
"""
FEATPIPE_SCRIPT = (
    TIMER_SCRIPT
    + """
from featpipe import extract
engine, precision = sys.argv[3:]
cache = extract(folder, backbone="resnet50", weights="none", engine=engine, precision=precision, device="cpu",
    out=out + ".h5")
print(json.dumps(cache.manifest["images_per_second"]))
"""
)
TIMM_SCRIPT = (
    TIMER_SCRIPT
    + """
import timm
from timm.data import create_dataset, create_loader, resolve_data_config
network = timm.create_model("resnet50", pretrained=False, num_classes=0).eval()
started = time.perf_counter()
dataset = create_dataset(root=str(folder), name="")
config = resolve_data_config({}, model=network)
settings = dict(batch_size=32, use_prefetcher=False, num_workers=2, device=torch.device("cpu"))
loader = create_loader(dataset, **settings, **config)
features = []
with torch.inference_mode():
    for images, _ in loader:
        features.append(network(images).numpy())
np.save(out, np.concatenate(features))
print_rate(np.concatenate(features), started)
"""
)
IMG2VEC_SCRIPT = (
    TIMER_SCRIPT
    + """
import torchvision.models
from PIL import Image
make_resnet50 = torchvision.models.resnet50
torchvision.models.resnet50 = lambda weights=None, **more: make_resnet50(weights=None, **more)
from img2vec_pytorch import Img2Vec
network = Img2Vec(cuda=False, model="resnet50")
network.layer_output_size = 2048
started = time.perf_counter()
features = []
for start in range(0, len(paths), 32):
    features.append(network.get_vec([Image.open(path).convert("RGB") for path in paths[start : start + 32]]))
np.save(out, np.concatenate(features))
print_rate(np.concatenate(features), started)
"""
)
EMBETTER_SCRIPT = (
    TIMER_SCRIPT
    + """
import timm
create_model = timm.create_model
timm.create_model = lambda name, pretrained=True, **more: create_model(name, pretrained=False, **more)
from embetter.vision import ImageLoader, TimmEncoder
from sklearn.pipeline import make_pipeline
network = make_pipeline(ImageLoader(), TimmEncoder("resnet50"))
network[1].model.eval()
started = time.perf_counter()
features = network.fit_transform(paths)
np.save(out, features)
print_rate(features, started)
"""
)
THINGSVISION_SCRIPT = (
    TIMER_SCRIPT
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
print_rate(features, started)
"""
)
OTHER_TOOLS = {"timm": TIMM_SCRIPT, "img2vec_pytorch": IMG2VEC_SCRIPT, "embetter": EMBETTER_SCRIPT}
VARIANTS = [("torch", "fp32"), ("openvino", "fp32"), ("torch", "bf16"), ("openvino", "bf16")]


def measure_rate(python: str, code: str, *arguments: object) -> float | None:
    """Images per second; None if the tool is not installed."""
    command = [python, "-W", "ignore", "-c", code, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as out:
        command.insert(6, out)
        process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode and "ModuleNotFoundError" in process.stderr:
        return None
    if process.returncode:
        raise RuntimeError(process.stderr)
    return float(json.loads(process.stdout.splitlines()[-1]))


def measure_tools(folder: Path, thingsvision: str | None) -> Iterator[tuple[str, float | None]]:
    """Measure every tool once."""
    yield "the script", measure_rate(sys.executable, SCRIPT, folder, "resnet50")
    for name, code in OTHER_TOOLS.items():
        yield name, measure_rate(sys.executable, code, folder)
    if thingsvision is not None:
        yield "thingsvision", measure_rate(thingsvision, THINGSVISION_SCRIPT, folder)
    for variant in VARIANTS:
        yield f"featpipe, {' '.join(variant)}", measure_rate(sys.executable, FEATPIPE_SCRIPT, folder, *variant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="?", type=int, default=64)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--thingsvision", metavar="PYTHON")
    options = parser.parse_args()
    rates_by_tool: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        write_photographs(Path(name), options.images)
        for _ in range(options.rounds):
            for tool, per_second in measure_tools(Path(name), options.thingsvision):
                if per_second is not None:
                    rates_by_tool.setdefault(tool, []).append(per_second)
    script_rate = statistics.median(rates_by_tool["the script"])
    for tool, rates in rates_by_tool.items():
        median_rate = statistics.median(rates)
        print(f"{tool:<24}{median_rate:7.1f} images/s {median_rate / script_rate:6.2f} × the script", flush=True)


if __name__ == "__main__":
    main()
