"""Custom networks, by import path or as an object."""

from __future__ import annotations

import copy
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from torch import Tensor, nn

from featpipe.backbones.backbone import Backbone
from featpipe.backbones.transforms import CustomTransform, SampleTransform, hash_source
from featpipe.backbones.weights import read_state_dicts, seeded_rng, select_state_dict
from featpipe.errors import ConfigError

AnyTransform = SampleTransform | Callable[[Tensor], Tensor]

TRANSFORM_REQUIREMENT = "its transform: a function from a uint8 tensor (3, H, W) to a float tensor (3, h, w)"


def build(name: str, weights: str | Path | None, transform: AnyTransform | None, seed: int) -> HeadlessNetwork:
    """Build a network with a factory function of the user.

    Parameters
    ----------
    name : str
        ``package.module:factory``. The factory takes no arguments and returns a headless Module, a pair of Module and
        transform, or a Backbone.
    weights : str or Path or None
        A file to load into the network; None and ``none`` keep the weights that the factory set.
    transform : callable, optional
        Replaces the transform of the factory.
    seed : int
        Seed of torch's random generator while the factory runs.
    """
    factory = _import_factory(name)
    with seeded_rng(seed), _cwd_on_path():
        result = factory()
    if isinstance(result, Backbone):
        result = result.network, result.transform
    network, factory_transform = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name} returned {type(network).__name__}, expected a Module, alone or with a transform")
    if transform is None and factory_transform is None:
        raise ConfigError(f"{name} returned a network without {TRANSFORM_REQUIREMENT}; return both")
    return wrap_network(
        network, weights, factory_transform if transform is None else transform, hash_source(factory), name
    )


def wrap_network(
    network: nn.Module, weights: str | Path | None, transform: AnyTransform | None, code: str = "", name: str = ""
) -> HeadlessNetwork:
    """Copy and wrap a network object; the caller's network is not changed.

    Its identity consists of its source file, structure, weights and transform.
    """
    if transform is None:
        raise ConfigError(
            f"a custom network ({type(network).__name__}) needs {TRANSFORM_REQUIREMENT}; pass transform=…"
        )
    if isinstance(weights, str) and weights != "none":
        raise ConfigError(f"weights {weights!r}: a custom network has no published weights; give a file, or none")
    network_copy = copy.deepcopy(network)
    if isinstance(weights, Path):
        load_weights_file(network_copy, weights)
    identity = {
        "import": name or f"{type(network).__module__}:{type(network).__qualname__}",
        "source": code or hash_source(network),
        "structure": sha256(repr(network).encode()).hexdigest(),
    }
    origin = str(weights) if isinstance(weights, Path) else "as it was made"
    return HeadlessNetwork(network_copy, as_transform(transform), "user", None, origin, identity)


def as_transform(transform: AnyTransform) -> SampleTransform:
    """Return a transform of any modality unchanged; wrap a plain function of images in a `CustomTransform`."""
    return transform if isinstance(transform, SampleTransform) else CustomTransform(transform)


def _import_factory(name: str) -> Callable[[], object]:
    module_name, _, attribute = name.partition(":")
    try:
        with _cwd_on_path():
            module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise ConfigError(f"{name}: importing {module_name} failed ({type(error).__name__}: {error})") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        function_names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f"{name}: {module_name} has no function {attribute!r}; it has {', '.join(function_names) or 'none'}"
        )
    return factory


@contextmanager
def _cwd_on_path() -> Iterator[None]:
    """Put the working directory on ``sys.path``: a console script has its own folder there instead."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


@dataclass(frozen=True, eq=False)
class HeadlessNetwork:
    """A network without its classifier.

    Attributes
    ----------
    network : Module
    transform : SampleTransform
    source : {"packaged", "torchvision", "timm", "user"}
    width : int or None
        Dimension of its output as declared by the architecture; None for a custom network.
    origin : str
        Source of the weights.
    code : mapping
        Identity of a custom network beyond its weights.
    weight_files : tuple of Path, optional
        Files from which published weights were read; None if unknown.
    """

    network: nn.Module
    transform: SampleTransform
    source: str
    width: int | None
    origin: str
    code: Mapping[str, str] = field(default_factory=dict)
    weight_files: tuple[Path, ...] | None = None


def load_weights_file(
    network: nn.Module, path: Path, removed: tuple[str, ...] = (), rename_weight: Callable[[str], str] = str
) -> None:
    """Load a local file into a headless network; on error the network is unchanged.

    Parameters
    ----------
    network : Module
    path : Path
    removed : tuple of str
        Names of the modules that were removed from the network; the file may still contain their weights.
    rename_weight : callable
        Legacy weight name → current name.

    Raises
    ------
    WeightsError
        See :func:`featpipe.backbones.weights.read_state_dicts` and :func:`featpipe.backbones.weights.match_state_dict`.
    """
    load_state(network, select_state_dict(read_state_dicts(path), network, removed, rename_weight, str(path)))


def load_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a matched state dict into a network."""
    state_dict = OrderedDict(state)
    state_dict._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]  # names and layout are current
    network.load_state_dict(state_dict, strict=False)
