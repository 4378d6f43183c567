"""How much work an image is, and how many images a batch of it is to have."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import torch

from featpipe.backbones import Backbone, example_batch

__all__ = ["count_multiply_adds", "default_batch_size"]

CPU_BATCH_BYTES = 16  # of one number of each image: 4 images in fp32, 8 in bf16, whose maps a core has near at hand
CPU_BATCH_MULTIPLY_ADDS = 36e9  # some three seconds at 10 GMAC/s, what one slow core does in fp32
GPU_BATCH_RANGE = (32, 512)  # least and most
GPU_BATCH_MULTIPLY_ADDS = 1e12  # some milliseconds of a large GPU, so that starting its kernels costs nothing


def default_batch_size(device: torch.device, image_multiply_adds: int | None, dtype: torch.dtype) -> int:
    """Images in one forward pass; it follows from the kind of device, network and precision, never from the clock.

    Parameters
    ----------
    device : torch.device
    image_multiply_adds : int or None
        Multiply-adds of one image, where they could be counted.
    dtype : torch.dtype
        Of what is computed.
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
    """The work of one image, counted without doing it; None where that cannot be told.

    The network is run with tensors that have a shape and no values. A network that cannot do without values, because
    it makes tensors of its own or decides by them, is run once in earnest.
    """
    from torch.utils.flop_counter import FlopCounterMode  # a tenth of a second, which a rerun has no use for

    reference = next((p for p in backbone.network.parameters() if p.is_floating_point()), torch.zeros(()))
    image = example_batch(backbone.transform, 1, reference.dtype, reference.device)
    for with_values in (False, True):
        # A user's own network may raise anything.
        with contextlib.suppress(Exception), FlopCounterMode(display=False) as counter:
            if with_values:
                backbone.embed(image)
            else:
                replace(backbone, network=_copy_to_meta(backbone.network)).embed(image.to("meta"))
            return int(counter.get_total_flops()) // 2
    return None


def _copy_to_meta(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network whose weights have only their shapes; a copy, for what it may keep from a forward pass."""
    memo: dict[int, Any] = {id(value): torch.nn.Parameter(value.to("meta"), False) for value in network.parameters()}
    memo |= {id(value): value.to("meta") for value in network.buffers()}
    return copy.deepcopy(network, memo)
