"""Training fits on the rows that it says, with labels that stay aligned, and estimates what it can keep."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featpipe import FeatureCache, extract, heads, split, train
from featpipe.archive import index as index_of
from featpipe.cache import SPLITS, Table, write_cache
from featpipe.errors import CacheError, ConfigError
from featpipe.labels import Labels
from featpipe.model import KEPT_DIGEST_BYTES
from featpipe.scores import score
from featpipe.status import Status
from featpipe.strings import Strings
from featpipe.training import training_rows

FACTS = {
    "backbone": {"name": "x", "source": "user", "weights": "0", "transform": {}, "outputs": {"pooled": {}}},
    "precision": "fp32",
    "storage": "float32",
    "extraction": 1,
}


def digests(n: int) -> np.ndarray:
    rows = [hashlib.sha256(str(i).encode()).digest() for i in range(n)]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(n, 32)


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., FeatureCache]:
    """Writes a cache of the features and labels given, without an image."""

    def make(X: Any, labels: Labels, **columns: Any) -> FeatureCache:
        n, X = len(X), np.asarray(X, np.float32)
        table = Table(
            ids=Strings.of(f"{i:03}.jpg" for i in range(n)),
            status=np.zeros(n, np.uint8),
            digests=digests(n),
            stamps=np.zeros((n, 16), np.uint8),
            split=np.zeros(n, np.uint8),
            labels=labels,
        )
        path = tmp_path / "made.h5"
        manifest = {"facts": FACTS, "backbone": {"name": "x:y", "outputs": ["pooled"]}}
        shapes = {"pooled": X.shape[1:]}
        write_cache(path, replace(table, **columns), manifest, shapes, "float32", lambda _, start, stop: X[start:stop])
        return FeatureCache(path)

    return make


def blobs(codes: np.ndarray, d: int = 5, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(int(codes.max()) + 1, d))
    return (centres[codes] + spread * rng.normal(size=(len(codes), d))).astype(np.float32)


def marked(n: int, **rows: Any) -> np.ndarray:
    marks = np.zeros(n, np.uint8)
    for name, where in rows.items():
        marks[where] = SPLITS.index(name)
    return marks


# -- which rows ------------------------------------------------------------------------------------------------------


def test_bad_and_unlabelled_rows_and_those_of_other_splits_are_left_out(make_cache: Any) -> None:
    codes = np.arange(24) % 3
    X = blobs(codes)
    status = np.zeros(24, np.uint8)
    status[[2, 7]] = Status.DAMAGED, Status.MISSING
    X[[2, 7]] = np.nan
    names = [None if i in (4, 9) else "abc"[c] for i, c in enumerate(codes)]
    marks = marked(24, train=slice(0, 18), test=slice(18, 24))
    cache = make_cache(X, Labels.of_classes(names), status=status, split=marks)
    rows = training_rows(cache)
    expected = [i for i in range(18) if i not in (2, 4, 7, 9)]
    assert rows.rows.tolist() == expected
    assert [rows.classes[code] for code in rows.y] == [names[i] for i in expected]
    assert np.array_equal(rows.X, X[expected])
    assert np.array_equal(rows.digests, digests(24)[expected])
    model = train(cache)
    oracle = heads.build("logistic").fit(X[expected], codes[expected])
    assert np.array_equal(model.predict_proba_features(X[18:]), oracle.predict_proba(X[18:]))
    assert model.history["trained_on"] | {"cache": 0, "fingerprint": 0} == {
        "cache": 0,
        "fingerprint": 0,
        "rows": 14,
        "of": 24,
        "split": "given",
        "bad": {"damaged": 1, "missing": 1},
    }


def test_classes_without_training_rows_leave_the_others_aligned(make_cache: Any) -> None:
    codes = np.arange(40) % 5
    X = blobs(codes, spread=0.1)
    marks = marked(40, train=np.isin(codes, (1, 2, 4)), test=np.isin(codes, (0, 3)))
    cache = make_cache(X, Labels.of_classes(["vwxyz"[c] for c in codes]), split=marks)
    model = train(cache, cv=2)
    assert model.classes == ("w", "x", "z")
    fitted = np.flatnonzero(np.isin(codes, (1, 2, 4)))
    assert model.predict_features(X[fitted]).tolist() == ["vwxyz"[c] for c in codes[fitted]]
    assert model.predict_proba_features(X).shape == (40, 3)


def test_a_model_knows_exactly_its_training_images(make_cache: Any) -> None:
    codes = np.arange(20) % 2
    own = digests(20).copy()
    own[2] = own[0]
    marks = marked(20, train=slice(0, 12))
    cache = make_cache(blobs(codes), Labels.of_classes(["ab"[c] for c in codes]), split=marks, digests=own)
    model = train(cache)
    assert model.was_trained_on(own).tolist() == [True] * 12 + [False] * 8
    assert len(model.trained_on) == 11
    assert {row.tobytes() for row in model.trained_on} == {row[:KEPT_DIGEST_BYTES].tobytes() for row in own[:12]}


def test_real_images_that_cannot_be_read_or_have_no_label_are_left_out(
    tiny: Any, make_folder: Any, tmp_path: Path
) -> None:
    folder = make_folder()
    (folder / "bee" / "01.jpg").write_bytes(b"no image")
    (folder / "stray.jpg").write_bytes((folder / "ape" / "00.jpg").read_bytes()[:-2] + b"\0\0\xff\xd9")
    with pytest.warns(UserWarning, match="1 of 19 images have no features"):
        cache = extract(folder, backbone=tiny, cache=tmp_path / "cache")
    model = train(cache)
    trained = {path for path in folder.rglob("*.jpg") if path.name != "stray.jpg" and path != folder / "bee/01.jpg"}
    known = {hashlib.sha256(path.read_bytes()).digest()[:KEPT_DIGEST_BYTES] for path in trained}
    assert {row.tobytes() for row in model.trained_on} == known
    assert index_of(folder).ids == cache.ids


# -- the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "params"), [("logistic", {"C": 0.3}), ("linear", {"epochs": 3})])
def test_the_cross_validated_score_is_that_of_a_loop_written_by_hand(
    head: str, params: dict[str, Any], make_cache: Any
) -> None:
    codes = np.random.default_rng(1).integers(0, 4, 90)
    X, names = blobs(codes, spread=2.5), ["dcba"[c] for c in codes]
    cache = make_cache(X, Labels.of_classes(names))
    model = train(cache, head, cv=3, params=params, random_state=7)
    probabilities = np.zeros((90, 4))
    for fit, held in split.folds(digests(90), names, k=3):
        estimator = heads.build(head, params=params, random_state=7).fit(X[fit], np.array(names)[fit])
        probabilities[held] = estimator.predict_proba(X[held])
    found = model.scores["cross_validation"]
    assert found["metrics"] == score("classification", names, probabilities, "abcd").to_dict()["metrics"]
    assert (found["folds"], found["n"]) == (3, 90)
    assert found["how"] == "3-fold cross-validation on the 90 training images"


def test_copies_of_an_image_never_lie_on_both_sides_of_a_fold(make_cache: Any) -> None:
    rng = np.random.default_rng(0)
    codes, X = np.repeat(rng.integers(0, 2, 60), 2), np.repeat(rng.normal(size=(60, 40)), 2, axis=0)
    names = ["ab"[c] for c in codes]
    cache = make_cache(X, Labels.of_classes(names), digests=np.repeat(digests(60), 2, axis=0))
    accuracy = train(cache, cv=4, params={"C": 100}).scores["cross_validation"]["metrics"]["accuracy"]["value"]
    assert accuracy < 0.7  # labels are random: whoever saw the copy would know them


def test_without_folds_there_is_no_estimate(make_cache: Any) -> None:
    codes = np.arange(12) % 2
    cache = make_cache(blobs(codes), Labels.of_classes(["ab"[c] for c in codes]))
    assert train(cache).scores == train(cache, cv=0).scores == {}


# -- other tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("targets", [1, 2])
def test_a_regression_is_trained_and_estimated(head: str, targets: int, make_cache: Any) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5)).astype(np.float32)
    Y = X @ rng.normal(size=(5, targets))
    Y[3] = np.nan
    names = ("height", "weight")[:targets]
    cache = make_cache(X, Labels.of_targets(Y, names))
    model = train(cache, head, cv=3, params={"epochs": 5})
    rows = np.delete(np.arange(60), 3)
    y = Y[rows, 0] if targets == 1 else Y[rows]
    oracle = heads.build(head, "regression", params={"epochs": 5}).fit(X[rows], y)
    assert (model.task, model.classes) == ("regression", names)
    assert np.array_equal(model.predict_features(X), oracle.predict(X))
    assert model.scores["cross_validation"]["n"] == 59


@pytest.mark.parametrize("head", ["logistic", "linear"])
def test_several_labels_an_image_are_trained_and_estimated(head: str, make_cache: Any) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5)).astype(np.float32)
    Y = (X[:, :3] > 0.3).astype(int)
    sets = [None if i == 5 else {name for name, on in zip("pqr", row, strict=True) if on} for i, row in enumerate(Y)]
    cache = make_cache(X, Labels.of_sets(sets))
    model = train(cache, head, cv=3)
    rows = np.delete(np.arange(60), 5)
    oracle = heads.build(head, "multilabel").fit(X[rows], Y[rows])
    assert (model.task, model.classes) == ("multilabel", ("p", "q", "r"))
    assert np.array_equal(model.predict_proba_features(X), oracle.predict_proba(X))
    assert np.array_equal(model.predict_features(X), oracle.predict(X))
    assert model.scores["cross_validation"]["metrics"]["mean_average_precision"]["value"] > 0.6


def test_weights_of_classes_are_given_by_name(make_cache: Any) -> None:
    codes = np.random.default_rng(0).integers(0, 3, 60)
    X = blobs(codes, spread=3)
    cache = make_cache(X, Labels.of_classes(["abc"[c] for c in codes]))
    model = train(cache, params={"class_weight": {"b": 5.0}})
    oracle = heads.build("logistic", params={"class_weight": {1: 5.0}}).fit(X, codes)
    assert np.array_equal(model.predict_proba_features(X), oracle.predict_proba(X))
    with pytest.raises(ConfigError, match="unknown class 'd'"):
        train(cache, params={"class_weight": {"d": 5.0}})


# -- what cannot be trained on ---------------------------------------------------------------------------------------


def refused(error: type[Exception], match: str, cache: FeatureCache, *args: Any, **settings: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        train(cache, *args, **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_cache_that_cannot_be_trained_on_says_what_to_do(make_cache: Any) -> None:
    codes = np.arange(12) % 2
    X, names = blobs(codes), ["ab"[c] for c in codes]
    refused(CacheError, r"made\.h5: has no labels; extract again with --labels", make_cache(X, Labels.none(12)))
    refused(ConfigError, "all training rows are of class 'a'", make_cache(X, Labels.of_classes(["a"] * 12)))
    refused(CacheError, "no row is labelled", make_cache(X, Labels.of_classes([None] * 12, ["a", "b"])))
    marks = marked(12, test=slice(0, 12))
    refused(CacheError, "marked for training", make_cache(X, Labels.of_classes(names), split=marks))
    bad = np.full(12, Status.DAMAGED, np.uint8)
    refused(CacheError, "readable", make_cache(np.full_like(X, np.nan), Labels.of_classes(names), status=bad))
    maps = make_cache(X.reshape(12, 5, 1, 1), Labels.of_classes(names))
    refused(ConfigError, r"feature maps of shape \(5, 1, 1\); heads train on pooled outputs: extract with", maps)


def test_a_wrong_setting_is_answered_with_the_nearest(make_cache: Any) -> None:
    codes = np.arange(12) % 2
    cache = make_cache(blobs(codes), Labels.of_classes(["ab"[c] for c in codes]))
    refused(ConfigError, "unknown head 'logistc'; did you mean 'logistic'", cache, "logistc")
    refused(ConfigError, "no setting 'hiden', did you mean 'hidden'", cache, "mlp", params={"hiden": 3})
    refused(ConfigError, "unknown output 'poold'; did you mean 'pooled'", cache, output="poold")
    refused(ConfigError, "C", cache, params={"C": -1})
    refused(ConfigError, "folds", cache, cv=1)
    numbers = make_cache(blobs(codes), Labels.of_targets(np.arange(12.0), ["t"]))
    refused(ConfigError, "head 'logistic' does classification and multilabel, not regression", numbers)


def test_a_class_with_fewer_images_than_folds_is_named(make_cache: Any) -> None:
    codes = np.array([0] * 6 + [1] * 6 + [2])
    cache = make_cache(blobs(codes), Labels.of_classes(["abc"[c] for c in codes]))
    refused(ConfigError, "class 'c' has 1 distinct image, fewer than k=5 folds", cache, cv=5)
    assert train(cache).classes == ("a", "b", "c")


def test_data_that_a_head_refuses_is_one_line(make_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.arange(12) % 2
    cache = make_cache(blobs(codes), Labels.of_classes(["ab"[c] for c in codes]))

    def refuse(*_: object) -> None:
        raise ValueError("too few rows\nto hold some out")

    monkeypatch.setattr("featpipe.heads.softmax.SoftmaxRegression.fit", refuse)
    refused(ConfigError, r"made\.h5: head 'logistic' cannot be fitted: too few rows to hold some out", cache)
