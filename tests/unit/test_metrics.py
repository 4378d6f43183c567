import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, spearmanr
from sklearn import metrics as sk

from featpipe.errors import ConfigError
from featpipe.metrics import (
    METRICS,
    SELECTION_METRICS,
    Interval,
    compare_paired,
    format_protocol,
    score,
    wilson_interval,
)
from featpipe.metrics.paired_tests import mcnemar_test

CLASSES = tuple("abcdefgh")
PROPORTION_METRICS = ("accuracy", "top5_accuracy", "exact_match")


def make_predictions(m=300, k=8, sharpness=1.5, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, k, m)
    logits = rng.normal(size=(m, k)).round(1)
    logits[np.arange(m), codes] += sharpness
    p = np.exp(logits)
    return codes, p / p.sum(axis=1, keepdims=True)


def to_class_names(codes):
    return [CLASSES[code] for code in codes]


def compute_calibration_error(confidence, is_correct, bins=15):
    """The plain definition: bin by bin, the mean confidence minus the accuracy."""
    edges, error = np.linspace(0, 1, bins + 1), 0.0
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        is_in_bin = (confidence >= low) & ((confidence < high) | (i == bins - 1))
        if is_in_bin.any():
            error += is_in_bin.mean() * abs(confidence[is_in_bin].mean() - is_correct[is_in_bin].mean())
    return error


