"""A network called as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from featpipe.backbone import Backbone
from featpipe.engine.runner import Embeddings, as_arrays, padded

__all__ = ["Eager"]


class Eager:
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
        ready = padded(self.backbone.transform.normalise(images), self.batch)
        ready = ready.to(self._device, self.dtype, memory_format=torch.channels_last)
        answer = as_arrays(self.compute(ready), len(images))
        return lambda: answer

    def compute(self, images: Tensor) -> Mapping[str, Tensor]:
        """The outputs of a full batch, transformed and in this engine's dtype."""
        return self.backbone.embed(images)
