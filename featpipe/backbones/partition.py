"""Cut a network in two: a frozen lower part that ends in one tensor, and the upper part that trains.

The upper part runs the network's own code with its own modules. Only the modules that finish before the cut are
replaced by placeholders. A placeholder returns a tensor of the right shape filled with NaN, so that any use of it shows
in the output; the placeholder of the cut module returns the cached value. If the output of the network is unchanged,
the upper part depends on no other value from below. This method needs no tracing of operators, keeps the modes and the
random layers of the upper part, and detects cuts that more than one tensor crosses.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featpipe.backbones.backbone import Backbone
from featpipe.backbones.outputs import Output, Recorder, resolve_outputs
from featpipe.backbones.stages import BatchShape, ModuleCall, eval_mode, is_within, map_leaves, trace_modules
from featpipe.backbones.transforms import image_size
from featpipe.errors import ConfigError

MAX_RELATIVE_ERROR = 1e-4  # relative to the norm of the embedding; a wrong cut has an error of about 1
N_CHECK_IMAGES = 2
MAX_CUT_CANDIDATES = 24  # modules; limits the search in a network of parallel branches, where no cut exists


@dataclass(frozen=True, eq=False)
class Partition:
    """The position of the cut, and the upper part of the network.

    Attributes
    ----------
    output : str
        Name of the value at the cut, in the form of ``outputs`` of :func:`featpipe.backbones.load`.
    upper : Module
        Value at the cut, (b, …) → embeddings of shape (b, d). It shares parameters and buffers with the network.
    lower_modules : tuple of str
        Dotted names of the modules that ``upper`` does not run.
    reason : str
        Explanation of the position, for messages.
    """

    output: str
    upper: nn.Module
    lower_modules: tuple[str, ...]
    reason: str


def partition_network(backbone: Backbone, frozen: Collection[str]) -> Partition:
    """Cut a network at the latest possible position before its first trainable parameter.

    Parameters
    ----------
    backbone : Backbone
        Its first output is the embedding. Inactive hooks stay registered on the network.
    frozen : collection of str
        Dotted names of frozen modules and parameters; their children are frozen too.

    Raises
    ------
    ConfigError
        If no frozen module comes before the trainable part, or no single value separates the two.
    """
    network, embedding = backbone.network, backbone.outputs[0]
    calls = trace_modules(network, image_size(backbone.transform))
    first_trained = _find_first_trained(network, frozenset(frozen), calls)
    if first_trained is None:
        return Partition(
            embedding.name,
            nn.Identity(),
            tuple(call.name for call in calls.values()),
            "no parameter is trained",
        )
    trained_text = f"{first_trained.name or 'the network itself'!r} is trained"
    earlier_calls = sorted(
        (call for call in calls.values() if call.end < first_trained.start), key=lambda run: -run.end
    )
    candidates = [
        call
        for call, next_call in zip(earlier_calls, [None, *earlier_calls], strict=False)
        if not _is_last_child(call, next_call)
    ]
    for call in candidates[:MAX_CUT_CANDIDATES]:
        upper = _make_upper(backbone, call, calls)
        if upper is not None:
            lower_modules = tuple(earlier.name for earlier in earlier_calls if earlier.end <= call.end)
            return Partition(
                upper.cut_output.name,
                upper,
                lower_modules,
                f"{trained_text}; it depends on earlier modules only through {call.name!r}",
            )
    reason = "depends on more than one earlier value" if earlier_calls else "no module finishes before it"
    raise ConfigError(
        f"{backbone.name} cannot be split into a frozen and a trained part: {trained_text}, and {reason}; "
        "train more of it, or the whole network"
    )


def _is_last_child(call: ModuleCall, next_call: ModuleCall | None) -> bool:
    """Whether a module is the last child of its parent, so that the parent's value follows directly from it."""
    return next_call is not None and next_call.start < call.start and next_call.end == call.end + 1


def _find_first_trained(
    network: nn.Module, frozen: frozenset[str], calls: Mapping[nn.Module, ModuleCall]
) -> ModuleCall | None:
    """Find the module with a trainable parameter that is called first."""
    calls_by_name = {call.name: call for call in calls.values()}
    first: ModuleCall | None = None
    for name, _ in network.named_parameters():
        if is_within(name, frozen):
            continue
        module_name = name.rpartition(".")[0]
        while module_name not in calls_by_name:  # its parameters are used by its parent
            module_name = module_name.rpartition(".")[0]
        if first is None or calls_by_name[module_name].start < first.start:
            first = calls_by_name[module_name]
    return first


def _make_upper(backbone: Backbone, call: ModuleCall, calls: Mapping[nn.Module, ModuleCall]) -> UpperNetwork | None:
    """Make the upper part after a module; None if it needs other values as well."""
    if call.call_count != 1 or not isinstance(call.output, BatchShape) or call.output.per_image is None:
        return None
    for materialize in (False, True):
        with suppress(Exception):  # a network may raise anything for unexpected input
            (cut_output,) = resolve_outputs(backbone.network, [f"{call.name}:none"], backbone.transform)
            upper = UpperNetwork(backbone, cut_output, calls, materialize=materialize)
            if _is_equivalent(backbone, upper):
                return upper
    return None