def compute_classification_scores(codes, p):
    predicted, present = p.argmax(axis=1), np.unique(codes)
    return {
        "accuracy": sk.accuracy_score(codes, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(codes, predicted),
        "macro_f1": sk.f1_score(codes, predicted, average="macro"),
        "top5_accuracy": sk.top_k_accuracy_score(codes, p, k=5, labels=range(p.shape[1])),
        "log_loss": sk.log_loss(codes, p, labels=range(p.shape[1])),
        "calibration_error": compute_calibration_error(p.max(axis=1), predicted == codes),
        "roc_auc": np.mean([sk.roc_auc_score(codes == c, p[:, c]) for c in present]),
        "pr_auc": np.mean([sk.average_precision_score(codes == c, p[:, c]) for c in present]),
    }


def compute_multilabel_scores(y, p):
    predicted = p >= 0.5
    return {
        "mean_average_precision": sk.average_precision_score(y, p, average="macro"),
        "micro_f1": sk.f1_score(y, predicted, average="micro"),
        "macro_f1": sk.f1_score(y, predicted, average="macro"),
        "exact_match": sk.accuracy_score(y, predicted),
        "calibration_error": compute_calibration_error(np.ravel(p), np.ravel(y)),
    }


def compute_regression_scores(y, p):
    return {
        "mae": sk.mean_absolute_error(y, p),
        "rmse": sk.root_mean_squared_error(y, p),
        "r2": sk.r2_score(y, p),
        "spearman": np.mean([spearmanr(y[:, c], p[:, c]).statistic for c in range(y.shape[1])]),
    }


def compute_resampled_intervals(y, p, oracle, bootstrap, seed):
    """The intervals from explicit resamples of the rows."""
    rng = np.random.default_rng(seed)
    values = [oracle(y[rows], p[rows]) for rows in rng.integers(0, len(y), (bootstrap, len(y)))]
    return {name: np.percentile([v[name] for v in values], (2.5, 97.5)) for name in values[0]}


def make_multilabel_rows(m=200, k=4, seed=0):
    rng = np.random.default_rng(seed)
    y = (rng.random((m, k)) < 0.4).astype(int)
    return y, np.clip(0.35 * y + 0.65 * rng.random((m, k)), 0, 1).round(2)


def make_regression_rows(m=200, t=2, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.normal(10, 3, (m, t)).round(1)
    return y, (y + rng.normal(0, 2, (m, t))).round(1)


def test_classification_scores_equal_those_of_scikit_learn():
    codes, p = make_predictions()
    scores = score("classification", to_class_names(codes), p, CLASSES, bootstrap=0)
    oracle = compute_classification_scores(codes, p)
    assert list(scores.metrics) == list(oracle)
    assert {name: score.value for name, score in scores.metrics.items()} == pytest.approx(oracle, abs=1e-12)
    np.testing.assert_array_equal(scores.confusion, sk.confusion_matrix(codes, p.argmax(axis=1)))


def test_the_auc_of_two_classes_is_the_binary_auc():
    codes, p = make_predictions(k=2)
    p = p.round(6)
    scores = score("classification", to_class_names(codes), p, CLASSES[:2], bootstrap=0)
    assert scores.metrics["roc_auc"].value == pytest.approx(sk.roc_auc_score(codes, p[:, 1]))
    assert "top5_accuracy" not in scores.metrics


def test_multilabel_scores_equal_those_of_scikit_learn():
    y, p = make_multilabel_rows()
    scores = score("multilabel", y, p, CLASSES[:4], bootstrap=0)
    assert {n: s.value for n, s in scores.metrics.items()} == pytest.approx(compute_multilabel_scores(y, p), abs=1e-12)


def test_regression_scores_equal_those_of_scikit_learn():
    y, p = make_regression_rows()
    scores = score("regression", y, p, ["height", "width"], bootstrap=0)
    assert {n: s.value for n, s in scores.metrics.items()} == pytest.approx(compute_regression_scores(y, p), abs=1e-12)
    assert scores.per_class[1]["rmse"] == pytest.approx(sk.root_mean_squared_error(y[:, 1], p[:, 1]))


@pytest.mark.parametrize(
    ("task", "names", "data", "oracle"),
    [
        ("multilabel", CLASSES[:4], make_multilabel_rows(80), compute_multilabel_scores),
        ("regression", ("height", "width"), make_regression_rows(80), compute_regression_scores),
        ("classification", CLASSES, make_predictions(120, sharpness=1), compute_classification_scores),
    ],
    ids=["multilabel", "regression", "classification"],
)
def test_intervals_equal_those_of_explicit_resamples(task, names, data, oracle):
    y, p = data
    labels = to_class_names(y) if task == "classification" else y
    metrics = score(task, labels, p, names, bootstrap=60, seed=5).metrics
    for name, (low, high) in compute_resampled_intervals(y, p, oracle, 60, 5).items():
        if name in PROPORTION_METRICS:
            continue
        assert metrics[name].low == pytest.approx(min(low, metrics[name].value), abs=1e-9), name
        assert metrics[name].high == pytest.approx(max(high, metrics[name].value), abs=1e-9), name


@settings(max_examples=30, deadline=None)
@given(m=st.integers(2, 40), k=st.integers(1, 8), seed=st.integers(0, 1000))
def test_every_interval_contains_its_value(m, k, seed):
    codes, p = make_predictions(m, k, seed=seed)
    scores = score("classification", to_class_names(codes), p, CLASSES[:k], bootstrap=50)
    for interval in scores.metrics.values():
        assert interval.low <= interval.value <= interval.high


def test_intervals_shrink_with_the_square_root_of_the_number_of_rows():
    def width(m):
        codes, p = make_predictions(m)
        interval = score("classification", to_class_names(codes), p, CLASSES).metrics["accuracy"]
        return interval.high - interval.low

    assert width(200) / width(3200) == pytest.approx(4, rel=0.15)


def test_the_interval_of_a_proportion_is_that_of_wilson():
    codes, p = make_predictions(2000)
    scores = score("classification", to_class_names(codes), p, CLASSES)
    is_correct = codes == p.argmax(axis=1)
    expected = binomtest(int(is_correct.sum()), 2000).proportion_ci(method="wilson")
    assert (scores.metrics["accuracy"].low, scores.metrics["accuracy"].high) == pytest.approx(tuple(expected))
    for code, row in enumerate(scores.per_class):
        in_class = codes == code
        expected = binomtest(int(is_correct[in_class].sum()), int(in_class.sum())).proportion_ci(method="wilson")
        assert row["recall_interval"] == pytest.approx(list(expected))


def test_proportions_of_0_and_1_have_an_interval():
    low, high = wilson_interval([0, 20], [20, 20])
    expected = [binomtest(n_correct, 20).proportion_ci(method="wilson") for n_correct in (0, 20)]
    assert low == pytest.approx([interval.low for interval in expected])
    assert high == pytest.approx([interval.high for interval in expected])


@pytest.mark.parametrize("all_correct", [True, False])
def test_scores_have_an_interval_if_all_rows_are_right_or_wrong(all_correct):
    codes = np.arange(40) % 4
    p = 0.025 + 0.9 * np.eye(4)[codes if all_correct else (codes + 1) % 4]
    metrics = score("classification", to_class_names(codes), p, CLASSES[:4]).metrics
    for name in ("accuracy", "balanced_accuracy", "macro_f1", *(("roc_auc", "pr_auc") if all_correct else ())):
        assert metrics[name].value == (1 if all_correct else 0), name
        assert metrics[name].high - metrics[name].low > 0.05, name
    rare_codes = np.repeat(np.arange(2), (38, 2))
    metrics = score(
        "classification", to_class_names(rare_codes), 0.1 + 0.8 * np.eye(2)[rare_codes], CLASSES[:2]
    ).metrics
    assert (
        metrics["balanced_accuracy"].low < metrics["accuracy"].low - 0.2
    )  # the recall of a class with two rows is uncertain


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others():
    codes, p = make_predictions(100)
    first, repeated, other_seed = (
        score("classification", to_class_names(codes), p, CLASSES, seed=seed).to_dict()["metrics"] for seed in (1, 1, 2)
    )
    assert first == repeated
    assert first != other_seed


def test_a_score_that_is_too_costly_to_resample_has_no_interval(monkeypatch):
    monkeypatch.setattr("featpipe.metrics.metrics._MAX_RANKED_SCORES", 10)
    codes, p = make_predictions(50)
    metrics = score("classification", to_class_names(codes), p, CLASSES).metrics
    assert not metrics["roc_auc"].known
    assert math.isfinite(metrics["roc_auc"].value)
    assert metrics["log_loss"].known


def test_a_class_without_rows_is_not_averaged_and_has_no_recall():
    codes, p = make_predictions(300)
    has_rows = codes != 3
    p[:, 3] = 0
    p /= p.sum(axis=1, keepdims=True)
    scores = score("classification", to_class_names(codes[has_rows]), p[has_rows], CLASSES)
    assert {n: s.value for n, s in scores.metrics.items()} == pytest.approx(
        compute_classification_scores(codes[has_rows], p[has_rows])
    )
    absent = scores.per_class[3]
    assert absent["support"] == 0
    assert math.isnan(absent["recall"])
    assert scores.to_dict()["per_class"][3]["precision"] is None
    assert scores.weakest()[-1] is absent


def test_one_row_is_scored_without_intervals_and_without_warnings():
    scores = score("classification", ["b"], [[0.3, 0.7]], ["a", "b"])
    assert not any(interval.known for interval in scores.metrics.values())
    assert scores.metrics["accuracy"].value == 1
    assert "roc_auc" not in scores.metrics


def test_a_single_class_has_perfect_scores():
    scores = score("classification", ["a", "a"], [[1.0], [1.0]], ["a"])
    assert scores.metrics == {
        "accuracy": Interval(1, 1, 1),
        "balanced_accuracy": Interval(1, 1, 1),
        "macro_f1": Interval(1, 1, 1),
    }


def test_a_single_label_is_not_scored_as_a_binary_problem():
    y, p = make_multilabel_rows(k=1)
    scores = score("multilabel", y, p, ["a"], bootstrap=0)
    assert scores.metrics["macro_f1"].value == pytest.approx(sk.f1_score(y[:, 0], p[:, 0] >= 0.5))
    assert scores.metrics["micro_f1"].value == pytest.approx(scores.metrics["macro_f1"].value)


def test_a_label_without_rows_is_not_in_the_mean_average_precision():
    y, p = make_multilabel_rows()
    y[:, 2] = 0
    value = score("multilabel", y, p, CLASSES[:4], bootstrap=20).metrics["mean_average_precision"].value
    columns = [0, 1, 3]
    assert value == pytest.approx(sk.average_precision_score(y[:, columns], p[:, columns]))


def test_a_constant_prediction_has_no_spearman_and_the_mean_has_zero_r2():
    y = np.array([1.0, 2.0, 3.0, 4.0])
    scores = score("regression", y, np.full(4, 2.5), ["height"])
    assert "spearman" not in scores.metrics
    assert scores.metrics["r2"].value == 0
    assert scores.metrics["r2"].low > -1e6


def test_single_precision_probabilities_are_accepted():
    codes, p = make_predictions()
    value = score("classification", to_class_names(codes), p.astype(np.float32), CLASSES, bootstrap=0).metrics[
        "log_loss"
    ]
    assert value.value == pytest.approx(sk.log_loss(codes, p), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dgo"], "unknown class 'dgo'; did you mean 'dog'\\?"),
        (["x1", "x2"], "2 of 2 labels are not among the 2 classes: 'x1', 'x2'"),
        (["cat", None], "1 of 2 rows have no label"),
        (["cat"], "found 1 labels and 2 predictions"),
    ],
)
def test_unknown_labels_are_named(labels, message):
    with pytest.raises(ConfigError, match=message):
        score("classification", labels, [[0.5, 0.5], [0.5, 0.5]], ["cat", "dog"])


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ([[2.0, -1.0]], "does not sum to 1"),
        ([[3.0, 4.0]], "does not sum to 1"),
        ([[math.nan, 1.0]], "1 of 1 rows are not finite, the first is row 0"),
        ([[0.2, 0.3, 0.5]], "found shape \\(1, 3\\)"),
        (np.empty((0, 2)), "at least one row"),
    ],
)
def test_values_that_are_not_probabilities_are_refused(probabilities, message):
    with pytest.raises(ConfigError, match=message):
        score("classification", ["cat"], probabilities, ["cat", "dog"])


