"""A network on a GPU, kept busy: copies overlap with computing, and its kernels are started all at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from featpipe.backbone import Backbone, Transform
from featpipe.backbone.products import Images, Products, Unresized, at_once
from featpipe.backbone.resampling import Axis
from featpipe.engine.runner import Embeddings
from featpipe.engine.tf32 import tf32
from featpipe.errors import ConfigError

__all__ = ["Cuda"]

WARM_UP = 3  # passes before a graph is captured: libraries choose their algorithms in the first


class _Slot:
    """A place on the device where one batch's pictures wait for their turn."""

    def __init__(self, images: Tensor) -> None:
        self.images = images  # channels last in memory
        self.copied = torch.cuda.Event()
        self.free = torch.cuda.Event()


class Cuda:
    """Runs a backbone on a GPU, for one calling thread.

    Pictures are copied as they are, a quarter of the bytes, resized there if they are not yet, to the same bits, and
    normalised by the same arithmetic. The forward pass is captured once as a CUDA graph and replayed, so that the
    caller need not start each kernel; a network that cannot be captured is called. Where a batch needs more memory
    than there is, it is halved, and no row is lost.

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
        self._copying = torch.cuda.Stream(device)  # and resizing, so that what is read there is in order
        self._products = Products(device)
        self._slots: list[_Slot] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input = torch.empty(0)
        self._outputs: Mapping[str, Tensor] = {}

    @property
    def name(self) -> str:
        return f"torch on {torch.cuda.get_device_name(self.device)}"

    def enter_stream(self, streams: int) -> None:
        """Workers decode; nothing is kept for them."""

    def submit(self, images: Images) -> Callable[[], Embeddings]:
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                with torch.inference_mode(), torch.cuda.device(self.device), tf32(self._tf32):
                    starts = range(0, len(images), self.batch)
                    begun = [self._begin(images[start : start + self.batch]) for start in starts]
                return lambda: _joined([answer() for answer in begun])
            self._shrink()  # now that the error is gone, and with it what its frames held

    def _shrink(self) -> None:
        if self.batch == 1:
            raise ConfigError(
                f"{self.backbone.name}: a single image needs more memory than {self.device} has free; "
                "pass --device cpu, or another --precision, or end what else uses it"
            )
        torch.cuda.synchronize(self.device)
        self._graph, self._slots, self._outputs, self._input = None, [], {}, torch.empty(0)
        self._products = Products(self.device)
        torch.cuda.empty_cache()
        self.batch //= 2

    def _begin(self, images: Images) -> Callable[[], Embeddings]:
        """Copy and compute without waiting; the caller's pictures may be pinned or not, and of any size if unresized.

        What is given back after a copy was begun is not used again before that has ended: torch keeps account of
        pinned memory by the stream that copies from it.
        """
        if not self._slots:
            self._make_ready(torch.uint8 if isinstance(images[0], Unresized) else images[0].dtype)
        slot = self._slots[0]
        self._slots.reverse()
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(slot.free)
            self._fill(slot.images, images)
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

    def _fill(self, places: Tensor, images: Images) -> None:
        """Copy pictures to their places; those that are yet to be resized by way of some memory of their own."""
        if isinstance(images, Tensor):
            places[: len(images)].copy_(images, non_blocking=True)
            return
        groups: dict[tuple[Axis, Axis], list[tuple[int, Tensor]]] = {}
        for number, picture in enumerate(images):
            if isinstance(picture, Unresized):
                groups.setdefault((picture.vertical, picture.horizontal), []).append((number, picture.pixels))
            else:
                places[number].copy_(picture, non_blocking=True)
        transform = cast(Transform, self.backbone.transform)  # nobody's own leaves pictures unresized
        for axes, group in groups.items():
            step = at_once(*axes, transform.interpolation)
            for start in range(0, len(group), step):
                numbers, pictures = zip(*group[start : start + step], strict=True)
                where = torch.tensor(numbers).to(self.device, non_blocking=True)
                places.index_copy_(0, where, self._resized(pictures, axes, transform))

    def _resized(self, pictures: Sequence[Tensor], axes: tuple[Axis, Axis], transform: Transform) -> Tensor:
        """Pictures of one size, copied to the device and brought into the form that the network sees."""
        channels, height, width = pictures[0].shape
        shape = (len(pictures), height, width, channels)
        pixels = torch.empty(shape, dtype=torch.uint8, device=self.device).permute(0, 3, 1, 2)
        for place, picture in zip(pixels, pictures, strict=True):
            place.copy_(picture, non_blocking=True)
        with tf32(False):
            return transform.bordered(self._products.resize(pixels, *axes, transform.interpolation))

    def _compute(self) -> Mapping[str, Tensor]:
        if self._graph is None:
            return self.backbone.embed(self._input)
        self._graph.replay()
        return self._outputs

    def _make_ready(self, dtype: torch.dtype) -> None:
        """Places for pictures and input, warm libraries, and the graph, where the network can be captured."""
        shape = (self.batch, *self.backbone.transform.size, 3)
        places = [torch.zeros(shape, dtype=dtype, device=self.device).permute(0, 3, 1, 2) for _ in range(2)]
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            ready = self.backbone.transform.normalise(places[0])
            self._input = ready.to(self.dtype, memory_format=torch.channels_last, copy=True)
            for _ in range(WARM_UP):
                self.backbone.embed(self._input)
        torch.cuda.synchronize(self.device)
        self._graph, self._outputs = self._captured()
        self._slots = [_Slot(place) for place in places]
        for slot in self._slots:
            slot.free.record(self._stream)
            for stream in (self._copying, self._stream):  # neither is the one that they were made on
                slot.images.record_stream(stream)

    def _captured(self) -> tuple[torch.cuda.CUDAGraph | None, Mapping[str, Tensor]]:
        """The forward pass as a graph that reads the input's place; None for a network that cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Workers pin memory meanwhile, which must not end the capture.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
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
