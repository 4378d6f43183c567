"""Caches of synthetic embeddings, for tests of class-incremental learning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featpipe import FeatureCache
from featpipe.cache import SPLIT_NAMES, SampleTable, write_cache
from featpipe.data import Labels
from featpipe.storage import StringColumn

D = 8
NAMES = ("ant", "bee", "cow", "dog", "eel", "fox")
CENTRES = dict(zip(NAMES, 2.5 * np.random.default_rng(7).normal(size=(len(NAMES), D)), strict=True))
FACTS = {
    "backbone": {"name": "x", "source": "user", "weights": "0", "transform": {}, "outputs": {"pooled": {}}},
    "precision": "fp32",
    "storage": "float32",
    "extraction": 1,
}


def make_embeddings(labels: Sequence[str], seed: int) -> np.ndarray:
    """Class centres plus noise, shape (n, D)."""
    noise = np.random.default_rng(seed).normal(size=(len(labels), D))
    return (np.stack([CENTRES[name] for name in labels]) + noise).astype(np.float32)


def make_cache_writer(folder: Path) -> Callable[..., FeatureCache]:
    """Make a function that writes caches into a folder.

    Its arguments are numbers of images by class and a seed. Images with the same seed are the same images, even if
    ``called`` gives their classes other names.
    """

    def write(
        counts: dict[str, int],
        seed: int,
        *,
        split: str | None = None,
        called: dict[str, str] | None = None,
        facts: dict[str, Any] = FACTS,
    ) -> FeatureCache:
        labels = [name for name, count in counts.items() for _ in range(count)]
        X, n = make_embeddings(labels, seed), len(labels)
        ids = [f"{seed}-{name}-{i:03}" for i, name in enumerate(labels)]
        digests = np.frombuffer(b"".join(hashlib.sha256(name.encode()).digest() for name in ids), np.uint8)
        table = SampleTable(
            ids=StringColumn.from_strings(ids),
            status=np.zeros(n, np.uint8),
            digests=digests.reshape(n, 32),
            stamps=np.zeros((n, 16), np.uint8),
            split=np.full(n, SPLIT_NAMES.index(split) if split else 0, np.uint8),
            labels=Labels.from_class_names([(called or {}).get(name, name) for name in labels]),
        )
        path = folder / f"{hashlib.sha256(repr((counts, seed, split, called, facts)).encode()).hexdigest()[:12]}.h5"
        manifest = {"facts": facts, "backbone": {"name": "x:y", "outputs": ["pooled"]}}
        write_cache(path, table, manifest, {"pooled": (D,)}, "float32", lambda _, start, stop: X[start:stop])
        return FeatureCache(path)

    return write
