"""Images of the demonstration: tiles of the sample photographs in scikit-image and scikit-learn.

The photographs are part of these packages (see ``CREDITS``); nothing is downloaded. Each photograph is cut into
grayscale tiles, so that colour alone does not identify it. Tiles of the left half are for training, tiles of the right
half for testing.
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

    Existing files with the same content are not rewritten.

    Parameters
    ----------
    folder : Path
        Output folder.

    Returns
    -------
    archive, table : Path
        ``tiles.tar`` with one folder per class, and ``tiles.csv`` with the columns path, label and split.

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
    """Load a sample photograph as grayscale, shape (h, w)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the packages
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
    """Yield tiles of one half; no tile crosses the middle, and at most `TILES_PER_HALF` are spread evenly."""
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
