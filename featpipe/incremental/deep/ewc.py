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
    context: FineTuneContext, backbone: Backbone, step: IncrementalStep, old_rows: NDArray[np.int64]
) -> ParameterImportances:
    """Importances of the weights for the old classes: from old images if given, else those that the model retains.

    Parameters
    ----------
    context : FineTuneContext
    backbone : Backbone
    step : IncrementalStep
    old_rows : ndarray of shape (m,), int64
        Rows of the archive of ``step.old``.

    Raises
    ------
    ConfigError
        If the model retains none for some of the weights to train.
    """
    layers, memory = make_old_layers(step), step.replay_memory
    last_layer = get_last_layer_name(layers)
    if len(np.unique(step.old.y)) == step.k_old:
        rows = np.unique(old_rows)
        logger.info(f"importances of the weights, from {len(rows)} old images")
        initial_head = InitialHead(layers, np.zeros(1), np.ones(1), {"kind": "start_head", "head": "old"})
        importances = compute_network_importances(context, backbone, backbone.network, initial_head, rows)
        for name in (f"{last_layer}.weight", f"{last_layer}.bias"):  # new classes have none
            old_importances = importances[name]
            importances[name] = np.zeros((step.k, *old_importances.shape[1:]), np.float32)
            importances[name][: len(old_importances)] = old_importances
        return importances
    assert memory is not None
    assert memory.network is not None
    assert memory.importances is not None
    W = memory.importances
    importances = {f"{last_layer}.weight": W[:, :-1], f"{last_layer}.bias": W[:, -1], **memory.network}
    missing_names = [n for n in list_trained_parameters(context, backbone, layers) if n not in importances]
    if missing_names:
        raise ConfigError(
            f"ewc with --unfreeze {context.tuning.unfreeze}: the model retains no importances of "
            f"{len(missing_names)} weights ({missing_names[0].removeprefix(BACKBONE_PREFIX)}); unfreeze less, or give "
            "old images of each class too"
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
    return [*_get_head_parameters(layers), *(BACKBONE_PREFIX + name for name in network_names)]


def get_last_layer_name(layers: HeadLayers) -> str:
    """The prefix of the last layer's parameter names."""
    return f"{HEAD_PREFIX}{len(layers.to_module()) - 1}"


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
    initial_parameters = {BACKBONE_PREFIX + name: parameter for name, parameter in network.named_parameters()}
    initial_parameters |= _get_head_parameters(initial_layers)
    reference = {name: parameter.detach().clone() for name, parameter in initial_parameters.items()}
    last_layer = get_last_layer_name(initial_layers)
    for name, parameter in _get_head_parameters(previous_layers).items():
        old_values, initial_values = parameter.detach(), reference[name][: len(parameter)]
        shift = (initial_values - old_values).mean(dim=0) if name.startswith(f"{last_layer}.") else 0.0
        reference[name][: len(parameter)] = old_values + shift
    weighted = {name: strength * torch.from_numpy(np.ascontiguousarray(value)) for name, value in importances.items()}
    return EWCPenalty({name: reference[name] for name in importances}, weighted)


def _get_head_parameters(layers: HeadLayers) -> dict[str, nn.Parameter]:
    return {HEAD_PREFIX + name: parameter for name, parameter in layers.to_module().named_parameters()}
