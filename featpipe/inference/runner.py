"""The interface of runners, eager execution, and functions that all runners share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe.backbones import Backbone

Embeddings = dict[str, NDArray[np.float32]]


class Runner(Protocol):
    """A network that is prepared to run batches of images."""

    @property
    def name(self) -> str:
        """Name of the inference backend."""

    @property
    def batch(self) -> int:
        """Images in one forward pass."""

    def enter_stream(self, streams: int) -> None:
        """Called once by each thread before it submits images."""

    def submit(self, images: Tensor) -> Callable[[], Embeddings]:
        """Start to embed resized and cropped images, (b, 3, h, w); calling the result waits for the embeddings.

        A runner on a GPU also accepts a sequence of separate images, which may be unresized.
        """


def pad_batch(images: Tensor, batch: int) -> Tensor:
    """Pad a batch with zeros to its full size."""
    if len(images) == batch:
        return images
    full_batch = images.new_zeros((batch, *images.shape[1:]))
    full_batch[: len(images)] = images
    return full_batch


def to_network_input(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert floating-point input to the network's dtype, 4-D input to channels last; integer input is unchanged."""
    if not inputs.is_floating_point():
        return inputs
    return inputs.to(dtype, memory_format=torch.channels_last if inputs.ndim == 4 else torch.preserve_format)


def to_arrays(outputs: Mapping[str, Tensor], count: int) -> Embeddings:
    """Convert outputs to float32 arrays, without the rows of the padding."""
    return {name: value[:count].to(torch.float32).cpu().numpy() for name, value in outputs.items()}


class EagerRunner:
    """Runs the backbone eagerly, on any device.

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
        """Do nothing: there is no per-thread state."""

    @torch.inference_mode()
    def submit(self, images: Tensor) -> Callable[[], Embeddings]:
        inputs = pad_batch(self.backbone.transform.normalize(images), self.batch)
        inputs = to_network_input(inputs, self.dtype).to(self._device)
        embeddings = to_arrays(self.compute(inputs), len(images))
        return lambda: embeddings

    def compute(self, images: Tensor) -> Mapping[str, Tensor]:
        """Compute the outputs of a full batch, normalised and in this runner's dtype."""
        return self.backbone.embed(images)
