"""Fine-tuning starts with the model's own predictions, for any head."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import featpipe
from featpipe import backbones, heads
from featpipe.data import decode_image
from featpipe.finetuning.batches import EmbeddingNetwork
from featpipe.finetuning.head_layers import HeadLayers, head_to_layers, initialize_head, layers_to_head
from featpipe.metrics import Calibration, format_note
from tests.support.finetuning import Ladder, small_transform, write_photos


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Photos, and tables that label them with two classes, several labels or a number."""
    home = tmp_path_factory.mktemp("head_layers")
    photos = write_photos(home / "photos")
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    labels = {
        "two": ("label", [name[0] in "ab" for name in names]),
        "several": ("labels", [";".join(c for c in ("abc"[i % 3], "xy"[i % 2])) for i in range(len(names))]),
        "number": ("target", [0.5 + 100 * i for i in range(len(names))]),
    }
    for table, (column, values) in labels.items():
        with open(home / f"{table}.csv", "w") as file:
            csv.writer(file).writerows([["path", column], *zip(names, values, strict=True)])
    return home


@pytest.fixture(scope="module")
def ladder():
    return backbones.load(Ladder(), transform=small_transform)


def extract_cache(home: Path, ladder, labels: str | None = None) -> featpipe.FeatureCache:
    table = None if labels is None else home / f"{labels}.csv"
    return featpipe.extract(home / "photos", backbone=ladder, labels=table, cache=home / "cache")


def predict_with_initial_layers(model: featpipe.Model, cache: featpipe.FeatureCache, paths: list[Path]) -> torch.Tensor:
    """Predictions of the network with its initial layers, before the first training step."""
    rows = cache.usable
    y = cache.label_table.take(rows).values
    initial_head = initialize_head(model, np.asarray(cache.X), y[:, 0] if model.task == "regression" else y)
    network = model.backbone.network
    embedding = EmbeddingNetwork(network, model.backbone.outputs[0])
    images = torch.stack([model.backbone.transform(read_pixels(path)) for path in paths])
    with torch.no_grad():
        scores = initial_head.layers.to_module().eval()(embedding(images))
    if model.task == "regression":
        return scores * torch.tensor(initial_head.target_std) + torch.tensor(initial_head.target_mean)
    return scores.sigmoid() if model.task == "multilabel" else scores.softmax(dim=1)


def read_pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(decode_image(path.read_bytes())).permute(2, 0, 1)


CONVERTIBLE_HEADS = ("logistic", "linear", "mlp", "ridge", "lda", "svm", "centroid", "keras")


@pytest.mark.parametrize("labels", [None, "two"])
@pytest.mark.parametrize("head", [*CONVERTIBLE_HEADS, "sklearn.linear_model.LogisticRegression"])
def test_the_initial_layers_predict_as_the_model(home, ladder, head, labels):
    cache = extract_cache(home, ladder, labels)
    model = featpipe.train(cache, head, params={"epochs": 3} if head in ("mlp", "keras", "linear") else {})
    model.attach(ladder)
    paths = sorted((home / "photos").rglob("*.png"))[::4]
    layers = predict_with_initial_layers(model, cache, paths)
    assert np.abs(layers.numpy() - model.predict_proba(paths)).max() < 1e-4


@pytest.mark.parametrize("head", ["logistic", "linear", "mlp"])
def test_the_initial_layers_predict_as_a_multilabel_model(home, ladder, head):
    cache = extract_cache(home, ladder, "several")
    model = featpipe.train(cache, head).attach(ladder)
    paths = sorted((home / "photos").rglob("*.png"))[::4]
    assert np.abs(predict_with_initial_layers(model, cache, paths).numpy() - model.predict_proba(paths)).max() < 1e-4


@pytest.mark.parametrize("head", ["ridge", "linear", "mlp"])
def test_the_initial_layers_predict_as_a_regression_model(home, ladder, head):
    cache = extract_cache(home, ladder, "number")
    model = featpipe.train(cache, head).attach(ladder)
    paths = sorted((home / "photos").rglob("*.png"))[::4]
    layers = predict_with_initial_layers(model, cache, paths).numpy()[:, 0]
    assert np.abs(layers - model.predict(paths)).max() < 1e-4 * np.std(cache.y)


