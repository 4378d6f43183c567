"""Several processes that train one network on shares of each batch, as ``torchrun`` starts them.

Gradients are summed over the processes after each batch, so that a step is the one that a single process would take.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

__all__ = ["World", "joined"]

R = TypeVar("R")
PATIENCE = timedelta(days=2)  # the others wait while the first one extracts


@dataclass(frozen=True)
class World:
    """One process among those that train together.

    Attributes
    ----------
    rank, size : int
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of a batch that are this process's."""
        return rows[self.rank :: self.size]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor the sum of those of all processes, in one exchange for each dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            distributed.all_reduce(flat)
            for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Put into each tensor what the first process has there."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def agree(self, value: bool) -> bool:
        """Whether it is so in any of the processes."""
        if self.size == 1:
            return value
        found = torch.tensor(int(value), device="cuda" if distributed.get_backend() == "nccl" else "cpu")
        distributed.all_reduce(found)
        return bool(found.item())

    def in_turn(self, work: Callable[[], R]) -> R:
        """Do something in the first process, and then, when it is done there, in the others."""
        if self.size == 1:
            return work()
        if not self.first:
            distributed.barrier()
            return work()
        try:
            return work()
        finally:
            distributed.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world that this process was started in; alone, if it was started by itself."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not distributed.is_available():
        yield World()
        return
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(distributed.get_rank(), distributed.get_world_size())
    finally:
        if ours:
            distributed.destroy_process_group()
