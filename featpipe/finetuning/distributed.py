"""Training by several processes, started by ``torchrun``: each computes a share of every batch.

Gradients are summed over all processes after each batch, so a step equals that of a single process.
"""

from __future__ import annotations

import logging
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

from featpipe.inference import keep_freed_memory, resolve_device

R = TypeVar("R")
BARRIER_TIMEOUT = timedelta(days=2)  # the others wait while the main process extracts


@dataclass(frozen=True)
class DistributedContext:
    """The rank of this process among those that train together.

    Attributes
    ----------
    rank, size : int
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def shard(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The share of a batch that this process computes."""
        return rows[self.rank :: self.size]

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all processes, in place, with one exchange for each dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in same_dtype])
            distributed.all_reduce(flat)
            for tensor, summed in zip(same_dtype, flat.split([tensor.numel() for tensor in same_dtype]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def broadcast_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Copy tensors of the main process to the others, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def all_reduce_any(self, value: bool) -> bool:
        """Whether ``value`` is true in any process."""
        if self.size == 1:
            return value
        flag = torch.tensor(int(value), device="cuda" if distributed.get_backend() == "nccl" else "cpu")
        distributed.all_reduce(flag)
        return bool(flag.item())

    def run_main_first(self, function: Callable[[], R]) -> R:
        """Call a function in the main process, and afterwards in the others."""
        if self.size == 1:
            return function()
        if not self.is_main:
            distributed.barrier()
            return function()
        try:
            return function()
        finally:
            distributed.barrier()


@contextmanager
def join_distributed(device: torch.device) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started; without torchrun, the group is this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not distributed.is_available():
        yield DistributedContext()
        return
    owns_group = not distributed.is_initialized()
    if owns_group:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=BARRIER_TIMEOUT)
    context = DistributedContext(distributed.get_rank(), distributed.get_world_size())
    package_logger = logging.getLogger("featpipe")
    level = package_logger.level
    if not context.is_main:
        package_logger.setLevel(logging.WARNING)  # the main process logs what all of them do
    try:
        yield context
    finally:
        package_logger.setLevel(level)
        if owns_group:
            distributed.destroy_process_group()


def resolve_process_device(name: str) -> torch.device:
    """The device of this process; of several processes on one machine, each has its own GPU."""
    device = resolve_device(name)
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device
