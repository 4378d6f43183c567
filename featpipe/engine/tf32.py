"""Whether products on a GPU may be computed in TF32, which is a setting of the whole process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["allow_tf32"]


@contextlib.contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """TF32 exactly where it is asked for, whatever the process had set, and as it was afterwards."""
    settings: list[tuple[Any, bool]] = [
        (torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32),
        (torch.backends.cudnn, torch.backends.cudnn.allow_tf32),
    ]
    for backend, _ in settings:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, previous in settings:
            backend.allow_tf32 = previous
