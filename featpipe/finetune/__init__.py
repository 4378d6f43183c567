"""Fine-tuning: back into the network, from where the probe ended.

The loop is in `loop`, and reads top to bottom; what it trains, on what and how is a `job`, what changes is a `state`.
"""

from featpipe.finetune.result import Comparison, FineTuned
from featpipe.finetune.verb import finetune
from featpipe.finetune.views import Augmentation

__all__ = ["Augmentation", "Comparison", "FineTuned", "finetune"]
