"""Classification networks of torchvision with their published weights and transforms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torchvision import models

from featpipe.backbones.sources.custom import HeadlessNetwork, load_weights_file
from featpipe.backbones.transforms import Transform
from featpipe.backbones.weights import seeded_rng
from featpipe.config import unknown_name_error
from featpipe.errors import WeightsError

HEAD_ATTRIBUTES = ("fc", "classifier", "heads", "head")  # attributes that contain the classifier
AUXILIARY_HEADS = ("AuxLogits", "aux1", "aux2")  # auxiliary heads of Inception and GoogLeNet, used only in training
NETWORKS_WITH_AUXILIARY = ("googlenet", "inception_v3")

WEIGHT_NAME_PATTERNS = (  # legacy names in published files that torchvision's loaders convert
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)


def is_available(name: str) -> bool:
    """Whether the installed torchvision has the network; a newer version may have more than the list of names."""
    return name in models.list_models(module=models)


def build(name: str, weights: str | Path | None, seed: int, progress: bool) -> HeadlessNetwork:
    """Build a headless torchvision network.

    Parameters
    ----------
    name : str
        Name in ``torchvision.models.list_models``.
    weights : str or Path or None
        A published name, a file, or ``none`` for an untrained network; None means torchvision's default weights.
    seed : int
        Seed of an untrained network.
    progress : bool
        Show a progress bar while downloading.
    """
    weights_enum = models.get_model_weights(name)
    member = _select_weights(weights_enum, weights)
    if isinstance(member, Path):
        network, removed, width = _make_untrained(name, seed)
        # Inception and GoogLeNet convert their input, because they were trained with another normalisation.
        if hasattr(network, "transform_input"):
            setattr(network, "transform_input", True)  # noqa: B010 - unknown to type checkers
        load_weights_file(network, member, (*removed, *AUXILIARY_HEADS), _to_current_name)
        return HeadlessNetwork(
            network, make_transform(_find_published_weights(weights_enum, member)), "torchvision", width, str(member)
        )
    if member is None:
        network, _, width = _make_untrained(name, seed)
        return HeadlessNetwork(
            network, make_transform(weights_enum.DEFAULT), "torchvision", width, f"untrained, seed {seed}"
        )
    network = _load_published(name, member, progress)
    _, width = remove_classifier(network)
    files = (_find_checkpoint(member),)
    return HeadlessNetwork(network, make_transform(member), "torchvision", width, str(member), weight_files=files)


def remove_classifier(network: nn.Module) -> tuple[tuple[str, ...], int]:
    """Remove the classifier in place, with all layers after the last features.

    Parameters
    ----------
    network : Module
        A classification network of torchvision.

    Returns
    -------
    removed : tuple of str
        Dotted names of the removed layers.
    width : int
        Dimension of their input.
    """
    attribute = next(name for name in HEAD_ATTRIBUTES if isinstance(getattr(network, name, None), nn.Module))
    layers = {name: layer for name, layer in network.named_modules() if f"{name}.".startswith(f"{attribute}.")}
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if linear:
        removed, width = (linear[-1],), layers[linear[-1]].in_features
    else:  # SqueezeNet classifies by a convolution and a ReLU, and pools afterwards
        removed = tuple(name for name, layer in layers.items() if isinstance(layer, (nn.Conv2d, nn.ReLU)))
        width = next(layer.in_channels for layer in layers.values() if isinstance(layer, nn.Conv2d))
    for name in removed:
        network.set_submodule(name, nn.Identity())
    return removed, int(width)


def make_transform(member: Any) -> Transform:
    """Make the transform of published weights.

    Parameters
    ----------
    member : torchvision.models.WeightsEnum
    """
    preset = member.transforms()
    return Transform(
        resize=int(preset.resize_size[0]),
        crop=(int(preset.crop_size[0]), int(preset.crop_size[0])),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _select_weights(weights_enum: Any, weights: str | Path | None) -> Any:
    """Select a member of the enum or a path; None means an untrained network."""
    if weights is None:
        return weights_enum.DEFAULT
    if isinstance(weights, Path):
        return weights
    if weights == "none":
        return None
    member_names = ["DEFAULT", *weights_enum.__members__]
    member_name = weights.removeprefix(weights_enum.__name__ + ".")
    if member_name in member_names:
        return weights_enum[member_name]
    raise unknown_name_error("weights", weights, dict.fromkeys([*member_names, "none"]), "or give a file")


def _make_untrained(name: str, seed: int) -> tuple[nn.Module, tuple[str, ...], int]:
    options: dict[str, Any] = {}
    if name in NETWORKS_WITH_AUXILIARY:
        options = {"aux_logits": False, "init_weights": True}
    with seeded_rng(seed):
        network = models.get_model(name, weights=None, **options)
    removed, width = remove_classifier(network)
    return network, removed, width


def _load_published(name: str, member: Any, progress: bool) -> nn.Module:
    options = {"aux_logits": False} if name in NETWORKS_WITH_AUXILIARY else {}
    checkpoint_path = _find_checkpoint(member)
    try:
        with seeded_rng(0):
            return models.get_model(name, weights=member, progress=progress, **options)
    except OSError as error:
        raise WeightsError(
            f"{name}: weights {member.name} cannot be downloaded ({error}); "
            f"download {checkpoint_path.name} elsewhere and copy it to {checkpoint_path}, "
            "or pass it with --weights FILE"
        ) from error
    except (RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{checkpoint_path}: not the weights {member.name} of {name} ({reason}); remove it and try again"
        ) from error


def _find_checkpoint(member: Any) -> Path:
    """The path of a downloaded file in torch's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / str(member.url).rsplit("/", 1)[-1]


def _to_current_name(name: str) -> str:
    for pattern, replacement in WEIGHT_NAME_PATTERNS:
        name = pattern.sub(replacement, name)
    return name


def _find_published_weights(weights_enum: Iterable[Any], path: Path) -> Any:
    """Identify the published weights in a file by its digest, which ends their file names; else the default ones."""
    with path.open("rb") as handle:
        file_hash = sha256()
        while block := handle.read(1 << 20):
            file_hash.update(block)
    for member in weights_enum:
        digest_match = re.search(r"-([0-9a-f]{8,})\.", member.url.rsplit("/", 1)[-1])
        if digest_match and file_hash.hexdigest().startswith(digest_match[1]):
            return member
    return weights_enum.DEFAULT  # type: ignore[attr-defined]
