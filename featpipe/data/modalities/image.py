"""The modality ``image``: an item is a uint8 tensor of shape (3, H, W), upright RGB on white, channels last in memory.

Pillow and torch are imported when an image is decoded or made, so that reading a cache needs neither.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from featpipe.data.modalities.modality import Modality
from featpipe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

DECODED_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff")
UNDECODED_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".ico", ".tga", ".exr", ".hdr"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".dcm", ".cr2", ".nef", ".arw", ".dng"),
)

PROBE_LEVELS = ((0, 256), (0, 48), (176, 256))  # lowest level, and highest plus one
PROBE_SIZE = (256, 320)
SYNTHETIC_SIZE = (375, 500)  # height and width; common in published datasets of photographs


def _decode(data: bytes) -> AbstractContextManager[Tensor]:
    from featpipe.data.jpeg import decode_within_budget

    return decode_within_budget(data)


def _to_item(image: Any) -> Tensor:
    import torch

    from featpipe.data.image import to_rgb

    return torch.from_numpy(to_rgb(image)).permute(2, 0, 1)


def _to_list(images: Any) -> list[Any]:
    """Convert a sequence of images, an array or column of paths, or a stack of pixel arrays to a list."""
    advice = "images must be a list, for one image [image]"
    if getattr(images, "ndim", 1) == 2 and getattr(images, "shape", (0, 0))[1] == 1:
        images = images.iloc[:, 0] if hasattr(images, "iloc") else images[:, 0]
    if isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, Mapping, Set)) or hasattr(images, "columns"):
        raise ConfigError(f"got a {type(images).__name__}; {advice}; for a whole archive: featpipe predict")
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OUS":
        is_single_image = images.ndim < 3 or (images.ndim == 3 and images.shape[2] in (3, 4))
        if is_single_image:
            raise ConfigError(f"got an array of shape {images.shape}; {advice}, or a stack of shape (n, h, w, 3)")
    if not hasattr(images, "__len__") or not hasattr(images, "__iter__"):
        raise ConfigError(f"got a {type(images).__name__}; {advice}; for a whole archive: featpipe predict")
    if not len(images):
        raise ConfigError("there are no images: an empty list, 0 sample(s)")
    return list(images)


def _make_probes() -> Sequence[Tensor]:
    """Make noise images of very different brightness and contrast, so that batch and image statistics differ."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(low, high, (3, *PROBE_SIZE), dtype=torch.uint8, generator=generator) for low, high in PROBE_LEVELS
    ]


def _make_encoded_images() -> tuple[list[bytes], str]:
    """JPEGs of about 70 kB: smooth shapes with grain."""
    from featpipe.data.image import encode_thumbnail, resize_image

    rng = np.random.default_rng(0)
    images = []
    for _ in range(32):
        smooth = resize_image(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), *SYNTHETIC_SIZE, "bicubic")
        grainy = np.clip(smooth + rng.normal(0, 12, (*SYNTHETIC_SIZE, 3)), 0, 255).astype(np.uint8)
        images.append(encode_thumbnail(grainy, max(SYNTHETIC_SIZE)))
    return images, "made-up JPEGs"


def _encode_preview(data: bytes, size: int) -> bytes:
    from featpipe.data.image import encode_preview

    return encode_preview(data, size)


IMAGE = Modality(
    name="image",
    decoded_suffixes=DECODED_SUFFIXES,
    suffixes=frozenset(DECODED_SUFFIXES + UNDECODED_SUFFIXES),
    decode=_decode,
    to_item=_to_item,
    to_list=_to_list,
    make_probes=_make_probes,
    encode_preview=_encode_preview,
    make_encoded_samples=_make_encoded_images,
)
