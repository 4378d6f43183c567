"""Views of pictures: random changes that are the same whenever they are asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2

from featpipe.backbone import CustomTransform, Transform
from featpipe.errors import ConfigError
from featpipe.names import check_names

__all__ = ["Augmentation", "View", "drawn"]

JITTER_MAX_HUE = 0.5  # torchvision's; half of the circle of colours is all of it
MAGNITUDES = 31  # of RandAugment, from 0


@dataclass(frozen=True)
class Augmentation:
    """How pictures are changed while a network is trained; nothing, if not said otherwise.

    Parameters
    ----------
    crop : float
        Take a part of the picture of at least this share of its area, of an aspect ratio from 3/4 to 4/3, in place of
        the transform's own crop; 0 is without. 0.08 is usual on ImageNet, 0.5 and more for few images.
    flip : float
        The share of pictures that are mirrored, left to right.
    rotation : float
        Degrees, at most, to either side.
    color : float
        The most by which brightness, contrast and saturation are changed, as a share; hue by a tenth of that.
    rand_augment : int
        Strength of two operations chosen at random (Cubuk et al. 2019), from 1 to 30; 0 is without, 9 is usual.
    blur : float
        The largest sigma of a Gaussian blur, in pixels.
    noise : float
        Standard deviation of noise on each number of a picture in [0, 1].
    erase : float
        The share of pictures of which a rectangle is covered (Zhong et al. 2017).
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
        most = {"rotation": 180, "color": 5 * JITTER_MAX_HUE, "rand_augment": MAGNITUDES - 1, "blur": 100}
        for field in fields(self):
            value, high = getattr(self, field.name), most.get(field.name, 1)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
                raise ConfigError(f"augmentation {field.name} is {value!r}; give a number from 0 to {high}")
        if self.rand_augment != int(self.rand_augment):
            raise ConfigError(f"augmentation rand_augment is {self.rand_augment}; give a whole number")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Augmentation:
        """From a mapping; an unknown name is answered with the nearest."""
        check_names("augmentation", settings, [field.name for field in fields(cls)])
        return cls(**settings)

    @property
    def changes(self) -> bool:
        """Whether there is any."""
        return any(asdict(self).values())

    def facts(self) -> dict[str, Any]:
        """What decides the result, as JSON can hold it; torchvision and torch decide too."""
        given = {name: float(value) for name, value in asdict(self).items() if value}
        return {**given, "versions": {name: version(name) for name in ("torch", "torchvision")}}

    def steps(self) -> v2.Transform | None:
        """What is done after the crop, to a picture of uint8."""
        steps: list[v2.Transform] = []
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.rotation:
            steps.append(v2.RandomRotation(self.rotation, v2.InterpolationMode.BILINEAR))
        if self.color:
            steps.append(v2.ColorJitter(self.color, self.color, self.color, self.color / 10))
        if self.rand_augment:
            steps.append(v2.RandAugment(2, int(self.rand_augment), MAGNITUDES, v2.InterpolationMode.BILINEAR))
        if self.blur:
            steps.append(v2.GaussianBlur(2 * round(2 * self.blur) + 1, (min(0.1, self.blur), self.blur)))
        if self.noise:
            steps.append(v2.GaussianNoise(sigma=self.noise))
        if self.erase:
            steps.append(v2.RandomErasing(self.erase))
        return v2.Compose(steps) if steps else None


@dataclass(frozen=True)
class View:
    """A transform with an augmentation before what is arithmetic in it: one view of each picture.

    A view is a function of the picture, its number and the seed, and of nothing else: computed in the loop or ahead of
    it, by any thread, on another day, it is the same. It has the face of a transform, and so can be cached.

    Parameters
    ----------
    transform : Transform or CustomTransform
        The backbone's. One of a user's own is given the changed picture whole.
    augmentation : Augmentation
    number : int
    seed : int
    """

    transform: Transform | CustomTransform
    augmentation: Augmentation
    number: int = 0
    seed: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return self.transform.size

    def __call__(self, image: Tensor) -> Tensor:
        """A picture, uint8 of shape (3, H, W) → float32 of shape (3, h, w)."""
        return self.normalise(self.picture(image))

    def picture(self, image: Tensor) -> Tensor:
        """What is each picture's own: (3, H, W) → (3, h, w)."""
        if not self.augmentation.changes:
            return self.transform.picture(image)
        pixels = sha256(image.permute(1, 2, 0).contiguous().numpy().data)
        pixels.update(f"{tuple(image.shape)} {self.seed} {self.number}".encode())
        with drawn(int.from_bytes(pixels.digest()[:8], "little")), torch.no_grad():
            return self._changed(image)

    def _changed(self, image: Tensor) -> Tensor:
        own = self.transform
        steps = self.augmentation.steps()
        size = own.size if isinstance(own, Transform) else tuple(image.shape[-2:])
        if self.augmentation.crop:
            mode = own.interpolation if isinstance(own, Transform) else "bilinear"
            image = v2.RandomResizedCrop(size, (self.augmentation.crop, 1.0), interpolation=mode)(image)
        elif isinstance(own, Transform):
            image = own.picture(image)
        image = image if steps is None else steps(image)
        return image if isinstance(own, Transform) else own.picture(image)

    def normalise(self, batch: Tensor) -> Tensor:
        """The arithmetic part, of a batch."""
        return self.transform.normalise(batch)

    def facts(self) -> dict[str, Any]:
        """What decides the result, as JSON can hold it; without augmentation, the transform's own."""
        facts = self.transform.facts()
        if not self.augmentation.changes:
            return facts
        return {**facts, "augmentation": self.augmentation.facts(), "view": self.number, "seed": self.seed}


class drawn(TorchFunctionMode):  # a context manager, used as a function
    """Random numbers from a seed, in this thread alone; the generator that all threads share is not touched.

    Examples
    --------
    >>> with drawn(7):
    ...     one = torch.rand(3)
    >>> with drawn(7):
    ...     bool(torch.equal(torch.rand(3), one))
    True
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed & (2**63 - 1))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.randn_like:  # has no generator in every version
            like = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            return torch.randn(args[0].shape, generator=self._generator, **like)
        if function in _RANDOM:
            kwargs.setdefault("generator", self._generator)
        return function(*args, **kwargs)


_RANDOM = {
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    Tensor.uniform_,
    Tensor.normal_,
    Tensor.random_,
    Tensor.bernoulli_,
}
