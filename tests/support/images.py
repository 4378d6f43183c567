"""Synthetic photographs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A smooth random image: magnified noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def jpeg(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    file = io.BytesIO()
    picture(seed, size).save(file, "JPEG", quality=92)
    return file.getvalue()
