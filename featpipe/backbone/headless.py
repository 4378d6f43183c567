"""What every source of networks hands over: the network without its old classifier, and what is known about it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from featpipe.backbone.transform import CustomTransform, Transform
from featpipe.backbone.weights import pick, read

__all__ = ["Headless", "fill", "fill_from_file"]


@dataclass(frozen=True, eq=False)
class Headless:
    """A network without its old classifier.

    Attributes
    ----------
    network : Module
    transform : Transform or CustomTransform
    source : {"packaged", "torchvision", "timm", "user"}
    width : int or None
        Length of its answer as the architecture declares it; None for a user's own network, which declares none.
    origin : str
        Where the weights came from, for people.
    code : mapping
        What identifies a user's own network beyond its weights.
    """

    network: nn.Module
    transform: Transform | CustomTransform
    source: str
    width: int | None
    origin: str
    code: Mapping[str, str] = field(default_factory=dict)


def fill_from_file(
    network: nn.Module, path: Path, removed: tuple[str, ...] = (), rename: Callable[[str], str] = str
) -> None:
    """Load a local file into a headless network, completely or not at all.

    Parameters
    ----------
    network : Module
    path : Path
    removed : tuple of str
        Names of the modules that were taken off the network; the file may still hold their weights.
    rename : callable
        Old names of the same weights → today's.

    Raises
    ------
    WeightsError
        As :func:`featpipe.backbone.weights.read` and :func:`featpipe.backbone.weights.fit`.
    """
    fill(network, pick(read(path), network, removed, rename, str(path)))


def fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a fitted state dict into a network."""
    named = OrderedDict(state)
    named._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]  # names and layout are today's
    network.load_state_dict(named, strict=False)