def test_temperature_and_prior_correction_are_folded_into_the_layers(home, ladder):
    cache = extract_cache(home, ladder)
    model = featpipe.train(cache, "logistic", cv=2, calibrate=True, prior={"ape": 0.7}).attach(ladder)
    assert model.calibration.temperature != 1
    assert len(model.calibration.offsets) == 3
    paths = sorted((home / "photos").rglob("*.png"))[::4]
    assert np.abs(predict_with_initial_layers(model, cache, paths).numpy() - model.predict_proba(paths)).max() < 1e-4


@pytest.mark.parametrize("labels", [None, "number"])
def test_a_nearest_neighbour_head_is_replaced_by_a_fitted_linear_head(home, ladder, labels):
    cache = extract_cache(home, ladder, labels)
    model = featpipe.train(cache, "knn").attach(ladder)
    y = cache.label_table.values if labels is None else cache.y
    initial_head = initialize_head(model, np.asarray(cache.X), y)
    name = "logistic" if labels is None else "ridge"
    assert (
        format_note(initial_head.note)
        == f"the layer starts as a {name} head fitted on the embeddings: knn cannot become a layer"
    )
    linear_head = heads.build(name, model.task).fit(np.asarray(cache.X), y)
    layers = initial_head.to_target_units(initial_head.layers)
    expected = linear_head.predict(cache.X) if labels else linear_head.decision_function(cache.X)
    scores = cache.X @ layers.weights[0].T + layers.biases[0]
    if labels is None:
        expected = expected - expected.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(scores.squeeze(), expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("task", ["classification", "regression", "multilabel"])
@pytest.mark.parametrize("widths", [(7, 3), (7, 2), (7, 5, 4, 3)])
def test_a_head_made_of_layers_predicts_the_same_after_saving(task, widths):
    rng = np.random.default_rng(0)
    pairs = list(pairwise(widths))
    weights = tuple(rng.normal(size=(fan_out, fan_in)) for fan_in, fan_out in pairs)
    layers = HeadLayers(weights, tuple(rng.normal(size=fan_out) for _, fan_out in pairs), "gelu", 0.2)
    name, pipeline = layers_to_head(layers, task)
    assert name == ("linear" if len(widths) == 2 else "mlp")
    restored = heads.loads(heads.dumps(pipeline))
    X = rng.normal(size=(6, 7)).astype(np.float32)
    with torch.no_grad():
        scores = layers.to_module().eval()(torch.from_numpy(X))
    link = {"classification": lambda s: s.softmax(dim=1), "multilabel": torch.sigmoid, "regression": lambda s: s}[task]
    predictions = restored.predict(X) if task == "regression" else restored.predict_proba(X)
    np.testing.assert_allclose(predictions, link(scores).numpy(), atol=1e-5)


def test_outputs_in_target_units_undo_the_scaling_of_targets():
    layers = HeadLayers((np.array([[2.0, 1.0]]),), (np.array([3.0]),))
    scaled = layers.fold_output_scaling(1 / 4.0, -5 / 4.0)
    np.testing.assert_allclose(scaled.fold_output_scaling(4.0, 5.0).weights[0], layers.weights[0])
    np.testing.assert_allclose(scaled.fold_output_scaling(4.0, 5.0).biases[0], layers.biases[0])


def test_a_scaler_without_mean_or_without_std_is_folded_into_the_layers():
    rng = np.random.default_rng(1)
    X, y = rng.normal(2, 3, (60, 5)).astype(np.float32), np.arange(60) % 3
    for settings in ({"scale__with_mean": False}, {"scale__with_std": False}, {"scale": "passthrough"}):
        pipeline = heads.build("lda", params=settings).fit(X, y)
        layers = head_to_layers(pipeline, "classification", Calibration(temperature=2.0), 5)
        scores = X @ layers.weights[0].T + layers.biases[0]
        expected = pipeline.decision_function(X) / 2
        np.testing.assert_allclose(scores, expected - expected.mean(axis=1, keepdims=True), atol=1e-4)
