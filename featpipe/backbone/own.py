"""A user's own network: by import path, or as an object."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from torch import Tensor, nn

from featpipe.backbone.frozen import Backbone
from featpipe.backbone.headless import HeadlessNetwork, load_weights_file
from featpipe.backbone.transform import CustomTransform, Transform, hash_source
from featpipe.backbone.weights import seeded_rng
from featpipe.errors import ConfigError

__all__ = ["AnyTransform", "build", "wrap_network"]

AnyTransform = Transform | CustomTransform | Callable[[Tensor], Tensor]

TRANSFORM_REQUIREMENT = "its transform: a function from a uint8 tensor (3, H, W) to a float tensor (3, h, w)"


def build(name: str, weights: str | Path | None, transform: AnyTransform | None, seed: int) -> HeadlessNetwork:
    """A network that a function of the user's makes.

    Parameters
    ----------
    name : str
        ``package.module:factory``. The factory takes nothing and gives a headless Module, a pair of Module and
        transform, or a Backbone.
    weights : str or Path or None
        A file to load into it; None, or ``none``, leaves it as it was made.
    transform : callable, optional
        Used in place of the factory's.
    seed : int
        torch's random numbers start from it while the factory runs.
    """
    factory = _import_factory(name)
    with seeded_rng(seed), _cwd_on_path():
        result = factory()
    if isinstance(result, Backbone):
        result = result.network, result.transform
    network, factory_transform = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name} gave {type(network).__name__}; expected a torch Module, or a Module and a transform")
    if transform is None and factory_transform is None:
        raise ConfigError(f"{name} gave a network alone; it must also give {TRANSFORM_REQUIREMENT}")
    return wrap_network(
        network, weights, factory_transform if transform is None else transform, hash_source(factory), name
    )


def wrap_network(
    network: nn.Module, weights: str | Path | None, transform: AnyTransform | None, code: str = "", name: str = ""
) -> HeadlessNetwork:
    """A copy of a network that the caller goes on owning.

    Its identity: its source file, its structure, its weights and its transform.
    """
    if transform is None:
        raise ConfigError(
            f"a network of your own ({type(network).__name__}) needs {TRANSFORM_REQUIREMENT}; pass transform=…"
        )
    if isinstance(weights, str) and weights != "none":
        raise ConfigError(f"weights {weights!r}: a network of your own takes a file, or none")
    network_copy = copy.deepcopy(network)
    if isinstance(weights, Path):
        load_weights_file(network_copy, weights)
    if not isinstance(transform, (Transform, CustomTransform)):
        transform = CustomTransform(transform)
    identity = {
        "import": name or f"{type(network).__module__}:{type(network).__qualname__}",
        "source": code or hash_source(network),
        "structure": sha256(repr(network).encode()).hexdigest(),
    }
    origin = str(weights) if isinstance(weights, Path) else "as it was made"
    return HeadlessNetwork(network_copy, transform, "user", None, origin, identity)


def _import_factory(name: str) -> Callable[[], object]:
    module_name, _, attribute = name.partition(":")
    try:
        with _cwd_on_path():
            module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
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
    """A command starts with its script's folder on the path, not with the folder in which it was typed."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
