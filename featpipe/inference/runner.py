"""What every way of running a network offers, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe.backbones import Backbone

__all__ = ["EagerRunner", "Embeddings", "Runner", "pad_batch", "to_arrays", "to_network_input"]

Embeddings = dict[str, NDArray[np.float32]]


class Runner(Protocol):
    """A network that is ready to be called with batch after batch."""

    @property
    def name(self) -> str:
        """Name of what computes."""

    @property
    def batch(self) -> int:
        """Images in one forward pass."""

    def enter_stream(self, streams: int) -> None:
        """To be called once by each of some threads that are going to submit."""

    def submit(self, images: Tensor) -> Callable[[], Embeddings]:
        """Begin with some images, (b, 3, h, w) as the transform's geometry leaves them; the answer waits.

        A runner on a GPU takes them each by itself, too, and some of them unresized.
        """


def pad_batch(images: Tensor, batch: int) -> Tensor:
    """A full batch: with zeros in place of the images that are missing."""
    if len(images) == batch:
        return images
    full_batch = images.new_zeros((batch, *images.shape[1:]))
    full_batch[: len(images)] = images
    return full_batch


def to_network_input(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point input in the dtype of the network, feature maps channels last; integer input as it is."""
    if not inputs.is_floating_point():
        return inputs
    return inputs.to(dtype, memory_format=torch.channels_last if inputs.ndim == 4 else torch.preserve_format)


def to_arrays(outputs: Mapping[str, Tensor], count: int) -> Embeddings:
    """The rows of the images that were there."""
    return {name: value[:count].to(torch.float32).cpu().numpy() for name, value in outputs.items()}


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
        inputs = to_network_input(inputs, self.dtype).to(self._device)
        embeddings = to_arrays(self.compute(inputs), len(images))
        return lambda: embeddings

    def compute(self, images: Tensor) -> Mapping[str, Tensor]:
        """The outputs of a full batch, transformed and in this engine's dtype."""
        return self.backbone.embed(images)
