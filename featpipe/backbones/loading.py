"""Load a backbone from a name, weights and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from featpipe.backbones.backbone import Backbone
from featpipe.backbones.identity import resolve_weights
from featpipe.backbones.outputs import POOLED, resolve_outputs
from featpipe.backbones.registry import PACKAGED_BACKBONES, TIMM_PREFIX, names
from featpipe.backbones.sources.custom import AnyTransform, HeadlessNetwork, as_transform
from featpipe.backbones.transforms import Transform
from featpipe.backbones.weights import digest_state, read_bundle
from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError, WeightsError
from featpipe.storage import describe_differences, is_model_file


def load(
    name: str | nn.Module = "efficientnet_lite0",
    *,
    weights: str | Path | None = None,
    outputs: Sequence[str] = (POOLED,),
    transform: AnyTransform | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Backbone:
    """Load a backbone.

    Parameters
    ----------
    name : str or Module
        One of :func:`featpipe.backbones.names`; ``package.module:factory`` for a custom network; a network object; or
        a model file, for the backbone of that model.
    weights : str or Path, optional
        None: the published default weights. ``none``: untrained. A published name such as ``IMAGENET1K_V2``. Or a
        file: safetensors, or a state dict, with or without the classifier, with any prefix; or a model file that
        contains weights, such as a fine-tuned model, whose transform is then used as well.
    outputs : sequence of str
        ``pooled``, the output of the network, and ``NODE[:POOL]``, the output of a module given by its dotted name,
        pooled by ``avg``, ``max``, ``gem``, ``cls`` or ``none``.
    transform : Transform or callable, optional
        Replaces the transform of the weights; required for a custom network that has none.
    seed : int
        Seed of an untrained network's initialisation.
    progress : bool
        Show a progress bar on stderr while downloading.

    Returns
    -------
    Backbone

    Raises
    ------
    ConfigError
        If a name is unknown, an output is invalid, or a transform is missing.
    WeightsError
        If weights are missing, unreadable or belong to another network.

    Examples
    --------
    >>> load("resnet18", weights="none", outputs=["pooled", "layer3:max"]).shapes
    {'pooled': (512,), 'layer3:max': (256,)}
    """
    model_files: tuple[Path, ...] = ()
    if isinstance(name, str) and Path(name).suffix == ".model":
        model_files = (Path(name).absolute(),)
        name, weights, seed = _resolve_model_file(Path(name), weights, seed)
    weights_source = resolve_weights(weights)
    if transform is None and isinstance(weights_source, Path) and is_model_file(weights_source):
        transform = _restore_library_transform(read_bundle(weights_source).document["facts"]["backbone"])
    headless = _build_headless(name, weights_source, transform, seed, progress)
    if transform is not None and headless.source != "user":
        chosen_transform = as_transform(transform)
    else:
        chosen_transform = headless.transform
    network = headless.network.eval().requires_grad_(False)
    output_names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    backbone_name = name if isinstance(name, str) else headless.code["import"]
    backbone = Backbone(
        name=backbone_name,
        source=headless.source,
        network=network,
        transform=chosen_transform,
        outputs=resolve_outputs(network, output_names, chosen_transform),
        digest=digest_state(network),
        origin=headless.origin,
        code=headless.code,
        request={
            "name": backbone_name,
            # Absolute: a model may be used from another working directory than it was trained in.
            "weights": str(weights_source.absolute()) if isinstance(weights_source, Path) else weights_source,
            "outputs": list(output_names),
            "seed": seed,
        },
        weight_files=_list_weight_files(headless, weights_source, transform, model_files),
    )
    pooled_shape = backbone.shapes.get(POOLED)
    if headless.width is not None and pooled_shape not in (None, (headless.width,)):
        raise WeightsError(f"{backbone.name}: an embedding has shape {pooled_shape}, expected ({headless.width},)")
    return backbone


def reload_backbone(
    backbone: str | Backbone | None,
    request: Mapping[str, Any],
    identity: Mapping[str, Any],
    *,
    context: str,
    weights: str | Path | None = None,
) -> Backbone:
    """Load the backbone of a cache or a model again and check its identity.

    Parameters
    ----------
    backbone : str or Backbone, optional
        A name that replaces the one in the request, or the backbone itself.
    request : mapping
        The stored ``Backbone.request``.
    identity : mapping
        The expected ``Backbone.to_dict()``, with all outputs or some.
    context : str
        Name of the cache or model, for error messages.
    weights : str or Path, optional
        Replaces the weights of the request.

    Raises
    ------
    ConfigError
        If the backbone is custom code, which is run only if the caller passes it, and ``backbone`` is None.
    WeightsError
        If the weights are missing, or the loaded backbone has another identity.
    """
    outputs = list(identity["outputs"])
    candidate = request.get("name", identity["name"]) if backbone is None else backbone
    if isinstance(candidate, str):
        if backbone is None and ":" in candidate:
            raise ConfigError(
                f"{context}: its backbone {candidate!r} is a custom network, whose code is not run by default; "
                "if you trust it, pass --backbone (in Python backbone=...)"
            )
        candidate = load(
            candidate,
            weights=request.get("weights") if weights is None else weights,
            outputs=outputs,
            transform=_restore_library_transform(identity),
            seed=int(request.get("seed", 0)),
        )
    if not isinstance(candidate, Backbone):
        raise ConfigError(
            f"backbone is a {type(candidate).__name__}; give a name, or featpipe.backbones.load(network, transform=…)"
        )
    actual = candidate.to_dict()
    actual["outputs"] = {output: actual["outputs"].get(output) for output in outputs}
    if actual != identity:
        changes = "; ".join(describe_differences(actual, identity)[:4])
        raise WeightsError(f"{context}: was made with another backbone ({changes}); pass the weights it was made with")
    return candidate


def _resolve_model_file(path: Path, weights: str | Path | None, seed: int) -> tuple[str, str | Path | None, int]:
    """Resolve a model file to its backbone's name, weights and seed; explicit ``weights`` take precedence."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such model file; `featpipe train` and `featpipe finetune` write them")
    bundle = read_bundle(path)
    request = bundle.document["backbone"]
    name = request["name"]
    if ":" in name:
        raise ConfigError(
            f"{path}: its backbone {name!r} is a custom network, whose code is not run by default; "
            f"if you trust it, pass --backbone {name} --weights {path}"
        )
    if weights is not None:
        return name, weights, seed
    return name, path if bundle.has_weights else request["weights"], request.get("seed", 0)


