"""Training: which rows are fitted, cross-validated scores, searches of settings, and comparisons of heads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

from featpipe import FeatureCache, extract, heads, load_model, train
from featpipe.cache import SPLIT_NAMES, SampleTable, write_cache
from featpipe.data import Labels, index
from featpipe.errors import CacheError, ConfigError
from featpipe.heads.resampling import draw_row_indices
from featpipe.metrics import score
from featpipe.model import STORED_DIGEST_BYTES
from featpipe.splits import SplitSeed, splits
from featpipe.status import Status
from featpipe.storage import StringColumn
from featpipe.training import EmbeddingDataset, compare, fit_head, load_training_data, search
from featpipe.training.train import _find_distinct_digests
from tests.support.datasets import FACTS, digests
from tests.support.logs import logged_warning


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., FeatureCache]:
    """Write a cache from features and labels, without images."""

    def make(X: Any, labels: Labels, **columns: Any) -> FeatureCache:
        n, X = len(X), np.asarray(X, np.float32)
        table = SampleTable(
            ids=StringColumn.from_strings(f"{i:03}.jpg" for i in range(n)),
            status=np.zeros(n, np.uint8),
            digests=digests(n),
            stamps=np.zeros((n, 16), np.uint8),
            split=np.zeros(n, np.uint8),
            labels=labels,
        )
        path = tmp_path / "rows.h5"
        manifest = {"facts": FACTS, "backbone": {"name": "x:y", "outputs": ["pooled"]}}
        shapes = {"pooled": X.shape[1:]}
        write_cache(path, replace(table, **columns), manifest, shapes, "float32", lambda _, start, stop: X[start:stop])
        return FeatureCache(path)

    return make


def make_blobs(codes: np.ndarray, d: int = 5, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(int(codes.max()) + 1, d))
    return (centres[codes] + spread * rng.normal(size=(len(codes), d))).astype(np.float32)


def make_split_column(n: int, **rows_by_split: Any) -> np.ndarray:
    marks = np.zeros(n, np.uint8)
    for name, row_indices in rows_by_split.items():
        marks[row_indices] = SPLIT_NAMES.index(name)
    return marks


@pytest.fixture
def abc_cache(make_cache: Any) -> FeatureCache:
    """30 rows, alternately of classes a, b, c; 20 to 24 for validation, 25 to 29 for the test; 26 copies row 2."""
    image_digests = digests(30).copy()
    image_digests[26] = image_digests[2]
    split = make_split_column(30, train=slice(0, 20), validation=slice(20, 25), test=slice(25, 30))
    labels = Labels.from_class_names(["abc"[i % 3] for i in range(30)])
    return make_cache(np.arange(90).reshape(30, 3), labels, digests=image_digests, split=split)


def test_a_dataset_selects_the_rows_of_a_split_and_names_them(abc_cache: FeatureCache) -> None:
    assert EmbeddingDataset.from_cache(abc_cache).rows.tolist() == list(range(30))
    test = EmbeddingDataset.from_cache(abc_cache, split="test")
    assert test.rows.tolist() == [25, 26, 27, 28, 29]
    assert list(test.ids) == ["025.jpg", "026.jpg", "027.jpg", "028.jpg", "029.jpg"]
    assert [test.classes[code] for code in test.y] == ["b", "c", "a", "b", "c"]
    assert test.is_streamed
    assert not test.to_memory().is_streamed
    assert test.to_memory().X.tolist() == np.arange(90).reshape(30, 3)[25:].tolist()


def test_a_dataset_leaves_out_listed_rows_copies_and_training_images_of_a_model(
    abc_cache: FeatureCache, tmp_path: Path
) -> None:
    train_rows = EmbeddingDataset.from_cache(abc_cache, split="train")
    test = EmbeddingDataset.from_cache(abc_cache, split="test")
    assert test.exclude_duplicates_of(train_rows).rows.tolist() == [25, 27, 28, 29]
    assert test.unseen_by(train(abc_cache, "centroid")).rows.tolist() == [25, 27, 28, 29]
    assert test.without(np.array([28])).rows.tolist() == [25, 26, 27, 29]
    (tmp_path / "bad.csv").write_text("path\n025.jpg\n003.jpg\n")
    assert test.without(tmp_path / "bad.csv").rows.tolist() == [26, 27, 28, 29]


def test_a_dataset_is_encoded_in_the_classes_of_another(abc_cache: FeatureCache) -> None:
    dataset = EmbeddingDataset.from_cache(abc_cache).take(np.array([1, 2, 4]))
    assert dataset.list_present_classes() == ("b", "c")
    assert dataset.aligned_to(("d", "c", "b")).y.tolist() == [2, 1, 2]
    assert dataset.drop_absent_classes().classes == ("b", "c")
    assert dataset.drop_absent_classes().y.tolist() == [0, 1, 0]
    with pytest.raises(ConfigError, match="no class or target 'c'"):
        dataset.aligned_to(("a", "b"))


def test_labels_and_targets_are_aligned_by_column(make_cache: Any) -> None:
    multilabel_cache = make_cache(np.zeros((3, 2)), Labels.from_label_sets([{"a"}, {"a", "c"}, set()]))
    aligned = EmbeddingDataset.from_cache(multilabel_cache).aligned_to(("c", "b", "a"))
    assert aligned.y.tolist() == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    target_cache = make_cache(np.zeros((2, 2)), Labels.from_targets([[1.0, 2.0], [3.0, 4.0]], ["x", "y"]))
    dataset = EmbeddingDataset.from_cache(target_cache)
    assert dataset.aligned_to(("y",)).y.tolist() == [2.0, 4.0]
    assert dataset.aligned_to(("y", "x")).y.tolist() == [[2.0, 1.0], [4.0, 3.0]]
    with pytest.raises(ConfigError, match="'z'"):
        dataset.aligned_to(("z",))


def test_datasets_with_the_same_classes_are_joined(abc_cache: FeatureCache) -> None:
    test = EmbeddingDataset.from_cache(abc_cache, split="test")
    validation = EmbeddingDataset.from_cache(abc_cache, split="validation")
    joined = validation + test
    assert joined.rows.tolist() == list(range(20, 30))
    assert np.array_equal(joined.X, np.arange(90).reshape(30, 3)[20:])
    assert np.array_equal(joined.digests, abc_cache.digests[20:])
    with pytest.raises(ConfigError, match="different classes"):
        test + test.aligned_to(("c", "b", "a"))


def test_a_dataset_counts_copies_once_and_leaves_out_classes_without_a_code(make_cache: Any) -> None:
    codes = np.array([0, 0, 1, 2, 2, 2])
    image_digests = digests(6).copy()
    image_digests[1], image_digests[5] = image_digests[0], image_digests[3]
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["abc"[c] for c in codes]), digests=image_digests)
    dataset = EmbeddingDataset.from_cache(cache)
    assert dataset.first_occurrences.tolist() == [0, 2, 3, 4]
    assert dataset.count_images().tolist() == [1, 1, 2]
    recoded = dataset.recoded(np.array([2, -1, 0]), ("x", "y", "z"))
    assert recoded.labels.tolist() == ["z", "z", "x", "x", "x"]
    assert recoded.rows.tolist() == [0, 1, 3, 4, 5]
    assert np.array_equal(recoded.features, cache.X[recoded.rows])


def test_a_subset_of_a_dataset_has_the_smallest_keys(abc_cache: FeatureCache) -> None:
    dataset = EmbeddingDataset.from_cache(abc_cache)
    keys = splits.compute_keys(abc_cache.digests, SplitSeed.NOVELTY)
    expected = np.sort(np.argsort(keys)[:10]).tolist()
    assert dataset.subset(10, SplitSeed.NOVELTY).rows.tolist() == expected
    assert not dataset.subset(100).is_streamed


def test_each_purpose_of_a_split_has_its_own_seed() -> None:
    seeds = {name: int(seed) for name, seed in SplitSeed.__members__.items()}
    assert seeds == {
        "TEST": 0,
        "INNER_FOLDS": 1,
        "EARLY_STOPPING": 2,
        "NOVELTY": 3,
        "FINETUNING_TEST": 4,
        "FINETUNING_VALIDATION": 5,
        "LEARNING_CURVE": 1,
    }


def test_bad_and_unlabelled_rows_and_those_of_other_splits_are_left_out(make_cache: Any) -> None:
    codes = np.arange(24) % 3
    X = make_blobs(codes)
    status = np.zeros(24, np.uint8)
    status[[2, 7]] = Status.DAMAGED, Status.MISSING
    X[[2, 7]] = np.nan
    names = [None if i in (4, 9) else "abc"[c] for i, c in enumerate(codes)]
    marks = make_split_column(24, train=slice(0, 18), test=slice(18, 24))
    cache = make_cache(X, Labels.from_class_names(names), status=status, split=marks)
    dataset = load_training_data(cache)
    expected = [i for i in range(18) if i not in (2, 4, 7, 9)]
    assert dataset.rows.tolist() == expected
    assert [dataset.classes[code] for code in dataset.y] == [names[i] for i in expected]
    assert np.array_equal(dataset.X, X[expected])
    assert np.array_equal(dataset.digests, digests(24)[expected])
    model = train(cache, tune=False)
    oracle = heads.build("logistic").fit(X[expected], codes[expected])
    assert np.array_equal(model.predict_proba_features(X[18:]), oracle.predict_proba(X[18:]))
    assert model.history["trained_on"] | {"cache": 0, "fingerprint": 0} == {
        "cache": 0,
        "fingerprint": 0,
        "rows": 14,
        "of": 24,
        "split": "given",
        "bad": {"damaged": 1, "missing": 1},
        "unlabelled": 2,
    }


def test_classes_without_training_rows_leave_the_others_aligned(make_cache: Any) -> None:
    codes = np.arange(40) % 5
    X = make_blobs(codes, spread=0.1)
    marks = make_split_column(40, train=np.isin(codes, (1, 2, 4)), test=np.isin(codes, (0, 3)))
    cache = make_cache(X, Labels.from_class_names(["vwxyz"[c] for c in codes]), split=marks)
    model = train(cache, cv=2, tune=False)
    assert model.classes == ("w", "x", "z")
    training_rows = np.flatnonzero(np.isin(codes, (1, 2, 4)))
    assert model.predict_features(X[training_rows]).tolist() == ["vwxyz"[c] for c in codes[training_rows]]
    assert model.predict_proba_features(X).shape == (40, 3)


def test_a_model_records_exactly_its_training_images(make_cache: Any) -> None:
    codes = np.arange(20) % 2
    image_digests = digests(20).copy()
    image_digests[2] = image_digests[0]
    marks = make_split_column(20, train=slice(0, 12))
    cache = make_cache(
        make_blobs(codes), Labels.from_class_names(["ab"[c] for c in codes]), split=marks, digests=image_digests
    )
    model = train(cache)
    assert model.was_trained_on(image_digests).tolist() == [True] * 12 + [False] * 8
    assert len(model.trained_on) == 11
    assert {row.tobytes() for row in model.trained_on} == {
        row[:STORED_DIGEST_BYTES].tobytes() for row in image_digests[:12]
    }


def test_real_images_that_cannot_be_read_or_have_no_label_are_left_out(
    tiny: Any, make_folder: Any, tmp_path: Path
) -> None:
    folder = make_folder()
    (folder / "bee" / "01.jpg").write_bytes(b"no image")
    (folder / "stray.jpg").write_bytes((folder / "ape" / "00.jpg").read_bytes()[:-2] + b"\0\0\xff\xd9")
    with logged_warning("1 of 19 images have no features"):
        cache = extract(folder, backbone=tiny, cache=tmp_path / "cache")
    model = train(cache)
    training_paths = {
        path for path in folder.rglob("*.jpg") if path.name != "stray.jpg" and path != folder / "bee/01.jpg"
    }
    training_digests = {hashlib.sha256(path.read_bytes()).digest()[:STORED_DIGEST_BYTES] for path in training_paths}
    assert {row.tobytes() for row in model.trained_on} == training_digests
    assert index(folder).ids == cache.ids


@pytest.mark.parametrize(("head", "params"), [("logistic", {"C": 0.3}), ("linear", {"epochs": 3})])
def test_the_cross_validated_score_equals_that_of_an_explicit_loop(
    head: str, params: dict[str, Any], make_cache: Any
) -> None:
    codes = np.random.default_rng(1).integers(0, 4, 90)
    X, names = make_blobs(codes, spread=2.5), ["dcba"[c] for c in codes]
    cache = make_cache(X, Labels.from_class_names(names))
    model = train(cache, head, cv=3, params=params, random_state=7)
    probabilities = np.zeros((90, 4))
    for fit, held_out in splits.make_folds(digests(90), names, k=3):
        estimator = heads.build(head, params=params, random_state=7).fit(X[fit], np.array(names)[fit])
        probabilities[held_out] = estimator.predict_proba(X[held_out])
    estimate = model.scores["cross_validation"]
    assert estimate["metrics"] == score("classification", names, probabilities, "abcd").to_dict()["metrics"]
    assert (estimate["folds"], estimate["n"]) == (3, 90)
    assert estimate["how"] == {"kind": "folds", "folds": 3, "n": 90}


def test_copies_of_an_image_are_never_on_both_sides_of_a_fold(make_cache: Any) -> None:
    rng = np.random.default_rng(0)
    codes, X = np.repeat(rng.integers(0, 2, 60), 2), np.repeat(rng.normal(size=(60, 40)), 2, axis=0)
    names = ["ab"[c] for c in codes]
    cache = make_cache(X, Labels.from_class_names(names), digests=np.repeat(digests(60), 2, axis=0))
    accuracy = train(cache, cv=4, params={"C": 100}).scores["cross_validation"]["metrics"]["accuracy"]["value"]
    assert accuracy < 0.7  # labels are random: only a copy in training could reveal them


def test_without_folds_there_is_no_estimate(make_cache: Any) -> None:
    codes = np.arange(12) % 2
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["ab"[c] for c in codes]))
    assert train(cache, tune=False).scores == train(cache, cv=0, tune=False).scores == {}


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("targets", [1, 2])
def test_a_regression_is_trained_and_estimated(head: str, targets: int, make_cache: Any) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5)).astype(np.float32)
    Y = X @ rng.normal(size=(5, targets))
    Y[3] = np.nan
    names = ("height", "weight")[:targets]
    cache = make_cache(X, Labels.from_targets(Y, names))
    model = train(cache, head, cv=3, params={"epochs": 5})
    rows = np.delete(np.arange(60), 3)
    y = Y[rows, 0] if targets == 1 else Y[rows]
    oracle = heads.build(head, "regression", params={"epochs": 5}).fit(X[rows], y)
    assert (model.task, model.classes) == ("regression", names)
    assert np.array_equal(model.predict_features(X), oracle.predict(X))
    assert model.scores["cross_validation"]["n"] == 59


@pytest.mark.parametrize("head", ["logistic", "linear"])
def test_a_multilabel_model_is_trained_and_estimated(head: str, make_cache: Any) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5)).astype(np.float32)
    Y = (X[:, :3] > 0.3).astype(int)
    sets = [
        None if i == 5 else {name for name, has_label in zip("pqr", row, strict=True) if has_label}
        for i, row in enumerate(Y)
    ]
    cache = make_cache(X, Labels.from_label_sets(sets))
    model = train(cache, head, cv=3, tune=False)
    rows = np.delete(np.arange(60), 5)
    oracle = heads.build(head, "multilabel").fit(X[rows], Y[rows])
    assert (model.task, model.classes) == ("multilabel", ("p", "q", "r"))
    assert np.array_equal(model.predict_proba_features(X), oracle.predict_proba(X))
    assert np.array_equal(model.predict_features(X), oracle.predict(X))
    assert model.scores["cross_validation"]["metrics"]["mean_average_precision"]["value"] > 0.6


def test_class_weights_are_given_by_class_name(make_cache: Any) -> None:
    codes = np.random.default_rng(0).integers(0, 3, 60)
    X = make_blobs(codes, spread=3)
    cache = make_cache(X, Labels.from_class_names(["abc"[c] for c in codes]))
    model = train(cache, params={"class_weight": {"b": 5.0}}, tune=False)
    oracle = heads.build("logistic", params={"class_weight": {1: 5.0}}).fit(X, codes)
    assert np.array_equal(model.predict_proba_features(X), oracle.predict_proba(X))
    with pytest.raises(ConfigError, match="unknown class 'd'"):
        train(cache, params={"class_weight": {"d": 5.0}})


def assert_train_refuses(error: type[Exception], match: str, cache: FeatureCache, *args: Any, **settings: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        train(cache, *args, **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_cache_that_cannot_be_trained_on_is_refused_with_the_remedy(make_cache: Any) -> None:
    codes = np.arange(12) % 2
    X, names = make_blobs(codes), ["ab"[c] for c in codes]
    assert_train_refuses(
        CacheError, r"rows\.h5: has no labels; extract again with --labels", make_cache(X, Labels.unlabeled(12))
    )
    assert_train_refuses(
        ConfigError, "all training rows are of class 'a'", make_cache(X, Labels.from_class_names(["a"] * 12))
    )
    assert_train_refuses(
        CacheError, "no row is labelled", make_cache(X, Labels.from_class_names([None] * 12, ["a", "b"]))
    )
    marks = make_split_column(12, test=slice(0, 12))
    assert_train_refuses(CacheError, "marked for training", make_cache(X, Labels.from_class_names(names), split=marks))
    bad = np.full(12, Status.DAMAGED, np.uint8)
    assert_train_refuses(
        CacheError, "readable", make_cache(np.full_like(X, np.nan), Labels.from_class_names(names), status=bad)
    )
    maps = make_cache(X.reshape(12, 5, 1, 1), Labels.from_class_names(names))
    assert_train_refuses(
        ConfigError, r"feature maps of shape \(5, 1, 1\); heads train on pooled outputs: extract with", maps
    )


def test_an_unknown_setting_is_refused_with_the_nearest_name(make_cache: Any) -> None:
    codes = np.arange(12) % 2
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["ab"[c] for c in codes]))
    assert_train_refuses(ConfigError, "unknown head 'logistc'; did you mean 'logistic'", cache, "logistc")
    assert_train_refuses(ConfigError, "no setting 'hiden', did you mean 'hidden'", cache, "mlp", params={"hiden": 3})
    assert_train_refuses(ConfigError, "unknown output 'poold'; did you mean 'pooled'", cache, output="poold")
    assert_train_refuses(ConfigError, "C", cache, params={"C": -1})
    assert_train_refuses(ConfigError, "folds", cache, cv=1)
    numbers = make_cache(make_blobs(codes), Labels.from_targets(np.arange(12.0), ["t"]))
    assert_train_refuses(ConfigError, "head 'logistic' supports classification and multilabel, not regression", numbers)


def test_a_class_with_fewer_images_than_folds_is_named(make_cache: Any) -> None:
    codes = np.array([0] * 6 + [1] * 6 + [2])
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["abc"[c] for c in codes]))
    assert_train_refuses(ConfigError, "class 'c' has 1 distinct image, fewer than 5 folds", cache, cv=5)
    assert train(cache).classes == ("a", "b", "c")


def test_an_error_of_a_head_is_reported_in_one_line(make_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.arange(12) % 2
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["ab"[c] for c in codes]))

    def refuse(*_: object) -> None:
        raise ValueError("too few rows\nto hold some out")

    monkeypatch.setattr("featpipe.heads.logistic.estimator.SoftmaxRegression.fit", refuse)
    assert_train_refuses(
        ConfigError, r"rows\.h5: head 'logistic' cannot be fitted: too few rows to hold some out", cache
    )


def make_noisy_rows(n: int = 150, d: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that differ in one of many columns, so that a weak penalty overfits."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)).astype(np.float32)
    return X, (X[:, 0] + rng.normal(size=n) > 0).astype(int)


def test_the_strength_of_logistic_is_selected_on_inner_folds_unless_it_is_set(make_cache: Any, log: list[str]) -> None:
    X, codes = make_noisy_rows()
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    model = train(cache)
    chosen = model.history["chosen"]
    assert len(chosen["tried"]) == 45
    assert [candidate["settings"]["C"] for candidate in chosen["tried"]] == np.logspace(-6, 5, 45).tolist()
    best = max(chosen["tried"], key=lambda candidate: candidate["score"])
    assert chosen["settings"] == best["settings"] == {"C": model.head["head"].C}
    assert best["settings"]["C"] < 0.5
    assert any("C=" in text and "log_loss" in text and "5 inner folds" in text for text in log)
    assert train(cache, params={"C": 3.0}).history["chosen"] is None
    assert train(cache, tune=False).head["head"].C == 1.0


def test_the_scores_of_the_path_equal_those_of_an_explicit_loop(make_cache: Any) -> None:
    X, codes = make_noisy_rows(n=90)
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    candidates = train(cache, metric="log_loss").history["chosen"]["tried"]
    for position in (8, 20, 30):
        C, losses = candidates[position]["settings"]["C"], []
        for fit, held_out in splits.make_folds(digests(90), codes, k=5, seed=1):
            Z = StandardScaler().fit(X[fit]).transform(X.astype(np.float64))
            head = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(Z[fit], codes[fit])
            losses.append(log_loss(codes[held_out], head.predict_proba(Z[held_out])))
        assert candidates[position]["score"] == pytest.approx(-np.mean(losses), rel=0.02)


def test_one_standard_error_selects_a_stronger_penalty(make_cache: Any) -> None:
    X, codes = make_noisy_rows()
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    best, simpler = train(cache).head["head"].C, train(cache, one_standard_error=True).head["head"].C
    assert simpler < best
    assert_train_refuses(
        ConfigError, "one_standard_error is for the search of C", cache, "mlp", one_standard_error=True
    )


@pytest.mark.parametrize(("head", "grid"), [
    ("knn", {"n_neighbors": (1, 9)}), ("ridge", {"alpha": (1e-3, 1e4)}), ("svm", {"C": (1e-4, 1.0)}),
    ("logistic", {"C": (1e-3, 100.0)}), ("sklearn.tree.DecisionTreeClassifier", {"max_depth": (1, 20)}),
])  # fmt: skip
def test_any_head_is_tuned_on_folds_of_its_training_rows(head: str, grid: dict, make_cache: Any) -> None:
    X, codes = make_noisy_rows()
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    model = train(cache, head, grid=grid)
    (key, values) = next(iter(grid.items()))
    oracle = GridSearchCV(
        heads.build(head, params={key: values[0]}),
        {f"head__{key}": values},
        cv=splits.make_folds(digests(150), codes, k=5, seed=1),
    ).fit(X, codes)
    assert model.history["chosen"]["settings"] == {key: oracle.best_params_[f"head__{key}"]}
    np.testing.assert_allclose(
        [candidate["score"] for candidate in model.history["chosen"]["tried"]], oracle.cv_results_["mean_test_score"]
    )


def test_tuning_a_head_without_a_default_grid_is_refused_with_the_remedy(make_cache: Any) -> None:
    X, codes = make_noisy_rows(n=40)
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    assert_train_refuses(
        ConfigError, "give the values to try: --grid", cache, "sklearn.tree.DecisionTreeClassifier", tune=True
    )
    assert_train_refuses(ConfigError, "unknown metric 'acuracy'; did you mean 'accuracy'", cache, metric="acuracy")


def test_settings_are_searched_again_in_each_fold_without_its_held_out_rows(make_cache: Any, monkeypatch: Any) -> None:
    X, codes = make_noisy_rows(n=60)
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    row_counts: list[int] = []
    make_inner_folds = search.make_inner_folds
    monkeypatch.setattr(search, "C_GRID", search.C_GRID[::9])
    monkeypatch.setattr(
        search, "make_inner_folds", lambda dataset: row_counts.append(len(dataset)) or make_inner_folds(dataset)
    )
    train(cache, cv=3)
    assert sorted(row_counts) == [40, 40, 40, 60]


def test_random_labels_score_at_chance_level_after_a_search_of_settings(make_cache: Any) -> None:
    """Forty columns of noise: the score by which a setting was selected would be above chance."""
    rng = np.random.default_rng(3)
    X, codes = rng.normal(size=(80, 40)), np.arange(80) % 2
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    estimate = train(cache, cv=3, metric="accuracy").scores["cross_validation"]["metrics"]["accuracy"]
    assert estimate["low"] < 0.5


@pytest.mark.parametrize("method", ["over", "under", "smote"])
def test_rows_are_resampled_only_within_each_fold(method: str, make_cache: Any) -> None:
    rng = np.random.default_rng(0)
    codes = (rng.random(120) < 0.15).astype(int)
    cache = make_cache(make_blobs(codes, spread=3), Labels.from_class_names(["ab"[c] for c in codes]))
    plain, balanced = (
        train(cache, cv=3, params={"C": 1.0}, balance=balance).scores["cross_validation"]["per_class"][1]["recall"]
        for balance in (None, method)
    )
    assert balanced > plain
    assert train(cache, balance=method, params={"C": 1.0}, cv=3).scores["cross_validation"]["n"] == 120


def test_probabilities_are_corrected_for_another_class_prior(make_cache: Any) -> None:
    codes = np.arange(90) % 3
    X = make_blobs(codes, spread=3)
    cache = make_cache(X, Labels.from_class_names(["abc"[c] for c in codes]))
    plain, rare = train(cache, tune=False), train(cache, tune=False, prior={"c": 0.01})
    expected = plain.predict_proba_features(X) * [0.495 * 3, 0.495 * 3, 0.03]
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(rare.predict_proba_features(X), expected, rtol=1e-9)
    assert np.count_nonzero(rare.predict_features(X) == "c") < np.count_nonzero(plain.predict_features(X) == "c")
    assert_train_refuses(ConfigError, "not among the 3 classes", cache, prior={"d": 0.5})


def test_rows_of_a_group_stay_together(make_cache: Any) -> None:
    """Labels are random by group, and features reveal the group: only its rows in training could reveal the label."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(30), 5)
    codes = rng.integers(0, 2, 30)[group]
    X = np.eye(30)[group] + 0.01 * rng.normal(size=(150, 30))
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    ungrouped, grouped = (
        train(cache, "knn", cv=3, groups=groups).scores["cross_validation"] for groups in (None, group)
    )
    assert ungrouped["metrics"]["accuracy"]["value"] > 0.99
    assert grouped["metrics"]["accuracy"]["value"] < 0.75
    assert grouped["how"]["groups"] == 30


