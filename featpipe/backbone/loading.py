"""A name, weights and outputs → a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from featpipe.backbone.carried import carried_by, is_model
from featpipe.backbone.catalogue import PACKAGED, TIMM, names
from featpipe.backbone.frozen import Backbone
from featpipe.backbone.headless import Headless
from featpipe.backbone.output import POOLED, resolve
from featpipe.backbone.own import AnyTransform
from featpipe.backbone.transform import CustomTransform, Transform
from featpipe.backbone.weights import digest_state
from featpipe.errors import ConfigError, WeightsError
from featpipe.fingerprint import differences
from featpipe.names import unknown

__all__ = ["load", "load_again"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".model")


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
        One of :func:`featpipe.backbone.names`, or ``package.module:factory`` for a network of your own, or the network;
        or a model's file, for the backbone of that model.
    weights : str or Path, optional
        None: the published ones. ``none``: untrained. A published name such as ``IMAGENET1K_V2``. Or a file:
        safetensors, or a state dict, with or without the old classifier, with any prefix; or a model that carries some,
        as fine-tuned ones do, with its transform.
    outputs : sequence of str
        ``pooled``, the network's own answer, and ``NODE[:POOL]``: a module by its dotted name, pooled by ``avg``,
        ``max``, ``gem``, ``cls`` or ``none``.
    transform : Transform or callable, optional
        In place of the one that belongs to the weights; required for a network of your own that brings none.
    seed : int
        Of an untrained network.
    progress : bool
        Show a bar on stderr while downloading.

    Returns
    -------
    Backbone

    Raises
    ------
    ConfigError
        If a name is unknown, an output does not fit, or a transform is missing.
    WeightsError
        If weights are missing, unreadable or belong to another network.

    Examples
    --------
    >>> load("resnet18", weights="none", outputs=["pooled", "layer3:max"]).shapes
    {'pooled': (512,), 'layer3:max': (256,)}
    """
    if isinstance(name, str) and Path(name).suffix == ".model":
        name, weights, seed = _of_model(Path(name), weights, seed)
    given_weights = _file_or_name(weights)
    if transform is None and isinstance(given_weights, Path) and is_model(given_weights):
        transform = _library_transform(carried_by(given_weights).facts)
    headless = _headless(name, given_weights, transform, seed, progress)
    if transform is not None and headless.source != "user":
        given = transform if isinstance(transform, (Transform, CustomTransform)) else CustomTransform(transform)
    else:
        given = headless.transform
    network = headless.network.eval().requires_grad_(False)
    backbone = Backbone(
        name=name if isinstance(name, str) else headless.code["import"],
        source=headless.source,
        network=network,
        transform=given,
        outputs=resolve(network, _sequence(outputs), given.size),
        digest=digest_state(network),
        origin=headless.origin,
        code=headless.code,
        request={
            "name": name if isinstance(name, str) else headless.code["import"],
            "weights": _lasting(given_weights),
            "outputs": list(_sequence(outputs)),
            "seed": seed,
        },
    )
    _check_width(backbone, headless.width)
    return backbone


def load_again(
    given: str | Backbone | None,
    request: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    where: str,
    weights: str | Path | None = None,
) -> Backbone:
    """The backbone that a cache or a model was made with.

    Parameters
    ----------
    given : str or Backbone, optional
        A name to use in place of the stated one, or the backbone itself.
    request : mapping
        What it was loaded from: ``Backbone.request``.
    facts : mapping
        What it must be: ``Backbone.facts()``, of all outputs or some.
    where : str
        What asks, for messages.
    weights : str or Path, optional
        In place of those of the request.

    Raises
    ------
    ConfigError
        If it is code of somebody's own, which is not run unasked, and none is given.
    WeightsError
        If the weights are not there, or another backbone came of it.
    """
    outputs = list(facts["outputs"])
    name = request.get("name", facts["name"]) if given is None else given
    if isinstance(name, str):
        if given is None and ":" in name:
            raise ConfigError(
                f"{where}: its backbone {name!r} is code of its author's own, which is not run unasked; "
                "pass --backbone (in Python backbone=...) if you trust it"
            )
        name = load(
            name,
            weights=request.get("weights") if weights is None else weights,
            outputs=outputs,
            transform=_library_transform(facts),
            seed=int(request.get("seed", 0)),
        )
    if not isinstance(name, Backbone):
        raise ConfigError(
            f"backbone is a {type(name).__name__}; give a name, or featpipe.backbone.load(network, transform=…)"
        )
    found = name.facts()
    found["outputs"] = {output: found["outputs"].get(output) for output in outputs}
    if found != facts:
        differ = "; ".join(differences(found, facts)[:4])
        raise WeightsError(f"{where}: was made with another backbone ({differ}); bring the weights it was made with")
    return name


def _of_model(path: Path, weights: str | Path | None, seed: int) -> tuple[str, str | Path | None, int]:
    """The backbone of a model's file, by its name, with the weights that were asked for or its own."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such model file; `featpipe train` and `featpipe finetune` make them")
    found = carried_by(path)
    if ":" in found.name:
        raise ConfigError(
            f"{path}: its backbone {found.name!r} is code of its author's own, which is not run unasked; "
            f"pass --backbone {found.name} --weights {path} if you trust it"
        )
    return (found.name, found.weights, found.seed) if weights is None else (found.name, weights, seed)


def _library_transform(facts: Mapping[str, Any]) -> Transform | None:
    """The transform made with, of a library's network: the library may have another for this name by now."""
    given = facts["transform"]
    known = [item.name for item in fields(Transform)]
    if facts.get("source") == "user" or not given.keys() >= set(known):
        return None
    settings: Any = {key: tuple(given[key]) if isinstance(given[key], list) else given[key] for key in known}
    return Transform(**settings)


def _headless(
    name: str | nn.Module, weights: str | Path | None, transform: AnyTransform | None, seed: int, progress: bool
) -> Headless:
    from featpipe.backbone import own

    if isinstance(name, nn.Module):
        return own.wrap(name, weights, transform)
    if ":" in name:
        return own.build(name, weights, transform, seed)

    from featpipe.backbone import from_timm, from_torchvision, packaged  # seconds of imports

    if name.startswith(TIMM):
        return from_timm.build(name, weights, seed, progress)
    if name in PACKAGED:
        return packaged.build(name, weights, seed, progress)
    if from_torchvision.is_known(name):
        return from_torchvision.build(name, weights, seed, progress)
    known = names()
    raise unknown("backbone", name, [TIMM + name] if TIMM + name in known else known)


def _file_or_name(weights: str | Path | None) -> str | Path | None:
    if isinstance(weights, str) and (Path(weights).suffix in SUFFIXES or "/" in weights or Path(weights).is_file()):
        return Path(weights).expanduser()
    return weights


def _lasting(weights: str | Path | None) -> str | None:
    """A file by its absolute path: a model may be used from another folder than it was trained in."""
    return str(weights.absolute()) if isinstance(weights, Path) else weights


def _sequence(outputs: Sequence[str]) -> Sequence[str]:
    return (outputs,) if isinstance(outputs, str) else outputs


def _check_width(backbone: Backbone, declared: int | None) -> None:
    found = backbone.shapes.get(POOLED)
    if declared is not None and found is not None and found != (declared,):
        raise WeightsError(f"{backbone.name}: gives {found} for an image, but declares a width of {declared}")
