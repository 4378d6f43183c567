"""Write golden models of one version of the model format, which every later featpipe must open. Run once a version.

``python tests/data/make_golden_models.py tests/data/golden-models-1.2`` creates the folder and refuses one that exists.
The folder gets one model for each head and task, expanded models, and a fine-tuned one. ``answers.npz`` holds what each
model predicted on the day it was written: for the embeddings ``X``, or ``X10`` in the case of the fine-tuned model.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import featpipe
from featpipe import backbones
from featpipe.cache import SampleTable, write_cache
from featpipe.data import Labels
from featpipe.storage import StringColumn

N_ROWS, WIDTH, CLASSES = 60, 8, ("ant", "bee", "cow")
FACTS = {
    "backbone": {"name": "x", "source": "user", "weights": "0", "transform": {}, "outputs": {"pooled": {}}},
    "precision": "fp32",
    "storage": "float32",
    "extraction": 1,
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "logistic": {},
    "logistic-calibrated": {"calibrate": True, "prior": {"ant": 0.5, "bee": 0.3, "cow": 0.2}},
    "mlp": {"params": {"epochs": 5}},
    "linear": {"params": {"epochs": 5}},
    "svm": {},
    "ridge": {},
    "lda": {},
    "knn": {},
    "centroid": {},
    "keras": {"params": {"epochs": 2}},
    "sklearn.naive_bayes.GaussianNB": {},
    "sklearn.neural_network.MLPClassifier": {"params": {"max_iter": 500}},
}
REGRESSORS = ("mlp", "linear", "ridge", "knn")
EXPANDED = (
    ("logistic", "statistics"),
    ("logistic", "frozen-old"),
    ("lda", "statistics"),
    ("logistic", "replay"),
    ("mlp", "distill"),
)


def make_embeddings(seed: int, n_classes: int = len(CLASSES)) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Gaussian blobs: X of shape (N_ROWS, WIDTH), and the class of each row."""
    rng = np.random.default_rng(seed)
    y = np.arange(N_ROWS) % n_classes
    centers = 2.0 * np.random.default_rng(7).normal(size=(6, WIDTH))
    return (centers[y] + rng.normal(size=(N_ROWS, WIDTH))).astype(np.float32), y


def make_cache(path: Path, X: NDArray[np.float32], labels: Labels, seed: int) -> featpipe.FeatureCache:
    n = len(X)
    digests = b"".join(hashlib.sha256(f"{seed}-{i}".encode()).digest() for i in range(n))
    table = SampleTable(
        ids=StringColumn.from_strings(f"{seed}-{i:03}.jpg" for i in range(n)),
        status=np.zeros(n, np.uint8),
        digests=np.frombuffer(digests, np.uint8).reshape(n, 32),
        stamps=np.zeros((n, 16), np.uint8),
        split=np.zeros(n, np.uint8),
        labels=labels,
    )
    manifest = {"facts": FACTS, "backbone": {"name": "x:y", "outputs": ["pooled"]}}
    write_cache(path, table, manifest, {"pooled": (WIDTH,)}, "float32", lambda _, start, stop: X[start:stop])
    return featpipe.FeatureCache(path)


def iter_models(folder: Path) -> Iterator[tuple[str, featpipe.Model]]:
    X, y = make_embeddings(1)
    class_names = [CLASSES[i] for i in y]
    cache = make_cache(folder / "classes.h5", X, Labels.from_class_names(class_names), 1)
    for name, options in CLASSIFIERS.items():
        yield name, featpipe.train(cache, name.removesuffix("-calibrated"), **{"cv": 3, **options})

    label_sets = [[name, "odd"] if i % 2 else [name] for i, name in enumerate(class_names)]
    multilabel_cache = make_cache(folder / "multilabel.h5", X, Labels.from_label_sets(label_sets), 1)
    for name in ("logistic", "mlp", "linear"):
        params = {} if name == "logistic" else {"epochs": 5}
        yield f"{name}-multilabel", featpipe.train(multilabel_cache, name, cv=2, params=params)

    targets = (X[:, :2] @ np.array([[1.0, 0.5], [-0.5, 2.0]])).astype(np.float64)
    regression_cache = make_cache(folder / "regression.h5", X, Labels.from_targets(targets, ["width", "height"]), 1)
    for name in REGRESSORS:
        params = {"epochs": 5} if name in ("mlp", "linear") else {}
        yield f"{name}-regression", featpipe.train(regression_cache, name, cv=2, params=params)

    X, y = make_embeddings(2, 5)
    is_new = y > 2
    new_labels = Labels.from_class_names(["dog" if i == 3 else "eel" for i in y[is_new]])
    new_cache = make_cache(folder / "new.h5", X[is_new], new_labels, 2)
    for head, method in EXPANDED:
        params = {"epochs": 5} if head == "mlp" else {}
        old = featpipe.train(cache, head, cv=3, params=params, keep="statistics,importances,rows=5")
        yield f"{head}-expanded-{method}", featpipe.expand(old, new_cache, method=method).model
    yield "lda-finetuned", make_finetuned_model(folder)


def make_network() -> nn.Module:
    """Three convolutions and global average pooling, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 10, 3, 1, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def resize_and_scale(image: torch.Tensor) -> torch.Tensor:
    """16×16 pixels in [-1, 1]."""
    return nn.functional.interpolate(image[None].float(), (16, 16), mode="area")[0] / 127.5 - 1


def make_finetuned_model(folder: Path) -> featpipe.Model:
    """A model that carries the fine-tuned weights of its small network."""
    backbone = backbones.load(make_network(), transform=resize_and_scale)
    rng = np.random.default_rng(0)
    for label, color in zip(CLASSES, ((150, 90, 90), (90, 150, 90), (90, 90, 150)), strict=True):
        (folder / "photos" / label).mkdir(parents=True)
        for i in range(16):
            pixels = np.clip(np.array(color) + rng.normal(0, 60, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / label / f"{i:02}.png")
    cache = featpipe.extract(folder / "photos", backbone=backbone, cache=folder / "cache")
    model = featpipe.train(cache, "lda", cv=3).attach(backbone)
    options: dict[str, Any] = {"epochs": 2, "batch": 16, "device": "cpu", "unfreeze": "all", "keep_worse": True}
    return featpipe.finetune(model, folder / "photos", cache=folder / "cache", **options).model


def predict_embeddings(model: featpipe.Model, X: NDArray[np.float32]) -> NDArray[np.float64]:
    return model.predict_features(X) if model.task == "regression" else model.predict_proba_features(X)


def write_golden_models(target: Path) -> None:
    target.mkdir()
    X10 = np.random.default_rng(4).normal(size=(20, 10)).astype(np.float32)
    answers: dict[str, NDArray[Any]] = {"X": make_embeddings(3)[0], "X10": X10}
    with tempfile.TemporaryDirectory() as temporary:
        for name, model in iter_models(Path(temporary)):
            model.save(target / f"{name}.model")
            X = answers["X10" if name.endswith("finetuned") else "X"]
            answers[name] = predict_embeddings(featpipe.load_model(target / f"{name}.model", backbone=None), X)
            with contextlib.suppress(featpipe.ConfigError):  # models without novelty scores
                answers[f"{name}/novelty"] = model.novelty_features(X)
    np.savez_compressed(target / "answers.npz", **answers)


if __name__ == "__main__":
    write_golden_models(Path(sys.argv[1]))