def _restore_library_transform(identity: Mapping[str, Any]) -> Transform | None:
    """Restore the stored transform of a library network: the library may use another one for this name by now."""
    recorded = identity["transform"]
    field_names = [item.name for item in fields(Transform)]
    if identity.get("source") == "user" or not recorded.keys() >= set(field_names):
        return None
    settings: Any = {
        key: tuple(recorded[key]) if isinstance(recorded[key], list) else recorded[key] for key in field_names
    }
    return Transform(**settings)


def _build_headless(
    name: str | nn.Module, weights: str | Path | None, transform: AnyTransform | None, seed: int, progress: bool
) -> HeadlessNetwork:
    from featpipe.backbones.sources import custom

    if isinstance(name, nn.Module):
        return custom.wrap_network(name, weights, transform)
    if ":" in name:
        return custom.build(name, weights, transform, seed)

    if name in PACKAGED_BACKBONES:
        from featpipe.backbones.sources import packaged

        return packaged.build(name, weights, seed, progress)
    if name.startswith(TIMM_PREFIX):
        from featpipe.backbones.sources import timm

        return timm.build(name, weights, seed, progress)

    from featpipe.backbones.sources import torchvision

    if torchvision.is_available(name):
        return torchvision.build(name, weights, seed, progress)
    available_names = names()
    raise unknown_name_error(
        "backbone", name, [TIMM_PREFIX + name] if TIMM_PREFIX + name in available_names else available_names
    )


def _list_weight_files(
    headless: HeadlessNetwork, weights: str | Path | None, transform: AnyTransform | None, model_files: tuple[Path, ...]
) -> tuple[Path, ...] | None:
    """List all files that determine a backbone; None for custom code, or if the source does not report them."""
    if headless.source == "user" or not (transform is None or isinstance(transform, Transform)):
        return None
    if isinstance(weights, Path):
        return (*model_files, weights.absolute())
    if weights == "none":
        return model_files
    return None if headless.weight_files is None else (*model_files, *headless.weight_files)
