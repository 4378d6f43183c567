"""The harness of faults, started once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Harness, compile_library

MEMORY = "/dev/shm"  # a trial syncs a dozen times, and only what a kill leaves is looked at: no disk is needed


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    library = compile_library(tmp_path_factory.mktemp("library"))
    if library is None:
        pytest.skip("needs Linux and a C compiler")
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        started = Harness(library, Path(folder) / "trials")
        yield started
        started.close()
