"""Fixed preprocessing that belongs to the weights: an item of a modality → network input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from featpipe.backbones.resize import embedding_bag
from featpipe.backbones.resize.embedding_bag import ResizeAxis
from featpipe.config import unknown_name_error
from featpipe.errors import ConfigError, SampleError
from featpipe.status import Status

CropMode = Literal["center", "squash", "border"]

MAX_RESIZED_PIXELS = 1 << 26  # of a resized image: a strip of 1 × 20,000 would otherwise become 4 GB


@runtime_checkable
class SampleTransform(Protocol):
    """The interface of a backbone's transform, for any modality.

    Attributes
    ----------
    modality : str
        Key of `featpipe.data.MODALITIES`; it defines the type of an item.
    input_shape : tuple of int
        Shape of one sample as network input.
    input_dtype : torch.dtype
        Floating-point input is cast to the precision of the engine; integer input is not.
    """

    @property
    def modality(self) -> str: ...
    @property
    def input_shape(self) -> tuple[int, ...]: ...
    @property
    def input_dtype(self) -> torch.dtype: ...

    def __call__(self, item: Any, /) -> Tensor:
        """Transform one item to network input."""

    def prepare(self, item: Any, /) -> Tensor:
        """Apply the per-item part, in a worker thread."""

    def collate(self, prepared: Sequence[Tensor], /) -> Tensor:
        """Collate prepared items to a batch; the first axis is the batch axis."""

    def normalize(self, batch: Tensor, /) -> Tensor:
        """Apply the per-batch part, on the device of the batch."""

    def to_dict(self) -> dict[str, Any]:
        """The parameters that determine the result."""


def example_batch(
    transform: SampleTransform, n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Make a batch of n zero samples, for tracing and counting; integer input keeps its dtype."""
    input_dtype = dtype if transform.input_dtype.is_floating_point else transform.input_dtype
    return torch.zeros(n, *transform.input_shape, dtype=input_dtype, device=device)


