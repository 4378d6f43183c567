"""Heads fitted to rows that are read in blocks equal heads fitted to all rows in memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from featpipe.errors import ConfigError
from featpipe.heads.closed_form import moments
from featpipe.heads.closed_form.moments import compute_moments
from featpipe.heads.closed_form.out_of_core import can_stream, fit_streamed
from featpipe.runtime.float16 import convert_float


class Source:
    """Rows that can only be read a few at a time."""

    def __init__(self, X: np.ndarray, max_rows: int) -> None:
        self._X, self._max_rows = X, max_rows
        self.shape, self.dtype = X.shape, X.dtype
        self.passes = 0.0

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        actual = self._X[rows]
        assert len(actual) <= self._max_rows, "more rows at once than fit into memory"
        self.passes += len(actual) / len(self._X)
        return actual


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(moments, "DIAGONAL_BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(moments, "GRAM_BLOCK_ELEMENTS", 700)
    monkeypatch.setattr(moments, "SHIFT_SAMPLE_ROWS", 40)


def make_data(k: int = 4, n: int = 600, d: int = 12, seed: int = 0, dtype: object = np.float64) -> tuple:
    """Columns with very different scales and offsets, one of them constant, and classes of unequal size."""
    rng = np.random.default_rng(seed)
    y = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
    X = rng.normal(size=(k, d))[y] + rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / 3
    X = X * np.geomspace(0.01, 100, d) + np.linspace(-500, 500, d)
    X[:, 5] = 7.0
    return X.astype(dtype), y


def make_pipeline(head: object, scale: object = None) -> Pipeline:
    return Pipeline([("scale", StandardScaler() if scale is None else scale), ("head", head)])


CLASSIFIERS = {
    "ridge": lambda: RidgeClassifier(),
    "ridge, balanced": lambda: RidgeClassifier(alpha=10, class_weight="balanced"),
    "ridge, weights by class": lambda: RidgeClassifier(class_weight={1: 5.0}),
    "ridge, no intercept": lambda: RidgeClassifier(fit_intercept=False),
    "lda": lambda: LinearDiscriminantAnalysis(solver="lsqr"),
    "lda, shrunk": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2),
    "lda, shrunk by Ledoit and Wolf": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "centroid": lambda: NearestCentroid(),
    "centroid, uniform": lambda: NearestCentroid(priors="empirical", shrink_threshold=0.3),
}


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_")
@pytest.mark.parametrize("scale", [None, "passthrough"])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_streamed_classifier_equals_one_fitted_in_memory(name, k, scale):
    if scale == "passthrough" and name == "ridge, no intercept":
        pytest.skip("columns of size 500 and no intercept: both are rounding errors")
    X, y = make_data(k)
    if scale == "passthrough":
        X = (X - X.mean(axis=0)) / np.maximum(X.std(axis=0), 1e-6)
        X[:, 5] = np.random.default_rng(1).normal(size=len(X))
    in_memory = make_pipeline(CLASSIFIERS[name](), scale).fit(X, y)
    streamed = fit_streamed(make_pipeline(CLASSIFIERS[name](), scale), Source(X, 500), y)
    np.testing.assert_array_equal(streamed.predict(X), in_memory.predict(X))
    if name.startswith("centroid"):
        np.testing.assert_allclose(streamed["head"].centroids_, in_memory["head"].centroids_, atol=1e-9)
        np.testing.assert_allclose(streamed.predict_proba(X), in_memory.predict_proba(X), atol=1e-9)
        np.testing.assert_allclose(streamed["head"].deviations_, in_memory["head"].deviations_, atol=1e-6)
    else:
        np.testing.assert_allclose(streamed.decision_function(X), in_memory.decision_function(X), rtol=1e-6, atol=1e-8)
    assert vars(streamed["head"]).keys() == vars(in_memory["head"]).keys()
    assert streamed["head"].n_features_in_ == 12


@pytest.mark.parametrize("t", [0, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_streamed_regressor_equals_one_fitted_in_memory(t, weighted):
    X, _ = make_data()
    rng = np.random.default_rng(3)
    y = X[:, : max(1, t)] @ rng.normal(size=(max(1, t),) * 2) + rng.normal(size=(len(X), max(1, t))) + 1e4
    y = y if t else y[:, 0]
    weights = rng.uniform(0, 3, len(X)) if weighted else None
    in_memory = make_pipeline(Ridge(alpha=2.0))
    in_memory.fit(X, y, head__sample_weight=weights)
    streamed = fit_streamed(make_pipeline(Ridge(alpha=2.0)), Source(X, 500), y, weights)
    np.testing.assert_allclose(streamed.predict(X), in_memory.predict(X), rtol=1e-8)
    assert streamed["head"].coef_.shape == in_memory["head"].coef_.shape


def test_the_streamed_scaler_equals_one_fitted_to_all_rows():
    X, y = make_data(dtype=np.float32)
    in_memory = StandardScaler().fit(X.astype(np.float64))
    scaler = fit_streamed(make_pipeline(Ridge()), Source(X, 500), y.astype(float))["scale"]
    np.testing.assert_allclose(scaler.mean_, in_memory.mean_, rtol=1e-12)
    np.testing.assert_allclose(scaler.scale_, in_memory.scale_, rtol=1e-9)
    assert scaler.scale_[5] == 1.0


@pytest.mark.parametrize("name", ["ridge", "lda", "centroid"])
def test_float16_rows_are_summed_without_loss_of_precision(name):
    X, y = make_data()
    X = ((X - X.mean(axis=0)) / np.maximum(X.std(axis=0), 1e-6) + 3).astype(np.float16)
    X[:, 5] = np.random.default_rng(1).normal(size=len(X))
    in_memory = make_pipeline(CLASSIFIERS[name]()).fit(X.astype(np.float64), y)
    streamed = fit_streamed(make_pipeline(CLASSIFIERS[name]()), Source(X, 500), y)
    actual, expected = (head.decision_function(X.astype(np.float64)) for head in (streamed, in_memory))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (3000, 70)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float16_is_converted_exactly(shape, dtype):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    x.flat[::7] = np.inf
    x.flags.writeable = False
    for array in (x, x[::2], np.asfortranarray(x)):
        actual = convert_float(array, dtype)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, array.astype(dtype))


def test_nonfinite_rows_are_refused():
    X, y = make_data()
    X[400, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_streamed(make_pipeline(NearestCentroid()), Source(X, 500), y)


def test_closed_form_heads_read_the_rows_once():
    X, y = make_data()
    for head in (RidgeClassifier(), LinearDiscriminantAnalysis(solver="lsqr"), NearestCentroid()):
        source = Source(X, 500)
        fit_streamed(make_pipeline(head), source, y)
        assert source.passes < 1.1  # the first rows are read twice, for the shift


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(np.float16, 1e-5), (np.float64, 1e-12)])
def test_moments_of_class_codes_equal_those_of_one_hot_targets(dtype, rounding, weighted, monkeypatch):
    monkeypatch.setattr(moments, "MIN_ROWS_PER_CLASS_SUM", 64)  # in several pieces
    X = np.random.default_rng(0).normal(size=(600, 12)).astype(dtype)
    codes = np.random.default_rng(1).integers(0, 3, 600)
    weights = np.random.default_rng(2).uniform(0.5, 3, 600) if weighted else None
    actual = compute_moments(X, codes, weights, n_classes=4)  # no row has the last class
    expected = compute_moments(X, np.eye(4)[codes], weights)
    for name in ("x", "gram", "y", "cross", "unweighted_sum", "unweighted_square_sum"):
        expected_array = getattr(expected, name)
        np.testing.assert_allclose(
            getattr(actual, name), expected_array, rtol=0, atol=rounding * np.abs(expected_array).max()
        )


def test_moments_of_two_halves_add_up():
    X, y = make_data()
    all_moments = compute_moments(X, y, n_classes=4)
    first_half = compute_moments(X[:300], y[:300], n_classes=4)
    second_half = compute_moments(np.concatenate([X[:40], X[300:]]), np.concatenate([y[:40], y[300:]]), n_classes=4)
    total = first_half + second_half
    mean = (X.sum(axis=0) + X[:40].sum(axis=0)) / 640
    np.testing.assert_allclose(total.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(all_moments.gram, (X - all_moments.shift).T @ (X - all_moments.shift), rtol=1e-9)
    assert total.rows == 640


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_number_of_rows():
    rng = np.random.default_rng(0)
    repeated_rows, y = rng.normal(size=(1000, 32)).astype(np.float16), rng.integers(0, 3, 1_000_000)

    class RepeatedRows:
        shape, dtype = (1_000_000, 32), repeated_rows.dtype

        def __getitem__(self, rows):
            return repeated_rows[np.arange(*rows.indices(1_000_000)) % 1000]

    tracemalloc.start()
    fit_streamed(make_pipeline(RidgeClassifier()), RepeatedRows(), y)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 60e6  # of 256 MB in float64; the labels and their codes take 8 bytes per row each


def test_a_head_that_needs_all_rows_in_memory_is_refused_with_the_alternatives():
    X, y = make_data()
    assert not can_stream(make_pipeline(KNeighborsClassifier()))
    with pytest.raises(ConfigError, match="in memory; use logistic, linear, mlp, ridge, lda or centroid"):
        fit_streamed(make_pipeline(KNeighborsClassifier()), Source(X, 500), y)
