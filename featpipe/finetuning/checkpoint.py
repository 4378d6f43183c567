"""Checkpoints: one safetensors file with the whole state, and what was asked for as JSON in its header.

A checkpoint has its name only when it is complete, and nothing in it can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from featpipe.durable import whole_file
from featpipe.errors import ConfigError, ModelError
from featpipe.finetuning.job import Job
from featpipe.finetuning.state import Epoch, State, put
from featpipe.fingerprint import differences

__all__ = ["read", "write"]

FORMAT = "featpipe-checkpoint/1"
KEY = "featpipe"
NUMBERS = ("rate", "epoch", "step", "loss", "seen", "pieces")
_TORN = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)


def write(path: Path, job: Job, state: State, asked: Mapping[str, Any]) -> None:
    """Save a state, in one step in the place of the one before.

    Parameters
    ----------
    path : Path
    job : Job
    state : State
    asked : mapping
        What decides the run: settings, rows, weights. JSON can hold it.
    """
    tensors = {f"now/{name}": tensor for name, tensor in job.kept().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in state.best.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in state.average.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in _of_optimizer(state).items()}
    document = {
        "format": FORMAT,
        "asked": asked,
        "curve": [epoch.facts() for epoch in state.curve],
        "scaler": state.scaler.state_dict(),
        **{name: getattr(state, name) for name in NUMBERS},
    }
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain, {KEY: json.dumps(document)})
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise ModelError(
            f"{path}: the checkpoint cannot be written ({error.strerror or error}); choose another --out"
        ) from None


def read(path: Path, job: Job, asked: Mapping[str, Any]) -> State:
    """Put back what was saved, and go on from there.

    Raises
    ------
    ConfigError
        If something else was asked for: it lists what differs.
    ModelError
        If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads(file.metadata()[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}")
    except _TORN as error:
        raise ModelError(
            f"{path}: is damaged or no checkpoint ({' '.join(str(error).split())[:200]}); begin anew with --restart"
        ) from None
    differ = differences(document["asked"], json.loads(json.dumps(asked)))
    if differ:
        raise ConfigError(
            f"{path}: is of a run that was asked for otherwise ({'; '.join(differ[:6])}); give the same again to "
            "go on, or --restart to begin anew"
        )
    try:
        return _restored(job, document, tensors)
    except _TORN as error:
        raise ModelError(f"{path}: does not fit the network ({error}); begin anew with --restart") from None


def _restored(job: Job, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    state = State.begun(job, float(document["rate"]))
    for name in NUMBERS:
        setattr(state, name, document[name])
    state.curve = [Epoch.of(facts) for facts in document["curve"]]
    state.scaler.load_state_dict(document["scaler"])
    put(job, {name: tensor.to(job.device) for name, tensor in _below("now", tensors).items()})
    state.best = {name: tensor.to(job.device) for name, tensor in _below("best", tensors).items()}
    state.average = {name: tensor.to(job.device) for name, tensor in _below("average", tensors).items()}
    parameters = job.parameters()
    for name, tensor in _below("optimizer", tensors).items():
        parameter, _, key = name.rpartition("/")
        own = parameters[parameter]  # as its numbers lie in memory, so must those of the state
        place = tensor if key == "step" else torch.empty_like(own).copy_(tensor)
        state.optimizer.state[own][key] = place
    return state


def _of_optimizer(state: State) -> dict[str, Tensor]:
    found = {}
    for group in state.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in state.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    found[f"{name}/{key}"] = value
    return found


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + "/")}
