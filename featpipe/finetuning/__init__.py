"""Fine-tuning: back into the network, from where the probe ended.

The loop is in `loop`, and reads top to bottom; what it trains, on what and how is a `job`, what changes is a `state`.
"""

from __future__ import annotations

from featpipe.finetuning.augmentation import Augmentation
from featpipe.finetuning.batches import prefetch_batches
from featpipe.finetuning.context import NON_TRAINING_SETTINGS, FineTuneContext, checkpoint_path_for, extract_for_model
from featpipe.finetuning.distributed import DistributedContext
from featpipe.finetuning.finetune import compute_network_importances, finetune, finetune_network, resolve_process_device
from featpipe.finetuning.head_layers import HeadLayers, InitialHead, head_to_layers, initialize_head
from featpipe.finetuning.regularizers import DistillationLoss, EWCPenalty, Regularizers, compute_network_fisher
from featpipe.finetuning.result import FineTuningResult, ProbeComparison, make_finetuned_backbone, make_finetuned_model
from featpipe.finetuning.split import Splits
from featpipe.finetuning.trainer import BACKBONE_PREFIX, HEAD_PREFIX, Trainer, TrainingState
from featpipe.finetuning.unfreeze import select_unfrozen

__all__ = [
    "BACKBONE_PREFIX",
    "HEAD_PREFIX",
    "NON_TRAINING_SETTINGS",
    "Augmentation",
    "DistillationLoss",
    "DistributedContext",
    "EWCPenalty",
    "FineTuneContext",
    "FineTuningResult",
    "HeadLayers",
    "InitialHead",
    "ProbeComparison",
    "Regularizers",
    "Splits",
    "Trainer",
    "TrainingState",
    "checkpoint_path_for",
    "compute_network_fisher",
    "compute_network_importances",
    "extract_for_model",
    "finetune",
    "finetune_network",
    "head_to_layers",
    "initialize_head",
    "make_finetuned_backbone",
    "make_finetuned_model",
    "prefetch_batches",
    "resolve_process_device",
    "select_unfrozen",
]
