"""Images of a run: listing, extraction, and the split into training and test rows."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from featpipe.splits import parse_time
from featpipe.status import Status
from featpipe.storage import atomic_write
from featpipe.training import EmbeddingDataset, load_training_data

logger = logging.getLogger(__name__)


def load_index(samples: SamplesConfig, tiles_folder: Path, where: str) -> Index:
    """List the samples of a recipe; no image is read.

    Parameters
    ----------
    samples : SamplesConfig
    tiles_folder : Path
        Folder for the built-in tiles, which are written if the recipe uses them.
    where : str
        The recipe, for messages.

    Raises
    ------
    ConfigError
        If no archive is given, or its images have no labels.
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
    """List the test images of ``[evaluation] archive``; None if test rows are held out of the training archive."""
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
    """Return the paths of the archives and their label table; write the built-in tiles if the recipe uses them."""
    labels: LabelTable | None = None
    if samples.labels is not None:
        labels = LabelTable(Path(samples.labels), samples.path_column, samples.label_column, samples.task)
    if TILES_ARCHIVE in paths:
        tiles, table = write_tiles(tiles_folder)
        paths, labels = [str(tiles) if path == TILES_ARCHIVE else path for path in paths], labels or LabelTable(table)
    return list(paths), labels


def _select_stratified(index: Index, max_samples: int) -> NDArray[np.int64]:
    """Select labelled samples with the frequencies of classes and splits, by the digests of their ids; ascending.

    New samples hardly change the selection, and no image is read.
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
    """Training rows of a cache, and test rows of the same or another one, without copies of training samples.

    `excluded_table` lists the rows that are in neither.
    """

    training_rows: NDArray[np.int64]
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
) -> tuple[EmbeddingDataset, TrainTestSplit]:
    """Split the rows of a cache into training and test rows: as the labels mark them, or by the samples' bytes.

    Parameters
    ----------
    cache : FeatureCache
    other_cache : FeatureCache or None
        Other samples to score, instead of a part of `cache`.
    output : str or None
    config : SplitConfig
    memory : int or None
        Bytes that training may use.
    folder : Path
        Folder for the table of excluded rows.

    Returns
    -------
    training : EmbeddingDataset
        The training rows with their embeddings.
    split : TrainTestSplit

    Raises
    ------
    ConfigError
        If no such split is possible.
    """
    dataset = load_training_data(
        cache, output, groups=config.groups, times=config.times, without=config.without, memory=memory
    )
    if other_cache is not None or cache.split.any():
        if config.since is not None:
            raise ConfigError(
                f"[split] since is {config.since!r}, but the labels or [evaluation] archive give the test images; "
                "remove since"
            )
        test_cache = cache if other_cache is None else other_cache
        test = EmbeddingDataset.from_cache(test_cache, split="test").exclude_duplicates_of(dataset)
        excluded_table = None if config.without is None or other_cache is not None else Path(config.without)
        test = test if excluded_table is None else test.without(excluded_table)
        return dataset, TrainTestSplit(dataset.rows, test_cache, test.rows, excluded_table)
    since = None if config.since is None or dataset.times is None else parse_time(config.since, dataset.times)
    train, test = (dataset.take(rows) for rows in dataset.make_holdout(config.test, seed=config.seed, since=since))
    left_out = np.setdiff1d(cache.usable, np.concatenate([train.rows, test.rows]))
    table = _write_excluded_table(cache, left_out, folder / "left-out.csv") if len(left_out) else None
    # with times, a class may have images after the cut alone
    training = train.drop_absent_classes()
    return training, TrainTestSplit(training.rows, cache, test.exclude_duplicates_of(train).rows, table)


def _write_excluded_table(cache: FeatureCache, rows: NDArray[np.int64], path: Path) -> Path:
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path"])
        writer.writerows([cache.ids[row]] for row in rows.tolist())
    return path


def draw_per_class(rows: EmbeddingDataset, n_per_class: int, seed: int) -> EmbeddingDataset:
    """Draw `n_per_class` rows of each class: those with the smallest hash keys under the seed."""
    ranked_rows = np.argsort(splits.compute_keys(rows.digests, seed), kind="stable")
    drawn = [ranked_rows[rows.y[ranked_rows] == code][:n_per_class] for code in range(len(rows.classes))]
    return rows.take(np.sort(np.concatenate(drawn)))


def select_available_shots(rows: EmbeddingDataset, requested: Sequence[int]) -> list[int]:
    """Select the numbers of images that every class has; log a warning about the others."""
    counts = np.bincount(rows.y, minlength=len(rows.classes))
    min_count = int(counts.min())
    unavailable = [number for number in requested if number > min_count]
    if unavailable:
        name = rows.classes[int(counts.argmin())]
        unavailable_text = " and ".join(map(str, unavailable))
        logger.warning(f"{unavailable_text} per class left out: class {name!r} has {min_count} training images")
    return [number for number in requested if number <= min_count]


@dataclass(frozen=True, eq=False)
class BackboneCaches:
    """The embeddings of one backbone; models are scored on `test_cache`, if there is one."""

    label: str
    backbone: Backbone
    cache: FeatureCache
    test_cache: FeatureCache | None

    def summarize(self) -> EmbeddingSummary:
        """Summary for the results."""
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
            network_bytes=sum(tensor.nbytes for tensor in self.backbone.network.state_dict().values()),
            width=self.backbone.width,
        )


def extract_backbone(
    config: ExtractionConfig, index: Index, test_index: Index | None, max_images: int | None, progress: ProgressCallback
) -> BackboneCaches:
    """Extract the caches of one backbone; known embeddings are reused.

    Parameters
    ----------
    config : ExtractionConfig
    index : Index
    test_index : Index or None
        Other images to score the models on.
    max_images : int or None
        Size of the subset of the archive's images.
    progress : callable
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
    """Path of the cache; a cache of a subset has another name than that of all images."""
    path = make_cache_path(index, backbone, make_facts(backbone, config), config)
    return path if max_images is None else path.with_name(f"{path.stem}-{max_images}-images{path.suffix}")
