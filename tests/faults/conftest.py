"""The fault harness, started once for all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Harness, compile_library

MEMORY_FOLDER = "/dev/shm"  # a trial syncs a dozen times, and only the state after a kill matters: no disk is needed


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    library = compile_library(tmp_path_factory.mktemp("library"))
    if library is None:
        pytest.skip("needs Linux and a C compiler")
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None) as folder:
        fault_harness = Harness(library, Path(folder) / "trials")
        yield fault_harness
        fault_harness.close()
