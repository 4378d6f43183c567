"""An encoded image to its picture: the bits of :mod:`featpipe.data.image`, in less time where it is a colour JPEG.

Pillow decodes a JPEG with the library that torchvision decodes it with, but into four bytes a pixel, which it then
packs into pieces, joins and copies, part of that with the interpreter's lock in its hand. torchvision has the library
write where the picture is to be. So Pillow reads the header, whose size, mode and orientation decide as ever, and
torchvision decodes; what it refuses is given to Pillow, which has the last word on what is damaged.

Notes
-----
The two may be built with different libraries, and torchvision is going to give up decoding (0.29 says so, to who calls
its function; its operator is called here). Whether it is there and agrees is tried once in a process
(:func:`is_exact`); where not, Pillow decodes. What libjpeg remarks about corrupt data, which it decodes all the same,
goes to standard error.
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

__all__ = ["LARGE_IMAGE_BUDGET", "decode_with_torchvision", "decode_within_budget", "is_torchvision_exact"]

LARGE_IMAGE_BUDGET = MemoryBudget()
"""What large pictures may take while they are decoded and worked on, in this process."""

PROBE_SIZES = ((48, 64), (37, 53), (7, 130))  # height and width of the pictures that are tried
RGB_READ_MODE = 3  # torchvision's ImageReadMode.RGB


def decode_with_torchvision(
    data: bytes, limits: ImageLimits = DEFAULT_IMAGE_LIMITS, reserve_memory: Callable[[int], None] | None = None
) -> NDArray[np.uint8]:
    """Decode one image; as :func:`featpipe.data.image.decode_image`, and with its errors."""
    return decode_image(data, limits, _decode_jpeg if is_torchvision_exact() else None, reserve_memory)


@contextlib.contextmanager
def decode_within_budget(data: bytes) -> Iterator[Tensor]:
    """A decoded image, for as long as it is worked on: those that are large wait for each other.

    So many threads need no more memory than there is, whatever pictures they come across.
    """
    with LARGE_IMAGE_BUDGET.reservation() as reserve_memory:
        pixels = decode_with_torchvision(data, reserve_memory=reserve_memory)
        yield torch.from_numpy(pixels).permute(2, 0, 1)


@cache
def is_torchvision_exact() -> bool:
    """Whether torchvision's pixels of JPEGs are those of the Pillow that is installed, tried once in a process."""
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
    """The pixels of a JPEG as they are stored, of shape (h, w, 3); None where torchvision cannot tell them."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns of what cannot be written
    try:
        pixels: NDArray[np.uint8] = torch.ops.image.decode_jpeg(encoded, RGB_READ_MODE, False).permute(1, 2, 0).numpy()
    except (AttributeError, RuntimeError):  # damaged, out of memory, or a torchvision that decodes no JPEG
        return None
    return pixels
