"""Count the multiply-adds of a network, and derive the batch size from them."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import torch

from featpipe.backbones import Backbone, example_batch

CPU_BATCH_BYTES = 16  # of one activation over the batch: 4 images in fp32, 8 in bf16, whose maps fit into the cache
CPU_BATCH_MULTIPLY_ADDS = 36e9  # about three seconds at 10 GMAC/s, the speed of a slow core in fp32
GPU_BATCH_RANGE = (32, 512)  # minimum and maximum
GPU_BATCH_MULTIPLY_ADDS = 1e12  # a few milliseconds of a large GPU, so that kernel launches are negligible


def default_batch_size(device: torch.device, image_multiply_adds: int | None, dtype: torch.dtype) -> int:
    """Number of images in one forward pass; depends on device type, network and precision, never on timings.

    Parameters
    ----------
    device : torch.device
    image_multiply_adds : int or None
        Multiply-adds for one image; None if unknown.
    dtype : torch.dtype
        Dtype of weights and activations.
    """
    if device.type == "cpu":
        max_batch = CPU_BATCH_BYTES // dtype.itemsize
        return (
            max_batch
            if not image_multiply_adds
            else max(1, min(max_batch, int(CPU_BATCH_MULTIPLY_ADDS // image_multiply_adds)))
        )
    min_batch, max_batch = GPU_BATCH_RANGE
    if not image_multiply_adds:
        return min_batch
    batch = 1 << max(0, int(GPU_BATCH_MULTIPLY_ADDS // image_multiply_adds).bit_length() - 1)
    return max(min_batch, min(max_batch, batch))


@torch.no_grad()
def count_multiply_adds(backbone: Backbone) -> int | None:
    """Count the multiply-adds for one image; None if they cannot be counted.

    The network runs on meta tensors, which have shapes but no values. A network that needs values, because it creates
    tensors or branches on values, runs once on real tensors.
    """
    from torch.utils.flop_counter import FlopCounterMode  # lazy: the import takes 0.1 s, and a rerun does not need it

    reference = next((p for p in backbone.network.parameters() if p.is_floating_point()), torch.zeros(()))
    image = example_batch(backbone.transform, 1, reference.dtype, reference.device)
    for with_values in (False, True):
        # A custom network may raise anything.
        with contextlib.suppress(Exception), FlopCounterMode(display=False) as counter:
            if with_values:
                backbone.embed(image)
            else:
                replace(backbone, network=_copy_to_meta(backbone.network)).embed(image.to("meta"))
            return int(counter.get_total_flops()) // 2
    return None


def _copy_to_meta(network: torch.nn.Module) -> torch.nn.Module:
    """Copy a network with its weights on the meta device; a forward pass may change the state of the network."""
    memo: dict[int, Any] = {id(value): torch.nn.Parameter(value.to("meta"), False) for value in network.parameters()}
    memo |= {id(value): value.to("meta") for value in network.buffers()}
    return copy.deepcopy(network, memo)
