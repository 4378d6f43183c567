"""Caches with known content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from featpipe.cache import (
    SPLIT_NAMES,
    FeatureCache,
    SampleTable,
    write_cache,
)
from featpipe.data import Labels
from featpipe.storage import StringColumn

SHAPES = {"pooled": (5,), "layer2": (3, 2, 2)}


def make_facts(storage: str = "float32", shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, object]:
    outputs = {name: {"node": name, "pool": "none"} for name in shapes or SHAPES}
    backbone = {"name": "net", "source": "user", "weights": "0" * 64, "transform": {}, "outputs": outputs}
    return {"backbone": backbone, "precision": "fp32", "storage": storage, "extraction": 1}


class CacheContent:
    """The content of a cache, with the labels as plain Python values for comparison."""

    def __init__(self, n: int = 40, task: str = "classification", storage: str = "float32", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.storage, self.task = n, storage, task
        self.ids = [f"{'ab/é'[i % 4]}/{i}" for i in range(n)]
        self.status = np.where(rng.random(n) < 0.3, rng.integers(1, 10, n), 0).astype(np.uint8)
        self.features = {name: rng.normal(size=(n, *shape)).astype(storage) for name, shape in SHAPES.items()}
        for values in self.features.values():
            values[self.status != 0] = np.nan
        self.digests = rng.integers(0, 256, (n, 32), np.uint8)
        self.stamps = rng.integers(0, 256, (n, 16), np.uint8)
        self.split = rng.integers(0, len(SPLIT_NAMES), n, np.uint8)
        self.is_labeled = rng.random(n) < 0.7
        self.raw_labels = self._make_labels(rng)
        if task == "none":
            self.is_labeled[:] = True

    def _make_labels(self, rng: np.random.Generator) -> list[object]:
        label_values: list[object] = {
            "classification": lambda: rng.choice(["cow", "ape", "bee"], self.n).tolist(),
            "multilabel": lambda: [set(rng.choice(["x", "y", "z"], rng.integers(0, 4))) for _ in range(self.n)],
            "regression": lambda: rng.normal(size=(self.n, 2)).tolist(),
            "none": lambda: [None] * self.n,
        }[self.task]()
        missing_label = [np.nan, np.nan] if self.task == "regression" else None
        return [
            value if is_labeled else missing_label
            for value, is_labeled in zip(label_values, self.is_labeled, strict=True)
        ]

    @property
    def labels(self) -> Labels:
        return {
            "classification": Labels.from_class_names,
            "multilabel": Labels.from_label_sets,
            "regression": lambda raw_labels: Labels.from_targets(raw_labels, ("height", "width")),
            "none": lambda raw_labels: Labels.unlabeled(len(raw_labels)),
        }[self.task](self.raw_labels)

    @property
    def table(self) -> SampleTable:
        return SampleTable(
            StringColumn.from_strings(self.ids), self.status, self.digests, self.stamps, self.split, self.labels
        )

    def gather(self, output: str, start: int, stop: int) -> np.ndarray:
        return self.features[output][start:stop]

    def write(self, path: Path, gather=None) -> FeatureCache:
        manifest = {"facts": make_facts(self.storage), "created": "today"}
        write_cache(path, self.table, manifest, SHAPES, self.storage, gather or self.gather)
        return FeatureCache(path)


def has_content(path: Path, content: CacheContent) -> bool:
    cache = FeatureCache(path)
    return (
        list(cache.ids) == content.ids
        and np.array_equal(cache.status_codes, content.status)
        and np.array_equal(cache.digests, content.digests)
        and np.array_equal(cache.stamps, content.stamps)
        and np.array_equal(cache.split, content.split)
        and cache.label_table.same_as(content.labels)
        and all(np.array_equal(cache.features(name), content.features[name], equal_nan=True) for name in SHAPES)
    )


def edit_dataset(path: Path, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Change the bytes of a dataset without HDF5, as a failing disk does."""
    with h5py.File(path) as file:
        dataset = file[name]
        offset, dtype, shape = dataset.id.get_offset(), dataset.dtype, dataset.shape
    column = np.memmap(path, dtype, "r+", offset, shape)
    edit(column)
    column.flush()


def flip_bit(path: Path, name: str, offset: int) -> None:
    def edit(column: np.ndarray) -> None:
        column.reshape(-1).view(np.uint8)[offset] ^= 1

    edit_dataset(path, name, edit)
