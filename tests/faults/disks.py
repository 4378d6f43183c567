"""Full disks and limits on file sizes."""

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
    """Make every write beyond this file size fail, including writes by libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "256k") -> Iterator[Path]:
    """Mount a new disk of this size; skip the test if that is not possible."""
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "featpipe-test", str(folder)], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("needs the mount command")
    if mounted.returncode:
        pytest.skip("needs the permission to mount a disk")
    try:
        yield folder
    finally:
        gc.collect()  # releases mapped files
        subprocess.run(["umount", "-l", str(folder)], check=True)
