"""Fuse each convolution of a graph with the operations after it, on a CPU.

A convolution, the following batch norm, the sum with a shortcut and the activation become a single call of oneDNN, on
weights that are reordered once into oneDNN's layout. This saves most passes over the activations and the repeated
reordering. The operators are those that torch's compiler emits for a CPU; they are called here without compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

aten = torch.ops.aten

# activation → its name in oneDNN's operators, and the number of its scalar arguments
ONEDNN_ACTIVATIONS: Mapping[Any, tuple[str, int]] = {
    aten.relu.default: ("relu", 0),
    aten.relu_.default: ("relu", 0),
    aten.hardtanh.default: ("hardtanh", 2),
    aten.hardtanh_.default: ("hardtanh", 2),
    aten.silu.default: ("swish", 0),
    aten.silu_.default: ("swish", 0),
    aten.hardswish.default: ("hardswish", 0),
    aten.hardswish_.default: ("hardswish", 0),
    aten.sigmoid.default: ("sigmoid", 0),
    aten.sigmoid_.default: ("sigmoid", 0),
}
HARDTANH_DEFAULTS = (-1.0, 1.0)  # torch's defaults
ADD_OPERATORS = (aten.add.Tensor, aten.add_.Tensor)
DROPOUT_OPERATORS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)


@dataclass
class _FusionChain:
    """A convolution and the nodes that are fused into it."""

    convolution: fx.Node
    norm: fx.Node | None = None
    sum: fx.Node | None = None
    activation: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def shortcut(self) -> fx.Node:
        """The other operand of the sum."""
        assert self.sum is not None
        previous = self.nodes[self.nodes.index(self.sum) - 1]
        return next(node for node in self.sum.args[:2] if node is not previous)  # type: ignore[return-value]


def fuse_convolutions(
    program: torch.export.ExportedProgram, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> fx.GraphModule:
    """Fuse the convolutions of an exported graph.

    Parameters
    ----------
    program : ExportedProgram
        Result of :func:`featpipe.inference.optimize.export_graph` for the network in ``dtype``.
    weights : mapping
        Name → parameter or buffer of the network in float32: batch norms are folded before rounding to ``dtype``.
    dtype : torch.dtype

    Returns
    -------
    GraphModule
        Images of shape (b, 3, h, w), ``dtype``, channels last → tuple of outputs.

    Raises
    ------
    Exception
        Any exception that a build of torch without the operators raises.
    """
    module = program.module()
    graph = module.graph
    _remove_nodes_after_outputs(graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:  # checks of the input's shape
            graph.erase_node(node)
        elif node.target in DROPOUT_OPERATORS and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.pad.default and _is_zero_padding(node):
            node.target = _pad_with_zeros
    for node in list(graph.nodes):
        if node.target is aten.conv2d.default and _is_replaceable(node):
            _replace_chain(module, _match_chain(node), weights, dtype)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    graph.lint()
    module.recompile()
    return module


def _remove_nodes_after_outputs(graph: fx.Graph) -> None:
    """Remove the nodes after the last output; outputs do not share memory with later nodes."""
    *nodes, output_node = graph.nodes
    while nodes and output_node not in nodes[-1].users:
        graph.erase_node(nodes.pop())


def _is_replaceable(convolution: fx.Node) -> bool:
    images, weight, _, _, padding, *_ = _conv_arguments(convolution)
    return weight.op == "get_attr" and isinstance(padding, (list, tuple)) and not _is_overwritten(images)


def _is_overwritten(value: fx.Node) -> bool:
    """Whether a later operation modifies a value in place, so that the value must be read before it."""
    schemas = ((user, getattr(user.target, "_schema", None)) for user in value.users)
    return any(schema is not None and schema.is_mutable and user.args[0] is value for user, schema in schemas)


def _match_chain(convolution: fx.Node) -> _FusionChain:
    """Match the norm, sum and activation after a convolution, as long as each has only one user."""
    chain = _FusionChain(convolution, nodes=[convolution])
    for kind, is_match in _CHAIN_MATCHERS:
        users = list(chain.last.users)
        if len(users) == 1 and is_match(users[0], chain.last):
            setattr(chain, kind, users[0])
            chain.nodes.append(users[0])
    return chain


def _is_norm(node: fx.Node, previous: fx.Node) -> bool:
    is_frozen = node.target is aten.batch_norm.default and node.args[0] is previous and not node.args[5]
    return bool(is_frozen and all(value is None or value.op == "get_attr" for value in node.args[1:5]))  # type: ignore[union-attr]


def _is_sum(node: fx.Node, previous: fx.Node) -> bool:
    """Whether a node adds two maps of the same shape; an in-place sum must write to the convolution's result."""
    if node.target not in ADD_OPERATORS or node.kwargs or len(node.args) != 2 or node.args[0] is node.args[1]:
        return False
    if node.target is aten.add_.Tensor and node.args[0] is not previous:
        return False
    other = node.args[1] if node.args[0] is previous else node.args[0]
    if not isinstance(other, fx.Node) or _is_overwritten(other):
        return False
    return bool(other.meta["val"].shape == previous.meta["val"].shape)


def _is_activation(node: fx.Node, previous: fx.Node) -> bool:
    return node.target in ONEDNN_ACTIVATIONS and node.args[0] is previous


_CHAIN_MATCHERS: tuple[tuple[str, Callable[[fx.Node, fx.Node], bool]], ...] = (
    ("norm", _is_norm),
    ("sum", _is_sum),
    ("activation", _is_activation),
)


