"""Batches for the training loop, from images that are decoded in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featpipe.backbones import Output, Recorder
from featpipe.data import Index, get_modality
from featpipe.errors import SampleError
from featpipe.inference import available_cores
from featpipe.runtime import prefetch as prefetch_in_thread
from featpipe.status import Status
from featpipe.storage import digest

PREFETCHED_BATCHES = 2  # prepared while the current one is trained on


class TrainingDataset(Protocol):
    """Inputs of the training loop: images, or feature maps that were computed once.

    Attributes
    ----------
    network : Module
        Batch → embeddings, with the parameters that are trained.
    """

    network: nn.Module

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Input of the network for rows of the archive; the same for the same rows and epoch."""
        ...


class EmbeddingNetwork(nn.Module):
    """A network up to one of its outputs.

    Parameters
    ----------
    network : Module
    output : Output
    """

    def __init__(self, network: nn.Module, output: Output) -> None:
        super().__init__()
        self.network = network
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) → (b, d)."""
        return Recorder([self.output]).run(self.network, images)[self.output.name]


class DecodedImageDataset:
    """Decodes and transforms the images of an archive.

    Parameters
    ----------
    index : Index
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes when it was embedded.
    network : Module
    transform : callable
        Image, uint8 (3, H, W), and epoch → float32 (3, h, w).
    workers : int, optional
        Decoding threads; one for each core if not given.
    """

    def __init__(
        self,
        index: Index,
        digests: NDArray[np.uint8],
        network: nn.Module,
        transform: Callable[[Tensor, int], Tensor],
        workers: int | None = None,
    ) -> None:
        self.network = network
        self._index = index
        self._digests = digests
        self._transform = transform
        self._reader = index.open()
        self._encoded_images = [self._read_bytes(row) for row in range(len(index))] if index.sequential else None
        self._decode = get_modality(index.modality).decode
        self._pool = ThreadPoolExecutor(workers or available_cores(), "featpipe-images")

    def __enter__(self) -> DecodedImageDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._reader.__exit__(None, None, None)

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Images of shape (b, 3, h, w), float32."""
        if not len(rows):
            return torch.zeros(0)
        return torch.stack(list(self._pool.map(lambda row: self._load_image(row, epoch), rows.tolist())))

    def _load_image(self, row: int, epoch: int) -> Tensor:
        data = self._encoded_images[row] if self._encoded_images is not None else self._read_bytes(row)
        if digest(data) != self._digests[row].tobytes():
            name = self._index.ids[row]
            raise SampleError(
                f"{name}: the bytes have changed since the image was embedded; run the same command again",
                status=Status.UNREADABLE,
                sample_id=name,
            )
        with self._decode(data) as image:
            return self._transform(image, epoch)

    def _read_bytes(self, row: int) -> bytes:
        try:
            return self._reader.read(row)
        except SampleError:
            if self._index.sequential:  # all images are read ahead, also those that are not trained on
                return b""
            raise


def prefetch_batches(
    dataset: TrainingDataset, batches: Sequence[NDArray[np.int64]], epoch: int, first_batch: int = 0
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Rows and inputs of each batch from ``first_batch`` on, prepared by another thread."""
    remaining_batches = batches[first_batch:]
    return zip(
        remaining_batches,
        prefetch_in_thread(lambda rows: dataset.batch(rows, epoch), remaining_batches, PREFETCHED_BATCHES),
        strict=True,
    )
