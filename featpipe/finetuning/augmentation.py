"""Augmentation: random changes of images, reproducible from the image's bytes, a view number and a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2

from featpipe.backbones import ImageTransform, SampleTransform, Transform, image_size
from featpipe.config import FineTuneConfig, check_names
from featpipe.errors import ConfigError

MAX_HUE_JITTER = 0.5  # torchvision's limit: half of the colour circle to either side
NUM_MAGNITUDE_BINS = 31  # of RandAugment, from 0


@dataclass(frozen=True)
class Augmentation:
    """Random changes of images in training; none by default.

    Parameters
    ----------
    crop : float
        Random crop of at least this share of the image's area and an aspect ratio from 3/4 to 4/3, in place of the
        transform's own crop; 0 disables it. 0.08 is usual on ImageNet, 0.5 and more for small datasets.
    flip : float
        Probability of a horizontal flip.
    rotation : float
        Maximum angle to either side, in degrees.
    color : float
        Maximum relative change of brightness, contrast and saturation; hue changes by a tenth of it.
    rand_augment : int
        Magnitude of RandAugment with two operations (Cubuk et al. 2019), 1 to 30; 0 disables it, 9 is usual.
    blur : float
        Maximum sigma of a Gaussian blur, in pixels.
    noise : float
        Standard deviation of Gaussian noise, of pixel values in [0, 1].
    erase : float
        Probability of random erasing (Zhong et al. 2017).
    """

    crop: float = 0.0
    flip: float = 0.0
    rotation: float = 0.0
    color: float = 0.0
    rand_augment: int = 0
    blur: float = 0.0
    noise: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        upper_limits = {
            "rotation": 180,
            "color": 5 * MAX_HUE_JITTER,
            "rand_augment": NUM_MAGNITUDE_BINS - 1,
            "blur": 100,
        }
        for field in fields(self):
            value, limit = getattr(self, field.name), upper_limits.get(field.name, 1)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= limit:
                raise ConfigError(f"augmentation {field.name} is {value!r}; give a number from 0 to {limit}")
        if self.rand_augment != int(self.rand_augment):
            raise ConfigError(f"augmentation rand_augment is {self.rand_augment}; give a whole number")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Augmentation:
        """From a mapping; the error for an unknown name suggests the nearest one."""
        check_names("augmentation", settings, [field.name for field in fields(cls)])
        return cls(**settings)

    @property
    def is_active(self) -> bool:
        """Whether any augmentation is enabled."""
        return any(asdict(self).values())

    def to_dict(self) -> dict[str, Any]:
        """The enabled augmentations, and the versions of the libraries that determine their results."""
        active_settings = {name: float(value) for name, value in asdict(self).items() if value}
        return {**active_settings, "versions": {name: version(name) for name in ("torch", "torchvision")}}

    def build_transform(self) -> v2.Transform | None:
        """The changes after the crop, for a uint8 image."""
        transforms: list[v2.Transform] = []
        if self.flip:
            transforms.append(v2.RandomHorizontalFlip(self.flip))
        if self.rotation:
            transforms.append(v2.RandomRotation(self.rotation, v2.InterpolationMode.BILINEAR))
        if self.color:
            transforms.append(v2.ColorJitter(self.color, self.color, self.color, self.color / 10))
        if self.rand_augment:
            transforms.append(
                v2.RandAugment(2, int(self.rand_augment), NUM_MAGNITUDE_BINS, v2.InterpolationMode.BILINEAR)
            )
        if self.blur:
            transforms.append(v2.GaussianBlur(2 * round(2 * self.blur) + 1, (min(0.1, self.blur), self.blur)))
        if self.noise:
            transforms.append(v2.GaussianNoise(sigma=self.noise))
        if self.erase:
            transforms.append(v2.RandomErasing(self.erase))
        return v2.Compose(transforms) if transforms else None


@dataclass(frozen=True)
class AugmentedTransform(ImageTransform):
    """A transform with augmentation before the normalization: one view of each image.

    A view depends only on the image, the view number and the seed, so any thread can compute it ahead of time, and it
    can be cached like the result of a transform.

    Parameters
    ----------
    transform : SampleTransform
        The backbone's. A custom transform gets the augmented image.
    augmentation : Augmentation
    view_index : int
    seed : int
    """

    transform: SampleTransform
    augmentation: Augmentation
    view_index: int = 0
    seed: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return image_size(self.transform)

    def __call__(self, image: Tensor) -> Tensor:
        """Image, uint8 of shape (3, H, W) → float32 of shape (3, h, w)."""
        return self.normalize(self.prepare(image))

    def prepare(self, image: Tensor) -> Tensor:
        """The part for a single image, up to the normalization: (3, H, W) → (3, h, w)."""
        if not self.augmentation.is_active:
            return self.transform.prepare(image)
        view_digest = sha256(image.permute(1, 2, 0).contiguous().numpy().data)
        view_digest.update(f"{tuple(image.shape)} {self.seed} {self.view_index}".encode())
        with seeded_random(int.from_bytes(view_digest.digest()[:8], "little")), torch.no_grad():
            return self._augment(image)

    def _augment(self, image: Tensor) -> Tensor:
        base_transform = self.transform
        random_transform = self.augmentation.build_transform()
        size = base_transform.size if isinstance(base_transform, Transform) else tuple(image.shape[-2:])
        if self.augmentation.crop:
            mode = base_transform.interpolation if isinstance(base_transform, Transform) else "bilinear"
            image = v2.RandomResizedCrop(size, (self.augmentation.crop, 1.0), interpolation=mode)(image)
        elif isinstance(base_transform, Transform):
            image = base_transform.prepare(image)
        image = image if random_transform is None else random_transform(image)
        return image if isinstance(base_transform, Transform) else base_transform.prepare(image)

    def normalize(self, batch: Tensor) -> Tensor:
        """The part for a batch."""
        return self.transform.normalize(batch)

    def to_dict(self) -> dict[str, Any]:
        """Everything that determines the result; that of the transform alone without augmentation."""
        transform_dict = self.transform.to_dict()
        if not self.augmentation.is_active:
            return transform_dict
        return {
            **transform_dict,
            "augmentation": self.augmentation.to_dict(),
            "view": self.view_index,
            "seed": self.seed,
        }


class seeded_random(TorchFunctionMode):  # a context manager, used as a function
    """Random numbers from a seed in this thread only; torch's global generator is not touched.

    Examples
    --------
    >>> with seeded_random(7):
    ...     first = torch.rand(3)
    >>> with seeded_random(7):
    ...     bool(torch.equal(torch.rand(3), first))
    True
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed & (2**63 - 1))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.randn_like:  # has no generator in every version
            tensor_options = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            return torch.randn(args[0].shape, generator=self._generator, **tensor_options)
        if function in _RANDOM_FUNCTIONS:
            kwargs.setdefault("generator", self._generator)
        return function(*args, **kwargs)


