"""Where the batches of the loop come from: pictures that are decoded anew, or feature maps that were computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featpipe.backbones import Output, Recorder
from featpipe.data import Index, decode_within_budget
from featpipe.errors import SampleError
from featpipe.inference import available_cores
from featpipe.runtime import prefetch as prefetch_in_thread
from featpipe.status import Status
from featpipe.storage import digest

__all__ = ["DecodedImageDataset", "EmbeddingNetwork", "TrainingDataset", "prefetch_batches"]

PREFETCHED_BATCHES = 2  # batches that are made ready while one is trained on


class TrainingDataset(Protocol):
    """What the loop trains on.

    Attributes
    ----------
    network : Module
        What turns a batch into embeddings, with the parameters that are trained.
    """

    network: nn.Module

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """What the network takes, for some rows of the archive; the same for the same rows and epoch."""
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
    """Decodes and changes the pictures of an archive.

    Parameters
    ----------
    index : Index
    digests : ndarray of shape (n, 32), uint8
        SHA-256 of each image's bytes, as they were embedded.
    network : Module
    views : callable
        A picture, uint8 (3, H, W), and the number of an epoch → float32 (3, h, w).
    workers : int, optional
        Threads that decode; as many as there are cores if not given.
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
        self._pool = ThreadPoolExecutor(workers or available_cores(), "featpipe-pictures")

    def __enter__(self) -> DecodedImageDataset:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._reader.__exit__(None, None, None)

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Pictures of shape (b, 3, h, w), float32."""
        if not len(rows):
            return torch.zeros(0)
        return torch.stack(list(self._pool.map(lambda row: self._load_image(row, epoch), rows.tolist())))

    def _load_image(self, row: int, epoch: int) -> Tensor:
        data = self._encoded_images[row] if self._encoded_images is not None else self._read_bytes(row)
        if digest(data) != self._digests[row].tobytes():
            name = self._index.ids[row]
            raise SampleError(
                f"{name}: its bytes are others than when it was embedded; run the same command again",
                status=Status.UNREADABLE,
                sample_id=name,
            )
        with decode_within_budget(data) as image:
            return self._transform(torch.from_numpy(image).permute(2, 0, 1), epoch)

    def _read_bytes(self, row: int) -> bytes:
        """Its bytes; what can only be read front to back is kept in memory, as it is encoded."""
        try:
            return self._reader.read(row)
        except SampleError:
            if self._index.sequential:  # its row is not trained on
                return b""
            raise


def prefetch_batches(
    dataset: TrainingDataset, batches: Sequence[NDArray[np.int64]], epoch: int, first_batch: int = 0
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """The batches from the first that is wanted, made ready by another thread while the one before is trained on."""
    remaining_batches = batches[first_batch:]
    return zip(
        remaining_batches,
        prefetch_in_thread(lambda rows: dataset.batch(rows, epoch), remaining_batches, PREFETCHED_BATCHES),
        strict=True,
    )
