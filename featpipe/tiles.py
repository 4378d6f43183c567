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

from featpipe.durable import whole_file
from featpipe.errors import ConfigError
from featpipe.image import encode_png

__all__ = ["CREDITS", "PHOTOGRAPHS", "SIDE", "write_tiles"]

SIDE = 64  # pixels
TILES_A_HALF = 32

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
    archive, table = io.BytesIO(), io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["path", "label", "split"])
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, source in PHOTOGRAPHS.items():
            for half, split in (("left", "train"), ("right", "test")):
                for number, tile in enumerate(_tiles(_photograph(source), half)):
                    path, data = f"{name}/{half}-{number:02}.png", encode_png(tile)
                    member = tarfile.TarInfo(path)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    rows.writerow([path, name, split])
    _write(folder / "tiles.tar", archive.getvalue())
    _write(folder / "tiles.csv", table.getvalue().encode())
    return folder / "tiles.tar", folder / "tiles.csv"


def _photograph(source: str) -> NDArray[np.uint8]:
    """One of the packages' photographs in gray, shape (h, w)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn of their own future
        if source.endswith(".jpg"):
            from sklearn.datasets import load_sample_image

            picture = load_sample_image(source)
        else:
            picture = _of_scikit_image(source)()
    picture = np.asarray(picture[0] if isinstance(picture, tuple) else picture)
    if picture.ndim == 2:
        return picture.astype(np.uint8)
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601 luma
    return np.rint(picture[..., :3] @ weights).astype(np.uint8)


def _of_scikit_image(name: str) -> Callable[[], NDArray[np.uint8]]:
    try:
        from skimage import data
    except ImportError:
        raise ConfigError(
            "the demonstration cuts its tiles from scikit-image's photographs: pip install 'featpipe[demo]'"
        ) from None
    photograph: Callable[[], NDArray[np.uint8]] = getattr(data, name)
    return photograph


def _tiles(photograph: NDArray[np.uint8], half: str) -> Iterator[NDArray[np.uint8]]:
    """Tiles of one half, none of which crosses the middle; evenly spread where there are many."""
    height, width = photograph.shape
    start, stop = (0, width // 2) if half == "left" else (-(-width // 2), width)
    corners = [(y, x) for y in range(0, height - SIDE + 1, SIDE) for x in range(start, stop - SIDE + 1, SIDE)]
    chosen = np.linspace(0, len(corners) - 1, min(len(corners), TILES_A_HALF)).round().astype(int)
    for y, x in (corners[i] for i in chosen):
        gray = photograph[y : y + SIDE, x : x + SIDE]
        yield np.repeat(gray[:, :, None], 3, axis=2)


def _write(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from None
