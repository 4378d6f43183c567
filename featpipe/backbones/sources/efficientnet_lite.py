"""EfficientNet-Lite in plain torch.

Modules, names and initialisation are those of timm's ``tf_efficientnet_lite0``, ``1`` and ``2``; a test compares them.
Embeddings, fingerprints and the names of inner outputs are therefore the same as with timm, and a command that uses a
packaged backbone does not wait for the import of timm.

References
----------
Tan and Le, "EfficientNet: Rethinking model scaling for convolutional neural networks", ICML 2019; the Lite variants
have neither squeeze-and-excitation nor swish (models/official/efficientnet/lite in github.com/tensorflow/tpu).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import pad

STEM_CHANNELS = 32
WIDTH = 1280  # of the embedding
N_CLASSES = 1000
KERNELS = (3, 3, 5, 3, 5, 5, 3)  # of the depthwise convolutions of each stage
STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the first block of each stage
EXPANSION = 6  # of the channels within a block, except in the first stage
NORM_EPSILON = 1e-3  # TensorFlow's


@dataclass(frozen=True)
class Variant:
    """The parameters that differ between the networks of the family.

    Attributes
    ----------
    depths, channels : tuple of int
        Blocks and output channels of each stage.
    image_size : int
        Height and width of the training images in pixels.
    crop_ratio : float
        Share of the height that the centre crop keeps in evaluation.
    """

    depths: tuple[int, ...]
    channels: tuple[int, ...]
    image_size: int
    crop_ratio: float


VARIANTS = {
    "efficientnet_lite0": Variant((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320), 224, 0.875),
    "efficientnet_lite1": Variant((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320), 240, 0.882),
    "efficientnet_lite2": Variant((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352), 260, 0.890),
}


class EfficientNetLite(nn.Module):
    """An untrained EfficientNet-Lite: images (b, 3, h, w) → embeddings (b, 1280).

    With the same seed of torch's random generator the weights are those of timm's network. Therefore the layers that
    timm creates and discards, the classifier and two test layers, are created and discarded here too.
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.conv_stem = _SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        self.bn1 = _NormActivation(STEM_CHANNELS)
        _ = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        stages: list[nn.Module] = []
        in_channels = STEM_CHANNELS
        for depth, channels, kernel, stride in zip(variant.depths, variant.channels, KERNELS, STRIDES, strict=True):
            blocks: list[nn.Module] = []
            for position in range(depth):
                block = _InvertedBlock if stages else _SeparableBlock
                blocks.append(block(in_channels, channels, kernel, 1 if position else stride))
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _conv2d(in_channels, WIDTH, 1)
        self.bn2 = _NormActivation(WIDTH)
        self.global_pool = _GlobalPool()
        self.classifier: nn.Module = nn.Linear(WIDTH, N_CLASSES)
        self._initialize()
        self.classifier = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks(self.bn1(self.conv_stem(images)))
        embeddings: Tensor = self.classifier(self.global_pool(self.bn2(self.conv_head(maps))))
        return embeddings

    def _initialize(self) -> None:
        """Draw the weights of convolutions from a normal distribution with variance 2 / fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))


class _SeparableBlock(nn.Module):
    """A depthwise convolution and a projection; the sum with the input where the shapes are equal."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.has_shortcut = stride == 1 and in_channels == channels
        self.conv_dw = _conv2d(in_channels, in_channels, kernel, stride, in_channels)
        self.bn1 = _NormActivation(in_channels)
        self.aa, self.se = nn.Identity(), nn.Identity()  # placeholders in timm's block that outputs may name
        self.conv_pw = _conv2d(in_channels, channels, 1)
        self.bn2 = _NormActivation(channels, activate=False)
        self.drop_path = nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        hidden = self.se(self.aa(self.bn1(self.conv_dw(maps))))
        projected: Tensor = self.bn2(self.conv_pw(hidden))
        return self.drop_path(projected) + maps if self.has_shortcut else projected


class _InvertedBlock(nn.Module):
    """An expansion, a depthwise convolution and a projection; the sum with the input where the shapes are equal."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden_channels = EXPANSION * in_channels
        self.has_shortcut = stride == 1 and in_channels == channels
        self.conv_pw = _conv2d(in_channels, hidden_channels, 1)
        self.bn1 = _NormActivation(hidden_channels)
        self.conv_dw = _conv2d(hidden_channels, hidden_channels, kernel, stride, hidden_channels)
        self.bn2 = _NormActivation(hidden_channels)
        self.aa, self.se = nn.Identity(), nn.Identity()
        self.conv_pwl = _conv2d(hidden_channels, channels, 1)
        self.bn3 = _NormActivation(channels, activate=False)
        self.drop_path = nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        hidden = self.bn1(self.conv_pw(maps))
        hidden = self.se(self.aa(self.bn2(self.conv_dw(hidden))))
        projected: Tensor = self.bn3(self.conv_pwl(hidden))
        return self.drop_path(projected) + maps if self.has_shortcut else projected


def _conv2d(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
    return _SameConv2d(in_channels, channels, kernel, stride, groups)


class _SameConv2d(nn.Conv2d):
    """A convolution that pads like TensorFlow's ``SAME``: with a stride, more at the right and the bottom."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__(in_channels, channels, kernel, stride, groups=groups, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        height, width = (
            max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(maps.shape[-2:], self.stride, self.kernel_size, strict=True)
        )
        return super().forward(pad(maps, (width // 2, width - width // 2, height // 2, height - height // 2)))


class _NormActivation(nn.BatchNorm2d):
    """A batch norm, and ReLU6 unless ``activate`` is false."""

    def __init__(self, channels: int, *, activate: bool = True) -> None:
        super().__init__(channels, eps=NORM_EPSILON)
        self.drop = nn.Identity()
        self.act = nn.ReLU6(inplace=True) if activate else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        activations: Tensor = self.act(self.drop(super().forward(maps)))
        return activations


class _GlobalPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)

    def forward(self, maps: Tensor) -> Tensor:
        embeddings: Tensor = self.flatten(self.pool(maps))
        return embeddings
