"""Where the batches of the loop come from: pictures that are decoded anew, or feature maps that were computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featpipe import decoding
from featpipe.archive import Index
from featpipe.backbone.output import Output, Recorder
from featpipe.engine.devices import available_cores
from featpipe.errors import SampleError
from featpipe.fingerprint import digest
from featpipe.status import Status
from featpipe.workers import ahead as work_ahead

__all__ = ["Embedding", "PictureSource", "Source", "ahead"]

READY = 2  # batches that are made ready while one is trained on


class Source(Protocol):
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


class Embedding(nn.Module):
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


class PictureSource:
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
        views: Callable[[Tensor, int], Tensor],
        workers: int | None = None,
    ) -> None:
        self.network = network
        self._index = index
        self._digests = digests
        self._views = views
        self._reader = index.open()
        self._kept = [self._read(row) for row in range(len(index))] if index.sequential else None
        self._pool = ThreadPoolExecutor(workers or available_cores(), "featpipe-pictures")

    def __enter__(self) -> PictureSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._reader.__exit__(None, None, None)

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Pictures of shape (b, 3, h, w), float32."""
        if not len(rows):
            return torch.zeros(0)
        return torch.stack(list(self._pool.map(lambda row: self._picture(row, epoch), rows.tolist())))

    def _picture(self, row: int, epoch: int) -> Tensor:
        data = self._kept[row] if self._kept is not None else self._read(row)
        if digest(data) != self._digests[row].tobytes():
            name = self._index.ids[row]
            raise SampleError(
                f"{name}: its bytes are others than when it was embedded; run the same command again",
                status=Status.UNREADABLE,
                sample_id=name,
            )
        with decoding.in_turn(data) as picture:
            return self._views(torch.from_numpy(picture).permute(2, 0, 1), epoch)

    def _read(self, row: int) -> bytes:
        """Its bytes; what can only be read front to back is kept in memory, as it is encoded."""
        try:
            return self._reader.read(row)
        except SampleError:
            if self._index.sequential:  # its row is not trained on
                return b""
            raise


def ahead(
    source: Source, batches: Sequence[NDArray[np.int64]], epoch: int, first: int = 0
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """The batches from the first that is wanted, made ready by another thread while the one before is trained on."""
    wanted = batches[first:]
    return zip(wanted, work_ahead(lambda rows: source.batch(rows, epoch), wanted, READY), strict=True)
