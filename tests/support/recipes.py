"""Photographs, networks and changes that make recipes run in seconds."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featpipe.experiments import RunResult
from tests.support.finetuning import Ladder, small_transform
from tests.support.networks import Tiny, tiny_transform

IMAGES_PER_CLASS = 24


def tiny() -> Any:
    return Tiny(), tiny_transform


def other() -> Any:
    return Tiny(7), tiny_transform


def ladder() -> Any:
    return Ladder(), small_transform


RECIPES_MODULE = "tests.support.recipes"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes that are hard to distinguish, and a table of their brightness."""
    folder = tmp_path_factory.mktemp("recipes")
    rng = np.random.default_rng(0)
    rows = [["path", "target"]]
    for number, name in enumerate(("blue", "green", "red")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(IMAGES_PER_CLASS):
            pixels = rng.integers(0, 160, (16, 16, 3))
            pixels[..., 2 - number] += rng.integers(0, 24)
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
            path = folder / "photos" / name / f"{i:02}.png"
            path.write_bytes(file.getvalue())
            os.utime(path, (1e9, 1e9))  # a file that changed just now would be read again
            rows.append([f"{name}/{i:02}.png", str(pixels.mean())])
    with open(folder / "brightness.csv", "w", newline="") as table_file:
        csv.writer(table_file).writerows(rows)
    return folder


def get_measurements(run: RunResult) -> list[Any]:
    """All measurements except times and sizes."""
    return [
        (row.name, row.chosen_settings, row.cross_validated, row.held_out, row.best, row.model_digest)
        for row in run.results
    ]
