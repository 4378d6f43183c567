"""torchvision's classification networks, their published weights and the transforms that belong to these."""

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

from featpipe.backbone.headless import Headless, fill_from_file
from featpipe.backbone.transform import Transform
from featpipe.backbone.weights import seeded
from featpipe.errors import WeightsError
from featpipe.names import unknown

__all__ = ["behead", "build", "is_known", "transform_of"]

HEADS = ("fc", "classifier", "heads", "head")  # what torchvision calls the part that holds the classifier
AUXILIARY = ("AuxLogits", "aux1", "aux2")  # Inception's and GoogLeNet's heads for training
WITH_AUXILIARY = ("googlenet", "inception_v3")

OLD_NAMES = (  # names in published files that torchvision's own loaders still translate
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)


def is_known(name: str) -> bool:
    """Whether this torchvision has the network; newer ones may have more than the list of names."""
    return name in models.list_models(module=models)


def build(name: str, weights: str | Path | None, seed: int, progress: bool) -> Headless:
    """A headless torchvision network.

    Parameters
    ----------
    name : str
        As in ``torchvision.models.list_models``.
    weights : str or Path or None
        A published name, a file, ``none``; None means torchvision's default.
    seed : int
        Of an untrained network.
    progress : bool
        Show a bar while downloading.
    """
    published = models.get_model_weights(name)
    member = _choose(published, weights)
    if isinstance(member, Path):
        network, removed, width = _untrained(name, seed)
        _use_trained_input(network)
        fill_from_file(network, member, (*removed, *AUXILIARY), _todays_name)
        return Headless(network, transform_of(_same_file(published, member)), "torchvision", width, str(member))
    if member is None:
        network, _, width = _untrained(name, seed)
        return Headless(network, transform_of(published.DEFAULT), "torchvision", width, f"untrained, seed {seed}")
    network = _published(name, member, progress)
    _, width = behead(network)
    return Headless(network, transform_of(member), "torchvision", width, str(member))


def behead(network: nn.Module) -> tuple[tuple[str, ...], int]:
    """Take the old classifier off, in place, with everything behind the last features.

    Parameters
    ----------
    network : Module
        One of torchvision's classification networks.

    Returns
    -------
    removed : tuple of str
        Dotted names of the layers that are gone.
    width : int
        Numbers that went into them.
    """
    attribute = next(name for name in HEADS if isinstance(getattr(network, name, None), nn.Module))
    layers = {name: layer for name, layer in network.named_modules() if _is_below(name, attribute)}
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if linear:
        removed, width = (linear[-1],), layers[linear[-1]].in_features
    else:  # SqueezeNet classifies by a convolution and a ReLU, and pools afterwards
        removed = tuple(name for name, layer in layers.items() if isinstance(layer, (nn.Conv2d, nn.ReLU)))
        width = next(layer.in_channels for layer in layers.values() if isinstance(layer, nn.Conv2d))
    for name in removed:
        network.set_submodule(name, nn.Identity())
    return removed, int(width)


def transform_of(member: Any) -> Transform:
    """The transform that belongs to published weights.

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


def _is_below(name: str, attribute: str) -> bool:
    return name == attribute or name.startswith(attribute + ".")


def _choose(published: Any, weights: str | Path | None) -> Any:
    """A member of the enum, a path, or None for an untrained network."""
    if weights is None:
        return published.DEFAULT
    if isinstance(weights, Path):
        return weights
    if weights == "none":
        return None
    names = ["DEFAULT", *published.__members__]
    short = weights.removeprefix(published.__name__ + ".")
    if short in names:
        return published[short]
    raise unknown("weights", weights, dict.fromkeys([*names, "none"]), "or give a file")


def _untrained(name: str, seed: int) -> tuple[nn.Module, tuple[str, ...], int]:
    options: dict[str, Any] = {}
    if name in WITH_AUXILIARY:
        options = {"aux_logits": False, "init_weights": True}
    with seeded(seed):
        network = models.get_model(name, weights=None, **options)
    removed, width = behead(network)
    return network, removed, width


def _use_trained_input(network: nn.Module) -> None:
    """Inception and GoogLeNet were trained with another normalisation, to which they can convert by themselves."""
    if hasattr(network, "transform_input"):
        setattr(network, "transform_input", True)  # noqa: B010 - to a type checker it is no attribute


def _published(name: str, member: Any, progress: bool) -> nn.Module:
    options = {"aux_logits": False} if name in WITH_AUXILIARY else {}
    file = member.url.rsplit("/", 1)[-1]
    place = Path(torch.hub.get_dir()) / "checkpoints" / file
    try:
        with seeded(0):
            return models.get_model(name, weights=member, progress=progress, **options)
    except OSError as error:
        raise WeightsError(
            f"{name}: weights {member.name} cannot be fetched ({error}); bring the file {file} and put it at {place}, "
            "or pass it with --weights FILE"
        ) from error
    except (RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{place}: not the weights {member.name} of {name} ({reason}); remove it and try again"
        ) from error


def _todays_name(name: str) -> str:
    for pattern, replacement in OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _same_file(published: Iterable[Any], path: Path) -> Any:
    """The published weights that a file holds, or else the default ones: published names end in the file's digest."""
    with path.open("rb") as handle:
        content = sha256()
        while block := handle.read(1 << 20):
            content.update(block)
    for member in published:
        found = re.search(r"-([0-9a-f]{8,})\.", member.url.rsplit("/", 1)[-1])
        if found and content.hexdigest().startswith(found[1]):
            return member
    return published.DEFAULT  # type: ignore[attr-defined]
