"""Fine-tuning: train the head and some of the network together, from where the probe ended.

`train_network` trains what a `FineTuneContext` describes and returns a `TrainedNetwork`. A caller adds to the loss by
`LossTerm`, and has more rows evaluated after each epoch by ``monitors``.
"""

from __future__ import annotations

from featpipe.finetuning.augmentation import Augmentation
from featpipe.finetuning.batches import prefetch_batches
from featpipe.finetuning.context import NON_TRAINING_SETTINGS, FineTuneContext, checkpoint_path_for, extract_for_model
from featpipe.finetuning.finetune import finetune
from featpipe.finetuning.head_layers import HeadLayers, InitialHead, head_to_layers, initialize_head
from featpipe.finetuning.loss_terms import LossTerm
from featpipe.finetuning.result import FineTuningResult, ProbeComparison
from featpipe.finetuning.split import Splits
from featpipe.finetuning.train import open_trainer, train_network
from featpipe.finetuning.trained_network import TrainedNetwork
from featpipe.finetuning.trainer import BACKBONE_PREFIX, HEAD_PREFIX, EpochRecord, Trainer
from featpipe.finetuning.unfreeze import select_unfrozen

__all__ = [
    "BACKBONE_PREFIX",
    "HEAD_PREFIX",
    "NON_TRAINING_SETTINGS",
    "Augmentation",
    "EpochRecord",
    "FineTuneContext",
    "FineTuningResult",
    "HeadLayers",
    "InitialHead",
    "LossTerm",
    "ProbeComparison",
    "Splits",
    "TrainedNetwork",
    "Trainer",
    "checkpoint_path_for",
    "extract_for_model",
    "finetune",
    "head_to_layers",
    "initialize_head",
    "open_trainer",
    "prefetch_batches",
    "select_unfrozen",
    "train_network",
]