def test_folds_by_time_are_scored_on_later_images(make_cache: Any) -> None:
    codes = np.arange(120) % 2
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["ab"[c] for c in codes]))
    estimate = train(cache, cv=3, tune=False, times=np.arange(120.0)).scores["cross_validation"]
    assert estimate["n"] == 90
    assert estimate["how"] == {"kind": "time_spans", "folds": 3, "n": 90, "n_rows": 120}


@pytest.mark.parametrize(
    ("head", "times", "since"),
    [
        ("logistic", np.arange(120.0), 90),
        ("ridge", np.datetime64("2024-01-01") + np.arange(120), "2024-03-31"),
    ],
)
def test_since_makes_a_single_split_that_is_scored_on_later_images(
    head: str, times: Any, since: Any, make_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = np.random.default_rng(0).integers(0, 2, 120)
    X = make_blobs(codes, spread=0.1)
    codes[90:] = 1 - codes[90:]
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    row_counts: list[int] = []
    for module in ("featpipe.training.cross_validation", "featpipe.training.train"):
        monkeypatch.setattr(
            import_module(module),
            "fit_head",
            lambda config, dataset: (row_counts.append(len(dataset)), fit_head(config, dataset))[1],
        )
    model = train(cache, head=head, times=times, since=since, tune=False)
    estimate = model.scores["cross_validation"]
    # Later rows have exchanged classes, so a head that was not fitted on them is always wrong.
    assert (estimate["n"], estimate["metrics"]["accuracy"]["value"], row_counts) == (30, 0.0, [90, 120])
    assert (estimate["how"]["kind"], estimate["how"]["n"]) == ("since", 30)


def test_an_invalid_cutoff_time_is_refused(make_cache: Any) -> None:
    codes = np.arange(40) % 2
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["ab"[c] for c in codes]))
    with pytest.raises(ConfigError, match="since is '2024', but the images have no times"):
        train(cache, since="2024")
    with pytest.raises(ConfigError, match="since is 'May', but the times are numbers"):
        train(cache, times=np.arange(40.0), since="May")
    with pytest.raises(ConfigError, match="no row has a time from 77"):
        train(cache, times=np.arange(40.0), since=77)


