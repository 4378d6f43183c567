"""Read weights from files (safetensors, or state dicts without unpickling code) and match them to a network by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from featpipe.errors import ModelError, WeightsError
from featpipe.storage import WEIGHTS_MEMBER, ModelBundle, digest_arrays, is_model_file

StateDict = Mapping[str, Tensor]

# Keys under which training programs store weights in a checkpoint, best first: authors evaluate the averaged (EMA) and
# teacher networks.
CHECKPOINT_KEYS = (
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
MAX_NESTING_DEPTH = 3
HEAD_NAMES = ("head", "head_dist", "fc", "classifier", "heads", "aux")  # modules whose weights may be left over
BATCH_COUNTER = "num_batches_tracked"  # used only in training
MAX_LISTED_NAMES = 3


@contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Seed torch's random generator within the context, and restore the caller's generator state afterwards."""
    rng_state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(rng_state)


def digest_state(network: nn.Module) -> str:
    """Compute the SHA-256 of a network's state dict: names, dtypes, shapes and bytes."""
    state = {name: value for name, value in network.state_dict().items() if not name.endswith(BATCH_COUNTER)}
    return digest_arrays((name, _to_numpy_dtype(value).numpy()) for name, value in state.items())


def _to_numpy_dtype(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    return value.view(torch.uint16) if value.dtype == torch.bfloat16 else value  # numpy has no bfloat16


def read_state_dicts(path: Path) -> list[StateDict]:
    """Read the state dicts in a file, best first.

    Raises
    ------
    WeightsError
        If the file is missing or damaged, holds no state dict, or can only be read by running code.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected weights as .safetensors, .pth, .pt or .bin")
    if is_model_file(path):
        return [_read_bundled_weights(path)]
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state_dicts = list(_find_state_dicts(content, MAX_NESTING_DEPTH))
    if not state_dicts:
        raise WeightsError(
            f"{path}: contains no state dict (names → tensors); save one with torch.save(net.state_dict(), …)"
        )
    return state_dicts


def read_bundle(path: Path, *members: str) -> ModelBundle:
    """Read a model file as a source of weights: a damaged one raises a WeightsError."""
    try:
        return ModelBundle.read(path, members)
    except ModelError as error:
        raise WeightsError(str(error)) from None


def _read_bundled_weights(path: Path) -> StateDict:
    import safetensors.torch

    bundle = read_bundle(path, WEIGHTS_MEMBER)
    if not bundle.has_weights:
        raise WeightsError(
            f"{path}: the model file contains no weights; pass the weights that its backbone was loaded with"
        )
    try:
        return safetensors.torch.load(bundle.members[WEIGHTS_MEMBER])
    except Exception as error:  # safetensors raises its own errors for damaged bytes
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{path}: {WEIGHTS_MEMBER} is damaged ({type(error).__name__}: {reason}); copy the model again"
        ) from None


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript archives, which are rejected below
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise WeightsError(
            f"{path}: contains objects other than tensors, which could run code, and was not loaded; "
            "save only the state dict, with torch.save(net.state_dict(), …) or as safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: not a readable state dict ({reason}); copy or download it again") from error


def _find_state_dicts(content: object, depth: int) -> Iterator[StateDict]:
    """Yield every mapping of names to tensors, those under well-known keys first."""
    if not isinstance(content, Mapping):
        return
    named_values = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named_values.items() if isinstance(value, Tensor)}
    nested = {key: value for key, value in named_values.items() if isinstance(value, Mapping)}
    if tensors:
        yield tensors
    if depth:
        for key in sorted(
            nested, key=lambda key: CHECKPOINT_KEYS.index(key) if key in CHECKPOINT_KEYS else len(CHECKPOINT_KEYS)
        ):
            yield from _find_state_dicts(nested[key], depth - 1)


def select_state_dict(
    states: list[StateDict],
    network: nn.Module,
    removed: tuple[str, ...],
    rename_weight: Callable[[str], str],
    context: str,
) -> dict[str, Tensor]:
    """Select the first state dict that matches a network; if none does, raise the error of the closest one."""
    failures = []
    for state in states:
        try:
            return match_state_dict(state, network, removed, rename_weight, context)
        except WeightsError as error:
            failures.append((_count_shared_names(state, network), error))
    raise max(failures, key=lambda failure: failure[0])[1]


def match_state_dict(
    state: StateDict, network: nn.Module, removed: tuple[str, ...], rename_weight: Callable[[str], str], context: str
) -> dict[str, Tensor]:
    """Rename a state dict to the names of a headless network; all weights must match, except those of a removed head.

    Parameters
    ----------
    state : mapping of str to Tensor
        With or without the removed head, and with any prefix (``module.``, ``backbone.`` …) before the names.
    network : Module
    removed : tuple of str
        Names of the modules that were removed from the network.
    rename_weight : callable
        Legacy weight name → current name.
    context : str
        For error messages.

    Raises
    ------
    WeightsError
        If weights are missing, have another shape, belong to another network, or match under several prefixes.
    """
    expected = {name: value for name, value in network.state_dict().items() if not name.endswith(BATCH_COUNTER)}
    available = {
        rename_weight(name.replace("_orig_mod.", "")): value  # torch.compile inserts this prefix at any depth
        for name, value in state.items()
        if not name.endswith(BATCH_COUNTER)
    }
    prefix = _find_prefix(available, expected, context)
    candidates = {name[len(prefix) :]: value for name, value in available.items() if name.startswith(prefix)}
    missing = [name for name in expected if name not in candidates]
    if missing:
        raise WeightsError(
            f"{context}: {_format_names(missing, 'weights')} missing; "
            f"the file has {_format_names(list(available), 'weights')}"
        )
    for name, value in expected.items():
        if candidates[name].shape != value.shape:
            shapes = f"{tuple(candidates[name].shape)}, expected {tuple(value.shape)}"
            raise WeightsError(f"{context}: {name!r} has shape {shapes}; the file belongs to another network")
    head_names = (*removed, *HEAD_NAMES)
    unexpected = [name for name in candidates if name not in expected and not _is_head_weight(name, head_names)]
    if unexpected:
        raise WeightsError(
            f"{context}: {_format_names(unexpected, 'weights')} not in this network; the file belongs to another one"
        )
    return {name: candidates[name] for name in expected}


def _count_shared_names(state: StateDict, network: nn.Module) -> int:
    suffixes = {_name_suffix(name) for name in state}
    return sum(_name_suffix(name) in suffixes for name in network.state_dict())


def _name_suffix(name: str) -> str:
    return ".".join(name.split(".")[-3:])


def _find_prefix(available: StateDict, expected: StateDict, context: str) -> str:
    """Find the prefix under which all expected names are available; the empty prefix is preferred."""
    longest = max(expected, key=len, default="")
    candidates = {name[: -len(longest)] for name in available if name.endswith("." + longest)}
    matching_prefixes = [
        prefix for prefix in sorted(candidates) if all(prefix + name in available for name in expected)
    ]
    if all(name in available for name in expected) or not matching_prefixes:
        return ""
    if len(matching_prefixes) > 1:
        raise WeightsError(
            f"{context}: weights match under several prefixes, {', '.join(map(repr, matching_prefixes))}; "
            "save only those of one prefix"
        )
    return matching_prefixes[0]


def _is_head_weight(name: str, modules: tuple[str, ...]) -> bool:
    top_module = re.sub(r"\d+$", "", name.split(".")[0]).lower()
    return any(name == module or name.startswith(module + ".") for module in modules) or top_module in modules


def _format_names(names: list[str], noun: str) -> str:
    remainder_text = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return f"{noun} {', '.join(map(repr, names[:MAX_LISTED_NAMES]))}{remainder_text}" if names else f"no {noun}"