class ImageTransform:
    """The common part of image transforms."""

    modality: ClassVar[str] = "image"
    input_dtype: ClassVar[torch.dtype] = torch.float32
    size: Any  # (h, w) of the network input

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of the network input: (3, h, w)."""
        height, width = self.size
        return 3, height, width

    def collate(self, prepared: Sequence[Tensor]) -> Tensor:
        """Stack images of shape (3, h, w) to a tensor of shape (b, 3, h, w), channels last in memory."""
        shape = (len(prepared), *prepared[0].shape[1:], 3)
        images = torch.empty(shape, dtype=prepared[0].dtype).permute(0, 3, 1, 2)
        for destination, image in zip(images, prepared, strict=True):
            destination.copy_(image)
        return images


def image_size(transform: SampleTransform) -> tuple[int, int]:
    """Height and width of the network input; raises ConfigError if the samples are not images."""
    if not isinstance(transform, ImageTransform):
        raise ConfigError(f"the backbone embeds {transform.modality} samples; fine-tuning and stages need images")
    height, width = transform.size
    return height, width


@dataclass(frozen=True)
class Transform(ImageTransform):
    """Resize, crop, scale to [0, 1] and normalise.

    Parameters
    ----------
    resize : int or (int, int) or None
        Pixels. One number: length of the shorter side. Two numbers: height and width, see ``mode``. None: no resizing.
    crop : (int, int)
        Height and width of the centre crop; smaller images are padded.
    interpolation : {"bilinear", "bicubic"}
    mean, std : tuple of 3 float
        For the channels R, G, B in [0, 1].
    mode : {"center", "squash", "border"}
        Used if ``resize`` has two numbers. ``center`` keeps the aspect ratio and covers the rectangle, ``squash``
        resizes to exactly that shape, and ``border`` keeps the aspect ratio, fits the image within the rectangle and
        pads it with the mean colour.

    Notes
    -----
    Resizing is bit-identical to Pillow's, with antialiasing: published weights were trained and evaluated with Pillow.
    Interpolation of floating-point tensors differs from Pillow by one level in one value of six, which changes an
    embedding by up to 4e-4 in cosine.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    mode: CropMode = "center"

    def __post_init__(self) -> None:
        if self.interpolation not in ("bilinear", "bicubic"):
            raise unknown_name_error("interpolation", self.interpolation, ("bilinear", "bicubic"))
        if self.mode not in ("center", "squash", "border"):
            raise unknown_name_error("crop mode", self.mode, ("center", "squash", "border"))
        if self.mode != "center" and not isinstance(self.resize, tuple):
            raise ConfigError(f"crop mode {self.mode!r} needs a height and a width to resize to, got {self.resize}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network input."""
        return self.crop

    def __call__(self, image: Tensor) -> Tensor:
        """Apply the whole transform.

        Parameters
        ----------
        image : Tensor of shape (3, H, W), uint8
            In any memory layout; channels last in memory is the fastest.

        Returns
        -------
        Tensor of shape (3, h, w), float32

        Raises
        ------
        SampleError
            If the resized image would exceed `MAX_RESIZED_PIXELS` because of an extreme aspect ratio.
        """
        return self.normalize(self.prepare(image))

    def prepare(self, image: Tensor) -> Tensor:
        """Resize and crop: uint8 of shape (3, H, W) → uint8 of shape (3, h, w)."""
        vertical, horizontal = self.resize_axes(*image.shape[-2:])
        return self.pad_to_crop(_resize_image(image, vertical, horizontal, self.interpolation))

    def resize_axes(self, height: int, width: int) -> tuple[ResizeAxis, ResizeAxis]:
        """Compute how the vertical and the horizontal axis of an image of this size are resized and cropped.

        Raises
        ------
        SampleError
            If the resized image would exceed `MAX_RESIZED_PIXELS` because of an extreme aspect ratio.
        """
        resized_size = self._compute_resized_size(height, width)
        if resized_size[0] * resized_size[1] > MAX_RESIZED_PIXELS:
            raise SampleError(
                f"too long and thin: {height} × {width} pixels would be resized to "
                f"{resized_size[0]} × {resized_size[1]}, expected at most {MAX_RESIZED_PIXELS:,} pixels in total",
                status=Status.TOO_LARGE,
            )
        return (
            _center_crop_axis(height, resized_size[0], self.crop[0]),
            _center_crop_axis(width, resized_size[1], self.crop[1]),
        )

    def pad_to_crop(self, images: Tensor) -> Tensor:
        """Pad resized and cropped images, (…, 3, h, w), to the size of the crop."""
        padding = [
            target_size - image_size for target_size, image_size in zip(self.crop, images.shape[-2:], strict=True)
        ]
        if not any(padding):
            return images
        fill = [round(255 * value) for value in self.mean] if self.mode == "border" else [0, 0, 0]
        (top, left), (bottom, right) = [n // 2 for n in padding], [(n + 1) // 2 for n in padding]
        borders = (left, right, top, bottom)
        channels = [pad(c, borders, value=value) for c, value in zip(images.unbind(-3), fill, strict=True)]
        return torch.stack(channels, dim=-3)

    def normalize(self, batch: Tensor) -> Tensor:
        """Scale and normalise: uint8 of shape (…, 3, h, w) → float32 of the same shape."""
        mean, std = _mean_and_std(self.mean, self.std, batch.device)
        channels_last = batch.movedim(-3, -1)
        if not channels_last.is_contiguous():
            return batch.to(torch.float32).div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])
        mean, std = (value.repeat(batch.shape[-1]) for value in (mean, std))  # whole rows are three times as fast
        values = channels_last.flatten(-2).to(torch.float32).div_(255).sub_(mean).div_(std)
        return values.unflatten(-1, (-1, 3)).movedim(-1, -3)

    def to_dict(self) -> dict[str, Any]:
        """The parameters that determine the result."""
        return {
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "crop": list(self.crop),
            "mode": self.mode,
            "interpolation": self.interpolation,
            "resampling": "pillow",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def _compute_resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing; the rounding is that of the library that published the weights."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, int):
            longer_side = int(self.resize * max(height, width) / min(height, width))
            return (self.resize, longer_side) if height <= width else (longer_side, self.resize)
        if self.mode == "squash":
            return self.resize
        ratios = height / self.resize[0], width / self.resize[1]
        ratio = max(ratios) if self.mode == "border" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))


