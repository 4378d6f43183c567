"""What the tests of fine-tuning share: pictures that a small network can learn, and that network."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

COLOURS = {"ape": (150, 90, 90), "bee": (90, 150, 90), "cow": (90, 90, 150)}


def picture(label: str, seed: int) -> Image.Image:
    """Noise around the colour of a class."""
    noise = np.random.default_rng(seed).normal(0, 60, (8, 8, 3))
    pixels = np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((24, 24), Image.Resampling.NEAREST)


def write_photos(folder: Path, each: int = 10, classes: Sequence[str] = tuple(COLOURS), first: int = 0) -> Path:
    """A folder for each class."""
    for number, label in enumerate(classes):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            file = io.BytesIO()
            picture(label, first + 1000 * number + i).save(file, "PNG")
            (folder / label / f"{i:02}.png").write_bytes(file.getvalue())
    return folder


def small_transform(image: Tensor) -> Tensor:
    """Sixteen by sixteen pixels around zero."""
    small = nn.functional.interpolate(image[None].float(), (16, 16), mode="area")
    return small[0] / 127.5 - 1


class Block(nn.Module):
    """As in a residual network."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout2d(0.1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(nn.functional.gelu(self.norm(self.conv(x)))) + self.skip(x)


def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1))


class Ladder(nn.Module):
    """A stem and three stages, each of half the resolution, as a network of the table has them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 6, 3, 1, 1)
            self.layer1 = layer(6, 6, 1)
            self.layer2 = layer(6, 8, 2)
            self.layer3 = layer(8, 10, 2)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3))
