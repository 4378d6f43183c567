"""A head fitted from sums that were collected in several steps equals one fitted to all rows."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.pipeline import Pipeline

from featpipe import heads
from featpipe.heads.closed_form.sufficient_statistics import (
    SufficientStatistics,
    accepts_statistics,
    compute_statistics,
    find_statistics_kind,
    fit_from_statistics,
    make_closed_form_head,
)

HEADS = {
    "lda": {},
    "lda, shrinkage 0.1": {"shrinkage": 0.1},
    "ridge": {"alpha": 3.0},
    "ridge, by evidence": {"alpha": "auto"},
    "centroid": {},
    "centroid, shrunk": {"shrink_threshold": 0.3},
    "lda, not scaled": {"scale": "passthrough"},
}
K, D = 5, 7


def build_head(name: str) -> Pipeline:
    return heads.build(name.split(",")[0], params=HEADS[name])


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Five classes of unequal size and spread; one has a single row, and one is constant in a column."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(K), [30, 12, 20, 1, 9])
    X = 3 * rng.normal(size=(K, D))[y] + rng.normal(size=(len(y), D)) * (1 + y[:, None]) @ rng.normal(size=(D, D)) + 50
    X[y == 1, 2] = 4.25
    return X.astype(np.float32).astype(np.float64), y


def compute_scores(pipeline: Pipeline, X: np.ndarray) -> np.ndarray:
    return np.asarray(pipeline.decision_function(X), np.float64)


@pytest.mark.parametrize("name", HEADS)
def test_statistics_of_two_steps_give_the_fit_to_all_rows(name: str, rows: Any) -> None:
    X, y = rows
    is_first_step = y < 3
    kind, exact = find_statistics_kind(build_head(name))
    assert exact
    in_steps = compute_statistics(kind, X[is_first_step], y[is_first_step], K)
    in_steps = in_steps + compute_statistics(kind, X[~is_first_step], y[~is_first_step], K, in_steps.shift)
    actual = compute_scores(fit_from_statistics(build_head(name), in_steps), X)
    at_once = compute_scores(fit_from_statistics(build_head(name), compute_statistics(kind, X, y, K)), X)
    with warnings.catch_warnings():  # scikit-learn warns about the class with one row
        warnings.simplefilter("ignore")
        expected = compute_scores(build_head(name).fit(X, y), X)
    scale = np.abs(expected).max()
    assert np.abs(actual - at_once).max() < 1e-8 * scale
    assert np.abs(actual - expected).max() < 1e-8 * scale


@pytest.mark.parametrize("name", ["lda, shrinkage 0.1", "ridge", "centroid"])
def test_new_rows_of_old_classes_give_the_fit_to_all_rows(name: str, rows: Any) -> None:
    X, y = rows
    kind = find_statistics_kind(build_head(name))[0]
    is_first_step = np.arange(len(y)) % 3 > 0
    is_first_step[y == 3] = True
    in_steps = compute_statistics(kind, X[is_first_step], y[is_first_step], K)
    in_steps = in_steps + compute_statistics(kind, X[~is_first_step], y[~is_first_step], K, in_steps.shift)
    actual, expected = (
        compute_scores(fit_from_statistics(build_head(name), statistics), X)
        for statistics in (in_steps, compute_statistics(kind, X, y, K))
    )
    assert np.abs(actual - expected).max() < 1e-8 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["lda, shrinkage 0.1", "ridge", "centroid"])
def test_merging_classes_equals_relabelling_their_rows(name: str, rows: Any) -> None:
    X, y = rows
    kind, new_codes = find_statistics_kind(build_head(name))[0], np.array([0, 1, 0, 2, 3])
    merged = compute_statistics(kind, X, y, K).remap_classes(new_codes, 4)
    actual = compute_scores(fit_from_statistics(build_head(name), merged), X)
    expected = compute_scores(fit_from_statistics(build_head(name), compute_statistics(kind, X, new_codes[y], 4)), X)
    assert np.abs(actual - expected).max() < 1e-8 * np.abs(expected).max()


def test_merged_classes_of_lda_have_the_scatter_of_their_rows(rows: Any) -> None:
    """The shrinkage of each class remains; the scatter between the merged classes is added."""
    X, y = rows
    new_codes = np.array([0, 1, 0, 2, 3])
    statistics = compute_statistics("apart", X, y, K)
    means = statistics.means
    between = sum(
        n * np.outer(m - c, m - c)
        for n, m, c in zip(
            statistics.counts, means, np.stack([X[new_codes[y] == p].mean(axis=0) for p in new_codes]), strict=True
        )
    )
    assert np.allclose(statistics.remap_classes(new_codes, 4).scatter_matrix, statistics.scatter_matrix + between)


def test_removing_a_class_keeps_the_other_means_and_the_shared_covariance(rows: Any) -> None:
    X, y = rows
    statistics = compute_statistics("gram", X, y, K)
    remaining = statistics.remap_classes(np.array([0, -1, 1, 2, 3]), 4)
    assert remaining.n_rows == len(y) - 12
    assert np.allclose(remaining.means, statistics.means[[0, 2, 3, 4]])

    def compute_covariance(s: SufficientStatistics) -> np.ndarray:
        return (s.scatter_matrix - (s.sums.T / s.counts) @ s.sums) / s.n_rows

    assert np.allclose(compute_covariance(remaining), compute_covariance(statistics))


@pytest.mark.parametrize("kind", ["diagonal", "gram", "apart"])
def test_statistics_are_stored_as_a_triangle_and_restored(kind: Any, rows: Any) -> None:
    X, y = rows
    statistics = compute_statistics(kind, X, y, K)
    restored = SufficientStatistics.from_arrays(statistics.to_arrays())
    for name, value in vars(statistics).items():
        assert np.array_equal(getattr(restored, name), value), name
    triangle = {"diagonal": 0, "gram": D * (D + 1) // 2, "apart": D * (D + 1) // 2 + D}[kind]
    assert statistics.nbytes == 8 * (K + K * D + 2 * D + triangle)
    for name in statistics.to_arrays():
        with pytest.raises((ValueError, KeyError)):
            SufficientStatistics.from_arrays(
                statistics.to_arrays() | {name: np.full_like(statistics.to_arrays()[name], np.nan)}
            )
        with pytest.raises((ValueError, KeyError)):
            SufficientStatistics.from_arrays(statistics.to_arrays() | {name: statistics.to_arrays()[name][:-1]})


@pytest.mark.parametrize("kind", ["diagonal", "gram", "apart"])
def test_sampled_rows_have_the_means_and_the_scatter_of_the_statistics(kind: Any, rows: Any) -> None:
    X, y = rows
    sampled_rows, codes = compute_statistics(kind, X, y, K).sample_rows(20_000)
    sample_statistics = compute_statistics("gram", sampled_rows, codes, K)
    assert np.allclose(sample_statistics.means, compute_statistics(kind, X, y, K).means, atol=0.2)
    spread = (
        sample_statistics.scatter_matrix
        - (sample_statistics.sums.T / sample_statistics.counts) @ sample_statistics.sums
    ) / sample_statistics.n_rows
    centred = X - np.stack([X[y == code].mean(axis=0) for code in range(K)])[y]
    assert np.allclose(np.sqrt(np.diag(spread)), np.sqrt((centred**2).mean(axis=0)), rtol=0.3)


def test_heads_without_a_closed_form_are_replaced_by_a_ridge() -> None:
    assert find_statistics_kind(heads.build("logistic")) == ("gram", False)
    assert find_statistics_kind(heads.build("ridge", params={"class_weight": "balanced"})) == ("gram", False)
    assert find_statistics_kind(heads.build("centroid", params={"metric": "manhattan"})) == ("gram", False)
    for kind, head_name in (("gram", "BayesianRidgeClassifier"), ("apart", "LinearDiscriminantAnalysis")):
        assert accepts_statistics(heads.build("logistic"), kind)
        assert type(make_closed_form_head(heads.build("logistic"), kind)[-1]).__name__ == head_name
    assert not accepts_statistics(heads.build("ridge"), "apart")
    with pytest.raises(ValueError, match="class 1 has no rows"):
        fit_from_statistics(heads.build("lda"), compute_statistics("apart", np.eye(4), np.array([0, 0, 2, 2]), 3))
    with pytest.raises(ValueError, match="needs statistics of kind gram"):
        fit_from_statistics(heads.build("ridge"), compute_statistics("diagonal", np.eye(4), np.array([0, 0, 1, 1]), 2))
