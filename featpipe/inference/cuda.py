"""Run a network on a GPU: copies overlap with computation, and a CUDA graph launches all kernels at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from featpipe.backbones import (
    Backbone,
    ImageBatch,
    MatmulResizer,
    ResizeAxis,
    Transform,
    UnresizedImage,
    max_resize_batch,
)
from featpipe.errors import ConfigError
from featpipe.inference.devices import allow_tf32
from featpipe.inference.runner import Embeddings

WARMUP_PASSES = 3  # passes before graph capture, in which libraries select their algorithms


class _InputBuffer:
    """A device buffer for the images of one batch."""

    def __init__(self, images: Tensor) -> None:
        self.images = images  # channels last in memory
        self.copied = torch.cuda.Event()
        self.free = torch.cuda.Event()


class CudaRunner:
    """Runs a backbone on a GPU, for one calling thread.

    Images are copied as uint8, a quarter of the bytes of float32. Resizing on the GPU is bit-identical to the CPU, and
    normalisation uses the same arithmetic. The forward pass is captured once as a CUDA graph and replayed, which saves
    the launch of each kernel; a network that cannot be captured is called eagerly. If a batch does not fit into
    memory, the batch size is halved and the images are submitted again.

    Parameters
    ----------
    backbone : Backbone
        On the device, in its dtype, channels last.
    batch : int
        Maximum number of images in one forward pass.
    precision : {"fp32", "tf32", "bf16", "fp16"}
    device : torch.device

    Raises
    ------
    ConfigError
        If a single image does not fit into memory.
    """

    def __init__(self, backbone: Backbone, batch: int, precision: str, device: torch.device) -> None:
        self.backbone = backbone
        self.batch = batch
        self.device = device
        self.dtype = next((p.dtype for p in backbone.network.parameters() if p.is_floating_point()), torch.float32)
        self._allow_tf32 = precision == "tf32"
        self._compute_stream = torch.cuda.Stream(device)
        self._copy_stream = torch.cuda.Stream(device)  # also for resizing, which reads the copied images in order
        self._resizer = MatmulResizer(device)
        self._buffers: list[_InputBuffer] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input = torch.empty(0)
        self._outputs: Mapping[str, Tensor] = {}

    @property
    def name(self) -> str:
        return f"torch on {torch.cuda.get_device_name(self.device)}"

    def enter_stream(self, streams: int) -> None:
        """Do nothing: worker threads only decode and have no state here."""

    def submit(self, images: ImageBatch) -> Callable[[], Embeddings]:
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                with torch.inference_mode(), torch.cuda.device(self.device), allow_tf32(self._allow_tf32):
                    starts = range(0, len(images), self.batch)
                    pending = [self._submit_batch(images[start : start + self.batch]) for start in starts]
                return lambda: _concatenate_embeddings([wait() for wait in pending])
            self._halve_batch()  # after the handler: the exception's stack frames keep tensors alive

    def _halve_batch(self) -> None:
        if self.batch == 1:
            raise ConfigError(
                f"{self.backbone.name}: a single image needs more memory than {self.device} has free; "
                "pass --device cpu or another --precision, or stop other programs on the device"
            )
        torch.cuda.synchronize(self.device)
        self._graph, self._buffers, self._outputs, self._input = None, [], {}, torch.empty(0)
        self._resizer = MatmulResizer(self.device)
        torch.cuda.empty_cache()
        self.batch //= 2

    def _submit_batch(self, images: ImageBatch) -> Callable[[], Embeddings]:
        """Copy and compute asynchronously. Images may be in pinned memory or not; unresized images have any size.

        The caller may free pinned memory while a copy is pending: torch records the copying stream and reuses the
        memory only after the copy has finished.
        """
        if not self._buffers:
            self._prepare(torch.uint8 if isinstance(images[0], UnresizedImage) else images[0].dtype)
        buffer = self._buffers[0]
        self._buffers.reverse()
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(buffer.free)
            self._copy_images(buffer.images, images)
            buffer.copied.record()
        with torch.cuda.stream(self._compute_stream):
            self._compute_stream.wait_event(buffer.copied)
            self._input.copy_(self.backbone.transform.normalize(buffer.images))
            buffer.free.record()
            outputs = self._forward()
            host_outputs = {name: _copy_to_host(value[: len(images)]) for name, value in outputs.items()}
            computed = torch.cuda.Event()
            computed.record()

        def wait_for_embeddings() -> Embeddings:
            computed.synchronize()
            return {name: value.numpy() for name, value in host_outputs.items()}

        return wait_for_embeddings

    def _copy_images(self, destination: Tensor, images: ImageBatch) -> None:
        """Copy images to the device buffer; unresized images are copied and resized in temporary memory first."""
        if isinstance(images, Tensor):
            destination[: len(images)].copy_(images, non_blocking=True)
            return
        groups: dict[tuple[ResizeAxis, ResizeAxis], list[tuple[int, Tensor]]] = {}
        for position, image in enumerate(images):
            if isinstance(image, UnresizedImage):
                groups.setdefault((image.vertical, image.horizontal), []).append((position, image.pixels))
            else:
                destination[position].copy_(image, non_blocking=True)
        transform = cast(Transform, self.backbone.transform)  # a custom transform never leaves images unresized
        for resize_axes, group in groups.items():
            step = max_resize_batch(*resize_axes, transform.interpolation)
            for start in range(0, len(group), step):
                positions, image_pixels = zip(*group[start : start + step], strict=True)
                position_index = torch.tensor(positions).to(self.device, non_blocking=True)
                destination.index_copy_(0, position_index, self._resize_on_device(image_pixels, resize_axes, transform))

    def _resize_on_device(
        self, image_pixels: Sequence[Tensor], resize_axes: tuple[ResizeAxis, ResizeAxis], transform: Transform
    ) -> Tensor:
        """Copy images of the same size to the device, then resize, crop and pad them there."""
        channels, height, width = image_pixels[0].shape
        shape = (len(image_pixels), height, width, channels)
        pixels = torch.empty(shape, dtype=torch.uint8, device=self.device).permute(0, 3, 1, 2)
        for destination, source in zip(pixels, image_pixels, strict=True):
            destination.copy_(source, non_blocking=True)
        with allow_tf32(False):
            return transform.pad_to_crop(self._resizer.resize(pixels, *resize_axes, transform.interpolation))

    def _forward(self) -> Mapping[str, Tensor]:
        if self._graph is None:
            return self.backbone.embed(self._input)
        self._graph.replay()
        return self._outputs

    def _prepare(self, dtype: torch.dtype) -> None:
        """Allocate the buffers, warm up the libraries, and capture the graph if the network allows it."""
        channels, height, width = self.backbone.transform.input_shape
        shape = (self.batch, height, width, channels)
        input_tensors = [torch.zeros(shape, dtype=dtype, device=self.device).permute(0, 3, 1, 2) for _ in range(2)]
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._compute_stream):
            normalized = self.backbone.transform.normalize(input_tensors[0])
            self._input = normalized.to(self.dtype, memory_format=torch.channels_last, copy=True)
            for _ in range(WARMUP_PASSES):
                self.backbone.embed(self._input)
        torch.cuda.synchronize(self.device)
        self._graph, self._outputs = self._capture_graph()
        self._buffers = [_InputBuffer(input_tensor) for input_tensor in input_tensors]
        for buffer in self._buffers:
            buffer.free.record(self._compute_stream)
            for stream in (self._copy_stream, self._compute_stream):  # allocated on the default stream
                buffer.images.record_stream(stream)

    def _capture_graph(self) -> tuple[torch.cuda.CUDAGraph | None, Mapping[str, Tensor]]:
        """Capture the forward pass as a graph that reads the input buffer; None if the network cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: worker threads pin memory during the capture, which would otherwise invalidate it.
            with torch.cuda.graph(graph, stream=self._compute_stream, capture_error_mode="thread_local"):
                outputs = self.backbone.embed(self._input)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a custom network may synchronize with the device or raise anything
            torch.cuda.synchronize(self.device)
            return None, {}
        return graph, outputs


def _copy_to_host(value: Tensor) -> Tensor:
    host = torch.empty(value.shape, dtype=torch.float32, pin_memory=True)
    return host.copy_(value, non_blocking=True)


def _concatenate_embeddings(parts: list[Embeddings]) -> Embeddings:
    return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
