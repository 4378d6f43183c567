"""Class-incremental learning that trains the network too (experimental).

In benchmarks it was rarely better than the same methods on embeddings; `tests/benchmarks/README.md` has the numbers.
"""

from __future__ import annotations

from featpipe.incremental.deep.setup import DeepTrainingConfig
from featpipe.incremental.deep.train import expand_network

__all__ = ["DeepTrainingConfig", "expand_network"]