def test_groups_on_both_sides_of_a_given_split_are_named(make_cache: Any) -> None:
    codes, marks = np.arange(40) % 2, np.array([1, 1, 1, 3, 2] * 8, np.uint8)
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["ab"[c] for c in codes]), split=marks)
    consistent_groups = np.where(marks == 1, "patient " + (np.arange(40) // 8).astype(str).astype(object), "others")
    assert train(cache, cv=2, tune=False, groups=consistent_groups).scores["cross_validation"]["how"]["groups"] == 5
    with pytest.raises(ConfigError, match=r"8 of 8 groups are on both sides .* the first are '0', '1', '2', '3', '4';"):
        train(cache, groups=np.arange(40) // 5)


def test_groups_are_read_from_a_table(make_cache: Any, tmp_path: Path) -> None:
    codes = np.arange(40) % 2
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["ab"[c] for c in codes]))
    (tmp_path / "visits.csv").write_text("path,patient\n" + "".join(f"{i:03}.jpg,p{i // 4}\n" for i in range(40)))
    estimate = train(cache, cv=3, tune=False, groups=f"{tmp_path}/visits.csv:patient").scores["cross_validation"]
    assert estimate["how"]["groups"] == 10


@pytest.mark.parametrize("head", ["svm", "ridge"])
def test_heads_without_probabilities_get_them_from_held_out_rows(head: str, make_cache: Any, tmp_path: Path) -> None:
    codes = np.arange(150) % 3
    X = make_blobs(codes, spread=3)
    cache = make_cache(X, Labels.from_class_names(["abc"[c] for c in codes]))
    model = train(cache, head, cv=3)
    probabilities = model.predict_proba_features(X)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (model.predict_features(X) == np.array(list("abc"))[model.head.predict(X)]).all()
    estimate = model.scores["cross_validation"]
    assert estimate["metrics"]["log_loss"]["value"] < 1.0
    assert estimate["calibration"]["error_after"] < 0.15
    assert train(cache, head).calibration is not None
    loaded = load_model(model.save(tmp_path / "a.model"))
    assert np.array_equal(loaded.predict_proba_features(X), probabilities)


def test_calibration_lowers_the_error_of_an_overfitted_head(make_cache: Any) -> None:
    X, codes = make_noisy_rows(n=200)
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    plain = train(cache, params={"C": 1e4}, cv=5)
    model = train(cache, params={"C": 1e4}, cv=5, calibrate=True)
    estimate = model.scores["cross_validation"]
    assert estimate["calibration"]["error_after"] < estimate["calibration"]["error_before"] / 1.5
    assert estimate["calibration"]["temperature"] > 1.2
    assert estimate["metrics"]["log_loss"]["value"] < plain.scores["cross_validation"]["metrics"]["log_loss"]["value"]
    assert (model.predict_features(X) == plain.predict_features(X)).all()


def test_heads_are_compared_on_the_same_folds_and_the_best_is_selected(make_cache: Any) -> None:
    codes = np.arange(90) % 3
    cache = make_cache(make_blobs(codes, spread=2.5), Labels.from_class_names(["abc"[c] for c in codes]))
    comparison = compare(cache, ["centroid", "knn", "ridge"], cv=3)
    assert {row.head for row in comparison.rows} == {"centroid", "knn", "ridge"}
    assert [row.score for row in comparison.rows] == sorted((row.score for row in comparison.rows), reverse=True)
    assert comparison.model.head_name == comparison.rows[0].head
    for row in comparison.rows:
        expected = train(cache, row.head, cv=3).scores["cross_validation"]
        assert expected["metrics"]["accuracy"]["value"] == row.score
        assert expected["spread"] == row.spread == pytest.approx(np.std(expected["by_fold"], ddof=1))
        assert row.seconds_to_fit > 0
        assert row.seconds_to_predict > 0
        assert row.bytes > 100
        assert {"balanced_accuracy", "macro_f1"} <= row.scores.keys()
    assert [row["head"] for row in comparison.model.scores["comparison"]] == [row.head for row in comparison.rows]


def test_all_heads_of_a_task_are_compared(make_cache: Any) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5))
    cache = make_cache(X, Labels.from_targets(X @ rng.normal(size=5), ["size"]))
    comparison = compare(cache, cv=2, params={"mlp": {"epochs": 2}, "keras": {"epochs": 2}})
    assert {row.head for row in comparison.rows} == set(heads.list_heads("regression"))
    assert comparison.rows[0].metric == "r2" or comparison.rows[0].metric in comparison.rows[0].scores
    with pytest.raises(ConfigError, match="2 folds or more"):
        compare(cache, cv=0)


