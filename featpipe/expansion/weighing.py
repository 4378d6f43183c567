"""How important each weight of a network is for the classes that it knew, and the pull to those weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe.backbone import Backbone
from featpipe.calibration import Calibration
from featpipe.errors import ConfigError
from featpipe.expansion.methods import old_head
from featpipe.expansion.pictures import Pictures
from featpipe.expansion.step import Step
from featpipe.finetuning.case import Case
from featpipe.finetuning.job import BELOW, HEAD
from featpipe.finetuning.layers import Layers, layers_of
from featpipe.finetuning.past import Anchor
from featpipe.finetuning.start import Start
from featpipe.finetuning.unfreezing import unfrozen
from featpipe.finetuning.work import weighed
from featpipe.progress import Progress

__all__ = ["Weights", "anchor_to", "known_of", "last_of", "names_of", "old_layers"]

Weights = dict[str, NDArray[np.float32]]


def old_layers(step: Step) -> Layers:
    """The layers of the model before, of the classes that stay."""
    pipeline = old_head(step)
    found = layers_of(pipeline, "classification", Calibration(step.temperature), int(pipeline[-1].n_features_in_))
    assert found is not None
    return found


def known_of(case: Case, backbone: Backbone, step: Step, pictures: Pictures) -> Weights:
    """How important each weight is for the old classes: from old images at hand, else as the model keeps it.

    Raises
    ------
    ConfigError
        If it keeps none of some of the weights that are to be trained.
    """
    layers = old_layers(step)
    if len(np.unique(step.old.y)) == step.k_old:
        rows = np.unique(pictures.rows(step.old))
        case.tell(Progress("note", f"importances of the weights, from {len(rows)} old images"))
        start = Start(layers, np.zeros(1), np.ones(1), "")
        return _padded(weighed(case, backbone, backbone.network, start, rows), step.k)
    assert step.kept is not None
    assert step.kept.network is not None
    assert step.kept.importances is not None
    last = last_of(layers)
    W = step.kept.importances
    found: Weights = {f"{last}.weight": W[:, :-1], f"{last}.bias": W[:, -1], **step.kept.network}
    if lacks := [name for name in names_of(case, backbone, layers) if name not in found]:
        raise ConfigError(
            f"ewc with --unfreeze {case.tuning.unfreeze}: the model keeps no importances of {len(lacks)} of the "
            f"weights ({lacks[0].removeprefix(BELOW)}); unfreeze less, or give old images of each class too"
        )
    return found


def names_of(case: Case, backbone: Backbone, layers: Layers) -> list[str]:
    """Of all that is trained, as a job calls it."""
    below = unfrozen(backbone, str(case.tuning.unfreeze)).names
    return [*(HEAD + name for name, _ in layers.module().named_parameters()), *(BELOW + name for name in below)]


def last_of(layers: Layers) -> str:
    """The last layer, as a job calls it."""
    return f"{HEAD}{len(layers.module()) - 1}"


def _padded(found: Weights, k: int) -> Weights:
    """With zeros for new classes, in what belongs to the last layer."""
    last = max(int(name[len(HEAD) :].split(".")[0]) for name in found if name.startswith(HEAD))
    padded = dict(found)
    for name in (f"{HEAD}{last}.weight", f"{HEAD}{last}.bias"):
        padded[name] = np.zeros((k, *found[name].shape[1:]), np.float32)
        padded[name][: len(found[name])] = found[name]
    return padded


def anchor_to(start: Layers, before: Layers, known: Weights, amount: float, network: nn.Module) -> Anchor:
    """The old weights, and their importances as heavy as so many images for each that is trained on.

    To the old model it is the same whatever is added to all rows of its last layer; of those that are the same, the
    reference is the one that is nearest to where training starts.
    """
    here, was = (dict(layers.module().named_parameters()) for layers in (start, before))
    weights = {BELOW + name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    weights |= {HEAD + name: parameter.detach().clone() for name, parameter in here.items()}
    for name, parameter in was.items():
        old, now = parameter.detach(), here[name].detach()
        moved = (now[: len(old)] - old).mean(dim=0) if (HEAD + name).startswith(last_of(start) + ".") else 0.0
        weights[HEAD + name][: len(old)] = old + moved
    return Anchor(
        {name: weights[name] for name in known},
        {name: amount * torch.from_numpy(np.ascontiguousarray(importance)) for name, importance in known.items()},
    )
