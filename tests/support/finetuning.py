"""A small network, images that it can learn, and a trainer, for tests of fine-tuning."""

from __future__ import annotations

import copy
import io
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from featpipe import backbones
from featpipe.config import FineTuneConfig
from featpipe.finetuning.batches import EmbeddingNetwork
from featpipe.finetuning.trainer import Trainer, TrainingState, TrainingTargets
from featpipe.finetuning.unfreeze import select_unfrozen
from featpipe.heads import LossFunction

LADDER_WIDTH = 10  # of the embedding of a Ladder
COLOURS = {"ape": (150, 90, 90), "bee": (90, 150, 90), "cow": (90, 90, 150)}


def make_image(label: str, seed: int) -> Image.Image:
    """Noise around the colour of a class."""
    noise = np.random.default_rng(seed).normal(0, 60, (8, 8, 3))
    pixels = np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((24, 24), Image.Resampling.NEAREST)


def write_photos(folder: Path, each: int = 10, classes: Sequence[str] = tuple(COLOURS), first: int = 0) -> Path:
    """Write a folder of ``each`` PNG files for each class; images with another ``first`` differ."""
    for number, label in enumerate(classes):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            file = io.BytesIO()
            make_image(label, first + 1000 * number + i).save(file, "PNG")
            (folder / label / f"{i:02}.png").write_bytes(file.getvalue())
    return folder


def small_transform(image: Tensor) -> Tensor:
    """Resize to 16 by 16 pixels in [-1, 1]."""
    small = nn.functional.interpolate(image[None].float(), (16, 16), mode="area")
    return small[0] / 127.5 - 1


class Block(nn.Module):
    """A residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout2d(0.1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(nn.functional.gelu(self.norm(self.conv(x)))) + self.skip(x)


def make_stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1))


class Ladder(nn.Module):
    """A stem and three stages, each at half the resolution of the one before, as in the networks of the registry.

    Strided 1×1 convolutions have 16 input channels: with fewer, oneDNN writes out of bounds in their backward pass.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 16, 3, 1, 1)
            self.layer1 = make_stage(16, 16, 1)
            self.layer2 = make_stage(16, 16, 2)
            self.layer3 = make_stage(16, LADDER_WIDTH, 2)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3))


N_ROWS, N_CLASSES = 40, 3  # of the dataset that `make_trainer` trains on
RUN_CONFIG = {"settings": {"epochs": 3, "learning_rate": 0.01}}  # for checkpoints


class TensorDataset:
    """Images in memory, shifted a little by the epoch."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.network, self.images = network, images

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        return self.images[torch.from_numpy(rows)] + 0.01 * epoch


class InterruptingDataset(TensorDataset):
    """A dataset that raises a signal when the batch with a given number is read."""

    def __init__(self, dataset: TensorDataset, batch_number: int, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__(dataset.network, dataset.images)
        self.batches_left, self.number = batch_number, number

    def batch(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        self.batches_left -= 1
        if self.batches_left == 0:
            signal.raise_signal(self.number)
        return super().batch(rows, epoch)


def make_trainer(network: nn.Module | None = None, **settings: Any) -> Trainer:
    """A trainer of a copy of a network (a Ladder if none is given) on rows 0 to 31; it validates on rows 32 to 39."""
    tuning = FineTuneConfig(
        **{"unfreeze": "all", "batch": 8, "epochs": 3, "patience": 0, "learning_rate": 1e-2, **settings}
    )
    backbone = backbones.load(network or Ladder(), transform=small_transform)
    trained_network = copy.deepcopy(backbone.network)
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(N_ROWS) % N_CLASSES
    noise = torch.randn(N_ROWS, 3, 16, 16, generator=generator)
    images = noise + nn.functional.one_hot(y, N_CLASSES)[:, :, None, None]
    dataset = TensorDataset(EmbeddingNetwork(trained_network, backbone.outputs[0]), images)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        head = nn.Sequential(nn.Linear(LADDER_WIDTH, N_CLASSES))
    rows = np.arange(N_ROWS)
    return Trainer(
        network=trained_network,
        head=head,
        unfrozen=select_unfrozen(backbone, str(tuning.unfreeze)),
        train_data=dataset,
        validation_data=dataset,
        train_rows=rows[:32],
        validation_rows=rows[32:],
        targets=TrainingTargets(y, torch.ones(N_ROWS)),
        loss_function=LossFunction("softmax", "cross_entropy"),
        tuning=tuning,
        sample_ids=[f"image {row}" for row in rows],
    )


def init_state(trainer: Trainer) -> TrainingState:
    return TrainingState.init(trainer, float(trainer.tuning.learning_rate))


def disable_dropout(trainer: Trainer) -> Trainer:
    for module in trainer.network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return trainer


def copy_weights(trainer: Trainer) -> dict[str, Tensor]:
    """All weights and statistics of the network, prefixed with ``b.``, and of the head."""
    state = {f"b.{name}": value for name, value in trainer.network.state_dict().items()}
    return {name: value.clone() for name, value in [*state.items(), *trainer.head.state_dict().items()]}


def assert_tensors_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor], **tolerance: float) -> None:
    """To the bit, unless a tolerance is given."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **{"rtol": 0, "atol": 0, **tolerance}, msg=name)
