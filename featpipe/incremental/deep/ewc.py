"""Elastic weight consolidation of a network: importances of its weights for the old classes, and the penalty."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe.backbones import Backbone
from featpipe.errors import ConfigError
from featpipe.finetuning import (
    BACKBONE_PREFIX,
    HEAD_PREFIX,
    FineTuneContext,
    HeadLayers,
    InitialHead,
    head_to_layers,
    open_trainer,
    select_unfrozen,
)
from featpipe.incremental.deep.images import ExpansionImages
from featpipe.incremental.deep.regularizers import EWCPenalty, compute_network_fisher
from featpipe.incremental.methods import make_old_head
from featpipe.incremental.problem import IncrementalStep
from featpipe.metrics import Calibration

logger = logging.getLogger(__name__)

ParameterImportances = dict[str, NDArray[np.float32]]


def make_old_layers(step: IncrementalStep) -> HeadLayers:
    """The head layers of the old model, for the classes that remain."""
    pipeline = make_old_head(step)
    layers = head_to_layers(pipeline, "classification", Calibration(step.temperature), int(pipeline[-1].n_features_in_))
    assert layers is not None
    return layers


def compute_importances(
    context: FineTuneContext, backbone: Backbone, step: IncrementalStep, images: ExpansionImages
) -> ParameterImportances:
    """Importances of the weights for the old classes: from old images if given, else those that the model retains.

    Raises
    ------
    ConfigError
        If the model retains none for some of the weights to train.
    """
    layers = make_old_layers(step)
    if len(np.unique(step.old.y)) == step.k_old:
        rows = np.unique(images.find_rows(step.old))
        logger.info(f"importances of the weights, from {len(rows)} old images")
        initial_head = InitialHead(layers, np.zeros(1), np.ones(1), "")
        importances = compute_network_importances(context, backbone, backbone.network, initial_head, rows)
        return _pad_new_classes(importances, step.k)
    assert step.replay_memory is not None
    assert step.replay_memory.network is not None
    assert step.replay_memory.importances is not None
    last_layer_name = get_last_layer_name(layers)
    W = step.replay_memory.importances
    importances = {
        f"{last_layer_name}.weight": W[:, :-1],
        f"{last_layer_name}.bias": W[:, -1],
        **step.replay_memory.network,
    }
    if missing_names := [
        name for name in list_trained_parameters(context, backbone, layers) if name not in importances
    ]:
        raise ConfigError(
            f"ewc with --unfreeze {context.tuning.unfreeze}: the model keeps no importances of {len(missing_names)} of "
            f"the weights ({missing_names[0].removeprefix(BACKBONE_PREFIX)}); unfreeze less, or give old images of "
            "each class too"
        )
    return importances


def compute_network_importances(
    context: FineTuneContext, backbone: Backbone, network: nn.Module, initial_head: InitialHead, rows: NDArray[np.int64]
) -> ParameterImportances:
    """The Fisher information of each trained weight, from images without augmentation.

    Parameters
    ----------
    context : FineTuneContext
    backbone : Backbone
        Before the training.
    network : Module
        The backbone's network, before or after training.
    initial_head : InitialHead
        The layers on it.
    rows : ndarray of shape (m,), int64
    """
    plain_context = replace(
        context,
        tuning=replace(context.tuning, augmentation={}, mixup=0.0, cutmix=0.0),
        splits=replace(context.splits, train=rows, validation=rows[:0], test=rows[:0]),
        loss_terms=(),
        monitors={},
        sample_weights=None,
        logit_adjustment=None,
    )
    with open_trainer(plain_context, backbone, network, initial_head) as trainer:
        fisher = compute_network_fisher(trainer, rows)
    return {name: np.asarray(value.cpu().numpy(), np.float32) for name, value in fisher.items()}


def list_trained_parameters(context: FineTuneContext, backbone: Backbone, layers: HeadLayers) -> list[str]:
    """Names of all trained parameters, as `Trainer.trained_parameters` has them."""
    network_names = select_unfrozen(backbone, str(context.tuning.unfreeze)).names
    return [
        *(HEAD_PREFIX + name for name, _ in layers.to_module().named_parameters()),
        *(BACKBONE_PREFIX + name for name in network_names),
    ]


def get_last_layer_name(layers: HeadLayers) -> str:
    """The prefix of the last layer's parameter names."""
    return f"{HEAD_PREFIX}{len(layers.to_module()) - 1}"


def _pad_new_classes(importances: ParameterImportances, k: int) -> ParameterImportances:
    """Extend the importances of the last layer to ``k`` classes with zeros."""
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
    """The penalty towards the old weights, with importances multiplied by ``strength``.

    Adding the same vector to all rows of the last layer does not change the old model. Among these equal layers, the
    reference is the one nearest to the initial layer.
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
