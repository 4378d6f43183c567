"""Fine-tuning: back into the network, from where the probe ended.

The loop is in `loop`, and reads top to bottom; what it trains, on what and how is a `job`, what changes is a `state`.
"""

from featpipe.finetuning.result import FineTuningResult, ProbeComparison
from featpipe.finetuning.verb import finetune
from featpipe.finetuning.views import Augmentation

__all__ = ["Augmentation", "FineTuningResult", "ProbeComparison", "finetune"]
