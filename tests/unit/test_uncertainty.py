"""Prediction sets have the requested coverage, novelty is a percentile, and both are stored safely in a model."""

from __future__ import annotations

import csv
import json
import zipfile

import numpy as np
import pytest
from scipy.special import softmax

from featpipe import extract, load_model, predict, train
from featpipe.errors import ConfigError, ModelError
from featpipe.model import ConformalPredictor, NoveltyScorer, Uncertainty, uncertainty


def random_predictions(m, k=6, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, m)
    logits = rng.normal(size=(m, k))
    logits[np.arange(m), y] += 1.5
    return softmax(logits, axis=1), y


@pytest.mark.parametrize("level", [0.7, 0.8, 0.9, 0.97])
def test_prediction_sets_have_the_requested_coverage(level):
    conformal = ConformalPredictor.from_predictions(*random_predictions(3000))
    p, y = random_predictions(20_000, seed=1)
    sets = conformal.predict_sets(p, level)
    assert sets[np.arange(len(y)), y].mean() == pytest.approx(level, abs=0.02)
    assert sets.any(axis=1).all()
    is_covered = sets[np.arange(len(y)), y]
    smaller = conformal.predict_sets(p, level - 0.05)
    assert (smaller <= sets).all()
    assert is_covered.sum() >= smaller[np.arange(len(y)), y].sum()


def test_the_threshold_is_the_conformal_order_statistic():
    p, y = random_predictions(99)
    scores = np.sort(1 - p[np.arange(99), y])
    assert ConformalPredictor.from_predictions(p, y).score_quantile(0.9) == pytest.approx(
        scores[89]
    )  # the 90th of (99 + 1) × 0.9
    assert (
        ConformalPredictor.from_predictions(*random_predictions(5)).predict_sets(p, 0.9).all()
    )  # five rows are too few for a coverage of 0.9


def test_intervals_have_the_requested_coverage_for_each_target():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(4000, 2))
    predicted = y + rng.normal(size=(4000, 2)) * [0.1, 3]
    conformal = ConformalPredictor.from_predictions(predicted[:2000], y[:2000])
    ends = conformal.predict_intervals(predicted[2000:], 0.9)
    is_covered = (ends[..., 0] <= y[2000:]) & (y[2000:] <= ends[..., 1])
    assert is_covered.mean(axis=0) == pytest.approx([0.9, 0.9], abs=0.025)


@pytest.mark.parametrize("level", [0, 1, 1.5, -0.1, float("nan")])
def test_a_level_outside_0_to_1_is_refused(level):
    with pytest.raises(ConfigError, match="a coverage between 0 and 1"):
        ConformalPredictor.from_predictions(*random_predictions(50)).score_quantile(level)


def random_embeddings(m, seed, d=16, shift=0.0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(m, d)) + 4
    X[:, 0] += shift
    return X.astype(np.float32)


def test_novelty_is_uniform_on_the_training_distribution_and_high_outside_it():
    X = random_embeddings(1500, 0)
    novelty = NoveltyScorer.from_embeddings(X, np.arange(800), np.arange(1500))
    in_distribution = novelty(random_embeddings(4000, 1))
    for share in (0.1, 0.5, 0.9, 0.95):
        assert (in_distribution <= share).mean() == pytest.approx(share, abs=0.03)
    assert (novelty(random_embeddings(200, 2, shift=60)) > 0.99).mean() > 0.95
    assert 0 <= in_distribution.min() <= in_distribution.max() < 1


def test_rows_of_one_group_are_not_compared_with_each_other():
    X = np.repeat(random_embeddings(300, 0), 4, axis=0)  # bursts of four
    X += np.random.default_rng(1).normal(0, 1e-3, X.shape).astype(np.float32)
    group = np.repeat(np.arange(300), 4)
    ungrouped = NoveltyScorer.from_embeddings(X, np.arange(1200), np.arange(1200))
    grouped = NoveltyScorer.from_embeddings(X, np.arange(1200), np.column_stack([np.arange(1200), group]))
    new_embeddings = random_embeddings(1000, 5)
    assert ungrouped(new_embeddings).mean() > 0.95
    assert grouped(new_embeddings).mean() == pytest.approx(0.5, abs=0.05)


