"""Heads that are fitted on rows read block by block are those that are fitted on all rows at once."""

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
    """Rows that are only given a few at a time."""

    def __init__(self, X: np.ndarray, most: int) -> None:
        self._X, self._most = X, most
        self.shape, self.dtype = X.shape, X.dtype
        self.passes = 0.0

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        actual = self._X[rows]
        assert len(actual) <= self._most, "more rows at once than fit into memory"
        self.passes += len(actual) / len(self._X)
        return actual


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(moments, "DIAGONAL_BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(moments, "GRAM_BLOCK_ELEMENTS", 700)
    monkeypatch.setattr(moments, "SHIFT_SAMPLE_ROWS", 40)


def data(k: int = 4, n: int = 600, d: int = 12, seed: int = 0, dtype: object = np.float64) -> tuple:
    """Columns of very unequal size and offset, one of them constant, classes of unequal size."""
    rng = np.random.default_rng(seed)
    y = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
    X = rng.normal(size=(k, d))[y] + rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / 3
    X = X * np.geomspace(0.01, 100, d) + np.linspace(-500, 500, d)
    X[:, 5] = 7.0
    return X.astype(dtype), y


def pipeline(head: object, scale: object = None) -> Pipeline:
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
    X, y = data(k)
    if scale == "passthrough":
        X = (X - X.mean(axis=0)) / np.maximum(X.std(axis=0), 1e-6)
        X[:, 5] = np.random.default_rng(1).normal(size=len(X))
    whole = pipeline(CLASSIFIERS[name](), scale).fit(X, y)
    streamed = fit_streamed(pipeline(CLASSIFIERS[name](), scale), Source(X, 500), y)
    np.testing.assert_array_equal(streamed.predict(X), whole.predict(X))
    if name.startswith("centroid"):
        np.testing.assert_allclose(streamed["head"].centroids_, whole["head"].centroids_, atol=1e-9)
        np.testing.assert_allclose(streamed.predict_proba(X), whole.predict_proba(X), atol=1e-9)
        np.testing.assert_allclose(streamed["head"].deviations_, whole["head"].deviations_, atol=1e-6)
    else:
        np.testing.assert_allclose(streamed.decision_function(X), whole.decision_function(X), rtol=1e-6, atol=1e-8)
    assert vars(streamed["head"]).keys() == vars(whole["head"]).keys()
    assert streamed["head"].n_features_in_ == 12


@pytest.mark.parametrize("t", [0, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_streamed_regressor_equals_one_fitted_in_memory(t, weighted):
    X, _ = data()
    rng = np.random.default_rng(3)
    y = X[:, : max(1, t)] @ rng.normal(size=(max(1, t),) * 2) + rng.normal(size=(len(X), max(1, t))) + 1e4
    y = y if t else y[:, 0]
    weights = rng.uniform(0, 3, len(X)) if weighted else None
    whole = pipeline(Ridge(alpha=2.0))
    whole.fit(X, y, head__sample_weight=weights)
    streamed = fit_streamed(pipeline(Ridge(alpha=2.0)), Source(X, 500), y, weights)
    np.testing.assert_allclose(streamed.predict(X), whole.predict(X), rtol=1e-8)
    assert streamed["head"].coef_.shape == whole["head"].coef_.shape


def test_the_streamed_scaler_equals_one_fitted_to_all_rows():
    X, y = data(dtype=np.float32)
    whole = StandardScaler().fit(X.astype(np.float64))
    scaler = fit_streamed(pipeline(Ridge()), Source(X, 500), y.astype(float))["scale"]
    np.testing.assert_allclose(scaler.mean_, whole.mean_, rtol=1e-12)
    np.testing.assert_allclose(scaler.scale_, whole.scale_, rtol=1e-9)
    assert scaler.scale_[5] == 1.0


@pytest.mark.parametrize("name", ["ridge", "lda", "centroid"])
def test_float16_rows_are_summed_without_loss_of_precision(name):
    X, y = data()
    X = ((X - X.mean(axis=0)) / np.maximum(X.std(axis=0), 1e-6) + 3).astype(np.float16)
    X[:, 5] = np.random.default_rng(1).normal(size=len(X))
    whole = pipeline(CLASSIFIERS[name]()).fit(X.astype(np.float64), y)
    streamed = fit_streamed(pipeline(CLASSIFIERS[name]()), Source(X, 500), y)
    actual, expected = (each.decision_function(X.astype(np.float64)) for each in (streamed, whole))
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
    X, y = data()
    X[400, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_streamed(pipeline(NearestCentroid()), Source(X, 500), y)


def test_closed_forms_take_one_pass():
    X, y = data()
    for head in (RidgeClassifier(), LinearDiscriminantAnalysis(solver="lsqr"), NearestCentroid()):
        source = Source(X, 500)
        fit_streamed(pipeline(head), source, y)
        assert source.passes < 1.1  # the first rows are looked at for the shift


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(np.float16, 1e-5), (np.float64, 1e-12)])
def test_moments_of_class_codes_equal_those_of_one_hot_targets(dtype, rounding, weighted, monkeypatch):
    monkeypatch.setattr(moments, "MIN_ROWS_PER_CLASS_SUM", 64)  # in several pieces
    X = np.random.default_rng(0).normal(size=(600, 12)).astype(dtype)
    codes = np.random.default_rng(1).integers(0, 3, 600)
    weights = np.random.default_rng(2).uniform(0.5, 3, 600) if weighted else None
    actual = compute_moments(X, codes, weights, n_classes=4)  # of the last class there is no row
    expected = compute_moments(X, np.eye(4)[codes], weights)
    for name in ("x", "gram", "y", "cross", "unweighted_sum", "unweighted_square_sum"):
        there = getattr(expected, name)
        np.testing.assert_allclose(getattr(actual, name), there, rtol=0, atol=rounding * np.abs(there).max())


def test_moments_of_two_halves_add_up():
    X, y = data()
    whole = compute_moments(X, y, n_classes=4)
    again = compute_moments(X[:300], y[:300], n_classes=4)
    other = compute_moments(np.concatenate([X[:40], X[300:]]), np.concatenate([y[:40], y[300:]]), n_classes=4)
    both = again + other
    mean = (X.sum(axis=0) + X[:40].sum(axis=0)) / 640
    np.testing.assert_allclose(both.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(whole.gram, (X - whole.shift).T @ (X - whole.shift), rtol=1e-9)
    assert both.rows == 640


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_number_of_rows():
    rng = np.random.default_rng(0)
    few, y = rng.normal(size=(1000, 32)).astype(np.float16), rng.integers(0, 3, 1_000_000)

    class Endless:
        shape, dtype = (1_000_000, 32), few.dtype

        def __getitem__(self, rows):
            return few[np.arange(*rows.indices(1_000_000)) % 1000]

    tracemalloc.start()
    fit_streamed(pipeline(RidgeClassifier()), Endless(), y)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 60e6  # of 256 MB in float64; the labels and their codes take 8 bytes a row each


def test_a_head_that_cannot_stream_is_an_error_that_lists_those_that_can():
    X, y = data()
    assert not can_stream(pipeline(KNeighborsClassifier()))
    with pytest.raises(ConfigError, match="in memory; use logistic, linear, mlp, ridge, lda or centroid"):
        fit_streamed(pipeline(KNeighborsClassifier()), Source(X, 500), y)
