"""Diagnostics find what the tests planted: near duplicates, label errors, errors, and a power law."""

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


def make_unit_rows(m, d=12, seed=0):
    X = np.random.default_rng(seed).normal(size=(m, d)).astype(np.float32)
    return X / np.linalg.norm(X, axis=1, keepdims=True)


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize(("columns", "span"), [(11, 64), (57, 3)])
def test_neighbours_match_scikit_learn_for_any_block_size(monkeypatch, exclude_self, columns, span):
    monkeypatch.setattr(nearest_neighbors, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(nearest_neighbors, "_BLOCK_COLUMNS", columns)
    monkeypatch.setattr(nearest_neighbors, "_SPAN_COLUMNS", span)
    rows, references = make_unit_rows(100), make_unit_rows(120, seed=1)
    references = rows if exclude_self else references
    similarities, indices = find_nearest_neighbors(rows, references, 4, exclude_self=exclude_self)
    oracle = NearestNeighbors(n_neighbors=4 + exclude_self, metric="cosine", algorithm="brute").fit(references)
    distances, expected = oracle.kneighbors(rows)
    np.testing.assert_array_equal(indices, expected[:, exclude_self:])
    np.testing.assert_allclose(1 - similarities, distances[:, exclude_self:], atol=1e-5)
    np.testing.assert_allclose(
        compute_outlier_scores(similarities), distances[:, exclude_self:].mean(axis=1), atol=1e-5
    )


def test_k_is_limited_to_the_number_of_references():
    rows = make_unit_rows(3)
    assert find_nearest_neighbors(rows, rows, 10, exclude_self=True)[1].shape == (3, 2)
    assert find_nearest_neighbors(rows, rows[:0], 10)[0].shape == (3, 0)
    assert find_nearest_neighbors(rows[:1], rows[:1], 10, exclude_self=True)[0].shape == (1, 0)


def test_near_duplicates_are_found_once_even_if_all_cosines_are_high():
    X = abs(make_unit_rows(40)) + 5  # all cosines above 0.99, as after a ReLU
    X[7] = X[30] * 1.001
    rows = CenteredNormalizer.from_embeddings(X)(X)
    pairs = find_near_duplicates(*find_nearest_neighbors(rows, rows, 3, exclude_self=True), within_rows=True)
    assert (pairs.rows.tolist(), pairs.others.tolist()) == ([7], [30])
    assert pairs.similarities[0] > 0.999


def make_probabilities(m=400, k=4, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, m)
    logits = rng.normal(size=(m, k))
    logits[np.arange(m), y] += 5
    p = np.exp(logits)
    return y, p / p.sum(axis=1, keepdims=True)


def make_predictions(y, p, names="abcd"):
    return LabeledPredictions("classification", [f"{i}.jpg" for i in range(len(y))], y, p, names)


def index_by_name(findings):
    return {finding.name: finding for finding in findings}


def test_planted_label_errors_are_found_with_their_correct_labels():
    pytest.importorskip("cleanlab")
    y, p = make_probabilities()
    labels = y.copy()
    wrong_rows = np.arange(0, 60, 3)
    labels[wrong_rows] = (labels[wrong_rows] + 1) % 4
    finding = index_by_name(make_prediction_findings(make_predictions(labels, p)))["label_errors"]
    ids = {row["id"] for row in finding.rows}
    expected = {f"{i}.jpg" for i in wrong_rows}
    assert len(ids & expected) >= 18
    assert len(ids - expected) <= 4
    suggested = {row["id"]: row["suggested"] for row in finding.rows}
    assert all(suggested[f"{i}.jpg"] == "abcd"[y[i]] for i in wrong_rows if f"{i}.jpg" in ids)


def test_without_cleanlab_label_errors_have_a_note_and_other_findings_are_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    findings = index_by_name(make_prediction_findings(make_predictions(*make_probabilities())))
    assert not findings["label_errors"].rows
    assert "featpipe[labels]" in findings["label_errors"].note
    assert findings["unsure"].rows


def test_errors_uncertain_rows_and_confused_pairs_are_sorted():
    y, p = make_probabilities(seed=3)
    p = 0.6 * p + 0.1
    findings = index_by_name(make_prediction_findings(make_predictions(y, p)))
    wrong = np.flatnonzero(p.argmax(axis=1) != y)
    order = wrong[np.argsort(-p[wrong].max(axis=1), kind="stable")]
    assert [row["id"] for row in findings["mistakes"].rows] == [f"{i}.jpg" for i in order]
    ordered = np.sort(p, axis=1)
    assert findings["unsure"].rows[0]["id"] == f"{np.argmin(ordered[:, -1] - ordered[:, -2])}.jpg"
    pairs = [(row["label"], row["predicted"]) for row in findings["confused"].rows]
    counts = [sum(y[i] == "abcd".index(a) and p[i].argmax() == "abcd".index(b) for i in wrong) for a, b in pairs]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == len(wrong)


def test_multilabel_and_regression_tasks_have_findings():
    rng = np.random.default_rng(0)
    y = (rng.random((200, 3)) < 0.5).astype(int)
    p = np.clip(0.05 + 0.9 * y + rng.normal(0, 0.03, y.shape), 0, 1)
    y[5] = 1 - y[5]
    findings = index_by_name(
        make_prediction_findings(LabeledPredictions("multilabel", [str(i) for i in range(200)], y, p, "abc"))
    )
    assert findings["mistakes"].rows[0]["id"] == "5"
    assert findings["mistakes"].total == 1
    target = rng.normal(size=100)
    findings = index_by_name(
        make_prediction_findings(
            LabeledPredictions("regression", [str(i) for i in range(100)], target, target + (np.arange(100) == 9), "t")
        )
    )
    assert findings["errors"].rows[0]["id"] == "9"


def test_findings_are_written_as_csv_and_files_of_empty_ones_removed(tmp_path):
    special_id = '=1+1, "quoted"\nline'
    full = Finding("some", "Some", "…", ("id", "label"), [{"id": special_id, "label": "a"}], 1)
    empty = Finding("none", "None", "…", ("id",))
    (tmp_path / "none.csv").write_text("id\nold.jpg\n")
    assert write_findings([full, empty], tmp_path) == [tmp_path / "some.csv"]
    assert not (tmp_path / "none.csv").exists()
    with open(tmp_path / "some.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"id": special_id, "label": "a"}]


def test_a_planted_power_law_is_forecast_within_its_interval():
    rng = np.random.default_rng(0)
    sizes = np.array([100, 200, 400, 800, 1600])
    expected_errors = 0.04 + 4 * sizes**-0.7
    errors = (rng.random((5, 3000)) < expected_errors[:, None]).astype(float)
    curve = extrapolate_learning_curve(sizes, errors)
    truth = 0.04 + 4 * 3200**-0.7
    assert curve.ahead == 3200
    assert curve.low <= truth <= curve.high
    assert curve.high - curve.low < 0.05
    assert curve.expected == pytest.approx(truth, abs=0.015)
    assert curve.to_dict() == extrapolate_learning_curve(sizes, errors).to_dict()


def test_a_flat_learning_curve_forecasts_no_gain():
    errors = (np.random.default_rng(1).random((4, 500)) < 0.2).astype(float)
    curve = extrapolate_learning_curve([50, 100, 200, 400], errors)
    assert curve.low < curve.errors[-1] < curve.high + 0.02
    assert "no significant gain" in str(curve) or curve.high < curve.errors[-1]
