"""Whether products on a GPU may be computed in TF32, which is a setting of the whole process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["tf32"]


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """TF32 exactly where it is asked for, whatever the process had set, and as it was afterwards."""
    settings: list[tuple[Any, bool]] = [
        (torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32),
        (torch.backends.cudnn, torch.backends.cudnn.allow_tf32),
    ]
    for place, _ in settings:
        place.allow_tf32 = allowed
    try:
        yield
    finally:
        for place, before in settings:
            place.allow_tf32 = before
