"""A CUDA device emulated on the CPU: its tensors lie in main memory, and its work is done at once.

It runs every line of the code for GPUs where there is none. It cannot show speed, nor the effects of the order in which
a real device does its work; the emulated events check that each stream waits for what it reads.
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
        assert event.recorded_on is not None, "waits for what was never begun"
        self.waited_for.append(event)


class Event:
    def __init__(self) -> None:
        self.recorded_on: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.recorded_on = stream or EmulatedGpu.now.streams[-1]

    def synchronize(self) -> None:
        assert self.recorded_on is not None, "waits for what was never begun"


class Graph:
    """Replays by computing again, into the places of the outputs; before that, nothing is in them."""

    def __init__(self) -> None:
        self.passes: list[tuple[Callable[[], Any], Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for again, places in self.passes:
            for name, value in again().items():
                places[name].copy_(value)


@dataclass
class EmulatedGpu:
    """What goes on.

    Attributes
    ----------
    streams : list of Stream
        The default one, and those entered since; the last one is current.
    graph : Graph or None
        The one that is captured at the moment.
    graphs : list of Graph
    pinned : set of int
        Where pinned memory begins.
    used_on : dict
        Streams that tensors were said to be used on, by where they begin.
    """

    streams: list[Stream] = field(default_factory=lambda: [Stream()])
    graph: Graph | None = None
    graphs: list[Graph] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)
    used_on: dict[int, list[Stream]] = field(default_factory=dict)

    now: ClassVar[EmulatedGpu]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.streams.append(stream)
        try:
            yield
        finally:
            assert self.streams.pop() is stream

    @contextlib.contextmanager
    def capture(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "the memory that other threads pin would end the capture"
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
    monkeypatch.setattr(EmulatedGpu, "now", gpu, raising=False)
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
    _make_here(monkeypatch, gpu)
    _capture(monkeypatch, gpu)
    return gpu


def _make_here(monkeypatch: pytest.MonkeyPatch, gpu: EmulatedGpu) -> None:
    """Tensors of the GPU, and pinned ones, are made on the CPU."""

    def here(value: object) -> object:
        is_device = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))
        return torch.device("cpu") if is_device else value

    def maker(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*given: Any, pin_memory: bool = False, **settings: Any) -> Any:
            value = make(*map(here, given), **{name: here(value) for name, value in settings.items()})
            if pin_memory:
                gpu.pinned.add(value.data_ptr())
            return value

        return made

    for name in MAKERS:
        monkeypatch.setattr(torch, name, maker(getattr(torch, name)))
    for owner in (Tensor, nn.Module):
        monkeypatch.setattr(owner, "to", maker(owner.to))

    def used(value: Tensor, stream: Stream) -> None:
        gpu.used_on.setdefault(value.data_ptr(), []).append(stream)

    monkeypatch.setattr(Tensor, "record_stream", used)


def _capture(monkeypatch: pytest.MonkeyPatch, gpu: EmulatedGpu) -> None:
    """Forward passes are noted while a graph is captured, when nothing can wait for a value."""
    embed, item = Backbone.embed, Tensor.item

    def noted(backbone: Backbone, images: Tensor) -> Any:
        outputs = embed(backbone, images)
        if gpu.graph is not None:
            gpu.graph.passes.append((lambda: embed(backbone, images), outputs))
        return outputs

    def value(tensor: Tensor) -> Any:
        if gpu.graph is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return item(tensor)

    monkeypatch.setattr(Backbone, "embed", noted)
    monkeypatch.setattr(Tensor, "item", value)
