"""Disks that are full."""

from __future__ import annotations

import contextlib
import gc
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["files_of_at_most", "small_disk"]


@contextlib.contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Every write beyond this size fails, those of libraries too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "256k") -> Iterator[Path]:
    """A new disk of this size, where one may mount it."""
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "featpipe-test", str(folder)], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip("may not mount a small disk")
    try:
        yield folder
    finally:
        gc.collect()  # what is mapped of it
        subprocess.run(["umount", "-l", str(folder)], check=True)
