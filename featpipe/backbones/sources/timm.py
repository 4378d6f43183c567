"""Networks of timm with their published weights and transforms."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from math import floor
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from featpipe.backbones.registry import TIMM_PREFIX, names
from featpipe.backbones.sources.custom import HeadlessNetwork, load_state
from featpipe.backbones.transforms import CropMode, Transform
from featpipe.backbones.weights import StateDict, read_state_dicts, seeded_rng, select_state_dict
from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError, WeightsError


def build(name: str, weights: str | Path | None, seed: int, progress: bool) -> HeadlessNetwork:
    """Build a headless timm network.

    Parameters
    ----------
    name : str
        ``timm/NAME`` or ``timm/NAME.TAG``.
    weights : str or Path or None
        A file, or ``none`` for an untrained network; None means the weights of the tag, or of timm's default tag.
    seed : int
        Seed of an untrained network.
    progress : bool
        Show a progress bar while downloading.
    """
    available_names = names(TIMM_PREFIX + "*")
    if name not in available_names:
        raise unknown_name_error("backbone", name, available_names)
    if isinstance(weights, str) and weights != "none":
        tags = [candidate for candidate in available_names if candidate.split(".")[0] == name.split(".")[0]]
        raise ConfigError(
            f"weights {weights!r} of {name}: timm's are part of the name: {', '.join(tags)}; or give a file"
        )
    network = _load_published(name, progress) if weights is None else create(name, seed)
    weight_files = _find_weight_files(network.pretrained_cfg) if weights is None else None
    transform = make_transform(network)
    classifier_layers = find_classifier_layers(network)
    origin = str(network.pretrained_cfg.get("tag") or "timm") if weights is None else f"untrained, seed {seed}"
    width = remove_classifier(network, name)
    if isinstance(weights, Path):
        load_state(network, _load_matching_state(weights, network, classifier_layers))
        origin = str(weights)
    return HeadlessNetwork(network, transform, "timm", width, origin, weight_files=weight_files)


def create(name: str, seed: int = 0) -> Any:
    """Create an untrained network with its classifier."""
    with seeded_rng(seed):
        return timm.create_model(name.removeprefix(TIMM_PREFIX), pretrained=False)


def find_classifier_layers(network: Any) -> tuple[str, ...]:
    """Dotted names of the classifier's layers."""
    layers = network.pretrained_cfg.get("classifier") or ()
    return (layers,) if isinstance(layers, str) else tuple(layers)


def remove_classifier(network: Any, name: str) -> int:
    """Remove the classifier in place and return the width of the features.

    Raises
    ------
    WeightsError
        If the removal added a parameter, such as a random projection, for which no weights exist.
    """
    original_ids = {id(parameter) for parameter in network.parameters()}
    network.reset_classifier(0)
    new_parameters = [key for key, parameter in network.named_parameters() if id(parameter) not in original_ids]
    if new_parameters:
        raise WeightsError(
            f"{name}: without its classifier it has a random layer, {new_parameters[0]!r}, that no weights cover; "
            "use another network of the family"
        )
    return int(getattr(network, "head_hidden_size", None) or network.num_features)


def make_transform(network: nn.Module) -> Transform:
    """Make timm's evaluation transform: that of its ``create_transform`` for the network's configuration."""
    config = timm.data.resolve_model_data_config(network)
    _, height, width = config["input_size"]
    resize_size = floor(height / config["crop_pct"]), floor(width / config["crop_pct"])
    mode: CropMode = config["crop_mode"] if config["crop_mode"] in ("squash", "border") else "center"
    return Transform(
        resize=resize_size[0] if mode == "center" and resize_size[0] == resize_size[1] else resize_size,
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        mode=mode,
    )


def _load_published(name: str, progress: bool) -> Any:
    timm.models.set_pretrained_download_progress(progress)
    timm_name = name.removeprefix(TIMM_PREFIX)
    config = timm.models.get_pretrained_cfg(timm_name)
    if config is None or not config.has_weights:
        raise WeightsError(
            f"{name}: timm publishes no weights for it; pass a file with --weights FILE, or --weights none"
        )
    try:
        with seeded_rng(0):
            return timm.create_model(timm_name, pretrained=True)
    except Exception as error:  # the hub client has its own exception hierarchy and is not a dependency of featpipe
        if not isinstance(error, (OSError, RuntimeError, ValueError)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        file = f"model.safetensors of {config.hf_hub_id}" if config.hf_hub_id else config.url
        raise WeightsError(
            f"{name}: weights cannot be downloaded ({reason}); "
            f"download {file} elsewhere and pass it with --weights FILE"
        ) from error


def _find_weight_files(config: Mapping[str, Any]) -> tuple[Path, ...] | None:
    """Find the files of published weights in the cache that they were downloaded to; None if they are not there.

    Besides the weights, the file that names the current revision of a repository is one of them.
    """
    repository, _, revision = str(config.get("hf_hub_id") or "").partition("@")
    if not repository:
        checkpoint = Path(torch.hub.get_dir()) / "checkpoints" / str(config.get("url")).rsplit("/", 1)[-1]
        return (checkpoint,) if checkpoint.is_file() else None
    file_names = config.get("hf_hub_filename") or "model.safetensors", "pytorch_model.bin"
    cached = (try_to_load_from_cache(repository, file_name, revision=revision or None) for file_name in file_names)
    weights_file = next((Path(path) for path in cached if isinstance(path, str)), None)
    if weights_file is None:
        return None
    reference = weights_file.parents[2] / "refs" / (revision or "main")
    return (weights_file, reference) if reference.is_file() else (weights_file,)


def _load_matching_state(path: Path, network: nn.Module, classifier_layers: tuple[str, ...]) -> dict[str, Tensor]:
    """Load weights from a local file; if the names do not match, after timm's conversion of legacy names."""
    states = read_state_dicts(path)
    try:
        return select_state_dict(states, network, classifier_layers, str, str(path))
    except WeightsError as error:
        translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        translated = [] if translate is None else [_translate_state(translate, state, network) for state in states]
        usable = [state for state in translated if state is not None]
        if not usable:
            raise
        try:
            return select_state_dict(usable, network, classifier_layers, str, str(path))
        except WeightsError:
            raise error from None


def _translate_state(translate: Any, state: StateDict, network: nn.Module) -> StateDict | None:
    try:
        translated = translate(dict(state), network)
    except Exception:  # the conversion may raise anything for names of another architecture
        return None
    return {name: value for name, value in translated.items() if isinstance(value, Tensor)}
