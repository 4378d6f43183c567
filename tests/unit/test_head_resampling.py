"""Rows are resampled as by imbalanced-learn, and only in fits."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from imblearn.over_sampling import SMOTE, RandomOverSampler
from imblearn.pipeline import make_pipeline as resampling_pipeline
from imblearn.under_sampling import RandomUnderSampler
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from featpipe import heads
from featpipe.config import RESAMPLING_METHODS
from featpipe.errors import ConfigError
from featpipe.heads.resampling import BalancedClassifier, draw_row_indices, fit_balanced, resample


def make_imbalanced_rows(
    sizes: tuple[int, ...] = (80, 25, 9), d: int = 6, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (rng.normal(size=(len(y), d)) * (1, 5, 0.1, 1, 1, 1)[:d] + 1.5 * y[:, None]).astype(np.float32), y


@pytest.mark.parametrize(("method", "sampler_class"), [("over", RandomOverSampler), ("under", RandomUnderSampler)])
def test_rows_are_drawn_as_imbalanced_learn_draws_them(method: str, sampler_class: Any) -> None:
    X, y = make_imbalanced_rows()
    sampler = sampler_class(random_state=3)
    sampler.fit_resample(X, y)
    rows = draw_row_indices(y, method, 3)
    np.testing.assert_array_equal(rows, np.sort(sampler.sample_indices_))
    np.testing.assert_array_equal(np.bincount(y[rows]), [80 if method == "over" else 9] * 3)
    resampled, labels = resample(X, y, method, 3)
    np.testing.assert_array_equal(resampled, X[rows])
    np.testing.assert_array_equal(labels, y[rows])


def test_oversampling_draws_every_row_and_undersampling_none_twice() -> None:
    y = make_imbalanced_rows()[1]
    assert set(draw_row_indices(y, "over", 0)) == set(range(len(y)))
    assert len(set(draw_row_indices(y, "under", 0))) == 27


def test_counts_of_drawn_rows_are_equivalent_sample_weights() -> None:
    X, y = make_imbalanced_rows()
    X = X.astype(np.float64)
    rows = draw_row_indices(y, "over", 0)
    resampled = LogisticRegression(tol=1e-10, max_iter=1000).fit(X[rows], y[rows])
    weights = np.bincount(rows, minlength=len(y))
    weighted = LogisticRegression(tol=1e-10, max_iter=1000).fit(X, y, sample_weight=weights)
    np.testing.assert_allclose(resampled.predict_proba(X), weighted.predict_proba(X), atol=1e-4)


def test_synthetic_rows_equal_those_of_imbalanced_learns_smote() -> None:
    X, y = make_imbalanced_rows()
    expected, labels = SMOTE(random_state=np.random.RandomState(5)).fit_resample(X, y)
    actual, actual_labels = resample(X, y, "smote", 5)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(actual_labels, labels)


def test_synthetic_rows_lie_between_a_row_and_a_neighbour_of_its_class() -> None:
    X, y = make_imbalanced_rows((60, 20))
    actual, labels = resample(X.astype(np.float64), y, "smote", 0, neighbors=3)
    class_rows = X[y == 1].astype(np.float64)
    neighbor_indices = (
        NearestNeighbors(n_neighbors=4).fit(class_rows).kneighbors(class_rows, return_distance=False)[:, 1:]
    )
    pairs = [(class_rows[i], class_rows[j]) for i in range(len(class_rows)) for j in neighbor_indices[i]]
    for row in actual[len(X) :]:
        gaps = [np.linalg.norm(a - row) + np.linalg.norm(b - row) - np.linalg.norm(a - b) for a, b in pairs]
        assert min(gaps) < 1e-9
    assert np.bincount(labels).tolist() == [60, 60]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_smote_uses_fewer_neighbours_for_a_class_with_few_rows(size: int) -> None:
    X, y = make_imbalanced_rows((30, size, 12))
    actual, labels = resample(X, y, "smote", 0)
    assert np.bincount(labels).tolist() == [30, 30, 30]
    class_rows = X[y == 1]
    synthetic_rows = actual[len(X) :][labels[len(X) :] == 1]
    assert (synthetic_rows >= class_rows.min(axis=0) - 1e-6).all()
    assert (synthetic_rows <= class_rows.max(axis=0) + 1e-6).all()


def test_smote_refuses_a_class_with_one_row_and_names_the_remedy() -> None:
    X, y = make_imbalanced_rows((30, 1, 12))
    with pytest.raises(ConfigError, match=r"class 'bee' has one training row, .* fewer folds, or use over or class_w"):
        resample(X, np.array(["ape", "bee", "cow"])[y], "smote", 0)
    assert np.bincount(resample(X, y, "over", 0)[1]).tolist() == [30, 30, 30]


@pytest.mark.parametrize("method", RESAMPLING_METHODS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_dtype_is_preserved(method: str, kind: Any) -> None:
    X, y = make_imbalanced_rows()
    assert resample(X.astype(kind), y, method, 0)[0].dtype == kind


@pytest.mark.parametrize("method", RESAMPLING_METHODS)
@pytest.mark.parametrize("kind", [str, object, np.int32])
def test_classes_may_be_text_or_numbers(method: str, kind: Any) -> None:
    X, y = make_imbalanced_rows()
    names = y.astype(np.int32) if kind is np.int32 else np.array(["a", "b", "c"], dtype=kind)[y]
    actual, labels = resample(X, names, method, 0)
    expected, codes = resample(X, y, method, 0)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.unique(labels, return_inverse=True)[1], codes)


@pytest.mark.parametrize("method", RESAMPLING_METHODS)
def test_classes_of_equal_size_are_unchanged(method: str) -> None:
    X, y = make_imbalanced_rows((20, 20))
    actual, labels = resample(X, y, method, 0)
    np.testing.assert_array_equal(actual, X)
    np.testing.assert_array_equal(labels, y)


@pytest.mark.parametrize("method", RESAMPLING_METHODS)
def test_results_depend_only_on_the_seed(method: str) -> None:
    X, y = make_imbalanced_rows()
    first, repeated, other_seed = (resample(X, y, method, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, repeated)
    assert not np.array_equal(first, other_seed)


@pytest.mark.parametrize("y", [np.zeros((9, 2)), np.linspace(0, 1, 9)])
def test_a_y_without_one_class_per_row_is_refused(y: np.ndarray) -> None:
    for method in RESAMPLING_METHODS:
        with pytest.raises(ConfigError, match="cannot be resampled; expected one class per row"):
            resample(np.zeros((9, 2)), y, method)


def test_an_unknown_method_suggests_the_nearest_match() -> None:
    with pytest.raises(ConfigError, match="unknown resampling method 'smot'; did you mean 'smote'"):
        resample(*make_imbalanced_rows(), "smot")


@pytest.mark.parametrize("method", RESAMPLING_METHODS)
def test_the_error_without_imbalanced_learn_names_the_package_to_install(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imblearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'featpipe\[balance\]', or use class_weight=balanced"):
        resample(*make_imbalanced_rows(), method)


@pytest.mark.parametrize("method", RESAMPLING_METHODS)
def test_the_scaler_is_fitted_to_original_rows_and_the_head_to_resampled_ones(method: str) -> None:
    X, y = make_imbalanced_rows()
    actual = fit_balanced(make_pipeline(StandardScaler(), LogisticRegression()), X, y, method, 0)
    scaler = StandardScaler().fit(X)
    oracle = LogisticRegression().fit(*resample(scaler.transform(X), y, method, 0))
    np.testing.assert_array_equal(actual[0].mean_, scaler.mean_)
    np.testing.assert_array_equal(actual.predict_proba(X), oracle.predict_proba(scaler.transform(X)))


def test_a_balanced_pipeline_equals_that_of_imbalanced_learn() -> None:
    X, y = make_imbalanced_rows()
    steps = StandardScaler(), LogisticRegression(tol=1e-8, max_iter=1000)
    oracle = resampling_pipeline(steps[0], SMOTE(random_state=np.random.RandomState(1)), steps[1]).fit(X, y)
    actual = BalancedClassifier(make_pipeline(*steps), "smote", 1).fit(X, y)
    np.testing.assert_allclose(actual.predict_proba(X), oracle.predict_proba(X), atol=1e-6)


def test_the_fitted_head_is_saved_without_imbalanced_learn() -> None:
    X, y = make_imbalanced_rows()
    pipeline = fit_balanced(heads.build("logistic"), X, y, "smote", 0)
    data = heads.dumps(pipeline)
    assert b"imblearn" not in data
    assert b"Balanced" not in data
    np.testing.assert_array_equal(heads.loads(data).predict_proba(X), pipeline.predict_proba(X))


def test_held_out_rows_are_neither_resampled_nor_used_in_fits() -> None:
    X, y = make_imbalanced_rows()
    fitted_rows: list[np.ndarray] = []

    class Spy(LogisticRegression):
        def fit(self, X: Any, y: Any) -> Any:
            fitted_rows.append(X)
            return super().fit(X, y)

    folds = list(StratifiedKFold(3).split(X, y))
    predictions = cross_val_predict(BalancedClassifier(Spy(), "over", 0), X, y, cv=folds)
    assert len(predictions) == len(y)
    for (train, test), rows in zip(folds, fitted_rows, strict=True):
        held_out_rows = {row.tobytes() for row in X[test]}
        assert {row.tobytes() for row in rows} == {row.tobytes() for row in X[train]}
        assert not held_out_rows & {row.tobytes() for row in rows}


def test_a_grid_search_sets_parameters_of_the_inner_head() -> None:
    X, y = make_imbalanced_rows()
    search = GridSearchCV(
        BalancedClassifier(heads.build("logistic", random_state=0), "over", 0),
        {"estimator__head__C": [1e-4, 1.0]},
        cv=3,
    )
    search.fit(X, y)
    assert search.best_params_["estimator__head__C"] == search.best_estimator_.estimator_.named_steps["head"].C
    assert search.best_params_["estimator__head__C"] == search.best_estimator_.estimator["head"].C


def test_balancing_raises_the_recall_of_a_rare_class_and_records_the_prior() -> None:
    X, y = make_imbalanced_rows((600, 30), d=1)
    plain = LogisticRegression(max_iter=1000).fit(X, y).predict(X)[y == 1].mean()
    for method in RESAMPLING_METHODS:
        balanced = BalancedClassifier(LogisticRegression(max_iter=1000), method, 0).fit(X, y)
        assert balanced.predict(X)[y == 1].mean() > plain
        np.testing.assert_allclose(balanced.prior_, [600 / 630, 30 / 630])


def test_early_stopping_does_not_validate_on_copies_of_training_rows() -> None:
    X, y = make_imbalanced_rows()
    head = heads.build("mlp", params={"early_stopping": True})
    with pytest.raises(ConfigError, match="with balance over early_stopping would validate on copies"):
        fit_balanced(head, X, y, "over", 0)


@pytest.mark.parametrize(
    ("settings", "message"), [({"how": "more"}, "how is 'more'"), ({"neighbors": 0}, "neighbors is 0")]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedClassifier(LogisticRegression(), **settings).check_params()


def test_a_balanced_head_has_only_the_methods_of_its_head() -> None:
    from sklearn.svm import LinearSVC

    assert not hasattr(BalancedClassifier(LinearSVC()), "predict_proba")
    assert hasattr(BalancedClassifier(LinearSVC()), "decision_function")
    copy = clone(BalancedClassifier(LinearSVC(C=3), "under", 7, neighbors=2))
    assert (copy.how, copy.random_state, copy.neighbors, copy.estimator.C) == ("under", 7, 2, 3)


@parametrize_with_checks(
    [
        BalancedClassifier(LogisticRegression(), "over", 0),
        BalancedClassifier(make_pipeline(StandardScaler(), LogisticRegression()), "under", 0),
        BalancedClassifier(LogisticRegression(), "smote", 0),
    ]
)
def test_a_balanced_classifier_passes_the_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)
