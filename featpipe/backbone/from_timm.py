"""timm's networks, their published weights and the transforms that belong to these."""

from __future__ import annotations

import sys
from math import floor
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from featpipe.backbone.catalogue import TIMM, names
from featpipe.backbone.headless import Headless, fill
from featpipe.backbone.transform import Mode, Transform
from featpipe.backbone.weights import State, pick, read, seeded
from featpipe.errors import ConfigError, WeightsError
from featpipe.names import unknown

__all__ = ["behead", "build", "create", "transform_of"]


def build(name: str, weights: str | Path | None, seed: int, progress: bool) -> Headless:
    """A headless timm network.

    Parameters
    ----------
    name : str
        ``timm/NAME`` or ``timm/NAME.TAG``.
    weights : str or Path or None
        A file, ``none``; None means the weights of the tag, or of timm's first tag.
    seed : int
        Of an untrained network.
    progress : bool
        Show a bar while downloading.
    """
    known = names(TIMM + "*")
    if name not in known:
        raise unknown("backbone", name, known)
    if isinstance(weights, str) and weights != "none":
        tags = [other for other in known if other.split(".")[0] == name.split(".")[0]]
        raise ConfigError(
            f"weights {weights!r} of {name}: timm's are part of the name: {', '.join(tags)}; or give a file"
        )
    full = _published(name, progress) if weights is None else create(name, seed)
    transform = transform_of(full)
    head = classifier_names(full)
    origin = str(full.pretrained_cfg.get("tag") or "timm") if weights is None else f"untrained, seed {seed}"
    width = behead(full, name)
    if isinstance(weights, Path):
        fill(full, _fitted(weights, full, head))
        origin = str(weights)
    return Headless(full, transform, "timm", width, origin)


def create(name: str, seed: int = 0) -> Any:
    """A whole untrained network, classifier and all."""
    with seeded(seed):
        return timm.create_model(name.removeprefix(TIMM), pretrained=False)


def classifier_names(network: Any) -> tuple[str, ...]:
    """Dotted names of the classifier's layers."""
    found = network.pretrained_cfg.get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def behead(network: Any, name: str) -> int:
    """Take the classifier off, in place; the width that is left.

    Raises
    ------
    WeightsError
        If that put a parameter there that was not in the network before, and so in no weights: a random projection.
    """
    before = {id(parameter) for parameter in network.parameters()}
    network.reset_classifier(0)
    new = [key for key, parameter in network.named_parameters() if id(parameter) not in before]
    if new:
        raise WeightsError(
            f"{name}: without its classifier it has a random layer, {new[0]!r}, that no weights cover; "
            "use another network of the family"
        )
    return int(getattr(network, "head_hidden_size", None) or network.num_features)


def transform_of(network: nn.Module) -> Transform:
    """The transform of timm's evaluation: what its ``create_transform`` makes of the network's own configuration."""
    config = timm.data.resolve_model_data_config(network)
    _, height, width = config["input_size"]
    scaled = floor(height / config["crop_pct"]), floor(width / config["crop_pct"])
    mode: Mode = config["crop_mode"] if config["crop_mode"] in ("squash", "border") else "center"
    return Transform(
        resize=scaled[0] if mode == "center" and scaled[0] == scaled[1] else scaled,
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        mode=mode,
    )


def _published(name: str, progress: bool) -> Any:
    timm.models.set_pretrained_download_progress(progress)
    short = name.removeprefix(TIMM)
    configuration = timm.models.get_pretrained_cfg(short)
    if configuration is None or not configuration.has_weights:
        raise WeightsError(
            f"{name}: timm publishes no weights for it; pass a file with --weights FILE, or --weights none"
        )
    try:
        with seeded(0):
            return timm.create_model(short, pretrained=True)
    except Exception as error:  # the hub's client has its own tree of errors, and it is not ours to import
        if not isinstance(error, (OSError, RuntimeError, ValueError)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        file = f"model.safetensors of {configuration.hf_hub_id}" if configuration.hf_hub_id else configuration.url
        raise WeightsError(
            f"{name}: weights cannot be fetched ({reason}); bring {file} and pass it with --weights FILE"
        ) from error


def _fitted(path: Path, network: nn.Module, head: tuple[str, ...]) -> dict[str, Tensor]:
    """A local file's weights; if the names do not fit as they are, then after timm's own translation of old names."""
    states = read(path)
    try:
        return pick(states, network, head, str, str(path))
    except WeightsError as error:
        translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        translated = [] if translate is None else [_translated(translate, state, network) for state in states]
        usable = [state for state in translated if state is not None]
        if not usable:
            raise
        try:
            return pick(usable, network, head, str, str(path))
        except WeightsError:
            raise error from None


def _translated(translate: Any, state: State, network: nn.Module) -> State | None:
    try:
        result = translate(dict(state), network)
    except Exception:  # it may fail in any way on names that are not of its family
        return None
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}
