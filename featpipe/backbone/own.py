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
from featpipe.backbone.headless import Headless, fill_from_file
from featpipe.backbone.transform import CustomTransform, Transform, code_of
from featpipe.backbone.weights import seeded
from featpipe.errors import ConfigError

__all__ = ["AnyTransform", "build", "wrap"]

AnyTransform = Transform | CustomTransform | Callable[[Tensor], Tensor]

NEEDED = "its transform: a function from a uint8 tensor (3, H, W) to a float tensor (3, h, w)"


def build(name: str, weights: str | Path | None, transform: AnyTransform | None, seed: int) -> Headless:
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
    factory = _find(name)
    with seeded(seed), _current_folder():
        made = factory()
    if isinstance(made, Backbone):
        made = made.network, made.transform
    network, own = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name} gave {type(network).__name__}; expected a torch Module, or a Module and a transform")
    if transform is None and own is None:
        raise ConfigError(f"{name} gave a network alone; it must also give {NEEDED}")
    return wrap(network, weights, own if transform is None else transform, code_of(factory), name)


def wrap(
    network: nn.Module, weights: str | Path | None, transform: AnyTransform | None, code: str = "", name: str = ""
) -> Headless:
    """A copy of a network that the caller goes on owning.

    Its identity: its source file, its structure, its weights and its transform.
    """
    if transform is None:
        raise ConfigError(f"a network of your own ({type(network).__name__}) needs {NEEDED}; pass transform=…")
    if isinstance(weights, str) and weights != "none":
        raise ConfigError(f"weights {weights!r}: a network of your own takes a file, or none")
    copied = copy.deepcopy(network)
    if isinstance(weights, Path):
        fill_from_file(copied, weights)
    if not isinstance(transform, (Transform, CustomTransform)):
        transform = CustomTransform(transform)
    identity = {
        "import": name or f"{type(network).__module__}:{type(network).__qualname__}",
        "source": code or code_of(network),
        "structure": sha256(repr(network).encode()).hexdigest(),
    }
    origin = str(weights) if isinstance(weights, Path) else "as it was made"
    return Headless(copied, transform, "user", None, origin, identity)


def _find(name: str) -> Callable[[], object]:
    path, _, attribute = name.partition(":")
    try:
        with _current_folder():
            module = importlib.import_module(path)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(f"{name}: importing {path} failed ({type(error).__name__}: {error})") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{name}: {path} has no function {attribute!r}; it has {', '.join(there) or 'none'}")
    return factory


@contextmanager
def _current_folder() -> Iterator[None]:
    """A command starts with its script's folder on the path, not with the folder in which it was typed."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