_RANDOM_FUNCTIONS = {
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    Tensor.uniform_,
    Tensor.normal_,
    Tensor.random_,
    Tensor.bernoulli_,
}


@dataclass(frozen=True, eq=False)
class BatchMix:
    """How the rows of a batch were mixed.

    Attributes
    ----------
    partner : ndarray of shape (b,), int64, or None
        The row that each row was mixed with; None without mixing.
    lam : float
        The share of the row itself.
    """

    partner: NDArray[np.int64] | None = None
    lam: float = 1.0


def apply_mixup_cutmix(inputs: Tensor, tuning: FineTuneConfig) -> tuple[Tensor, BatchMix]:
    """Apply mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), one of them at random if both are on.

    Torch's generator provides the seed.

    Parameters
    ----------
    inputs : Tensor of shape (b, 3, h, w)
    tuning : FineTuneConfig
    """
    if not (tuning.mixup or tuning.cutmix) or len(inputs) < 2:
        return inputs, BatchMix()
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    use_cutmix = bool(tuning.cutmix) and (not tuning.mixup or rng.random() < 0.5)
    alpha = tuning.cutmix if use_cutmix else tuning.mixup
    lam, partner = float(rng.beta(alpha, alpha)), rng.permutation(len(inputs))
    partner_inputs = inputs[torch.from_numpy(partner)]
    if not use_cutmix:
        return inputs * lam + partner_inputs * (1 - lam), BatchMix(partner, lam)
    height, width = inputs.shape[-2:]
    cut_sizes = [round(length * (1 - lam) ** 0.5) for length in (height, width)]
    top, left = (
        int(rng.integers(0, length - cut_length + 1))
        for length, cut_length in zip((height, width), cut_sizes, strict=True)
    )
    window = (..., slice(top, top + cut_sizes[0]), slice(left, left + cut_sizes[1]))
    mixed = inputs.clone()
    mixed[window] = partner_inputs[window]
    return mixed, BatchMix(partner, 1 - cut_sizes[0] * cut_sizes[1] / (height * width))
