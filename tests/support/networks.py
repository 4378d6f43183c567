"""Small networks, and the count of their forward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from featpipe.inference import Engine


def tiny_transform(image: Tensor) -> Tensor:
    """Twelve by twelve pixels in [0, 1]."""
    small = nn.functional.interpolate(image[None].float(), (12, 12), mode="area")
    return small[0] / 255


class Tiny(nn.Module):
    """A network that embeds thousands of images in a second."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)
            self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of images of each forward pass; the passes of the frozen check are not counted."""
    from featpipe.inference import Engine

    passes: list[int] = []
    submit = Engine.submit

    def record_pass(self: Engine, images: Tensor) -> object:
        passes.append(len(images))
        return submit(self, images)

    monkeypatch.setattr(Engine, "submit", record_pass)
    return passes


CUSTOM_NETWORK_CODE = """
import torch
from torch import nn

def transform(image):
    small = nn.functional.interpolate(image[None].float(), (12, 12), mode="area")
    return small[0] / 255

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.slow = {slow}
    def forward(self, x):
        import time
        time.sleep(self.slow * len(x))
        return self.conv(x).relu().mean((2, 3))

def make():
    return Net(), transform
"""


class DataDependent(Tiny):
    """A network with a branch on a value, which creates a tensor in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (torch.ones(1) if x.sum().item() > 0 else torch.zeros(1) + 1)


class Stateful(Tiny):
    """A network that stores a tensor in its first forward pass and uses it in later ones."""

    offset: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.offset is None:
            self.offset = torch.full((8,), 2.0, device=x.device)
        return super().forward(x) + self.offset


class OutsideTorch(nn.Module):
    """A network that computes with numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy().mean((2, 3)))
