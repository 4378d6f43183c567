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

import featpipe
from tests.support.finetuning import Ladder, small_transform
from tests.support.networks import Tiny, tiny_transform

EACH = 24


def tiny() -> Any:
    return Tiny(), tiny_transform


def other() -> Any:
    return Tiny(7), tiny_transform


def ladder() -> Any:
    return Ladder(), small_transform


HERE = "tests.support.recipes"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours that are hard to distinguish, in folders, and a table of each image's brightness."""
    folder = tmp_path_factory.mktemp("recipes")
    rng = np.random.default_rng(0)
    rows = [["path", "target"]]
    for number, name in enumerate(("blue", "green", "red")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(EACH):
            pixels = rng.integers(0, 160, (16, 16, 3))
            pixels[..., 2 - number] += rng.integers(0, 24)
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
            (folder / "photos" / name / f"{i:02}.png").write_bytes(file.getvalue())
            os.utime(folder / "photos" / name / f"{i:02}.png", (1e9, 1e9))  # a new file is read twice
            rows.append([f"{name}/{i:02}.png", str(pixels.mean())])
    with open(folder / "brightness.csv", "w", newline="") as out:
        csv.writer(out).writerows(rows)
    return folder


def numbers(run: featpipe.experiments.Run) -> list[Any]:
    """All measurements except times and sizes."""
    return [
        (row.name, row.chosen_settings, row.cross_validated, row.held_out, row.best, row.model_digest)
        for row in run.results
    ]