def _replace_chain(
    module: fx.GraphModule, chain: _FusionChain, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Replace a chain with a single call."""
    images, _, _, stride, padding, dilation, groups = _conv_arguments(chain.convolution)
    weight, bias = (None if value is None else value.to(dtype) for value in _fold_batch_norm(module, chain, weights))
    assert weight is not None
    if _is_padded_depthwise(chain.convolution):
        images, weight, padding = _fold_padding(images, weight)
    shape = list(images.meta["val"].shape)
    name = f"fused_{chain.convolution.name}"
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, shape)
    module.register_buffer(f"{name}_weight", packed)
    if bias is not None:
        module.register_buffer(f"{name}_bias", bias)
    activation, scalars = _activation_arguments(chain)
    graph = module.graph
    with graph.inserting_before(chain.last):
        tensors = [graph.get_attr(f"{name}_weight"), None if bias is None else graph.get_attr(f"{name}_bias")]
        conv_settings = (padding, stride, dilation, groups)
        if chain.sum is None:
            operator = torch.ops.mkldnn._convolution_pointwise.default
            arguments = (images, *tensors, *conv_settings, activation or "none", scalars, None)
        else:
            operator = torch.ops.mkldnn._convolution_pointwise.binary
            arguments = (images, chain.shortcut, *tensors, *conv_settings, "add", None, activation, scalars, None)
        fused_node = graph.call_function(operator, arguments)
    fused_node.meta.update(chain.last.meta)
    chain.last.replace_all_uses_with(fused_node)
    for node in reversed(chain.nodes):
        graph.erase_node(node)


def _is_padded_depthwise(convolution: fx.Node) -> bool:
    """Whether a node is a depthwise convolution and the only user of a padding."""
    images, weight, _, _, padding, dilation, _ = _conv_arguments(convolution)
    is_padded = images.target is _pad_with_zeros and len(images.users) == 1 and min(images.args[1]) >= 0
    is_depthwise = weight.meta["val"].shape[1] == 1
    return is_padded and is_depthwise and not any(padding) and list(dilation) == [1, 1]


def _fold_padding(pad_node: fx.Node, weight: Tensor) -> tuple[fx.Node, Tensor, list[int]]:
    """Fold a padding into the convolution: return the unpadded maps, the kernel and its symmetric padding.

    If the padding is asymmetric, as in networks that pad like TensorFlow, the kernel is extended with zeros on the side
    of less padding. The sums stay bit-identical, for a few more multiplications. Padding the maps explicitly takes as
    long as the convolution.
    """
    unpadded: Any = pad_node.args[0]
    left, right, top, bottom = (int(size) for size in pad_node.args[1])  # type: ignore[union-attr,arg-type]
    zeros = [max(0, right - left), max(0, left - right), max(0, bottom - top), max(0, top - bottom)]
    return unpadded, pad(weight, zeros), [max(top, bottom), max(left, right)]


def _conv_arguments(node: fx.Node) -> tuple[Any, ...]:
    """All seven arguments of conv2d, with its defaults."""
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    arguments = dict(zip(names, defaults, strict=True)) | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return tuple(arguments.values())


def _fold_batch_norm(
    module: fx.GraphModule, chain: _FusionChain, weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Fold the batch norm into the convolution's weight and bias; computed in float64."""

    def load_value(node: Any, default: float) -> Any:
        if node is None:
            return default
        name = str(node.target)
        float_weight = weights.get(name.removeprefix("network."))
        return (attrgetter(name)(module) if float_weight is None else float_weight).detach().double()

    _, weight, bias, *_ = _conv_arguments(chain.convolution)
    weight, bias = load_value(weight, 1), load_value(bias, 0)
    if chain.norm is not None:
        norm_arguments: Any = chain.norm.args
        gamma, beta, mean, variance = (load_value(norm_arguments[position], position == 1) for position in range(1, 5))
        scale = gamma / (variance + norm_arguments[7]).sqrt()
        weight, bias = weight * scale.reshape(-1, 1, 1, 1), (bias - mean) * scale + beta
    return weight.float(), bias.float() if isinstance(bias, Tensor) else None


def _activation_arguments(chain: _FusionChain) -> tuple[str | None, list[float]]:
    if chain.activation is None:
        return None, []
    name, count = ONEDNN_ACTIVATIONS[chain.activation.target]
    arguments: Any = chain.activation.args[1:]
    return name, [float(value) for value in (*arguments, *HARDTANH_DEFAULTS[len(arguments) :])][:count]


def _is_zero_padding(node: fx.Node) -> bool:
    """Whether a node pads the last two axes of a batch of maps with zeros."""
    arguments: dict[str, Any] = dict(zip(("images", "sizes", "mode", "value"), node.args, strict=False))
    is_map = arguments["images"].meta["val"].ndim == 4 and len(arguments["sizes"]) == 4
    return is_map and arguments.get("mode", "constant") == "constant" and not arguments.get("value")


def _pad_with_zeros(images: Tensor, sizes: list[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Pad like torch, but write each value once: torch fills the whole result before it copies."""
    if min(sizes) < 0 or not images.is_contiguous(memory_format=torch.channels_last):
        return pad(images, sizes)
    left, right, top, bottom = sizes
    b, c, h, w = images.shape
    padded = images.new_empty((b, h + top + bottom, w + left + right, c)).permute(0, 3, 1, 2)
    padded[:, :, :top] = 0
    padded[:, :, top + h :] = 0
    padded[:, :, top : top + h, :left] = 0
    padded[:, :, top : top + h, left + w :] = 0
    padded[:, :, top : top + h, left : left + w] = images
    return padded
