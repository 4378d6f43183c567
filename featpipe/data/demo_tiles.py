"""The demonstration's images: tiles of real photographs that come with scikit-image and scikit-learn.

The photographs are those packages' own (see ``CREDITS``); nothing is downloaded. Each is cut into gray tiles, so that
colour does not give a photograph away; tiles of its left half are for training, tiles of its right half for testing.
"""

from __future__ import annotations

import csv
import io
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featpipe.data.image import encode_png
from featpipe.errors import ConfigError
from featpipe.storage import atomic_write

__all__ = ["CREDITS", "PHOTOGRAPHS", "TILE_SIZE", "write_tiles"]

TILE_SIZE = 64  # pixels
TILES_PER_HALF = 32

PHOTOGRAPHS = {  # class → function of skimage.data, or file of sklearn.datasets
    "astronaut": "astronaut",
    "brick": "brick",
    "camera": "camera",
    "cat": "chelsea",
    "cell": "cell",
    "coffee": "coffee",
    "coins": "coins",
    "flower": "flower.jpg",
    "galaxies": "hubble_deep_field",
    "grass": "grass",
    "gravel": "gravel",
    "histology": "immunohistochemistry",
    "moon": "moon",
    "motorcycle": "stereo_motorcycle",
    "palace": "china.jpg",
    "retina": "retina",
    "rocket": "rocket",
}
CREDITS = "Photographs: the sample images of scikit-image and scikit-learn, under the licences given there."


def write_tiles(folder: Path) -> tuple[Path, Path]:
    """Write the tiles as an archive and a table of labels with a split.

    Files that are there with the same content are left alone.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    archive, table : Path
        ``tiles.tar`` with a folder for each class, and ``tiles.csv`` with the columns path, label and split.

    Raises
    ------
    ConfigError
        If scikit-image is not installed.
    """
    archive_buffer, table_buffer = io.BytesIO(), io.StringIO()
    csv_writer = csv.writer(table_buffer, lineterminator="\n")
    csv_writer.writerow(["path", "label", "split"])
    with tarfile.open(fileobj=archive_buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, source in PHOTOGRAPHS.items():
            for half, split in (("left", "train"), ("right", "test")):
                for tile_number, tile in enumerate(_iter_tiles(_load_photograph(source), half)):
                    path, png_bytes = f"{name}/{half}-{tile_number:02}.png", encode_png(tile)
                    member = tarfile.TarInfo(path)
                    member.size = len(png_bytes)
                    tar.addfile(member, io.BytesIO(png_bytes))
                    csv_writer.writerow([path, name, split])
    _write_if_changed(folder / "tiles.tar", archive_buffer.getvalue())
    _write_if_changed(folder / "tiles.csv", table_buffer.getvalue().encode())
    return folder / "tiles.tar", folder / "tiles.csv"


def _load_photograph(source: str) -> NDArray[np.uint8]:
    """One of the packages' photographs in gray, shape (h, w)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn of their own future
        if source.endswith(".jpg"):
            from sklearn.datasets import load_sample_image

            photograph = load_sample_image(source)
        else:
            photograph = _get_skimage_loader(source)()
    photograph = np.asarray(photograph[0] if isinstance(photograph, tuple) else photograph)
    if photograph.ndim == 2:
        return photograph.astype(np.uint8)
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma
    return np.rint(photograph[..., :3] @ weights).astype(np.uint8)


def _get_skimage_loader(name: str) -> Callable[[], NDArray[np.uint8]]:
    try:
        from skimage import data
    except ImportError:
        raise ConfigError(
            "the demonstration cuts its tiles from scikit-image's photographs: pip install 'featpipe[demo]'"
        ) from None
    load_photograph: Callable[[], NDArray[np.uint8]] = getattr(data, name)
    return load_photograph


def _iter_tiles(photograph: NDArray[np.uint8], half: str) -> Iterator[NDArray[np.uint8]]:
    """Tiles of one half, none of which crosses the middle; evenly spread where there are many."""
    height, width = photograph.shape
    start, stop = (0, width // 2) if half == "left" else (-(-width // 2), width)
    corners = [
        (y, x)
        for y in range(0, height - TILE_SIZE + 1, TILE_SIZE)
        for x in range(start, stop - TILE_SIZE + 1, TILE_SIZE)
    ]
    selected = np.linspace(0, len(corners) - 1, min(len(corners), TILES_PER_HALF)).round().astype(int)
    for y, x in (corners[i] for i in selected):
        gray = photograph[y : y + TILE_SIZE, x : x + TILE_SIZE]
        yield np.repeat(gray[:, :, None], 3, axis=2)


def _write_if_changed(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from None
