"""A network in two: what is frozen, up to one value, and what comes after it.

The part above is the network's own code, run with its own modules: only those that are done before the cut are left
out. Each of them answers at once with a tensor of the right shape that holds no number but NaN, so that nothing of it
can enter the answer unnoticed; the one whose value was kept answers with that. Whatever then comes out of the network
as it did before depends on nothing else from below. So a cut needs no tracing of operators, keeps every mode and every
random layer of the upper part as it is, and where more than one tensor crosses it, that shows.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featpipe.backbone.frozen import Backbone
from featpipe.backbone.output import Output, Recorder, resolve
from featpipe.backbone.passes import Run, Shape, evaluating, mapped, runs
from featpipe.backbone.stages import belongs
from featpipe.errors import ConfigError

__all__ = ["Above", "Cut", "cut"]

FARTHEST = 1e-4  # of the answer's length; what is computed otherwise than in the whole network is wrong by about 1
IMAGES = 2
TRIED_MAX = 24  # modules; the value of a network that is all branches is looked for in vain


@dataclass(frozen=True, eq=False)
class Cut:
    """Where a network is cut.

    Attributes
    ----------
    output : str
        Name of the value at the cut, as ``outputs`` of :func:`featpipe.backbone.load` takes it.
    above : Module
        That value, (b, …) → embeddings of shape (b, d). Its parameters and statistics are the network's own.
    below : tuple of str
        Dotted names of the modules that ``above`` leaves out.
    why : str
        Why it is there, for people.
    """

    output: str
    above: nn.Module
    below: tuple[str, ...]
    why: str


def cut(backbone: Backbone, frozen: Collection[str]) -> Cut:
    """Cut a network as late as can be before the first of its parameters that trains.

    Parameters
    ----------
    backbone : Backbone
        Its first output is the embedding. Hooks that do nothing by themselves stay in the network.
    frozen : collection of str
        Dotted names of modules and parameters that stay as they are, with all that is below them.

    Raises
    ------
    ConfigError
        If nothing that is frozen comes before what trains, or no single value separates them; it says which.
    """
    network, embedding = backbone.network, backbone.outputs[0]
    ran = runs(network, backbone.transform.size)
    first = _first_to_train(network, frozenset(frozen), ran)
    if first is None:
        return Cut(
            embedding.name, nn.Identity(), tuple(run.name for run in ran.values()), "nothing of the network trains"
        )
    trains = f"{first.name or 'the network itself'!r} trains"
    before = sorted((run for run in ran.values() if run.ended < first.began), key=lambda run: -run.ended)
    outer = [run for run, later in zip(before, [None, *before], strict=False) if not _is_last_of(run, later)]
    for run in outer[:TRIED_MAX]:
        above = _above(backbone, run, ran)
        if above is not None:
            below = tuple(other.name for other in before if other.ended <= run.ended)
            return Cut(above.at.name, above, below, f"{trains}; all that comes before goes through {run.name!r}")
    reason = "what comes before it is not one value" if before else "no module is done before it"
    raise ConfigError(f"{backbone.name} cannot be cut into a frozen part and one that trains: {trains}, and {reason}")


def _is_last_of(run: Run, later: Run | None) -> bool:
    """Whether a module is the last of the one around it, whose value is the same or made of it at once."""
    return later is not None and later.began < run.began and later.ended == run.ended + 1


def _first_to_train(network: nn.Module, frozen: frozenset[str], ran: Mapping[nn.Module, Run]) -> Run | None:
    """The module that begins first among those with a parameter that trains."""
    by_name = {run.name: run for run in ran.values()}
    first: Run | None = None
    for name, _ in network.named_parameters():
        if belongs(name, frozen):
            continue
        owner = name.rpartition(".")[0]
        while owner not in by_name:  # its parameters are used by the module around it
            owner = owner.rpartition(".")[0]
        if first is None or by_name[owner].began < first.began:
            first = by_name[owner]
    return first


def _above(backbone: Backbone, run: Run, ran: Mapping[nn.Module, Run]) -> Above | None:
    """What comes after a module, if its value is all that it takes."""
    if run.times != 1 or not isinstance(run.value, Shape) or run.value.of_an_image is None:
        return None
    for dense in (False, True):
        with suppress(Exception):  # whatever a network raises that is not given what it expects
            (at,) = resolve(backbone.network, [f"{run.name}:none"], backbone.transform.size)
            above = Above(backbone, at, ran, dense=dense)
            if _is_right(backbone, above):
                return above
    return None


def _is_right(backbone: Backbone, above: Above) -> bool:
    """Whether the value at the cut gives the embedding, and in training mode too nothing else is taken from below."""
    network, at, embedding = backbone.network, above.at, backbone.outputs[0]
    like = next(network.parameters())
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]
    with evaluating(network):
        images = torch.rand(IMAGES, 3, *backbone.transform.size).to(like.device, like.dtype)
        values = Recorder((at, embedding)).run(network, images)
        found, expected = above(values[at.name].clone()), values[embedding.name]
        distance = (found - expected).flatten(1).norm(dim=1)
        if not (distance <= FARTHEST * expected.flatten(1).norm(dim=1)).all():
            return False
        try:
            return bool(above.train()(values[at.name]).isfinite().all())
        finally:
            for buffer, before in kept:
                buffer.copy_(before)


class Above(nn.Module):
    """A network from one of its values on.

    The modules are the network's own, so that training them trains the network. Only those that hold both modules
    below and above are copies, which share their children, parameters and statistics; their mode is that of the
    originals, whichever of the two is told to train.

    Parameters
    ----------
    backbone : Backbone
    at : Output
        The value, unpooled.
    ran : mapping from Module to Run
        Of a forward pass.
    dense : bool
        Write numbers in place of those that are left out, for networks that work on them in place.
    """

    def __init__(self, backbone: Backbone, at: Output, ran: Mapping[nn.Module, Run], *, dense: bool) -> None:
        super().__init__()
        self.at = at
        self.embedding = backbone.outputs[0]
        self.size = backbone.transform.size
        self._now = _Now(dense)
        self._copies: list[tuple[nn.Module, nn.Module]] = []
        cut_at = backbone.network.get_submodule(at.node)
        self.network = self._upper(backbone.network, cut_at, ran, {})

    def _upper(
        self, module: nn.Module, cut_at: nn.Module, ran: Mapping[nn.Module, Run], known: dict[nn.Module, nn.Module]
    ) -> nn.Module:
        """A module without what is done before the cut; itself, if nothing of it is."""
        if module in known:
            return known[module]
        if module is cut_at or _is_done(module, ran[cut_at].ended, ran):
            made: nn.Module = _StandIn(module, None if module is cut_at else ran[module].value, self._now)
        else:
            made = self._with_children(
                module,
                {name: child and self._upper(child, cut_at, ran, known) for name, child in module._modules.items()},
            )
        known[module] = made
        return made

    def _with_children(self, module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
        if all(children[name] is child for name, child in module._modules.items()):
            return module
        made = copy.copy(module)
        made._modules = children
        self.__dict__["_copies"].append((made, module))  # not registered: they are within the network
        return made

    def forward(self, value: Tensor) -> Tensor:
        """The embeddings.

        Parameters
        ----------
        value : Tensor of shape (b, *shape)
            At the cut, on the network's device and in its dtype. It may be overwritten.

        Returns
        -------
        Tensor of shape (b, d)
        """
        for made, original in self._copies:
            made.training = original.training
        self._now.value = value.movedim(1, -1).contiguous() if self.at.layout == "nhwc" else value
        images = self._now.blank((len(value), 3, *self.size))
        try:
            return Recorder((self.embedding,)).run(self.network, images)[self.embedding.name]
        finally:
            self._now.value = None

    def train(self, mode: bool = True) -> Above:
        super().train(mode)
        for _, original in self._copies:
            original.training = mode
        return self


@dataclass
class _Now:
    """The forward pass under way."""

    dense: bool
    value: Tensor | None = None

    def blank(self, shape: tuple[int, ...]) -> Tensor:
        """No numbers."""
        assert self.value is not None
        blank = self.value.new_full((), torch.nan).expand(shape)
        return blank.clone() if self.dense else blank


class _StandIn(nn.Module):
    """In the place of a module that is left out, or of the one whose value is given."""

    def __init__(self, module: nn.Module, answer: Any, now: _Now) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, and so none of its parameters are this one's
        self._answer = answer
        self._now = now

    def forward(self, *args: object, **kwargs: object) -> object:
        value = self._now.value
        if self._answer is None or value is None:
            return value
        return mapped(
            lambda item: self._now.blank(item.of(len(value))) if isinstance(item, Shape) else item, self._answer
        )

    def __getattr__(self, name: str) -> Any:
        """What networks ask their modules for, such as the size of a patch."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_module" not in self.__dict__:
                raise
            return getattr(self.__dict__["_module"][0], name)


def _is_done(module: nn.Module, by: int, ran: Mapping[nn.Module, Run]) -> bool:
    """Whether a module can be left out: it and all that is within it run no more, and its answer has but a shape."""
    run = ran.get(module)
    if run is None or run.times != 1 or run.value is None or not _has_only_shape(run.value):
        return False
    return all(ran[inner].ended <= by for inner in module.modules() if inner in ran)


def _has_only_shape(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_has_only_shape, value))
    if isinstance(value, Shape):
        return value.dtype.is_floating_point
    return value is None or isinstance(value, int)
