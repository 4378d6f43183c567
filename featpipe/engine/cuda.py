"""A network on a GPU, kept busy: copies overlap with computing, and its kernels are started all at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featpipe.backbone import Backbone
from featpipe.engine.runner import Embeddings, padded
from featpipe.errors import ConfigError

__all__ = ["Cuda"]

WARM_UP = 3  # passes before a graph is captured: libraries choose their algorithms in the first


class _Slot:
    """A place on the device where one batch's pictures wait for their turn."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.copied = torch.cuda.Event()
        self.free = torch.cuda.Event()


class Cuda:
    """Runs a backbone on a GPU, for one calling thread.

    Pictures are copied as they are, a quarter of the bytes, and normalised there by the same arithmetic. The forward
    pass is captured once as a CUDA graph and replayed, so that the caller need not start each kernel; a network that
    cannot be captured is called. Where a batch needs more memory than there is, it is halved, and no row is lost.

    Parameters
    ----------
    backbone : Backbone
        On the device, in its dtype, channels last.
    batch : int
        Images in one forward pass, at most.
    precision : {"fp32", "tf32", "bf16", "fp16"}
    device : torch.device

    Raises
    ------
    ConfigError
        If the memory is not enough for a single image.
    """

    def __init__(self, backbone: Backbone, batch: int, precision: str, device: torch.device) -> None:
        self.backbone = backbone
        self.batch = batch
        self.device = device
        self.dtype = next((p.dtype for p in backbone.network.parameters() if p.is_floating_point()), torch.float32)
        self._tf32 = precision == "tf32"
        self._stream = torch.cuda.Stream(device)
        self._copying = torch.cuda.Stream(device)
        self._slots: list[_Slot] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input = torch.empty(0)
        self._outputs: Mapping[str, Tensor] = {}

    @property
    def name(self) -> str:
        return f"torch on {torch.cuda.get_device_name(self.device)}"

    def enter_stream(self, streams: int) -> None:
        """Workers decode; nothing is kept for them."""

    def submit(self, images: Tensor) -> Callable[[], Embeddings]:
        while True:
            try:
                with torch.inference_mode(), torch.cuda.device(self.device), _strict(self._tf32):
                    begun = [self._begin(part) for part in images.split(self.batch)]
                return lambda: _joined([answer() for answer in begun])
            except torch.OutOfMemoryError:
                self._shrink()

    def _shrink(self) -> None:
        if self.batch == 1:
            raise ConfigError(
                f"{self.backbone.name}: a single image needs more memory than {self.device} has free; "
                "pass --device cpu, or another --precision, or end what else uses it"
            )
        torch.cuda.synchronize(self.device)
        self._graph, self._slots, self._outputs, self._input = None, [], {}, torch.empty(0)
        torch.cuda.empty_cache()
        self.batch //= 2

    def _begin(self, images: Tensor) -> Callable[[], Embeddings]:
        """Copy and compute without waiting; the caller's pictures may be pinned or not."""
        if not self._slots:
            self._make_ready(images)
        slot = self._slots[0]
        self._slots.reverse()
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(slot.free)
            slot.images[: len(images)].copy_(images, non_blocking=True)
            slot.copied.record()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.copied)
            self._input.copy_(self.backbone.transform.normalise(slot.images))
            slot.free.record()
            outputs = self._compute()
            found = {name: _to_host(value[: len(images)]) for name, value in outputs.items()}
            done = torch.cuda.Event()
            done.record()

        def answer() -> Embeddings:
            done.synchronize()
            return {name: value.numpy() for name, value in found.items()}

        return answer

    def _compute(self) -> Mapping[str, Tensor]:
        if self._graph is None:
            return self.backbone.embed(self._input)
        self._graph.replay()
        return self._outputs

    def _make_ready(self, images: Tensor) -> None:
        """Places for pictures and input, warm libraries, and the graph, where the network can be captured."""
        with torch.cuda.stream(self._stream):
            example = padded(images, self.batch).to(self.device)
            example = example.contiguous(memory_format=torch.channels_last)
            ready = self.backbone.transform.normalise(example)
            self._input = ready.to(self.dtype, memory_format=torch.channels_last, copy=True)
            for _ in range(WARM_UP):
                self.backbone.embed(self._input)
        torch.cuda.synchronize(self.device)
        self._graph, self._outputs = self._captured()
        self._slots = [_Slot(example), _Slot(torch.empty_like(example))]
        for slot in self._slots:
            slot.free.record(self._stream)

    def _captured(self) -> tuple[torch.cuda.CUDAGraph | None, Mapping[str, Tensor]]:
        """The forward pass as a graph that reads the input's place; None for a network that cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                outputs = self.backbone.embed(self._input)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # one that waits for the device, or for the clock: anybody's network may
            torch.cuda.synchronize(self.device)
            return None, {}
        return graph, outputs


def _to_host(value: Tensor) -> Tensor:
    host = torch.empty(value.shape, dtype=torch.float32, pin_memory=True)
    return host.copy_(value, non_blocking=True)


def _joined(parts: list[Embeddings]) -> Embeddings:
    return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


@contextlib.contextmanager
def _strict(tf32: bool) -> Iterator[None]:
    """TF32 exactly where it was asked for, whatever the process had set, and as it was afterwards."""
    settings: list[tuple[Any, bool]] = [
        (torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32),
        (torch.backends.cudnn, torch.backends.cudnn.allow_tf32),
    ]
    for place, _ in settings:
        place.allow_tf32 = tf32
    try:
        yield
    finally:
        for place, before in settings:
            place.allow_tf32 = before