@lru_cache(16)  # on a GPU each copy would synchronize with all pending work
def _mean_and_std(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def _center_crop_axis(source_size: int, resized_size: int, crop: int) -> ResizeAxis:
    crop_length = min(resized_size, crop)
    return ResizeAxis(source_size, resized_size, round((resized_size - crop_length) / 2), crop_length)


def _resize_image(image: Tensor, vertical: ResizeAxis, horizontal: ResizeAxis, interpolation: str) -> Tensor:
    if (vertical.source_size, horizontal.source_size) == (vertical.resized_size, horizontal.resized_size):
        return image[:, vertical.crop_slice, horizontal.crop_slice]
    return embedding_bag.resize(image, vertical, horizontal, interpolation)


@dataclass(frozen=True)
class CustomTransform(ImageTransform):
    """A user-defined image transform, validated on construction.

    Its identity consists of its source code and of its results for a few fixed images, so that parameters outside the
    source code are detected too.

    Parameters
    ----------
    function : callable
        uint8 Tensor of shape (3, H, W) → float Tensor of shape (3, h, w), the same h and w for every image.

    Raises
    ------
    ConfigError
        If the result has another type or shape, the function is random, or its source code cannot be found.
    """

    function: Callable[[Tensor], Tensor]
    size: tuple[int, int] = field(init=False)
    answers: str = field(init=False)
    code: str = field(init=False)

    def __post_init__(self) -> None:
        images = [_make_noise_image(*size, seed) for seed, size in enumerate([(480, 640), (333, 250), (64, 64)])]
        results = [self.function(image.clone()) for image in images]
        for image, result in zip(images, results, strict=True):
            self._check_result(image, result, results[0])
            if not torch.equal(result, self.function(image.clone())):
                raise ConfigError(
                    f"transform {_qualified_name(self.function)} is random: two calls for one image differ"
                )
        object.__setattr__(self, "size", tuple(results[0].shape[1:]))
        data = b"".join(result.to(torch.float32).contiguous().numpy().tobytes() for result in results)
        object.__setattr__(self, "answers", sha256(data).hexdigest())
        object.__setattr__(self, "code", hash_source(self.function))

    def __call__(self, image: Tensor) -> Tensor:
        result = self.function(image)
        if result.shape != (3, *self.size):
            raise ConfigError(
                f"transform {_qualified_name(self.function)} returned shape {tuple(result.shape)} for an image of "
                f"{tuple(image.shape)}, expected {(3, *self.size)} as for other images"
            )
        return result

    def prepare(self, image: Tensor) -> Tensor:
        """Apply the whole transform: a user's function cannot be split."""
        return self(image)

    def normalize(self, batch: Tensor) -> Tensor:
        """Return the batch unchanged: `prepare` applies the whole transform."""
        return batch

    def to_dict(self) -> dict[str, Any]:
        """The parameters that determine the result."""
        return {
            "name": _qualified_name(self.function),
            "code": self.code,
            "answers": self.answers,
            "size": list(self.size),
        }

    def _check_result(self, image: Tensor, result: object, first: Tensor) -> None:
        is_float_image = isinstance(result, Tensor) and result.ndim == 3 and result.is_floating_point()
        if not (is_float_image and isinstance(result, Tensor) and result.shape == (3, *first.shape[1:])):
            result_text = (
                f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            )
            raise ConfigError(
                f"transform {_qualified_name(self.function)} returned {result_text} "
                f"for a uint8 tensor of {tuple(image.shape)}; "
                "expected a float tensor (3, h, w), the same h and w for every image"
            )


def hash_source(target: object) -> str:
    """Compute the SHA-256 of the source of a function or of an object's class: of the whole file if there is one."""
    owner = target if inspect.isroutine(target) or inspect.isclass(target) else type(target)
    try:
        file = inspect.getsourcefile(owner)
        if file is not None and not file.startswith("<"):
            with open(file, "rb") as handle:
                return sha256(handle.read()).hexdigest()
    except (OSError, TypeError):
        pass
    try:  # a notebook cell has source but no file
        return sha256(inspect.getsource(owner).encode()).hexdigest()
    except (OSError, TypeError):
        raise ConfigError(
            f"the source code of {_qualified_name(target)} cannot be found, but identifies its embeddings; "
            "define it in a file"
        ) from None


def _qualified_name(target: object) -> str:
    owner = target if hasattr(target, "__qualname__") else type(target)
    return f"{owner.__module__}:{owner.__qualname__}"


def _make_noise_image(height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
