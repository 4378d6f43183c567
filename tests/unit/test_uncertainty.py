"""Sets hold the right answer as often as they say, novelty reads as a share, and both are kept safely in the model."""

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


def answers(m, k=6, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, m)
    logits = rng.normal(size=(m, k))
    logits[np.arange(m), y] += 1.5
    return softmax(logits, axis=1), y


@pytest.mark.parametrize("level", [0.7, 0.8, 0.9, 0.97])
def test_sets_hold_the_right_class_as_often_as_is_asked(level):
    conformal = ConformalPredictor.from_predictions(*answers(3000))
    p, y = answers(20_000, seed=1)
    sets = conformal.predict_sets(p, level)
    assert sets[np.arange(len(y)), y].mean() == pytest.approx(level, abs=0.02)
    assert sets.any(axis=1).all()
    right = sets[np.arange(len(y)), y]
    smaller = conformal.predict_sets(p, level - 0.05)
    assert (smaller <= sets).all()
    assert right.sum() >= smaller[np.arange(len(y)), y].sum()


def test_the_threshold_is_the_textbooks_order_statistic():
    p, y = answers(99)
    scores = np.sort(1 - p[np.arange(99), y])
    assert ConformalPredictor.from_predictions(p, y).score_quantile(0.9) == pytest.approx(
        scores[89]
    )  # the 90th of (99 + 1) × 0.9
    assert (
        ConformalPredictor.from_predictions(*answers(5)).predict_sets(p, 0.9).all()
    )  # five rows cannot say what nine in ten do


def test_intervals_hold_each_target_as_often_as_is_asked():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(4000, 2))
    predicted = y + rng.normal(size=(4000, 2)) * [0.1, 3]
    conformal = ConformalPredictor.from_predictions(predicted[:2000], y[:2000])
    ends = conformal.predict_intervals(predicted[2000:], 0.9)
    held = (ends[..., 0] <= y[2000:]) & (y[2000:] <= ends[..., 1])
    assert held.mean(axis=0) == pytest.approx([0.9, 0.9], abs=0.025)


@pytest.mark.parametrize("level", [0, 1, 1.5, -0.1, float("nan")])
def test_a_level_that_is_no_share_is_refused(level):
    with pytest.raises(ConfigError, match="a coverage between 0 and 1"):
        ConformalPredictor.from_predictions(*answers(50)).score_quantile(level)


def cloud(m, seed, d=16, away=0.0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(m, d)) + 4
    X[:, 0] += away
    return X.astype(np.float32)


def test_novelty_is_uniform_on_images_like_those_of_training_and_high_on_others():
    X = cloud(1500, 0)
    novelty = NoveltyScorer.from_embeddings(X, np.arange(800), np.arange(1500))
    like = novelty(cloud(4000, 1))
    for share in (0.1, 0.5, 0.9, 0.95):
        assert (like <= share).mean() == pytest.approx(share, abs=0.03)
    assert (novelty(cloud(200, 2, away=60)) > 0.99).mean() > 0.95
    assert 0 <= like.min() <= like.max() < 1


def test_copies_and_rows_of_one_group_are_not_held_out_from_each_other():
    X = np.repeat(cloud(300, 0), 4, axis=0)  # bursts of four
    X += np.random.default_rng(1).normal(0, 1e-3, X.shape).astype(np.float32)
    group = np.repeat(np.arange(300), 4)
    blind = NoveltyScorer.from_embeddings(X, np.arange(1200), np.arange(1200))
    told = NoveltyScorer.from_embeddings(X, np.arange(1200), np.column_stack([np.arange(1200), group]))
    new = cloud(1000, 5)
    assert blind(new).mean() > 0.95
    assert told(new).mean() == pytest.approx(0.5, abs=0.05)


def test_what_is_kept_survives_the_file_to_the_bit():
    kept = Uncertainty(
        NoveltyScorer.from_embeddings(cloud(60, 0), np.arange(50), np.arange(60)),
        ConformalPredictor.from_predictions(*answers(40)),
    )
    again = uncertainty.loads(uncertainty.dumps(kept))
    assert again.novelty is not None
    assert again.conformal is not None
    np.testing.assert_array_equal(again.novelty.references, kept.novelty.references)
    np.testing.assert_array_equal(again.novelty.distances, kept.novelty.distances)
    np.testing.assert_array_equal(again.conformal.scores, kept.conformal.scores)


def test_arrays_that_no_model_holds_are_refused():
    from safetensors.numpy import save

    for arrays in (
        {"novelty.rows": np.zeros((2, 2), np.float32)},
        {"novelty.rows": np.full((2, 2), np.nan, np.float16)},
        {"conformal.scores": np.zeros((0,), np.float32)},
        {"conformal.scores": np.zeros((2, 2, 2), np.float32)},
        {"else": np.zeros(3, np.float32)},
    ):
        with pytest.raises(ValueError, match="which no model holds"):
            uncertainty.loads(save(arrays))
    with pytest.raises(ValueError, match="not safetensors"):
        uncertainty.loads(b"\xff" * 64)


@pytest.fixture
def model(tiny, make_folder, tmp_path):
    return train(extract(make_folder(each=8), backbone=tiny, cache=tmp_path / "cache"), cv=2, tune=False).attach(tiny)


def test_a_saved_model_gives_the_same_sets_and_novelty(model, tiny, tmp_path):
    paths = sorted((tmp_path / "photos").rglob("*.jpg"))
    again = load_model(model.save(tmp_path / "a.model"), backbone=tiny)
    assert again.predict_sets(paths, 0.8) == model.predict_sets(paths, 0.8)
    np.testing.assert_array_equal(again.novelty(paths), model.novelty(paths))
    with zipfile.ZipFile(tmp_path / "a.model") as file:
        assert file.getinfo("trust.safetensors").file_size < 10_000
    for label, answers_ in zip(model.predict(paths), model.predict_sets(paths, 0.8), strict=True):
        assert answers_[0] == label


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_predictions_have_columns_for_both(model, tmp_path, suffix):
    paths = sorted((tmp_path / "photos").rglob("*.jpg"))
    out = tmp_path / f"out{suffix}"
    predict(model, tmp_path / "photos", out, sets=0.9)
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file)) if suffix == ".csv" else [json.loads(line) for line in file]
    assert list(rows[0]) == ["id", "status", "label", "probability", "top", "set", "novelty"]
    sets = [json.loads(row["set"]) if suffix == ".csv" else row["set"] for row in rows]
    assert sets == [list(answers_) for answers_ in model.predict_sets(paths, 0.9)]
    assert [float(row["novelty"]) for row in rows] == pytest.approx(model.novelty(paths), abs=1e-3)


def test_a_model_without_held_out_answers_says_what_to_do(tiny, make_folder, tmp_path):
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