@pytest.mark.parametrize("head", ["ridge", "lda", "centroid", "logistic"])
def test_streamed_rows_give_the_same_model(head: str, make_cache: Any) -> None:
    codes = np.random.default_rng(0).integers(0, 3, 200)
    X = make_blobs(codes, spread=2.5)
    cache = make_cache(X, Labels.from_class_names(["abc"[c] for c in codes]))
    in_memory, streamed = (train(cache, head, cv=3, tune=False, memory=memory) for memory in (None, 0))
    assert not in_memory.history["streamed"]
    assert streamed.history["streamed"]
    np.testing.assert_allclose(streamed.predict_proba_features(X), in_memory.predict_proba_features(X), atol=2e-4)
    expected, actual = (
        model.scores["cross_validation"]["metrics"]["accuracy"]["value"] for model in (in_memory, streamed)
    )
    assert expected == pytest.approx(actual, abs=0.01)


def test_the_strength_is_searched_on_a_subset_of_streamed_rows(make_cache: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("featpipe.training.search.MAX_TUNING_ROWS", 100)
    X, codes = make_noisy_rows(n=200)
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    chosen = train(cache, memory=0).history["chosen"]
    assert (chosen["how"]["n"], chosen["how"]["scaled_to"]) == (100, 200)
    best = max(chosen["tried"], key=lambda candidate: candidate["score"])
    assert chosen["settings"]["C"] == pytest.approx(best["settings"]["C"] / 2)


def test_heads_that_need_all_rows_in_memory_are_refused(make_cache: Any) -> None:
    codes = np.arange(40) % 2
    cache = make_cache(make_blobs(codes), Labels.from_class_names(["ab"[c] for c in codes]))
    assert_train_refuses(ConfigError, "needs all 40 rows in memory", cache, "knn", memory=0)
    assert_train_refuses(ConfigError, "balance=smote needs all rows in memory", cache, memory=0, balance="smote")


@pytest.mark.parametrize("method", ["over", "under"])
def test_streamed_rows_are_balanced_by_sample_weights(method: str, make_cache: Any) -> None:
    codes = (np.random.default_rng(0).random(120) < 0.2).astype(int)
    X = make_blobs(codes, spread=3)
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    streamed = train(cache, params={"C": 1.0}, balance=method, memory=0)
    drawn_rows = draw_row_indices(codes, method, 0)
    scaled_rows = np.unique(drawn_rows)  # the scaler is fitted to each drawn row once
    scaler = StandardScaler().fit(X[scaled_rows])
    oracle = heads.SoftmaxRegression(1.0).fit(scaler.transform(X[drawn_rows]), codes[drawn_rows])
    probabilities = streamed.predict_proba_features(X)
    np.testing.assert_allclose(probabilities, oracle.predict_proba(scaler.transform(X)), atol=1e-4)


def test_a_balanced_head_may_stop_early(make_cache: Any) -> None:
    codes = (np.random.default_rng(0).random(120) < 0.2).astype(int)
    cache = make_cache(make_blobs(codes, spread=3), Labels.from_class_names(["ab"[c] for c in codes]))
    model = train(cache, "mlp", params={"early_stopping": True, "epochs": 3}, balance="smote")
    assert len(model.history["curves"]["validation_curve"]) == 3


def test_embeddings_that_are_not_finite_are_refused_with_their_ids(make_cache: Any) -> None:
    codes = np.arange(40) % 2
    X = make_blobs(codes)
    X[[3, 7], 2] = np.nan, np.inf
    cache = make_cache(X, Labels.from_class_names(["ab"[c] for c in codes]))
    for memory in (None, 0):
        assert_train_refuses(ConfigError, r"NaN or infinity .*\(003\.jpg, 007\.jpg\)", cache, memory=memory)
        assert_train_refuses(ConfigError, r"NaN or infinity .*\(003\.jpg, 007\.jpg\)", cache, "lda", memory=memory)


def test_early_stopping_validates_on_other_images(make_cache: Any, monkeypatch: Any) -> None:
    codes = np.repeat(np.arange(60) % 2, 2)
    image_digests = np.repeat(digests(60), 2, axis=0)
    cache = make_cache(
        make_blobs(codes, spread=3), Labels.from_class_names(["ab"[c] for c in codes]), digests=image_digests
    )
    row_counts: list[Any] = []
    original_fit = heads.MLPClassifier.fit

    def record_fit(self: Any, X: Any, y: Any, sample_weight: Any = None, validation: Any = None) -> Any:
        row_counts.append((len(X), len(validation[0])))
        return original_fit(self, X, y, sample_weight, validation)

    monkeypatch.setattr(heads.MLPClassifier, "fit", record_fit)
    model = train(cache, "mlp", params={"early_stopping": True, "epochs": 3, "validation_fraction": 0.2})
    ((fitted, validated),) = row_counts
    fit_rows, held_out = splits.make_holdout(image_digests, codes, test=0.2, seed=2)
    assert (fitted, validated) == (len(fit_rows), len(held_out))
    assert len(model.history["curves"]["validation_curve"]) == len(model.history["curves"]["loss_curve"])


@pytest.mark.parametrize("n", [0, 1, 500])
def test_training_digests_are_distinct_and_sorted(n: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2, (n, 16), np.uint8) * rng.integers(0, 256, (1, 16), np.uint8)
    rows = np.concatenate([rows, rows[: n // 2]])
    np.testing.assert_array_equal(_find_distinct_digests(rows), np.unique(rows, axis=0))
