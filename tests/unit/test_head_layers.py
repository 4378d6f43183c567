"""Fine-tuning starts at the model's own answers, whatever its head is."""

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
from featpipe.metrics import Calibration
from tests.support.finetuning import Ladder, small_transform, write_photos


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Photographs, and tables that give them two classes, several labels, one number and two."""
    place = tmp_path_factory.mktemp("start")
    photos = write_photos(place / "photos")
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    labels = {
        "two": ("label", [name[0] in "ab" for name in names]),
        "several": ("labels", [";".join(c for c in ("abc"[i % 3], "xy"[i % 2])) for i in range(len(names))]),
        "number": ("target", [0.5 + 100 * i for i in range(len(names))]),
    }
    for table, (column, values) in labels.items():
        with open(place / f"{table}.csv", "w") as file:
            csv.writer(file).writerows([["path", column], *zip(names, values, strict=True)])
    return place


@pytest.fixture(scope="module")
def ladder():
    return backbones.load(Ladder(), transform=small_transform)


def extract_cache(place: Path, ladder, labels: str | None = None) -> featpipe.FeatureCache:
    table = None if labels is None else place / f"{labels}.csv"
    return featpipe.extract(place / "photos", backbone=ladder, labels=table, cache=place / "cache")


def first_answers(model: featpipe.Model, cache: featpipe.FeatureCache, paths: list[Path]) -> torch.Tensor:
    """What the network with its new layer says of pictures before the first step."""
    rows = cache.usable
    y = cache.label_table.take(rows).values
    start = initialize_head(model, np.asarray(cache.X), y[:, 0] if model.task == "regression" else y)
    network = model.backbone.network
    embedding = EmbeddingNetwork(network, model.backbone.outputs[0])
    images = torch.stack([model.backbone.transform(pixels(path)) for path in paths])
    with torch.no_grad():
        scores = start.layers.to_module().eval()(embedding(images))
    if model.task == "regression":
        return scores * torch.tensor(start.target_std) + torch.tensor(start.target_mean)
    return scores.sigmoid() if model.task == "multilabel" else scores.softmax(dim=1)


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(decode_image(path.read_bytes())).permute(2, 0, 1)


LINEAR = ("logistic", "linear", "mlp", "ridge", "lda", "svm", "centroid", "keras")


@pytest.mark.parametrize("labels", [None, "two"])
@pytest.mark.parametrize("head", [*LINEAR, "sklearn.linear_model.LogisticRegression"])
def test_the_initial_layers_predict_as_the_model(place, ladder, head, labels):
    cache = extract_cache(place, ladder, labels)
    model = featpipe.train(cache, head, params={"epochs": 3} if head in ("mlp", "keras", "linear") else {})
    model.attach(ladder)
    paths = sorted((place / "photos").rglob("*.png"))[::4]
    layers = first_answers(model, cache, paths)
    assert np.abs(layers.numpy() - model.predict_proba(paths)).max() < 1e-4


@pytest.mark.parametrize("head", ["logistic", "linear", "mlp"])
def test_the_initial_layers_predict_as_a_multilabel_model(place, ladder, head):
    cache = extract_cache(place, ladder, "several")
    model = featpipe.train(cache, head).attach(ladder)
    paths = sorted((place / "photos").rglob("*.png"))[::4]
    assert np.abs(first_answers(model, cache, paths).numpy() - model.predict_proba(paths)).max() < 1e-4


@pytest.mark.parametrize("head", ["ridge", "linear", "mlp"])
def test_the_initial_layers_predict_as_a_regression_model(place, ladder, head):
    cache = extract_cache(place, ladder, "number")
    model = featpipe.train(cache, head).attach(ladder)
    paths = sorted((place / "photos").rglob("*.png"))[::4]
    layers = first_answers(model, cache, paths).numpy()[:, 0]
    assert np.abs(layers - model.predict(paths)).max() < 1e-4 * np.std(cache.y)


def test_temperature_and_prior_correction_are_folded_into_the_layers(place, ladder):
    cache = extract_cache(place, ladder)
    model = featpipe.train(cache, "logistic", cv=2, calibrate=True, prior={"ape": 0.7}).attach(ladder)
    assert model.calibration.temperature != 1
    assert len(model.calibration.offsets) == 3
    paths = sorted((place / "photos").rglob("*.png"))[::4]
    assert np.abs(first_answers(model, cache, paths).numpy() - model.predict_proba(paths)).max() < 1e-4


@pytest.mark.parametrize("labels", [None, "number"])
def test_a_nearest_neighbour_head_is_replaced_by_a_fitted_linear_head(place, ladder, labels):
    cache = extract_cache(place, ladder, labels)
    model = featpipe.train(cache, "knn").attach(ladder)
    y = cache.label_table.values if labels is None else cache.y
    start = initialize_head(model, np.asarray(cache.X), y)
    name = "logistic" if labels is None else "ridge"
    assert (
        start.description == f"the layer starts as a {name} head fitted on the embeddings: knn is not a network layer"
    )
    own = heads.build(name, model.task).fit(np.asarray(cache.X), y)
    layers = start.to_target_units(start.layers)
    answers = own.predict(cache.X) if labels else own.decision_function(cache.X)
    found = cache.X @ layers.weights[0].T + layers.biases[0]
    if labels is None:
        answers = answers - answers.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found.squeeze(), answers, atol=1e-3 * np.abs(answers).max())


@pytest.mark.parametrize("task", ["classification", "regression", "multilabel"])
@pytest.mark.parametrize("widths", [(7, 3), (7, 2), (7, 5, 4, 3)])
def test_layers_become_a_head_that_is_saved_and_predicts_the_same(task, widths):
    random = np.random.default_rng(0)
    pairs = list(pairwise(widths))
    weights = tuple(random.normal(size=(fan_out, fan_in)) for fan_in, fan_out in pairs)
    layers = HeadLayers(weights, tuple(random.normal(size=fan_out) for _, fan_out in pairs), "gelu", 0.2)
    name, pipeline = layers_to_head(layers, task)
    assert name == ("linear" if len(widths) == 2 else "mlp")
    again = heads.loads(heads.dumps(pipeline))
    X = random.normal(size=(6, 7)).astype(np.float32)
    with torch.no_grad():
        scores = layers.to_module().eval()(torch.from_numpy(X))
    link = {"classification": lambda s: s.softmax(dim=1), "multilabel": torch.sigmoid, "regression": lambda s: s}[task]
    answers = again.predict(X) if task == "regression" else again.predict_proba(X)
    np.testing.assert_allclose(answers, link(scores).numpy(), atol=1e-5)


def test_the_scale_of_targets_is_undone():
    layers = HeadLayers((np.array([[2.0, 1.0]]),), (np.array([3.0]),))
    within = layers.fold_output_scaling(1 / 4.0, -5 / 4.0)
    np.testing.assert_allclose(within.fold_output_scaling(4.0, 5.0).weights[0], layers.weights[0])
    np.testing.assert_allclose(within.fold_output_scaling(4.0, 5.0).biases[0], layers.biases[0])


def test_a_scaler_that_does_not_scale_or_not_centre_is_folded_too():
    random = np.random.default_rng(1)
    X, y = random.normal(2, 3, (60, 5)).astype(np.float32), np.arange(60) % 3
    for settings in ({"scale__with_mean": False}, {"scale__with_std": False}, {"scale": "passthrough"}):
        pipeline = heads.build("lda", params=settings).fit(X, y)
        layers = head_to_layers(pipeline, "classification", Calibration(temperature=2.0), 5)
        scores = X @ layers.weights[0].T + layers.biases[0]
        wanted = pipeline.decision_function(X) / 2
        np.testing.assert_allclose(scores, wanted - wanted.mean(axis=1, keepdims=True), atol=1e-4)
