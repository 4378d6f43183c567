"""What every source of networks hands over: the network without its old classifier, and what is known about it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from featpipe.backbone.transform import CustomTransform, Transform
from featpipe.backbone.weights import read_state_dicts, select_state_dict

__all__ = ["HeadlessNetwork", "load_state", "load_weights_file"]


@dataclass(frozen=True, eq=False)
class HeadlessNetwork:
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


def load_weights_file(
    network: nn.Module, path: Path, removed: tuple[str, ...] = (), rename_weight: Callable[[str], str] = str
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
    load_state(network, select_state_dict(read_state_dicts(path), network, removed, rename_weight, str(path)))


def load_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a fitted state dict into a network."""
    state_dict = OrderedDict(state)
    state_dict._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]  # names and layout are today's
    network.load_state_dict(state_dict, strict=False)
