"""What is trained, on what, and how: everything that stays the same while a network is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from featpipe.finetuning.parallel import World
from featpipe.finetuning.source import Source
from featpipe.finetuning.unfreezing import Unfrozen
from featpipe.heads.losses import Objective
from featpipe.progress import Tell, quiet
from featpipe.recipe import FineTuning

if TYPE_CHECKING:
    from featpipe.finetuning.past import Past

__all__ = ["BELOW", "HEAD", "Job", "Targets"]

HEAD, BELOW = "head.", "backbone."  # before the names of parameters


@dataclass(frozen=True, eq=False)
class Targets:
    """What is to be answered for each row of an archive.

    Attributes
    ----------
    Y : Tensor
        Class codes of shape (n,), 0 and 1 of shape (n, k), or standardised numbers of shape (n, t); anything, of rows
        that are not labelled.
    weights : Tensor of shape (n,)
        In the loss; 1 on average over the training rows.
    """

    Y: Tensor
    weights: Tensor

    def of(self, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Those of some rows."""
        where = torch.from_numpy(rows)
        return self.Y[where].to(device), self.weights[where].to(device)


@dataclass(frozen=True, eq=False)
class Job:
    """What is trained, on what, and how.

    Attributes
    ----------
    network : Module
        The backbone's, a copy that is trained.
    head : Sequential
        The new layer or layers.
    unfrozen : Unfrozen
    source, watched : Source
        Of the training rows, and of those without augmentation by which it is judged when to stop.
    train, validation : ndarray of shape (m,), int64
        Rows of the archive.
    ids : sequence of str
        What people call them.
    board : callable or None
        Told each :class:`featpipe.finetuning.state.Epoch` that is done.
    past : Past or None
        Where classes have come to those that the model knew.
    beside : ndarray of shape (t,), int64
        Rows by which both sides are then watched, of ``watched``; they decide nothing.
    """

    network: nn.Module
    head: nn.Sequential
    unfrozen: Unfrozen
    source: Source
    watched: Source
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    targets: Targets
    objective: Objective
    tuning: FineTuning
    ids: Any
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: World = field(default_factory=World)
    progress: Tell = quiet
    board: Callable[[Any], None] | None = None
    past: Past | None = None
    beside: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _modes: list[nn.Module] = field(default_factory=list, init=False, repr=False)

    @property
    def steps(self) -> int:
        """Steps of the optimizer in an epoch."""
        return -(-len(self.train) // self.tuning.batch)

    @property
    def outputs(self) -> int:
        """Numbers that the new layer answers with."""
        return len(list(self.head.parameters())[-1])

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The rows of each step of an epoch: they depend on the seed and the epoch, and on nothing before."""
        random = np.random.default_rng((self.tuning.seed, epoch))
        if self.tuning.sampling is None:
            order = random.permutation(self.train)
        else:
            codes = self.targets.Y[torch.from_numpy(self.train)].numpy()
            odds = 1 / np.bincount(codes)[codes]
            order = random.choice(self.train, len(self.train), p=odds / odds.sum())
        return [part.astype(np.int64) for part in np.array_split(order, self.steps)]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained in the end, the new layer first."""
        below = dict(self.network.named_parameters())
        found = {HEAD + name: parameter for name, parameter in self.head.named_parameters()}
        return found | {BELOW + name: below[name] for name in self.unfrozen.names}

    def kept(self) -> dict[str, Tensor]:
        """All that training changes: the parameters, and the statistics of the batch norms that follow the batches."""
        found: dict[str, Tensor] = {name: parameter.data for name, parameter in self.parameters().items()}
        for place, module in self.network.named_modules():
            if isinstance(module, _NormBase) and self._follows(module):
                for name, buffer in module.named_buffers(recurse=False):
                    found[f"{BELOW}{place}.{name}"] = buffer
        return found

    def pull(self) -> Tensor | None:
        """What draws the weights to those of the model before, as part of the loss; None where nothing does."""
        anchor = None if self.past is None else self.past.anchor
        return None if anchor is None else anchor.pull(self.parameters())

    def depth(self) -> Mapping[str, int]:
        return {BELOW + name: depth for name, depth in self.unfrozen.depth.items()}

    def thaw(self, epoch: int) -> tuple[nn.Parameter, ...]:
        """Let gradients reach what is trained in an epoch, and nothing else; what that is."""
        active = set(self.unfrozen.thawed(epoch, self.tuning.gradual))
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None
        self.head.requires_grad_(True)
        self.network.eval()
        self._modes[:] = self._training()
        return tuple(p for p in (*self.head.parameters(), *self.network.parameters()) if p.requires_grad)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Dropout and its like are on in what is trained; batch norms follow the batches where that was asked for."""
        for module in self._modes:
            module.training = True
        try:
            yield
        finally:
            for module in self._modes:
                module.training = False

    def _training(self) -> list[nn.Module]:
        """The modules that are in training mode while what is thawed now is trained; the network is in eval mode."""
        found = {module: any(p.requires_grad for p in module.parameters()) for module in self.network.modules()}
        for module in self.network.modules():
            if isinstance(module, _NormBase):
                found[module] &= self._follows(module)
        for parent in self.network.modules():
            for child in parent.children():  # dropout and its like have no parameters of their own
                if next(child.parameters(), None) is None:
                    found |= dict.fromkeys(child.modules(), found[parent])
        return [*self.head.modules(), *(module for module, trains in found.items() if trains)]

    @cached_property
    def _trained(self) -> set[int]:
        return {id(parameter) for parameter in self.parameters().values()}

    @property
    def follows(self) -> bool:
        """Whether the statistics of any batch norm follow the batches."""
        return any(isinstance(module, _NormBase) and self._follows(module) for module in self.network.modules())

    def _follows(self, module: nn.Module) -> bool:
        """Whether a batch norm's statistics follow the batches, once it is thawed."""
        return self.tuning.batch_norm == "trained" and any(id(p) in self._trained for p in module.parameters())

    def scores(self, source: Source, inputs: Tensor) -> Tensor:
        """Logits, or standardised numbers, of shape (b, k), float32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.tuning.precision)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            scores = self.head(source.network(inputs))
        return torch.as_tensor(scores.float())