def test_uncertainty_survives_a_round_trip_to_the_bit():
    original = Uncertainty(
        NoveltyScorer.from_embeddings(random_embeddings(60, 0), np.arange(50), np.arange(60)),
        ConformalPredictor.from_predictions(*random_predictions(40)),
    )
    loaded = uncertainty.loads(uncertainty.dumps(original))
    assert loaded.novelty is not None
    assert loaded.conformal is not None
    np.testing.assert_array_equal(loaded.novelty.references, original.novelty.references)
    np.testing.assert_array_equal(loaded.novelty.distances, original.novelty.distances)
    np.testing.assert_array_equal(loaded.conformal.scores, original.conformal.scores)


def test_invalid_arrays_are_refused():
    from safetensors.numpy import save

    for arrays in (
        {"novelty.rows": np.zeros((2, 2), np.float32)},
        {"novelty.rows": np.full((2, 2), np.nan, np.float16)},
        {"conformal.scores": np.zeros((0,), np.float32)},
        {"conformal.scores": np.zeros((2, 2, 2), np.float32)},
        {"else": np.zeros(3, np.float32)},
    ):
        with pytest.raises(ValueError, match="expected finite values in the type"):
            uncertainty.loads(save(arrays))
    with pytest.raises(ValueError, match="not safetensors"):
        uncertainty.loads(b"\xff" * 64)


@pytest.fixture
def model(tiny, make_folder, tmp_path):
    return train(extract(make_folder(each=8), backbone=tiny, cache=tmp_path / "cache"), cv=2, tune=False).attach(tiny)


def test_a_saved_model_gives_the_same_sets_and_novelty(model, tiny, tmp_path):
    paths = sorted((tmp_path / "photos").rglob("*.jpg"))
    loaded = load_model(model.save(tmp_path / "a.model"), backbone=tiny)
    assert loaded.predict_sets(paths, 0.8) == model.predict_sets(paths, 0.8)
    np.testing.assert_array_equal(loaded.novelty(paths), model.novelty(paths))
    with zipfile.ZipFile(tmp_path / "a.model") as file:
        assert file.getinfo("trust.safetensors").file_size < 10_000
    for label, prediction_set in zip(model.predict(paths), model.predict_sets(paths, 0.8), strict=True):
        assert prediction_set[0] == label


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_predictions_have_columns_for_sets_and_novelty(model, tmp_path, suffix):
    paths = sorted((tmp_path / "photos").rglob("*.jpg"))
    out = tmp_path / f"out{suffix}"
    predict(model, tmp_path / "photos", out, sets=0.9)
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file)) if suffix == ".csv" else [json.loads(line) for line in file]
    assert list(rows[0]) == ["id", "status", "label", "probability", "top", "set", "novelty"]
    sets = [json.loads(row["set"]) if suffix == ".csv" else row["set"] for row in rows]
    assert sets == [list(prediction_set) for prediction_set in model.predict_sets(paths, 0.9)]
    assert [float(row["novelty"]) for row in rows] == pytest.approx(model.novelty(paths), abs=1e-3)


def test_prediction_sets_without_held_out_predictions_are_refused_with_advice(tiny, make_folder, tmp_path):
    cache = extract(make_folder(each=6), backbone=tiny, cache=tmp_path / "cache")
    for trained in (train(cache), train(cache, cv=2, prior={"ape": 0.8})):
        with pytest.raises(ConfigError, match="train with --cv 2 or more and without --prior"):
            predict(trained.attach(tiny), tmp_path / "photos", tmp_path / "out.csv", sets=0.9)
    assert not (tmp_path / "out.csv").exists()


def test_a_damaged_member_is_named(model, tmp_path):
    path = model.save(tmp_path / "a.model")
    data = bytearray(path.read_bytes())
    data[data.index(b"conformal.scores") + 400] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"trust\.safetensors"):
        load_model(path)