def test_multilabel_rows_without_labels_are_refused():
    with pytest.raises(ConfigError, match="neither 0 nor 1"):
        score("multilabel", [[1, 0], [-1, -1]], [[0.5, 0.5], [0.5, 0.5]], ["a", "b"])


def test_the_dictionary_is_json_with_stable_keys():
    codes, p = make_predictions(50)
    scores = json.loads(
        json.dumps(score("classification", to_class_names(codes), p, CLASSES).to_dict(), allow_nan=False)
    )
    assert list(scores) == ["task", "n", "metrics", "per_class", "confusion", "classes"]
    assert set(scores["metrics"]["accuracy"]) == {"value", "low", "high"}
    assert set(scores["per_class"][0]) == {
        *("name", "precision", "recall", "f1", "support"),
        *("precision_interval", "recall_interval"),
    }
    assert np.sum(scores["confusion"]) == scores["n"] == 50


def test_the_most_confused_pairs_come_first():
    p = np.eye(3)[[1, 1, 0, 2, 2, 0]] * 0.9 + 0.1 / 3
    scores = score("classification", ["a", "a", "a", "c", "b", "b"], p, "abc")
    assert scores.confused(2) == [("a", "b", 2), ("b", "a", 1)]


def test_the_table_shows_every_score_and_the_weakest_class_first():
    codes, p = make_predictions(200)
    scores = score("classification", to_class_names(codes), p, CLASSES)
    table = scores.table(limit=3)
    for name, interval in scores.metrics.items():
        assert METRICS[name].title in table
        assert f"{interval.value:.3f}  [{interval.low:.3f}, {interval.high:.3f}]" in table
    assert table.splitlines()[-4].startswith(scores.weakest()[0]["name"])
    assert table.endswith("the 3 weakest of 8")


