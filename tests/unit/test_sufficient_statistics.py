"""Sums over rows are enough: a head learns them in any number of steps as from all rows at once."""

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


def head(name: str) -> Pipeline:
    return heads.build(name.split(",")[0], params=HEADS[name])


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Five classes of unequal size and spread, one of a single row, with a column that one class does not vary in."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(K), [30, 12, 20, 1, 9])
    X = 3 * rng.normal(size=(K, D))[y] + rng.normal(size=(len(y), D)) * (1 + y[:, None]) @ rng.normal(size=(D, D)) + 50
    X[y == 1, 2] = 4.25
    return X.astype(np.float32).astype(np.float64), y


def scores(pipeline: Pipeline, X: np.ndarray) -> np.ndarray:
    return np.asarray(pipeline.decision_function(X), np.float64)


@pytest.mark.parametrize("name", HEADS)
def test_statistics_of_two_steps_give_the_fit_to_all_rows(name: str, rows: Any) -> None:
    X, y = rows
    first = y < 3
    kind, exact = find_statistics_kind(head(name))
    assert exact
    in_steps = compute_statistics(kind, X[first], y[first], K)
    in_steps = in_steps + compute_statistics(kind, X[~first], y[~first], K, in_steps.shift)
    actual = scores(fit_from_statistics(head(name), in_steps), X)
    at_once = scores(fit_from_statistics(head(name), compute_statistics(kind, X, y, K)), X)
    with warnings.catch_warnings():  # of the class with one row, of which scikit-learn says that it has one row
        warnings.simplefilter("ignore")
        peer = scores(head(name).fit(X, y), X)
    scale = np.abs(peer).max()
    assert np.abs(actual - at_once).max() < 1e-8 * scale
    assert np.abs(actual - peer).max() < 1e-8 * scale


@pytest.mark.parametrize("name", ["lda, shrinkage 0.1", "ridge", "centroid"])
def test_new_rows_of_old_classes_give_the_fit_to_all_rows(name: str, rows: Any) -> None:
    X, y = rows
    kind = find_statistics_kind(head(name))[0]
    early = np.arange(len(y)) % 3 > 0
    early[y == 3] = True
    parts = compute_statistics(kind, X[early], y[early], K)
    parts = parts + compute_statistics(kind, X[~early], y[~early], K, parts.shift)
    actual, peer = (scores(fit_from_statistics(head(name), s), X) for s in (parts, compute_statistics(kind, X, y, K)))
    assert np.abs(actual - peer).max() < 1e-8 * np.abs(peer).max()


@pytest.mark.parametrize("name", ["lda, shrinkage 0.1", "ridge", "centroid"])
def test_merging_classes_equals_relabelling_their_rows(name: str, rows: Any) -> None:
    X, y = rows
    kind, place = find_statistics_kind(head(name))[0], np.array([0, 1, 0, 2, 3])
    merged = compute_statistics(kind, X, y, K).remap_classes(place, 4)
    actual = scores(fit_from_statistics(head(name), merged), X)
    peer = scores(fit_from_statistics(head(name), compute_statistics(kind, X, place[y], 4)), X)
    assert np.abs(actual - peer).max() < 1e-8 * np.abs(peer).max()


def test_merged_classes_of_lda_have_the_scatter_of_their_rows(rows: Any) -> None:
    """What shrinkage added to each class stays; the rest is that of the rows under one name."""
    X, y = rows
    place = np.array([0, 1, 0, 2, 3])
    apart = compute_statistics("apart", X, y, K)
    means = apart.means
    between = sum(
        n * np.outer(m - c, m - c)
        for n, m, c in zip(apart.counts, means, np.stack([X[place[y] == p].mean(axis=0) for p in place]), strict=True)
    )
    assert np.allclose(apart.remap_classes(place, 4).scatter_matrix, apart.scatter_matrix + between)


def test_removing_a_class_keeps_the_other_means_and_the_shared_covariance(rows: Any) -> None:
    X, y = rows
    whole = compute_statistics("gram", X, y, K)
    left = whole.remap_classes(np.array([0, -1, 1, 2, 3]), 4)
    assert left.n_rows == len(y) - 12
    assert np.allclose(left.means, whole.means[[0, 2, 3, 4]])

    def within(s: SufficientStatistics) -> np.ndarray:
        return (s.scatter_matrix - (s.sums.T / s.counts) @ s.sums) / s.n_rows

    assert np.allclose(within(left), within(whole))


@pytest.mark.parametrize("kind", ["diagonal", "gram", "apart"])
def test_statistics_are_stored_as_a_triangle_and_restored(kind: Any, rows: Any) -> None:
    X, y = rows
    whole = compute_statistics(kind, X, y, K)
    again = SufficientStatistics.from_arrays(whole.to_arrays())
    for name, value in vars(whole).items():
        assert np.array_equal(getattr(again, name), value), name
    triangle = {"diagonal": 0, "gram": D * (D + 1) // 2, "apart": D * (D + 1) // 2 + D}[kind]
    assert whole.nbytes == 8 * (K + K * D + 2 * D + triangle)
    for name in whole.to_arrays():
        with pytest.raises((ValueError, KeyError)):
            SufficientStatistics.from_arrays(whole.to_arrays() | {name: np.full_like(whole.to_arrays()[name], np.nan)})
        with pytest.raises((ValueError, KeyError)):
            SufficientStatistics.from_arrays(whole.to_arrays() | {name: whole.to_arrays()[name][:-1]})


@pytest.mark.parametrize("kind", ["diagonal", "gram", "apart"])
def test_sampled_rows_have_the_means_and_the_scatter_of_the_statistics(kind: Any, rows: Any) -> None:
    X, y = rows
    drawn, codes = compute_statistics(kind, X, y, K).sample_rows(20_000)
    again = compute_statistics("gram", drawn, codes, K)
    assert np.allclose(again.means, compute_statistics(kind, X, y, K).means, atol=0.2)
    spread = (again.scatter_matrix - (again.sums.T / again.counts) @ again.sums) / again.n_rows
    centred = X - np.stack([X[y == code].mean(axis=0) for code in range(K)])[y]
    assert np.allclose(np.sqrt(np.diag(spread)), np.sqrt((centred**2).mean(axis=0)), rtol=0.3)


def test_heads_without_a_closed_form_are_replaced_by_a_ridge() -> None:
    assert find_statistics_kind(heads.build("logistic")) == ("gram", False)
    assert find_statistics_kind(heads.build("ridge", params={"class_weight": "balanced"})) == ("gram", False)
    assert find_statistics_kind(heads.build("centroid", params={"metric": "manhattan"})) == ("gram", False)
    for kind, head in (("gram", "BayesianRidgeClassifier"), ("apart", "LinearDiscriminantAnalysis")):
        assert accepts_statistics(heads.build("logistic"), kind)
        assert type(make_closed_form_head(heads.build("logistic"), kind)[-1]).__name__ == head
    assert not accepts_statistics(heads.build("ridge"), "apart")
    with pytest.raises(ValueError, match="class 1 has no rows"):
        fit_from_statistics(heads.build("lda"), compute_statistics("apart", np.eye(4), np.array([0, 0, 2, 2]), 3))
    with pytest.raises(ValueError, match="takes statistics of kind gram"):
        fit_from_statistics(heads.build("ridge"), compute_statistics("diagonal", np.eye(4), np.array([0, 0, 1, 1]), 2))
