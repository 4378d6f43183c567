"""Checkpoints: one safetensors file with the training state, and the run's configuration as JSON in its header.

A checkpoint gets its name only when it is complete, and nothing in it can run code.
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

from featpipe.errors import ConfigError, ModelError
from featpipe.finetuning.trainer import EpochRecord, Trainer, TrainingState, load_weights
from featpipe.storage import atomic_write, describe_differences

CHECKPOINT_FORMAT = "featpipe-checkpoint/1"
METADATA_KEY = "featpipe"
SCALAR_FIELDS = ("rate", "epoch", "step", "loss", "seen", "pieces")
_DAMAGE_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)


def save_checkpoint(path: Path, trainer: Trainer, state: TrainingState, run_config: Mapping[str, Any]) -> None:
    """Save a state; it replaces the previous checkpoint atomically.

    Parameters
    ----------
    path : Path
    trainer : Trainer
    state : TrainingState
    run_config : mapping
        Everything that determines the run, as JSON data.
    """
    tensors = {f"now/{name}": tensor for name, tensor in trainer.trained_tensors().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in state.best_weights.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in state.ema_weights.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in _collect_optimizer_tensors(state).items()}
    document = {
        "format": CHECKPOINT_FORMAT,
        "asked": run_config,
        "curve": [epoch.to_dict() for epoch in state.curve],
        "scaler": state.scaler.state_dict(),
        **{name: getattr(state, name) for name in SCALAR_FIELDS},
    }
    cpu_tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = safetensors.torch.save(cpu_tensors, {METADATA_KEY: json.dumps(document)})
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise ModelError(
            f"{path}: the checkpoint cannot be written ({error.strerror or error}); choose another --out"
        ) from None


def load_checkpoint(path: Path, trainer: Trainer, run_config: Mapping[str, Any]) -> TrainingState:
    """Load a state, and put its weights into the trainer's network.

    Raises
    ------
    ConfigError
        If ``run_config`` differs; the message lists the differences.
    ModelError
        If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads(file.metadata()[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if document["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {document['format']!r} instead of {CHECKPOINT_FORMAT!r}")
    except _DAMAGE_ERRORS as error:
        raise ModelError(
            f"{path}: is damaged or not a checkpoint ({' '.join(str(error).split())[:200]}); start over with --restart"
        ) from None
    changed_settings = describe_differences(document["asked"], json.loads(json.dumps(run_config)))
    if changed_settings:
        raise ConfigError(
            f"{path}: belongs to a run with other settings ({'; '.join(changed_settings[:6])}); give the same settings "
            "to resume it, or --restart to start over"
        )
    try:
        return _restore_state(trainer, document, tensors)
    except _DAMAGE_ERRORS as error:
        raise ModelError(f"{path}: does not fit the network ({error}); start over with --restart") from None


def _restore_state(trainer: Trainer, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TrainingState:
    state = TrainingState.init(trainer, float(document["rate"]))
    for name in SCALAR_FIELDS:
        setattr(state, name, document[name])
    state.curve = [EpochRecord.from_dict(record) for record in document["curve"]]
    state.scaler.load_state_dict(document["scaler"])
    load_weights(trainer, {name: tensor.to(trainer.device) for name, tensor in _select_prefix("now", tensors).items()})
    state.best_weights = {name: tensor.to(trainer.device) for name, tensor in _select_prefix("best", tensors).items()}
    state.ema_weights = {name: tensor.to(trainer.device) for name, tensor in _select_prefix("average", tensors).items()}
    parameters = trainer.trained_parameters()
    for name, tensor in _select_prefix("optimizer", tensors).items():
        parameter_name, _, key = name.rpartition("/")
        weight = parameters[parameter_name]  # the optimizer state needs the same memory layout
        value = tensor if key == "step" else torch.empty_like(weight).copy_(tensor)
        state.optimizer.state[weight][key] = value
    return state


def _collect_optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    tensors = {}
    for group in state.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in state.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"{name}/{key}"] = value
    return tensors


def _select_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + "/")}
