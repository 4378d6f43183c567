"""What to look at next is found: planted copies, planted label errors, planted outliers, and a law that was planted."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from featpipe.diagnostics import (
    Finding,
    LabeledPredictions,
    compute_outlier_scores,
    extrapolate_learning_curve,
    find_near_duplicates,
    find_nearest_neighbors,
    make_prediction_findings,
    nearest_neighbors,
    write_findings,
)
from featpipe.diagnostics.nearest_neighbors import CenteredNormalizer


def unit(m, d=12, seed=0):
    X = np.random.default_rng(seed).normal(size=(m, d)).astype(np.float32)
    return X / np.linalg.norm(X, axis=1, keepdims=True)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(("columns", "span"), [(11, 64), (57, 3)])
def test_neighbours_are_those_of_scikit_learn_whatever_the_blocks(monkeypatch, same, columns, span):
    monkeypatch.setattr(nearest_neighbors, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(nearest_neighbors, "_BLOCK_COLUMNS", columns)
    monkeypatch.setattr(nearest_neighbors, "_SPAN_COLUMNS", span)
    rows, others = unit(100), unit(120, seed=1)
    others = rows if same else others
    similar, numbers = find_nearest_neighbors(rows, others, 4, exclude_self=same)
    oracle = NearestNeighbors(n_neighbors=4 + same, metric="cosine", algorithm="brute").fit(others)
    distances, expected = oracle.kneighbors(rows)
    np.testing.assert_array_equal(numbers, expected[:, same:])
    np.testing.assert_allclose(1 - similar, distances[:, same:], atol=1e-5)
    np.testing.assert_allclose(compute_outlier_scores(similar), distances[:, same:].mean(axis=1), atol=1e-5)


def test_fewer_others_than_neighbours_are_all_named():
    rows = unit(3)
    assert find_nearest_neighbors(rows, rows, 10, exclude_self=True)[1].shape == (3, 2)
    assert find_nearest_neighbors(rows, rows[:0], 10)[0].shape == (3, 0)
    assert find_nearest_neighbors(rows[:1], rows[:1], 10, exclude_self=True)[0].shape == (1, 0)


def test_copies_are_found_once_also_where_a_relu_makes_everything_similar():
    X = abs(unit(40)) + 5  # all in one corner: cosines above 0.99
    X[7] = X[30] * 1.001
    rows = CenteredNormalizer.from_embeddings(X)(X)
    pairs = find_near_duplicates(*find_nearest_neighbors(rows, rows, 3, exclude_self=True), within_rows=True)
    assert (pairs.rows.tolist(), pairs.others.tolist()) == ([7], [30])
    assert pairs.similarities[0] > 0.999


def probabilities(m=400, k=4, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, m)
    logits = rng.normal(size=(m, k))
    logits[np.arange(m), y] += 5
    p = np.exp(logits)
    return y, p / p.sum(axis=1, keepdims=True)


def judged(y, p, names="abcd"):
    return LabeledPredictions("classification", [f"{i}.jpg" for i in range(len(y))], y, p, names)


def tables(found):
    return {finding.name: finding for finding in found}


def test_planted_label_errors_are_found_first():
    pytest.importorskip("cleanlab")
    y, p = probabilities()
    given = y.copy()
    planted = np.arange(0, 60, 3)
    given[planted] = (given[planted] + 1) % 4
    found = tables(make_prediction_findings(judged(given, p)))["label_errors"]
    ids = {row["id"] for row in found.rows}
    expected = {f"{i}.jpg" for i in planted}
    assert len(ids & expected) >= 18
    assert len(ids - expected) <= 4
    suggested = {row["id"]: row["suggested"] for row in found.rows}
    assert all(suggested[f"{i}.jpg"] == "abcd"[y[i]] for i in planted if f"{i}.jpg" in ids)


def test_without_cleanlab_the_other_tables_are_there_and_the_first_says_why_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    found = tables(make_prediction_findings(judged(*probabilities())))
    assert not found["label_errors"].rows
    assert "featpipe[labels]" in found["label_errors"].note
    assert found["unsure"].rows


def test_mistakes_doubts_and_pairs_are_in_order():
    y, p = probabilities(seed=3)
    p = 0.6 * p + 0.1
    found = tables(make_prediction_findings(judged(y, p)))
    wrong = np.flatnonzero(p.argmax(axis=1) != y)
    order = wrong[np.argsort(-p[wrong].max(axis=1), kind="stable")]
    assert [row["id"] for row in found["mistakes"].rows] == [f"{i}.jpg" for i in order]
    two = np.sort(p, axis=1)
    assert found["unsure"].rows[0]["id"] == f"{np.argmin(two[:, -1] - two[:, -2])}.jpg"
    pairs = [(row["label"], row["predicted"]) for row in found["confused"].rows]
    counts = [sum(y[i] == "abcd".index(a) and p[i].argmax() == "abcd".index(b) for i in wrong) for a, b in pairs]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == len(wrong)


def test_several_labels_and_numbers_have_tables_too():
    rng = np.random.default_rng(0)
    y = (rng.random((200, 3)) < 0.5).astype(int)
    p = np.clip(0.05 + 0.9 * y + rng.normal(0, 0.03, y.shape), 0, 1)
    y[5] = 1 - y[5]
    found = tables(
        make_prediction_findings(LabeledPredictions("multilabel", [str(i) for i in range(200)], y, p, "abc"))
    )
    assert found["mistakes"].rows[0]["id"] == "5"
    assert found["mistakes"].total == 1
    target = rng.normal(size=100)
    found = tables(
        make_prediction_findings(
            LabeledPredictions("regression", [str(i) for i in range(100)], target, target + (np.arange(100) == 9), "t")
        )
    )
    assert found["errors"].rows[0]["id"] == "9"


def test_tables_are_written_and_those_of_before_that_are_empty_now_are_removed(tmp_path):
    nasty = '=1+1, "quoted"\nline'
    full = Finding("some", "Some", "…", ("id", "label"), [{"id": nasty, "label": "a"}], 1)
    empty = Finding("none", "None", "…", ("id",))
    (tmp_path / "none.csv").write_text("id\nold.jpg\n")
    assert write_findings([full, empty], tmp_path) == [tmp_path / "some.csv"]
    assert not (tmp_path / "none.csv").exists()
    with open(tmp_path / "some.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"id": nasty, "label": "a"}]


def test_a_planted_law_is_forecast_within_its_interval():
    rng = np.random.default_rng(0)
    sizes = np.array([100, 200, 400, 800, 1600])
    law = 0.04 + 4 * sizes**-0.7
    errors = (rng.random((5, 3000)) < law[:, None]).astype(float)
    found = extrapolate_learning_curve(sizes, errors)
    truth = 0.04 + 4 * 3200**-0.7
    assert found.ahead == 3200
    assert found.low <= truth <= found.high
    assert found.high - found.low < 0.05
    assert found.expected == pytest.approx(truth, abs=0.015)
    assert found.to_dict() == extrapolate_learning_curve(sizes, errors).to_dict()


def test_a_curve_that_does_not_fall_promises_nothing():
    errors = (np.random.default_rng(1).random((4, 500)) < 0.2).astype(float)
    found = extrapolate_learning_curve([50, 100, 200, 400], errors)
    assert found.low < found.errors[-1] < found.high + 0.02
    assert "no gain" in str(found) or found.high < found.errors[-1]
