"""What every way of running a network offers, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Embeddings", "Runner", "pad_batch", "to_arrays"]

Embeddings = dict[str, NDArray[np.float32]]


class Runner(Protocol):
    """A network that is ready to be called with batch after batch."""

    @property
    def name(self) -> str:
        """What computes, for people."""

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


def to_arrays(outputs: Mapping[str, Tensor], count: int) -> Embeddings:
    """The rows of the images that were there."""
    return {name: value[:count].to(torch.float32).cpu().numpy() for name, value in outputs.items()}