def _is_equivalent(backbone: Backbone, upper: UpperNetwork) -> bool:
    """Whether the upper part reproduces the embedding, and uses no other lower value in training mode either."""
    network, cut_output, embedding = backbone.network, upper.cut_output, backbone.outputs[0]
    reference = next(network.parameters())
    saved_buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with eval_mode(network):
        images = torch.rand(N_CHECK_IMAGES, *backbone.transform.input_shape).to(reference.device, reference.dtype)
        values = Recorder((cut_output, embedding)).run(network, images)
        actual, expected = upper(values[cut_output.name].clone()), values[embedding.name]
        distance = (actual - expected).flatten(1).norm(dim=1)
        if not (distance <= MAX_RELATIVE_ERROR * expected.flatten(1).norm(dim=1)).all():
            return False
        try:
            return bool(upper.train()(values[cut_output.name]).isfinite().all())
        finally:
            for buffer, saved in saved_buffers:
                buffer.copy_(saved)


class UpperNetwork(nn.Module):
    """The part of a network after one of its values.

    The modules are those of the network, so that training them trains the network. Only modules with children on both
    sides of the cut are copied; a copy shares children, parameters and buffers with its original, and both always have
    the same training mode.

    Parameters
    ----------
    backbone : Backbone
    cut_output : Output
        The value at the cut, without pooling.
    calls : mapping from Module to ModuleCall
        Recorded in a forward pass.
    materialize : bool
        Allocate the placeholder tensors, for networks that modify them in place.
    """

    def __init__(
        self, backbone: Backbone, cut_output: Output, calls: Mapping[nn.Module, ModuleCall], *, materialize: bool
    ) -> None:
        super().__init__()
        self.cut_output = cut_output
        self.embedding = backbone.outputs[0]
        self.size = image_size(backbone.transform)
        self._pass_state = _PassState(materialize)
        self._copies: list[tuple[nn.Module, nn.Module]] = []
        cut_module = backbone.network.get_submodule(cut_output.node)
        self.network = self._build_upper(backbone.network, cut_module, calls, {})

    def _build_upper(
        self,
        module: nn.Module,
        cut_module: nn.Module,
        calls: Mapping[nn.Module, ModuleCall],
        built: dict[nn.Module, nn.Module],
    ) -> nn.Module:
        """Copy a module without the children that finish before the cut; the module itself if there are none."""
        if module in built:
            return built[module]
        if module is cut_module or _is_finished(module, calls[cut_module].end, calls):
            result: nn.Module = _PlaceholderModule(
                module, None if module is cut_module else calls[module].output, self._pass_state
            )
        else:
            result = self._replace_children(
                module,
                {
                    name: child and self._build_upper(child, cut_module, calls, built)
                    for name, child in module._modules.items()
                },
            )
        built[module] = result
        return result

    def _replace_children(self, module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
        if all(children[name] is child for name, child in module._modules.items()):
            return module
        module_copy = copy.copy(module)
        module_copy._modules = children
        self.__dict__["_copies"].append((module_copy, module))  # not registered: they are submodules already
        return module_copy

    def forward(self, value: Tensor) -> Tensor:
        """Compute the embeddings from the value at the cut.

        Parameters
        ----------
        value : Tensor of shape (b, *shape)
            The value at the cut, on the network's device and in its dtype. It may be overwritten.

        Returns
        -------
        Tensor of shape (b, d)
        """
        for module_copy, original in self._copies:
            module_copy.training = original.training
        self._pass_state.value = value.movedim(1, -1).contiguous() if self.cut_output.layout == "nhwc" else value
        images = self._pass_state.make_placeholder((len(value), 3, *self.size))
        try:
            return Recorder((self.embedding,)).run(self.network, images)[self.embedding.name]
        finally:
            self._pass_state.value = None

    def train(self, mode: bool = True) -> UpperNetwork:
        super().train(mode)
        for _, original in self._copies:
            original.training = mode
        return self


@dataclass
class _PassState:
    """State of the current forward pass."""

    materialize: bool
    value: Tensor | None = None

    def make_placeholder(self, shape: tuple[int, ...]) -> Tensor:
        """Make a tensor of NaN."""
        assert self.value is not None
        placeholder = self.value.new_full((), torch.nan).expand(shape)
        return placeholder.clone() if self.materialize else placeholder


class _PlaceholderModule(nn.Module):
    """Replaces a module below the cut, or the cut module, whose value is given."""

    def __init__(self, module: nn.Module, output_template: Any, pass_state: _PassState) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, so that its parameters are not registered
        self._output_template = output_template
        self._pass_state = pass_state

    def forward(self, *args: object, **kwargs: object) -> object:
        value = self._pass_state.value
        if self._output_template is None or value is None:
            return value
        return map_leaves(
            lambda item: (
                self._pass_state.make_placeholder(item.for_batch(len(value))) if isinstance(item, BatchShape) else item
            ),
            self._output_template,
        )

    def __getattr__(self, name: str) -> Any:
        """Forward attributes that networks read from their modules, such as the patch size."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_module" not in self.__dict__:
                raise
            return getattr(self.__dict__["_module"][0], name)


def _is_finished(module: nn.Module, end: int, calls: Mapping[nn.Module, ModuleCall]) -> bool:
    """Whether a placeholder can replace a module: it finishes before ``end``, runs once, and returns float tensors."""
    call = calls.get(module)
    if call is None or call.call_count != 1 or call.output is None or not _has_only_shape(call.output):
        return False
    return all(calls[submodule].end <= end for submodule in module.modules() if submodule in calls)


def _has_only_shape(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_has_only_shape, value))
    if isinstance(value, BatchShape):
        return value.dtype.is_floating_point
    return value is None or isinstance(value, int)
