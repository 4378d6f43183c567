"""Decode colour JPEGs with torchvision: the same bits as :mod:`featpipe.data.image`, in less time.

Pillow and torchvision decode JPEGs with the same library. Pillow decodes to four bytes per pixel, then packs, joins and
copies them, partly while it holds the GIL. torchvision lets the library write into the final tensor. Therefore Pillow
reads the header (size, mode and orientation) and torchvision decodes. If torchvision fails, Pillow decodes and decides
whether the image is damaged.

Notes
-----
Pillow and torchvision may be built with different libraries, and torchvision is deprecating its decoders (since 0.29
the public function warns; this module calls the operator). :func:`is_torchvision_exact` checks once per process
whether the operator exists and gives the same bits; otherwise Pillow decodes. libjpeg writes warnings about corrupt
data that it can still decode to standard error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featpipe.data.image import DEFAULT_IMAGE_LIMITS, ImageLimits, decode_image, encode_jpeg, resize_image
from featpipe.runtime import MemoryBudget

LARGE_IMAGE_BUDGET = MemoryBudget()
"""Memory budget of this process for decoding and transforming large images."""

PROBE_SIZES = ((48, 64), (37, 53), (7, 130))  # height and width of the test images
RGB_READ_MODE = 3  # torchvision's ImageReadMode.RGB


def decode_with_torchvision(
    data: bytes, limits: ImageLimits = DEFAULT_IMAGE_LIMITS, reserve_memory: Callable[[int], None] | None = None
) -> NDArray[np.uint8]:
    """Decode one image, like :func:`featpipe.data.image.decode_image` and with the same errors."""
    return decode_image(data, limits, _decode_jpeg if is_torchvision_exact() else None, reserve_memory)


@contextlib.contextmanager
def decode_within_budget(data: bytes) -> Iterator[Tensor]:
    """Decode an image and hold its share of the memory budget until the context exits.

    Large images wait for each other, so that the memory of many threads is bounded for any mix of image sizes.

    Yields
    ------
    Tensor of shape (3, h, w), uint8
    """
    with LARGE_IMAGE_BUDGET.reservation() as reserve_memory:
        pixels = decode_with_torchvision(data, reserve_memory=reserve_memory)
        yield torch.from_numpy(pixels).permute(2, 0, 1)


@cache
def is_torchvision_exact() -> bool:
    """Whether torchvision decodes JPEGs to the same pixels as the installed Pillow; checked once per process."""
    with contextlib.suppress(ImportError):
        import torchvision.io  # noqa: F401  # registers the operator

    rng = np.random.default_rng(0)
    for height, width in PROBE_SIZES:
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture[: height // 2] = resize_image(picture[:4, :4], height // 2, width, "bicubic")
        for subsampling in (0, 1, 2):
            for progressive in (False, True):
                data = encode_jpeg(picture, subsampling=subsampling, progressive=progressive)
                decoded = _decode_jpeg(data)
                if decoded is None or not np.array_equal(decoded, decode_image(data)):
                    return False
    return True


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Decode the pixels of a JPEG as stored, shape (h, w, 3); None if torchvision cannot decode it."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns about read-only buffers
    try:
        pixels: NDArray[np.uint8] = torch.ops.image.decode_jpeg(encoded, RGB_READ_MODE, False).permute(1, 2, 0).numpy()
    except (AttributeError, RuntimeError):  # damaged, out of memory, or a torchvision that decodes no JPEG
        return None
    return pixels
