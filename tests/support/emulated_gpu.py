"""A CUDA device emulated on the CPU: its tensors lie in main memory, and its work is done at once.

It runs the code for GPUs on machines without one. It shows neither speed nor the effects of the order in which a real
device works; the emulated events check that each stream waits for the data that it reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from featpipe.backbones import Backbone

MAKERS = ("empty", "zeros")


class Stream:
    def __init__(self, device: object = None) -> None:
        self.waited_for: list[Event] = []

    def wait_event(self, event: Event) -> None:
        assert event.recorded_on is not None, "waits for an event that was never recorded"
        self.waited_for.append(event)


class Event:
    def __init__(self) -> None:
        self.recorded_on: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.recorded_on = stream or EmulatedGpu.current.streams[-1]

    def synchronize(self) -> None:
        assert self.recorded_on is not None, "waits for an event that was never recorded"


class Graph:
    """Replays by computing the passes again into their outputs, which contain NaN until then."""

    def __init__(self) -> None:
        self.passes: list[tuple[Callable[[], Any], Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for compute, places in self.passes:
            for name, value in compute().items():
                places[name].copy_(value)


@dataclass
class EmulatedGpu:
    """State of the emulated GPU.

    Attributes
    ----------
    streams : list of Stream
        The default stream and the entered ones; the last one is current.
    graph : Graph or None
        The graph that is being captured.
    graphs : list of Graph
    pinned : set of int
        Addresses of pinned tensors.
    used_on : dict
        Streams recorded for tensors, by address.
    """

    streams: list[Stream] = field(default_factory=lambda: [Stream()])
    graph: Graph | None = None
    graphs: list[Graph] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)
    used_on: dict[int, list[Stream]] = field(default_factory=dict)

    current: ClassVar[EmulatedGpu]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.streams.append(stream)
        try:
            yield
        finally:
            assert self.streams.pop() is stream

    @contextlib.contextmanager
    def capture(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "memory pinned by other threads would end the capture"
        self.graph = graph
        try:
            with self.stream(stream):
                yield
        finally:
            self.graph = None
        self.graphs.append(graph)
        for _, places in graph.passes:
            for value in places.values():
                value.fill_(torch.nan)


def emulate_gpu(monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    """Make torch report and use one emulated GPU until the test ends."""
    gpu = EmulatedGpu()
    monkeypatch.setattr(EmulatedGpu, "current", gpu, raising=False)
    names: dict[str, object] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "an emulated GPU",
        "get_device_capability": lambda device=None: (8, 0),
        "get_rng_state": lambda device=None: None,
        "set_rng_state": lambda state, device=None: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "device": lambda device: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": gpu.stream,
        "graph": gpu.capture,
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    _create_tensors_on_cpu(monkeypatch, gpu)
    _capture(monkeypatch, gpu)
    return gpu


def _create_tensors_on_cpu(monkeypatch: pytest.MonkeyPatch, gpu: EmulatedGpu) -> None:
    """Create tensors of the GPU, and pinned ones, on the CPU."""

    def to_cpu_device(value: object) -> object:
        is_device = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))
        return torch.device("cpu") if is_device else value

    def wrap_maker(make: Callable[..., Any]) -> Callable[..., Any]:
        def create(*arguments: Any, pin_memory: bool = False, **settings: Any) -> Any:
            value = make(
                *map(to_cpu_device, arguments), **{name: to_cpu_device(value) for name, value in settings.items()}
            )
            if pin_memory:
                gpu.pinned.add(value.data_ptr())
            return value

        return create

    for name in MAKERS:
        monkeypatch.setattr(torch, name, wrap_maker(getattr(torch, name)))
    for owner in (Tensor, nn.Module):
        monkeypatch.setattr(owner, "to", wrap_maker(owner.to))

    def record_stream(value: Tensor, stream: Stream) -> None:
        gpu.used_on.setdefault(value.data_ptr(), []).append(stream)

    monkeypatch.setattr(Tensor, "record_stream", record_stream)


def _capture(monkeypatch: pytest.MonkeyPatch, gpu: EmulatedGpu) -> None:
    """Record forward passes while a graph is captured; reading a value is an error then."""
    embed, item = Backbone.embed, Tensor.item

    def embed_and_record(backbone: Backbone, images: Tensor) -> Any:
        outputs = embed(backbone, images)
        if gpu.graph is not None:
            gpu.graph.passes.append((lambda: embed(backbone, images), outputs))
        return outputs

    def value(tensor: Tensor) -> Any:
        if gpu.graph is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return item(tensor)

    monkeypatch.setattr(Backbone, "embed", embed_and_record)
    monkeypatch.setattr(Tensor, "item", value)