def test_class_names_cannot_send_control_characters_to_the_terminal():
    scores = score("classification", ["\x1b[31mred\n", "\u202eb"], np.eye(2), ["\x1b[31mred\n", "\u202eb"])
    assert "\x1b" not in scores.table()
    assert "\\x1b[31mred\\n" in scores.table()
    assert "\\u202eb" in scores.table()


def test_long_class_names_are_cut_in_the_table():
    table = score("classification", ["x" * 10_000, "y"], np.eye(2), ["x" * 10_000, "y"]).table()
    assert max(map(len, table.splitlines())) < 100


def test_every_score_has_a_name_and_a_meaning():
    codes, p = make_predictions(50)
    actual = {
        *score("classification", to_class_names(codes), p, CLASSES).metrics,
        *score("multilabel", *make_multilabel_rows(), CLASSES[:4]).metrics,
        *score("regression", *make_regression_rows(), ["a", "b"]).metrics,
    }
    assert actual == set(METRICS)
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == {
        "log_loss",
        "calibration_error",
        "mae",
        "rmse",
    }


def test_every_selection_metric_is_a_reported_metric():
    assert set().union(*SELECTION_METRICS.values()) <= set(METRICS)


def test_mcnemar_counts_the_rows_that_only_one_model_gets_right():
    y = np.zeros(60, int)
    first_correct, second_correct = np.ones(60), np.ones(60)
    first_correct[:4], second_correct[2:14] = 0, 0  # 2 wrong in both, 2 in the first alone, 10 in the second alone
    probability_pair = [np.column_stack([is_correct, 1 - is_correct]) for is_correct in (first_correct, second_correct)]
    actual = compare_paired("classification", to_class_names(y), *probability_pair, CLASSES[:2])
    assert (actual.only_first, actual.only_second, actual.n) == (10, 2, 60)
    expected_p = 2 * sum(math.comb(12, i) for i in range(3)) / 2**12
    contrast = actual.contrasts["accuracy"]
    assert contrast.p == pytest.approx(expected_p)
    assert contrast.test == "mcnemar"
    assert contrast.difference.value == pytest.approx(8 / 60)
    assert contrast.difference.low < 8 / 60 < contrast.difference.high
    swapped = compare_paired("classification", to_class_names(y), *probability_pair[::-1], CLASSES[:2])
    assert swapped.contrasts["accuracy"].difference.value == pytest.approx(-8 / 60)
    assert swapped.contrasts["accuracy"].p == contrast.p


