"""Named outputs of a network, and how an activation is pooled to an embedding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from featpipe.backbones.transforms import SampleTransform, example_batch
from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError

POOLED = "pooled"
POOLINGS = ("avg", "max", "gem", "cls", "none")

GEM_POWER = 3.0  # Radenović, Tolias, Chum 2018, "Fine-tuning CNN Image Retrieval with No Human Annotation"
GEM_EPSILON = 1e-6


@dataclass(frozen=True)
class Output:
    """A module of a network, and the pooling of its output.

    Attributes
    ----------
    node : str
        ``pooled``, the output of the network, or the dotted name of a module.
    pool : {"avg", "max", "gem", "cls", "none"}
    layout : {"vector", "tokens", "nchw", "nhwc"}
        Layout of the module's output: (b, d), (b, t, d), (b, c, h, w) or (b, h, w, c).
    prefix_tokens : int
        Number of tokens before the patch tokens: class token and registers.
    shape : tuple of int
        Shape after pooling, for one image: (d,), (t, d) or (c, h, w).
    """

    node: str
    pool: str
    layout: str
    prefix_tokens: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return POOLED if self.node == POOLED else f"{self.node}:{self.pool}"

    def to_dict(self) -> dict[str, Any]:
        """The parameters that determine the result."""
        return {"node": self.node, "pool": self.pool, "prefix": self.prefix_tokens, "shape": list(self.shape)}

    def reduce(self, value: Tensor) -> Tensor:
        """Pool the module's output for a batch, (b, …) → (b, *shape); the result does not share memory with it."""
        if self.pool == "none":
            channels_first = value.movedim(-1, 1) if self.layout == "nhwc" else value
            return channels_first.clone(memory_format=torch.contiguous_format)
        if self.pool == "cls":
            return value[:, 0].clone()
        axes = {"tokens": (1,), "nchw": (2, 3), "nhwc": (1, 2)}[self.layout]
        if self.layout == "tokens":
            value = value[:, self.prefix_tokens :]
        if self.pool == "max":
            return value.amax(axes)
        float_value = value.float()  # long sums in half precision lose digits
        if self.pool == "gem":
            float_value = float_value.clamp(min=GEM_EPSILON).pow(GEM_POWER).mean(axes).pow(1 / GEM_POWER)
        else:
            float_value = float_value.mean(axes)
        return float_value.to(value.dtype)


