"""Fine-tuning: train the head and part of the network together, starting from the trained head.

`train_network` trains what a `FineTuneContext` describes and returns a `TrainedNetwork`. Callers add to the loss with
`LossTerm`, and evaluate further rows after each epoch with ``monitors``.
"""

from __future__ import annotations

from featpipe.finetuning.augmentation import Augmentation
from featpipe.finetuning.batches import prefetch_batches
from featpipe.finetuning.context import NON_TRAINING_SETTINGS, FineTuneContext, checkpoint_path_for, extract_for_model
from featpipe.finetuning.finetune import finetune
from featpipe.finetuning.head_layers import HeadLayers, InitialHead, head_to_layers, initialize_head
from featpipe.finetuning.loss_terms import LossTerm
from featpipe.finetuning.result import FineTuningResult
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
