"""How important each weight of a network is for the classes that it knew, and the pull to those weights."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe.backbones import Backbone
from featpipe.errors import ConfigError
from featpipe.finetuning import (
    BACKBONE_PREFIX,
    HEAD_PREFIX,
    EWCPenalty,
    FineTuneContext,
    HeadLayers,
    InitialHead,
    compute_network_importances,
    head_to_layers,
    select_unfrozen,
)
from featpipe.incremental.deep.images import ExpansionImages
from featpipe.incremental.methods import make_old_head
from featpipe.incremental.problem import IncrementalStep
from featpipe.metrics import Calibration

__all__ = [
    "ParameterImportances",
    "compute_importances",
    "get_last_layer_name",
    "list_trained_parameters",
    "make_ewc_penalty",
    "make_old_layers",
]

logger = logging.getLogger(__name__)

ParameterImportances = dict[str, NDArray[np.float32]]


def make_old_layers(step: IncrementalStep) -> HeadLayers:
    """The layers of the model before, of the classes that stay."""
    pipeline = make_old_head(step)
    layers = head_to_layers(pipeline, "classification", Calibration(step.temperature), int(pipeline[-1].n_features_in_))
    assert layers is not None
    return layers


def compute_importances(
    context: FineTuneContext, backbone: Backbone, step: IncrementalStep, images: ExpansionImages
) -> ParameterImportances:
    """How important each weight is for the old classes: from old images at hand, else as the model keeps it.

    Raises
    ------
    ConfigError
        If it keeps none of some of the weights that are to be trained.
    """
    layers = make_old_layers(step)
    if len(np.unique(step.old.y)) == step.k_old:
        rows = np.unique(images.find_rows(step.old))
        logger.info(f"importances of the weights, from {len(rows)} old images")
        initial_head = InitialHead(layers, np.zeros(1), np.ones(1), "")
        return _pad_new_classes(
            compute_network_importances(context, backbone, backbone.network, initial_head, rows), step.k
        )
    assert step.replay_memory is not None
    assert step.replay_memory.network is not None
    assert step.replay_memory.importances is not None
    last_layer_name = get_last_layer_name(layers)
    W = step.replay_memory.importances
    importances: ParameterImportances = {
        f"{last_layer_name}.weight": W[:, :-1],
        f"{last_layer_name}.bias": W[:, -1],
        **step.replay_memory.network,
    }
    if missing_names := [
        name for name in list_trained_parameters(context, backbone, layers) if name not in importances
    ]:
        raise ConfigError(
            f"ewc with --unfreeze {context.tuning.unfreeze}: the model keeps no importances of {len(missing_names)} of the "
            f"weights ({missing_names[0].removeprefix(BACKBONE_PREFIX)}); unfreeze less, or give old images of each class too"
        )
    return importances


def list_trained_parameters(context: FineTuneContext, backbone: Backbone, layers: HeadLayers) -> list[str]:
    """Of all that is trained, as a job calls it."""
    network_names = select_unfrozen(backbone, str(context.tuning.unfreeze)).names
    return [
        *(HEAD_PREFIX + name for name, _ in layers.to_module().named_parameters()),
        *(BACKBONE_PREFIX + name for name in network_names),
    ]


def get_last_layer_name(layers: HeadLayers) -> str:
    """The last layer, as a job calls it."""
    return f"{HEAD_PREFIX}{len(layers.to_module()) - 1}"


def _pad_new_classes(importances: ParameterImportances, k: int) -> ParameterImportances:
    """With zeros for new classes, in what belongs to the last layer."""
    last_layer_number = max(
        int(name[len(HEAD_PREFIX) :].split(".")[0]) for name in importances if name.startswith(HEAD_PREFIX)
    )
    padded = dict(importances)
    for name in (f"{HEAD_PREFIX}{last_layer_number}.weight", f"{HEAD_PREFIX}{last_layer_number}.bias"):
        padded[name] = np.zeros((k, *importances[name].shape[1:]), np.float32)
        padded[name][: len(importances[name])] = importances[name]
    return padded


def make_ewc_penalty(
    initial_layers: HeadLayers,
    previous_layers: HeadLayers,
    importances: ParameterImportances,
    strength: float,
    network: nn.Module,
) -> EWCPenalty:
    """The old weights, and their importances as heavy as so many images for each that is trained on.

    To the old model it is the same whatever is added to all rows of its last layer; of those that are the same, the
    reference is the one that is nearest to where training starts.
    """
    initial_parameters, old_parameters = (
        dict(layers.to_module().named_parameters()) for layers in (initial_layers, previous_layers)
    )
    weights = {BACKBONE_PREFIX + name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    weights |= {HEAD_PREFIX + name: parameter.detach().clone() for name, parameter in initial_parameters.items()}
    for name, parameter in old_parameters.items():
        old_values, initial_values = parameter.detach(), initial_parameters[name].detach()
        shift = (
            (initial_values[: len(old_values)] - old_values).mean(dim=0)
            if (HEAD_PREFIX + name).startswith(get_last_layer_name(initial_layers) + ".")
            else 0.0
        )
        weights[HEAD_PREFIX + name][: len(old_values)] = old_values + shift
    return EWCPenalty(
        {name: weights[name] for name in importances},
        {
            name: strength * torch.from_numpy(np.ascontiguousarray(importance))
            for name, importance in importances.items()
        },
    )
