"""The first and the third stage of a run: which images there are, which are learnt from, and which are held out."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import data, splits
from featpipe.backbones import Backbone
from featpipe.cache import SPLIT_NAMES, FeatureCache
from featpipe.config import ExtractionConfig
from featpipe.data import Index, LabelTable, write_tiles
from featpipe.errors import ConfigError
from featpipe.experiments.grid import make_backbone_label
from featpipe.experiments.recipe.schema import TILES_ARCHIVE, EvaluationConfig, SamplesConfig, SplitConfig
from featpipe.experiments.result import EmbeddingSummary
from featpipe.extraction import extract_index, load_backbone, make_cache_path, make_facts
from featpipe.inference import resolve_devices
from featpipe.runtime import ProgressCallback
from featpipe.splits import find_listed_rows, parse_time
from featpipe.status import Status
from featpipe.storage import atomic_write, compute_fingerprint, digest_arrays
from featpipe.training import EmbeddingDataset, load_training_data

__all__ = [
    "BackboneCaches",
    "TrainTestSplit",
    "digest_training_rows",
    "draw_per_class",
    "extract_backbone",
    "load_index",
    "load_test_index",
    "make_run_cache_path",
    "resolve_archives",
    "select_available_shots",
    "split_cache_rows",
]

logger = logging.getLogger(__name__)


def load_index(samples: SamplesConfig, tiles_folder: Path, where: str) -> Index:
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
    index = _index_archives(samples.archive, samples, tiles_folder)
    if index.labels.task == "none":
        raise ConfigError(
            f"{samples.archive[0]}: has no labels; give labels = TABLE in the recipe, or one folder for each class"
        )
    return index if samples.images is None else index.take(_select_stratified(index, samples.images))


def load_test_index(config: EvaluationConfig, samples: SamplesConfig, tiles_folder: Path) -> Index | None:
    """The images that models are scored on, if these are not held out of the others."""
    if not config.archive:
        return None
    test_samples = SamplesConfig() if config.labels is None else replace(samples, labels=config.labels)
    return _index_archives(config.archive, test_samples, tiles_folder)


def _index_archives(paths: Sequence[str], samples: SamplesConfig, tiles_folder: Path) -> Index:
    archives, labels = resolve_archives(paths, samples, tiles_folder)
    return data.index(archives, labels=labels)


def resolve_archives(
    paths: Sequence[str], samples: SamplesConfig, tiles_folder: Path
) -> tuple[list[str], LabelTable | None]:
    """The archives as files, and the table of their labels; the tiles are written if they are asked for."""
    labels: LabelTable | None = None
    if samples.labels is not None:
        labels = LabelTable(Path(samples.labels), samples.path_column, samples.label_column, samples.task)
    if TILES_ARCHIVE in paths:
        tiles, table = write_tiles(tiles_folder)
        paths, labels = [str(tiles) if path == TILES_ARCHIVE else path for path in paths], labels or LabelTable(table)
    return list(paths), labels


def _select_stratified(index: Index, max_samples: int) -> NDArray[np.int64]:
    """So many labelled samples, ascending: of each class and each side of a split in proportion, by their ids' digests.

    Which they are does not change when others come, and no image is read for it.
    """
    rows = np.flatnonzero(index.labels.known & (index.fault == Status.OK))
    hash_keys = np.array(
        [int.from_bytes(hashlib.sha256(index.ids[row].encode()).digest()[:8]) for row in rows.tolist()]
    )
    values = index.labels.values[rows] if index.labels.task == "classification" else np.zeros(len(rows), np.int64)
    strata = values * len(SPLIT_NAMES) + index.split[rows]
    positions = np.empty(len(rows))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        positions[members[np.argsort(hash_keys[members], kind="stable")]] = (np.arange(len(members)) + 0.5) / len(
            members
        )
    return np.sort(rows[np.argsort(positions, kind="stable")[:max_samples]]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class TrainTestSplit:
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

    training: EmbeddingDataset
    test_cache: FeatureCache
    test_rows: NDArray[np.int64]
    excluded_table: Path | None


def split_cache_rows(
    cache: FeatureCache,
    other_cache: FeatureCache | None,
    output: str | None,
    config: SplitConfig,
    memory: int | None,
    folder: Path,
) -> TrainTestSplit:
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
    rows = load_training_data(
        cache, output, groups=config.groups, times=config.times, without=config.without, memory=memory
    )
    if other_cache is not None or cache.split.any():
        if config.since is not None:
            raise ConfigError(f"since is {config.since!r}, but what is scored is given already; leave since out")
        test_cache = cache if other_cache is None else other_cache
        test_rows = test_cache.usable
        if test_cache.split.any():
            test_rows = test_rows[test_cache.split[test_rows] == SPLIT_NAMES.index("test")]
        excluded_table = None if config.without is None or other_cache is not None else Path(config.without)
        if excluded_table is not None:
            test_rows = np.setdiff1d(test_rows, find_listed_rows(cache, excluded_table))
        return TrainTestSplit(rows, test_cache, _drop_training_images(test_rows, test_cache, rows), excluded_table)
    train_positions, test_positions = _holdout_by_content(cache, rows, config)
    left_out = np.setdiff1d(cache.usable, np.concatenate([rows.rows[train_positions], rows.rows[test_positions]]))
    training = _drop_absent_classes(rows.take(train_positions))
    left_out_table = _write_excluded_table(cache, left_out, folder / "left-out.csv") if len(left_out) else None
    return TrainTestSplit(
        training, cache, _drop_training_images(rows.rows[test_positions], cache, training), left_out_table
    )


def _holdout_by_content(
    cache: FeatureCache, rows: EmbeddingDataset, config: SplitConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    y, class_names = (rows.y, rows.classes) if cache.task == "classification" else (None, None)
    since = None if config.since is None or rows.times is None else parse_time(config.since, rows.times)
    constraints = {"groups": rows.groups, "times": rows.times, "since": since}
    return splits.make_holdout(rows.digests, y, test=config.test, seed=config.seed, names=class_names, **constraints)


def _drop_training_images(
    rows: NDArray[np.int64], cache: FeatureCache, training: EmbeddingDataset
) -> NDArray[np.int64]:
    """Those rows whose bytes are not among the training images."""
    training_digests = {digest.tobytes() for digest in training.digests}
    return rows[[digest.tobytes() not in training_digests for digest in cache.digests[rows]]]


def _drop_absent_classes(rows: EmbeddingDataset) -> EmbeddingDataset:
    """Where time decides, a class may be there only later."""
    if rows.y.ndim != 1 or not np.issubdtype(rows.y.dtype, np.integer):
        return rows
    present, codes = np.unique(rows.y, return_inverse=True)
    return replace(rows, y=codes, classes=tuple(rows.classes[code] for code in present))


def _write_excluded_table(cache: FeatureCache, rows: NDArray[np.int64], path: Path) -> Path:
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path"])
        writer.writerows([cache.ids[row]] for row in rows.tolist())
    return path


def draw_per_class(rows: EmbeddingDataset, n_per_class: int, seed: int) -> EmbeddingDataset:
    """So many rows of each class, those whose images have the smallest keys under a seed."""
    hash_keys = splits.compute_keys(rows.digests, seed)
    rows_by_class = [np.flatnonzero(rows.y == code) for code in range(len(rows.classes))]
    return rows.take(
        np.sort(
            np.concatenate(
                [
                    class_rows[np.argsort(hash_keys[class_rows], kind="stable")[:n_per_class]]
                    for class_rows in rows_by_class
                ]
            )
        )
    )


def select_available_shots(rows: EmbeddingDataset, requested: Sequence[int]) -> list[int]:
    """Those of some numbers that every class has so many images for; a person is told of the others."""
    counts = np.bincount(rows.y, minlength=len(rows.classes))
    min_count = int(counts.min())
    unavailable = [number for number in requested if number > min_count]
    if unavailable:
        name = rows.classes[int(counts.argmin())]
        unavailable_text = " and ".join(map(str, unavailable))
        logger.warning(f"{unavailable_text} per class left out: class {name!r} has {min_count} training images")
    return [number for number in requested if number <= min_count]


def digest_training_rows(rows: EmbeddingDataset) -> str:
    """A digest of what a head is fitted on: which images, which labels, and what keeps them together."""
    constraints = {
        name: None if values is None else [str(value) for value in values]
        for name, values in (("groups", rows.groups), ("times", rows.times))
    }
    y = np.ascontiguousarray(rows.y)
    return compute_fingerprint([digest_arrays([("digests", rows.digests), ("y", y)]), list(rows.classes), constraints])


@dataclass(frozen=True, eq=False)
class BackboneCaches:
    """The embeddings of one backbone.

    Attributes
    ----------
    label : str
    backbone : Backbone
    cache : FeatureCache
    scored : FeatureCache or None
        Of other images, that the models are scored on.
    """

    label: str
    backbone: Backbone
    cache: FeatureCache
    test_cache: FeatureCache | None

    def summarize(self) -> EmbeddingSummary:
        """What is told of it."""
        manifest = self.cache.manifest
        return EmbeddingSummary(
            backbone=self.label,
            cache=self.cache.path,
            scored=self.cache.path if self.test_cache is None else self.test_cache.path,
            fingerprint=self.cache.fingerprint,
            samples=len(self.cache),
            bad=sum(self.cache.bad_rows().values()),
            embedded=manifest.get("embedded"),
            images_per_second=manifest.get("images_per_second") or None,
            network_bytes=_count_bytes(self.backbone.network),
            width=self.backbone.width,
        )


def extract_backbone(
    config: ExtractionConfig, index: Index, test_index: Index | None, max_images: int | None, progress: ProgressCallback
) -> BackboneCaches:
    """The caches of one backbone: from what is known already, and a forward pass for the rest.

    Parameters
    ----------
    settings : Extraction
    index : Index
    scored : Index or None
        Other images, that the models are scored on.
    images : int or None
        So many were taken of the archive.
    tell : callable
    """
    config = replace(config, device=",".join(map(str, resolve_devices(config.device))))
    label = make_backbone_label(config)
    logger.info(f"{label}: {len(index):,} images")
    backbone = load_backbone(config)
    out = make_run_cache_path(index, backbone, config, max_images)
    cache = extract_index(index, backbone, replace(config, out=out), progress)
    test_cache = None if test_index is None else extract_index(test_index, backbone, config, progress)
    return BackboneCaches(label, backbone, cache, test_cache)


def make_run_cache_path(index: Index, backbone: Backbone, config: ExtractionConfig, max_images: int | None) -> Path:
    """Where the cache lies; that of some of the images does not take the place of that of all."""
    path = make_cache_path(index, backbone, make_facts(backbone, config), config)
    return path if max_images is None else path.with_name(f"{path.stem}-{max_images}-images{path.suffix}")


def _count_bytes(network: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