class Recorder:
    """Records outputs during one forward pass.

    Values are pooled immediately, because a later layer may overwrite them in place.

    Parameters
    ----------
    outputs : sequence of Output
    run_to_end : bool
        Run the whole network even if no output needs it.
    """

    def __init__(self, outputs: Sequence[Output], *, run_to_end: bool = False) -> None:
        self._run_to_end = run_to_end
        self.values: dict[str, Tensor] = {}
        self._outputs_by_node: dict[str, list[Output]] = {}
        for output in outputs:
            self._outputs_by_node.setdefault(output.node, []).append(output)
        self._missing_nodes = set(self._outputs_by_node)

    def run(self, network: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Run one forward pass, up to the last module that is needed or to the end."""
        with _set_listener(self._record):
            try:
                network_output = network(images)
            except _StopForward:
                return self.values
        if POOLED in self._missing_nodes:
            self._record(POOLED, network_output)
        if self._missing_nodes:
            raise ConfigError(
                f"output {min(self._missing_nodes)!r}: the network called this module before, but not for these "
                "images; name a module that every forward pass calls"
            )
        return self.values

    def _record(self, node: str, value: object) -> None:
        tensor = _as_tensor(node, value)
        for output in self._outputs_by_node.get(node, ()):
            self.values[output.name] = output.reduce(tensor)
        self._missing_nodes.discard(node)
        if not self._missing_nodes and node != POOLED and not self._run_to_end:
            raise _StopForward


class _StopForward(Exception):
    pass


_LISTENER: ContextVar[Callable[[str, object], None] | None] = ContextVar("listener", default=None)


@contextmanager
def _set_listener(listener: Callable[[str, object], None]) -> Iterator[None]:
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@dataclass(frozen=True)
class _RecordingHook:
    """A forward hook that calls the listener of the current thread; stateless, so that a network can be copied."""

    node: str

    def __call__(self, module: nn.Module, args: object, value: object) -> None:
        listener = _LISTENER.get()
        if listener is not None:
            listener(self.node, value)


def resolve_outputs(network: nn.Module, output_names: Sequence[str], transform: SampleTransform) -> tuple[Output, ...]:
    """Resolve output names and determine their shapes with two forward passes.

    Parameters
    ----------
    network : Module
        Headless. Forward hooks stay registered on it.
    output_names : sequence of str
        ``pooled`` or ``NODE[:POOL]``.
    transform : SampleTransform
        Its input shape is used for the forward passes.

    Raises
    ------
    ConfigError
        If a node or pooling is unknown, the pooling does not suit the value, or the value has no batch axis.
    """
    parsed = [_parse_output(network, text) for text in output_names]
    if not parsed:
        raise ConfigError("no output is named; name 'pooled' or NODE[:POOL]")
    modules = dict(network.named_modules())
    for node in dict.fromkeys(node for node, _ in parsed if node != POOLED):
        if not any(hook == _RecordingHook(node) for hook in modules[node]._forward_hooks.values()):
            modules[node].register_forward_hook(_RecordingHook(node))
    pass_1, pass_2 = (_record_shapes(network, example_batch(transform, n)) for n in (1, 2))
    height, width = (1, *transform.input_shape)[-2:]
    size = height, width
    outputs = []
    for node, pool in parsed:
        shape = _image_shape(node, pass_1.get(node), pass_2.get(node))
        layout = "vector" if node == POOLED else _detect_layout(node, shape, size)
        outputs.append(_make_output(network, node, pool, layout, shape, size))
    duplicates = [name for name, count in Counter(output.name for output in outputs).items() if count > 1]
    if duplicates:
        raise ConfigError(f"output {duplicates[0]!r} is named more than once; name each output once")
    return tuple(outputs)


def _parse_output(network: nn.Module, text: str) -> tuple[str, str | None]:
    node, colon, pool = text.partition(":")
    if colon and pool not in POOLINGS:
        raise unknown_name_error("pooling", pool, POOLINGS)
    if node == POOLED:
        if colon:
            raise ConfigError(f"output {text!r}: the network itself pools 'pooled'; leave out {colon + pool!r}")
        return node, "none"
    module_names = [name for name, _ in network.named_modules() if name]
    if node not in module_names:
        raise unknown_name_error("output", node, [POOLED, *module_names])
    return node, pool or None


@torch.inference_mode()
def _record_shapes(network: nn.Module, images: Tensor) -> dict[str, tuple[int, list[tuple[int, ...]]]]:
    """For each node that ran: the batch size, and the shape of each output value."""
    shapes_by_node: dict[str, tuple[int, list[tuple[int, ...]]]] = {}

    def record(node: str, value: object) -> None:
        shapes_by_node.setdefault(node, (len(images), []))[1].append(tuple(_as_tensor(node, value).shape))

    with _set_listener(record):
        record(POOLED, network(images))
    return shapes_by_node


def _as_tensor(node: str, value: object) -> Tensor:
    if isinstance(value, (tuple, list)) and value:
        value = value[0]  # attention returns (values, weights)
    if not isinstance(value, Tensor):
        raise ConfigError(f"output {node!r} is a {type(value).__name__}, expected a tensor; name another module")
    return value


def _image_shape(node: str, *passes: tuple[int, list[tuple[int, ...]]] | None) -> tuple[int, ...]:
    """The value's shape for one image; raises an error unless every pass gave one value with the batch axis first."""
    shapes = set()
    for recorded in passes:
        if recorded is None:
            raise ConfigError(f"output {node!r}: the forward pass does not call this module; name another one")
        batch, values = recorded
        if len(values) > 1:
            raise ConfigError(
                f"output {node!r}: a forward pass calls this module {len(values)} times, expected one call; "
                "name the module that contains it"
            )
        if not values[0] or values[0][0] != batch:
            raise ConfigError(
                f"output {node!r} has shape {values[0]} for a batch of {batch}, expected the batch on the first axis; "
                "name another module"
            )
        shapes.add(values[0][1:])
    if len(shapes) > 1:
        raise ConfigError(f"output {node!r}: its shape depends on the batch: {sorted(shapes)}; name another module")
    return shapes.pop()


def _detect_layout(node: str, shape: tuple[int, ...], size: tuple[int, int]) -> str:
    if len(shape) not in (1, 2, 3):
        raise ConfigError(
            f"output {node!r} has shape {shape} for one image; expected a vector, tokens or a feature map: "
            "name another module"
        )
    if len(shape) < 3:
        return ("vector", "tokens")[len(shape) - 1]
    if 0 in shape:
        raise ConfigError(
            f"output {node!r} has shape {shape} for images of {size[0]} × {size[1]} pixels, expected no empty axis: "
            "name another module"
        )
    return "nhwc" if is_channels_last(shape, size) else "nchw"


def is_channels_last(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether a feature map has shape (h, w, c), not (c, h, w): its spatial axes have the image's aspect ratio."""
    first, last = (abs(log(a / b) - log(size[0] / size[1])) for a, b in (shape[1:], shape[:2]))
    return last < first


def _make_output(
    network: nn.Module, node: str, pool: str | None, layout: str, shape: tuple[int, ...], size: tuple[int, int]
) -> Output:
    """Validate the pooling, or choose the default, and compute the shape after pooling."""
    if node == POOLED and len(shape) != 1:
        raise ConfigError(
            f"the output of the network has shape {shape} for one image, expected (d,); name a module in it, "
            "such as --output NODE:avg, or let the network end with pooling"
        )
    prefix_tokens = _count_prefix_tokens(network, shape[0], size) if layout == "tokens" else 0
    has_class_token = prefix_tokens > 0 and _has_class_token(network)
    if pool is None:
        pool = {"vector": "none", "tokens": "cls" if has_class_token else "avg"}.get(layout, "avg")
    if pool == "cls" and not has_class_token:
        raise ConfigError(f"output '{node}:cls' has shape {shape} and no class token; use avg, max, gem or none")
    if layout == "vector" and pool != "none":
        raise ConfigError(f"output '{node}:{pool}' has shape {shape}, a vector, which needs no pooling; name {node!r}")
    if pool == "none":
        kept_shape = (shape[2], *shape[:2]) if layout == "nhwc" else shape
    else:
        kept_shape = shape[:1] if layout == "nchw" else shape[-1:]
    return Output(node, pool, layout, prefix_tokens, kept_shape)


def _has_class_token(network: nn.Module) -> bool:
    """Whether the network has a class token: ``class_token`` in torchvision, ``cls_token`` in timm."""
    return any(isinstance(getattr(network, name, None), Tensor) for name in ("class_token", "cls_token"))


def _count_prefix_tokens(network: nn.Module, tokens: int, size: tuple[int, int]) -> int:
    """Number of prefix tokens at this module; 0 before they are concatenated to the patches."""
    declared = getattr(network, "num_prefix_tokens", int(_has_class_token(network)))
    return int(declared) if _is_grid(tokens - declared, size) and not _is_grid(tokens, size) else 0


def _is_grid(count: int, size: tuple[int, int]) -> bool:
    """Whether this number of patches forms a grid with the image's aspect ratio."""
    return count > 0 and round(sqrt(count * size[0] / size[1])) * round(sqrt(count * size[1] / size[0])) == count
