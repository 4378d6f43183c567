"""Read the backbone of a model file: its name, its identity, and the weights in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from featpipe.errors import ModelError, WeightsError
from featpipe.storage import WEIGHTS_MEMBER, ModelBundle


@dataclass(frozen=True)
class BundledBackbone:
    """The description of the backbone in a model file.

    Attributes
    ----------
    name : str
    weights : str or Path or None
        The model file if it contains weights; else the ``weights`` argument with which the backbone was loaded.
    seed : int
    identity : mapping
        The properties that determine the embeddings: weights, transform and outputs.
    """

    name: str
    weights: str | Path | None
    seed: int
    identity: Mapping[str, Any]


def read_bundled_backbone(path: Path) -> BundledBackbone:
    """Read the description of the backbone in a model file.

    Raises
    ------
    WeightsError
        If the file is damaged.
    """
    bundle = _read_bundle(path)
    request, identity = bundle.document["backbone"], bundle.document["facts"]["backbone"]
    weights = path if bundle.has_weights else request["weights"]
    return BundledBackbone(request["name"], weights, request.get("seed", 0), identity)


def read_bundled_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights in a model file.

    Raises
    ------
    WeightsError
        If the file contains no weights or is damaged.
    """
    import safetensors.torch

    bundle = _read_bundle(path, WEIGHTS_MEMBER)
    if not bundle.has_weights:
        raise WeightsError(f"{path}: carries no weights; its backbone has those that it was loaded with")
    try:
        return safetensors.torch.load(bundle.members[WEIGHTS_MEMBER])
    except Exception as error:  # safetensors raises its own errors for damaged bytes
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{path}: {WEIGHTS_MEMBER} is damaged ({type(error).__name__}: {reason}); copy the model again"
        ) from None


def _read_bundle(path: Path, *members: str) -> ModelBundle:
    try:
        return ModelBundle.read(path, members)
    except ModelError as error:
        raise WeightsError(str(error)) from None
