"""A network called as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featpipe.backbone import Backbone
from featpipe.engine.runner import Embeddings, pad_batch, to_arrays

__all__ = ["EagerRunner"]


class EagerRunner:
    """Calls the backbone, on any device.

    Parameters
    ----------
    backbone : Backbone
        On its device, in its dtype.
    batch : int
    dtype : torch.dtype
    """

    name = "torch"

    def __init__(self, backbone: Backbone, batch: int, dtype: torch.dtype) -> None:
        self.backbone = backbone
        self.batch = batch
        self.dtype = dtype
        self._device = next((p.device for p in backbone.network.parameters()), torch.device("cpu"))

    def enter_stream(self, streams: int) -> None:
        """Nothing is kept for a stream."""

    @torch.inference_mode()
    def submit(self, images: Tensor) -> Callable[[], Embeddings]:
        inputs = pad_batch(self.backbone.transform.normalize(images), self.batch)
        inputs = inputs.to(self._device, self.dtype, memory_format=torch.channels_last)
        embeddings = to_arrays(self.compute(inputs), len(images))
        return lambda: embeddings

    def compute(self, images: Tensor) -> Mapping[str, Tensor]:
        """The outputs of a full batch, transformed and in this engine's dtype."""
        return self.backbone.embed(images)
