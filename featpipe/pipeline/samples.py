"""The first and the third stage of a run: which images there are, which are learnt from, and which are held out."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featpipe import archive, split
from featpipe.archive import Index, Table
from featpipe.cache import SPLITS, FeatureCache
from featpipe.durable import whole_file
from featpipe.errors import ConfigError
from featpipe.fingerprint import digest_arrays, fingerprint
from featpipe.grouping import moment_of, rows_named
from featpipe.progress import Progress, Tell
from featpipe.recipe import TILES, Evaluation, Samples, Split
from featpipe.status import Status
from featpipe.tiles import write_tiles
from featpipe.training import Rows, training_rows

__all__ = ["Divided", "divided", "drawn", "identity_of", "index_of", "places_of", "scored_index_of", "tell_short"]


def index_of(samples: Samples, folder: Path, where: str) -> Index:
    """The samples of a recipe, listed and ordered; no image is read.

    Parameters
    ----------
    samples : Samples
    folder : Path
        Where the tiles are written, if these are the archive.
    where : str
        The recipe, for messages.

    Raises
    ------
    ConfigError
        If no archive is named, or nothing is known of its images.
    """
    if not samples.archive:
        raise ConfigError(f"{where}: names no archive; give one, as in `featpipe run {Path(where).stem} photos/`")
    index = _listed(samples.archive, samples, folder)
    if index.labels.task == "none":
        raise ConfigError(
            f"{samples.archive[0]}: has no labels; give labels = TABLE in the recipe, or one folder for each class"
        )
    return index if samples.images is None else index.take(_some(index, samples.images))


def scored_index_of(evaluation: Evaluation, samples: Samples, folder: Path) -> Index | None:
    """The images that models are scored on, if these are not held out of the others."""
    if not evaluation.archive:
        return None
    asked = Samples() if evaluation.labels is None else replace(samples, labels=evaluation.labels)
    return _listed(evaluation.archive, asked, folder)


def _listed(paths: Sequence[str], samples: Samples, folder: Path) -> Index:
    places, labels = places_of(paths, samples, folder)
    return archive.index(places, labels=labels)


def places_of(paths: Sequence[str], samples: Samples, folder: Path) -> tuple[list[str], Table | None]:
    """The archives as files, and the table of their labels; the tiles are written if they are asked for."""
    labels: Table | None = None
    if samples.labels is not None:
        labels = Table(Path(samples.labels), samples.path_column, samples.label_column, samples.task)  # type: ignore[arg-type]
    if TILES in paths:
        tiles, table = write_tiles(folder)
        paths, labels = [str(tiles) if path == TILES else path for path in paths], labels or Table(table)
    return list(paths), labels


def _some(index: Index, most: int) -> NDArray[np.int64]:
    """So many labelled samples, ascending: of each class and each side of a split in proportion, by their ids' digests.

    Which they are does not change when others come, and no image is read for it.
    """
    rows = np.flatnonzero(index.labels.known & (index.fault == Status.OK))
    keys = np.array([int.from_bytes(hashlib.sha256(index.ids[row].encode()).digest()[:8]) for row in rows.tolist()])
    values = index.labels.values[rows] if index.labels.task == "classification" else np.zeros(len(rows), np.int64)
    kind = values * len(SPLITS) + index.split[rows]
    within = np.empty(len(rows))
    for code in np.unique(kind):
        own = np.flatnonzero(kind == code)
        within[own[np.argsort(keys[own], kind="stable")]] = (np.arange(len(own)) + 0.5) / len(own)
    return np.sort(rows[np.argsort(within, kind="stable")[:most]]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Divided:
    """The rows of a cache, on their sides.

    Attributes
    ----------
    training : Rows
    scored : FeatureCache
        That the models are scored on; the same cache, or one of other images.
    held : ndarray of shape (m,), int64
        Rows of it that none of the training images is among.
    without : Path or None
        A table of the rows that are on neither side.
    """

    training: Rows
    scored: FeatureCache
    held: NDArray[np.int64]
    without: Path | None


def divided(
    cache: FeatureCache, other: FeatureCache | None, output: str | None, asked: Split, memory: int | None, folder: Path
) -> Divided:
    """Divide the rows of a cache: as the labels say, or by what the images are.

    Parameters
    ----------
    cache : FeatureCache
    other : FeatureCache or None
        Other images to score.
    output : str or None
    asked : Split
    memory : int or None
        Bytes that training may use.
    folder : Path
        Where a table of the rows on neither side is written.

    Raises
    ------
    ConfigError
        If no such split is possible.
    """
    rows = training_rows(cache, output, groups=asked.groups, times=asked.times, without=asked.without, memory=memory)
    if other is not None or cache.split.any():
        if asked.since is not None:
            raise ConfigError(f"since is {asked.since!r}, but what is scored is given already; leave since out")
        scored = cache if other is None else other
        usable = scored.usable
        if scored.split.any():
            usable = usable[scored.split[usable] == SPLITS.index("test")]
        without = None if asked.without is None or other is not None else Path(asked.without)
        if without is not None:
            usable = np.setdiff1d(usable, rows_named(cache, without))
        return Divided(rows, scored, _unseen(usable, scored, rows), without)
    fit, held = _by_content(cache, rows, asked)
    neither = np.setdiff1d(cache.usable, np.concatenate([rows.rows[fit], rows.rows[held]]))
    training = _of_present_classes(rows.take(fit))
    table = _written(cache, neither, folder / "left-out.csv") if len(neither) else None
    return Divided(training, cache, _unseen(rows.rows[held], cache, training), table)


def _by_content(cache: FeatureCache, rows: Rows, asked: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    y, names = (rows.y, rows.classes) if cache.task == "classification" else (None, None)
    since = None if asked.since is None or rows.times is None else moment_of(asked.since, rows.times)
    kept = {"groups": rows.groups, "times": rows.times, "since": since}
    return split.holdout(rows.digests, y, test=asked.test, seed=asked.seed, names=names, **kept)


def _unseen(rows: NDArray[np.int64], cache: FeatureCache, training: Rows) -> NDArray[np.int64]:
    """Those rows whose bytes are not among the training images."""
    seen = {digest.tobytes() for digest in training.digests}
    return rows[[digest.tobytes() not in seen for digest in cache.digests[rows]]]


def _of_present_classes(rows: Rows) -> Rows:
    """Where time decides, a class may be there only later."""
    if rows.y.ndim != 1 or not np.issubdtype(rows.y.dtype, np.integer):
        return rows
    present, codes = np.unique(rows.y, return_inverse=True)
    return replace(rows, y=codes, classes=tuple(rows.classes[code] for code in present))


def _written(cache: FeatureCache, rows: NDArray[np.int64], path: Path) -> Path:
    with whole_file(path, text=True) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path"])
        table.writerows([cache.ids[row]] for row in rows.tolist())
    return path


def drawn(rows: Rows, each: int, seed: int) -> Rows:
    """So many rows of each class, those whose images have the smallest keys under a seed."""
    keys = split.key(rows.digests, seed)
    chosen = [np.flatnonzero(rows.y == code) for code in range(len(rows.classes))]
    return rows.take(np.sort(np.concatenate([own[np.argsort(keys[own], kind="stable")[:each]] for own in chosen])))


def tell_short(rows: Rows, wanted: Sequence[int], tell: Tell) -> list[int]:
    """Those of some numbers that every class has so many images for; a person is told of the others."""
    counts = np.bincount(rows.y, minlength=len(rows.classes))
    least = int(counts.min())
    short = [number for number in wanted if number > least]
    if short:
        name = rows.classes[int(counts.argmin())]
        numbers = " and ".join(map(str, short))
        tell(Progress("warning", f"{numbers} per class left out: class {name!r} has {least} training images"))
    return [number for number in wanted if number <= least]


def identity_of(rows: Rows) -> str:
    """A digest of what a head is fitted on: which images, which labels, and what keeps them together."""
    beside = {
        name: None if values is None else [str(value) for value in values]
        for name, values in (("groups", rows.groups), ("times", rows.times))
    }
    y = np.ascontiguousarray(rows.y)
    return fingerprint([digest_arrays([("digests", rows.digests), ("y", y)]), list(rows.classes), beside])
