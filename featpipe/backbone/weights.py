"""Weights from files: safetensors, or state dicts read without running code; fitted to a network by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from featpipe.backbone.carried import is_model, read_carried
from featpipe.errors import WeightsError
from featpipe.fingerprint import digest_arrays

__all__ = ["State", "digest_state", "fit", "pick", "read", "seeded"]

State = Mapping[str, Tensor]

# Where training programs put the weights in a checkpoint, best first: averaged and teacher networks are the ones that
# their authors evaluate.
NESTS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "ema_state_dict",
    "teacher",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "network",
    "net",
    "backbone",
    "encoder",
    "student",
    "params",
    "weights",
)
DEPTH_MAX = 3
HEADS = ("head", "head_dist", "fc", "classifier", "heads", "aux")  # leftovers of these names are old heads
COUNTER = "num_batches_tracked"  # only training looks at it
SHOWN = 3


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random initialisation from a seed; the caller's random numbers go on as if nothing had happened."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def digest_state(network: nn.Module) -> str:
    """The SHA-256 of a network's state dict: names, dtypes, shapes and bytes."""
    state = {name: value for name, value in network.state_dict().items() if not name.endswith(COUNTER)}
    return digest_arrays((name, _bytes(value).numpy()) for name, value in state.items())


def _bytes(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    return value.view(torch.uint16) if value.dtype == torch.bfloat16 else value  # numpy has no bfloat16


def read(path: Path) -> list[State]:
    """The state dicts in a file, best first.

    Raises
    ------
    WeightsError
        If the file is missing, is damaged, holds no state dict, or could only be read by running code.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected weights as .safetensors, .pth, .pt or .bin")
    if is_model(path):
        return [read_carried(path)]
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    found = list(_states(content, DEPTH_MAX))
    if not found:
        raise WeightsError(
            f"{path}: holds no state dict (names → tensors); save one with torch.save(net.state_dict(), …)"
        )
    return found


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); bring a complete one") from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript archives, which are refused below anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds objects other than tensors, which could run code, and was not loaded; "
            "save the state dict alone, torch.save(net.state_dict(), …), or as safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: not a readable state dict ({reason}); bring a complete one") from error


def _states(content: object, depth: int) -> Iterator[State]:
    """Every mapping of names to tensors, those in well-known places first."""
    if not isinstance(content, Mapping):
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    inner = {key: value for key, value in named.items() if isinstance(value, Mapping)}
    if tensors:
        yield tensors
    if depth:
        for key in sorted(inner, key=lambda key: NESTS.index(key) if key in NESTS else len(NESTS)):
            yield from _states(inner[key], depth - 1)


def pick(
    states: list[State], network: nn.Module, removed: tuple[str, ...], rename: Callable[[str], str], where: str
) -> dict[str, Tensor]:
    """The first of several state dicts that fits a network; if none does, why the nearest one does not."""
    failures = []
    for state in states:
        try:
            return fit(state, network, removed, rename, where)
        except WeightsError as error:
            failures.append((_overlap(state, network), error))
    raise max(failures, key=lambda failure: failure[0])[1]


def fit(
    state: State, network: nn.Module, removed: tuple[str, ...], rename: Callable[[str], str], where: str
) -> dict[str, Tensor]:
    """A state dict under the names of a headless network, complete and with nothing left over but an old head.

    Parameters
    ----------
    state : mapping of str to Tensor
        With or without the old head, and with any prefix (``module.``, ``backbone.`` …) before the names.
    network : Module
    removed : tuple of str
        Names of the modules that were taken off the network.
    rename : callable
        Old names of the same weights → today's.
    where : str
        For messages.

    Raises
    ------
    WeightsError
        If weights are missing, have another shape, belong to another network, or fit twice.
    """
    needed = {name: value for name, value in network.state_dict().items() if not name.endswith(COUNTER)}
    given = {rename(_stripped(name)): value for name, value in state.items() if not name.endswith(COUNTER)}
    prefix = _prefix(given, needed, where)
    under = {name[len(prefix) :]: value for name, value in given.items() if name.startswith(prefix)}
    missing = [name for name in needed if name not in under]
    if missing:
        raise WeightsError(f"{where}: {_some(missing, 'weights')} missing; it has {_some(list(given), 'others')}")
    for name, value in needed.items():
        if under[name].shape != value.shape:
            shapes = f"{tuple(under[name].shape)}, expected {tuple(value.shape)}"
            raise WeightsError(f"{where}: {name!r} has shape {shapes}; it belongs to another network")
    heads = (*removed, *HEADS)
    strange = [name for name in under if name not in needed and not _is_below(name, heads)]
    if strange:
        raise WeightsError(f"{where}: {_some(strange, 'weights')} not in this network; it belongs to another one")
    return {name: under[name] for name in needed}


def _stripped(name: str) -> str:
    """torch.compile puts this before the names of whatever it wrapped, at any depth."""
    return name.replace("_orig_mod.", "")


def _overlap(state: State, network: nn.Module) -> int:
    ends = {_tail(name) for name in state}
    return sum(_tail(name) in ends for name in network.state_dict())


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-3:])


def _prefix(given: State, needed: State, where: str) -> str:
    """What stands before all the names that are needed; the empty prefix is preferred."""
    longest = max(needed, key=len, default="")
    candidates = {name[: -len(longest)] for name in given if name.endswith("." + longest)}
    fitting = [prefix for prefix in sorted(candidates) if all(prefix + name in given for name in needed)]
    if all(name in given for name in needed) or not fitting:
        return ""
    if len(fitting) > 1:
        raise WeightsError(f"{where}: fits under {', '.join(map(repr, fitting))}; save the one that you mean alone")
    return fitting[0]


def _is_below(name: str, modules: tuple[str, ...]) -> bool:
    first = re.sub(r"\d+$", "", name.split(".")[0]).lower()
    return any(name == module or name.startswith(module + ".") for module in modules) or first in modules


def _some(names: list[str], what: str) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} {', '.join(map(repr, names[:SHOWN]))}{more}" if names else f"no {what}"