def test_models_that_always_agree_have_zero_difference_with_an_interval():
    codes, p = make_predictions(100)
    contrast = compare_paired("classification", to_class_names(codes), p, p, CLASSES).contrasts["accuracy"]
    assert (contrast.p, contrast.difference.value) == (1.0, 0.0)
    assert contrast.difference.low == pytest.approx(-contrast.difference.high)
    assert contrast.difference.high > 0.005


@pytest.mark.parametrize(
    ("task", "names", "data", "oracle"),
    [
        ("regression", ("height", "width"), make_regression_rows(80), compute_regression_scores),
        ("multilabel", CLASSES[:4], make_multilabel_rows(80), compute_multilabel_scores),
    ],
)
def test_the_interval_of_a_difference_uses_the_same_resamples_for_both_models(task, names, data, oracle):
    y, p = data
    q = p.copy()
    q[::3] = q[::3][:, ::-1]
    actual = compare_paired(task, y, p, q, names, n_resamples=60, seed=3).contrasts
    rng = np.random.default_rng(3)
    draws = rng.integers(0, len(y), (60, len(y)))
    values = [{n: v - oracle(y[r], q[r])[n] for n, v in oracle(y[r], p[r]).items()} for r in draws]
    for name in set(actual) - set(PROPORTION_METRICS):
        difference = np.array([value[name] for value in values])
        low, high = np.percentile(difference, (2.5, 97.5))
        assert (actual[name].difference.low, actual[name].difference.high) == pytest.approx((low, high), abs=1e-9)
        assert actual[name].p <= 1


def test_the_interval_of_a_paired_difference_has_its_nominal_coverage():
    rng, n_covered = np.random.default_rng(0), 0
    for _ in range(400):
        first_correct, second_correct = rng.random(150) < 0.9, rng.random(150) < 0.8
        actual = mcnemar_test(first_correct, second_correct).difference
        n_covered += actual.low <= 0.1 <= actual.high
    assert 0.93 <= n_covered / 400 <= 0.985


@pytest.mark.parametrize(
    ("protocol", "description"),
    [
        ({"kind": "folds", "folds": 5, "n": 90}, "5-fold cross-validation on the 90 training images"),
        (
            {"kind": "time_spans", "folds": 3, "n": 1500, "n_rows": 2000, "groups": 1200},
            "3 time spans, each predicted from the earlier ones: 1,500 of 2,000 training images, 1,200 groups kept "
            "together",
        ),
        (
            {"kind": "since", "since": "2024-01-15", "n": 34},
            "fitted on images before 2024-01-15, scored on the 34 images since then",
        ),
        (
            {"kind": "inner_folds", "candidates": 45, "folds": 5, "n": 100, "scaled_to": 2000},
            "best of 45 on 5 inner folds of 100 rows, and scaled to 2,000",
        ),
        ({"kind": "not_tuned"}, "not tuned: a class has a single image"),
        ({"kind": "holdout", "n": 9}, "9 images held out"),
        ({"kind": "unseen", "n": 9}, "9 images that were not trained on"),
        ({"kind": "given", "n": 9}, "9 given test images"),
        ({"kind": "new_holdout", "n": 10}, "10 new images, held out and trained on afterwards"),
        (
            {"kind": "given_and_new_holdout", "given": 9, "n": 10},
            "9 given test images and 10 new images, held out and trained on afterwards",
        ),
        ({"kind": "none"}, "no test images"),
        ("the words of an older file", "the words of an older file"),
    ],
)
def test_a_protocol_is_stored_as_data_and_shown_as_text(protocol, description):
    assert format_protocol(json.loads(json.dumps(protocol))) == description
