"""Small networks, and how often they run."""

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
    """How many images each forward pass is of, from here on; what proves that a network is frozen is none."""
    from featpipe.inference import Engine

    passes: list[int] = []
    submit = Engine.submit

    def counted(self: Engine, images: Tensor) -> object:
        passes.append(len(images))
        return submit(self, images)

    monkeypatch.setattr(Engine, "submit", counted)
    return passes


OWN = """
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


class Deciding(Tiny):
    """Decides by a value, and makes a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (torch.ones(1) if x.sum().item() > 0 else torch.zeros(1) + 1)


class Remembering(Tiny):
    """Keeps a tensor from its first forward pass for the later ones."""

    offset: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.offset is None:
            self.offset = torch.full((8,), 2.0, device=x.device)
        return super().forward(x) + self.offset


class ByHand(nn.Module):
    """Computes outside of torch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy().mean((2, 3)))
