from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile

import joblib
import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from featpipe import heads
from featpipe.config import parse_settings
from featpipe.errors import ConfigError, ModelError
from featpipe.heads import LinearClassifier, LinearRegressor, MLPClassifier, MLPRegressor, SoftmaxRegression
from featpipe.heads.logistic.objective import LogisticProblem


def make_features(n: int, d: int, k: int, *, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Rows like embeddings: a few directions matter, many are noise."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    latent = spread * np.random.default_rng(99).normal(size=(k, 16))[y] + rng.normal(size=(n, 16))
    X = np.maximum(latent @ np.random.default_rng(98).normal(size=(16, d)) / 4 + 0.3 * rng.normal(size=(n, d)), 0)
    return X, y


def make_problems() -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    rng = np.random.default_rng(0)
    X, y = make_classification(300, 20, n_informative=10, n_classes=4, random_state=0)
    separable = make_classification(200, 15, n_informative=10, n_classes=3, class_sep=6, random_state=0)
    rare = (rng.random(800) < 0.02).astype(int) + 2 * (rng.random(800) < 0.01)
    wide = rng.normal(size=(60, 300))
    return {
        "well conditioned": (X, y, 1.0),
        "badly conditioned": (X * np.logspace(-3, 2, 20), y, 1.0),
        "separable": (*separable, 10.0),
        "imbalanced": (rng.normal(size=(800, 8)) + rare[:, None], np.minimum(rare, 2), 1.0),
        "wide": (wide, rng.integers(0, 5, 60), 1.0),
        "binary": (X, (y > 1).astype(int), 0.1),
    }


PROBLEMS = make_problems()
# Since scikit-learn 1.8, l1_ratio alone selects the penalty.
HAS_L1_RATIO_ONLY = LogisticRegression().get_params().get("penalty") == "deprecated"


def compute_objective(W, b, X, y, C, weights=None) -> float:
    """scikit-learn's objective, computed independently; labels are 0, 1, …"""
    scores = X @ W.T + b
    if len(W) == 1:
        scores = np.hstack([np.zeros_like(scores), scores])
    scores = scores - scores.max(axis=1, keepdims=True)
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(y)), y]
    return C * float(losses @ (np.ones(len(y)) if weights is None else weights)) + 0.5 * float((W**2).sum())


def fit_sklearn_head(X, y, C, **settings) -> LogisticRegression:
    return LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000, **settings).fit(X, y)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_softmax_regression_minimises_the_objective_of_scikit_learn(kind):
    X, y, C = PROBLEMS[kind]
    head, sklearn_head = SoftmaxRegression(C=C).fit(X, y), fit_sklearn_head(X, y, C)
    lowest = min(compute_objective(e.coef_, e.intercept_, X, y, C) for e in (head, sklearn_head))
    assert compute_objective(head.coef_, head.intercept_, X, y, C) <= lowest * (1 + 1e-6)
    assert head.coef_.shape == sklearn_head.coef_.shape
    np.testing.assert_allclose(head.predict_proba(X), sklearn_head.predict_proba(X), atol=1e-4)
    np.testing.assert_allclose(head.coef_, sklearn_head.coef_, atol=1e-3 * np.abs(sklearn_head.coef_).max())


def compute_l1_objective(head, X, y, C, ratio) -> float:
    """The objective with a share of L1 in its penalty."""
    W = head.coef_
    return (
        compute_objective(W, head.intercept_, X, y, C)
        - 0.5 * ratio * float((W**2).sum())
        + ratio * float(np.abs(W).sum())
    )


@pytest.mark.parametrize("ratio", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["well conditioned", "imbalanced", "binary"])
def test_an_l1_fit_reaches_the_minimum_of_saga(kind, ratio):
    X, y, C = PROBLEMS[kind]
    head = SoftmaxRegression(C=C, l1_ratio=ratio).fit(X, y)
    penalty = {"l1_ratio": ratio} if HAS_L1_RATIO_ONLY else {"penalty": "elasticnet", "l1_ratio": ratio}
    sklearn_head = LogisticRegression(C=C, solver="saga", tol=1e-9, max_iter=20_000, **penalty).fit(X, y)
    lowest = compute_l1_objective(sklearn_head, X, y, C, ratio)
    assert compute_l1_objective(head, X, y, C, ratio) <= lowest * (1 + 1e-6)
    np.testing.assert_allclose(head.predict_proba(X), sklearn_head.predict_proba(X), atol=1e-3)


@pytest.mark.parametrize("ratio", [1.0, 0.4])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_no_small_perturbation_lowers_the_l1_objective(kind, ratio):
    X, y, C = PROBLEMS[kind]
    head = SoftmaxRegression(C=C, l1_ratio=ratio).fit(X, y)
    W = head.coef_
    k = max(len(W), len(np.unique(y)))
    p = head.predict_proba(X) - np.eye(k)[y]
    p = p[:, 1:] if len(W) == 1 else p
    # The smallest subgradients, squared and divided by the curvature: the gain of a Newton step along each coordinate.
    slopes = C * p.T @ X + (1 - ratio) * W
    subgradients = np.where(
        W != 0, slopes + ratio * np.sign(W), np.sign(slopes) * np.maximum(np.abs(slopes) - ratio, 0)
    )
    curvature = C * 0.25 * (X**2).sum(axis=0) + 1e-12
    assert (subgradients**2 / curvature).sum() <= 2e-3 * compute_l1_objective(head, X, y, C, ratio)
    assert (W == 0).any()


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0, 2: 0.5}])
def test_sample_and_class_weights_act_as_in_scikit_learn(fit_intercept, class_weight):
    X, y, C = PROBLEMS["well conditioned"]
    weights = np.random.default_rng(0).random(len(y)) + 0.1
    settings = {"C": C, "fit_intercept": fit_intercept, "class_weight": class_weight}
    head = SoftmaxRegression(**settings).fit(X, y, sample_weight=weights)
    sklearn_head = LogisticRegression(solver="newton-cholesky", tol=1e-12, max_iter=1000, **settings)
    sklearn_head.fit(X, y, sample_weight=weights)
    np.testing.assert_allclose(head.predict_proba(X), sklearn_head.predict_proba(X), atol=1e-4)
    assert fit_intercept or not head.intercept_.any()


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_the_gradient_equals_finite_differences_of_the_value(link):
    rng = np.random.default_rng(0)
    Y = rng.integers(0, 3, 20) if link == "softmax" else rng.integers(0, 2, (20, 3))
    problem = LogisticProblem(rng.normal(size=(20, 4)), Y, rng.random(Y.shape), link, 3)

    def value(flat):
        return problem.evaluate(flat.reshape(3, 5)).values.sum()

    def gradient(flat):
        return problem.evaluate(flat.reshape(3, 5)).gradient.ravel()

    assert check_grad(value, gradient, rng.normal(size=15)) < 1e-5


def test_a_fit_that_reaches_max_iter_warns_with_its_gap():
    X, y, _ = PROBLEMS["separable"]
    with pytest.warns(ConvergenceWarning, match=r"after 3 steps at a relative gap of at most .*; raise max_iter"):
        head = SoftmaxRegression(C=1e4, max_iter=3).fit(X, y)
    assert head.n_iter_ == 3


@pytest.mark.parametrize("scale", [1e4, 1e300])
def test_probabilities_are_exact_for_huge_scores(scale):
    head = SoftmaxRegression().fit(*PROBLEMS["well conditioned"][:2])
    head.coef_ = np.zeros_like(head.coef_)
    head.intercept_ = np.array([0.0, -np.log(3) - scale, -scale, 1.0])
    actual = head.predict_proba(np.zeros((2, 20)))
    np.testing.assert_allclose(actual, [[1 / (1 + np.e), 0, 0, np.e / (1 + np.e)]] * 2, atol=1e-15)
    np.testing.assert_allclose(actual.sum(axis=1), 1, rtol=1e-15)


def test_a_multilabel_fit_equals_one_binary_fit_per_label():
    X, y, _ = PROBLEMS["well conditioned"]
    Y = np.column_stack([y == 0, y > 1, y != 2]).astype(np.int8)
    head = SoftmaxRegression().fit(X, Y)
    binary_heads = [fit_sklearn_head(X, column, 1.0) for column in Y.T]
    expected = np.column_stack([binary_head.predict_proba(X)[:, 1] for binary_head in binary_heads])
    np.testing.assert_allclose(head.predict_proba(X), expected, atol=1e-4)
    np.testing.assert_array_equal(head.predict(X), expected > 0.5)


def test_a_label_without_rows_gets_a_low_finite_probability():
    X, y, _ = PROBLEMS["well conditioned"]
    head = SoftmaxRegression().fit(X, np.column_stack([y == 0, np.zeros_like(y)]))
    np.testing.assert_allclose(head.predict_proba(X)[:, 1], 0.5 / (len(y) + 1), rtol=1e-12)


def test_a_single_label_stays_a_matrix_for_a_multilabel_task():
    X, y, _ = PROBLEMS["well conditioned"]
    for name in heads.list_heads("multilabel"):
        head = heads.build(name, "multilabel").fit(X, (y == 0)[:, None].astype(int))
        assert head.predict_proba(X).shape == head.predict(X).shape == (len(X), 1)


def test_a_row_of_weight_zero_is_ignored():
    X, y, _ = PROBLEMS["well conditioned"]
    weights = np.ones(len(y))
    weights[y == 3] = 0
    head = SoftmaxRegression().fit(X, y, sample_weight=weights)
    assert head.classes_.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(head.coef_, SoftmaxRegression().fit(X[y < 3], y[y < 3]).coef_)


@pytest.mark.parametrize("weights", [-np.ones(300), np.full(300, np.inf), np.zeros(300), np.ones(3)])
def test_invalid_sample_weights_are_refused(weights):
    X, y, _ = PROBLEMS["well conditioned"]
    with pytest.raises(ValueError, match="sample_weight"):
        SoftmaxRegression().fit(X, y, sample_weight=weights)


def test_classes_may_be_strings_in_an_object_array():
    X, y, _ = PROBLEMS["well conditioned"]
    names = np.array(["ant", "bee", "cat", "dog"], dtype=object)
    assert set(SoftmaxRegression().fit(X, names[y]).predict(X)) <= set(names)
    with pytest.raises(ValueError, match="without a class"):
        SoftmaxRegression().fit(X, np.where(y == 0, None, names[y]))
    with pytest.raises(ValueError, match="class_weight names eel"):
        SoftmaxRegression(class_weight={"eel": 2.0}).fit(X, names[y])


def test_float32_features_give_the_predictions_of_float64():
    X, y, _ = PROBLEMS["wide"]
    X = X.astype(np.float32)
    np.testing.assert_array_equal(
        SoftmaxRegression().fit(X, y).predict_proba(X),
        SoftmaxRegression().fit(X.astype(np.float64), y).predict_proba(X.astype(np.float64)),
    )


CLASSIFIERS = [LinearClassifier, MLPClassifier]
REGRESSORS = [LinearRegressor, MLPRegressor]


def test_a_linear_classifier_trained_long_enough_finds_the_logistic_optimum():
    X, y, _ = PROBLEMS["well conditioned"]
    X = StandardScaler().fit_transform(X)
    head = LinearClassifier(learning_rate=0.1, epochs=400, batch_size=1000, weight_decay=0, random_state=0).fit(X, y)
    sklearn_head = fit_sklearn_head(X, y, 1e8)
    np.testing.assert_allclose(head.predict_proba(X), sklearn_head.predict_proba(X), atol=1e-2)


def test_a_linear_regressor_trained_long_enough_finds_least_squares():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 5))
    Y = X @ rng.normal(size=(5, 2)) * [1.0, 1e5] + [1e3, -1e7] + rng.normal(size=(200, 2)) * [0.1, 1e4]
    head = LinearRegressor(learning_rate=0.1, epochs=600, batch_size=1000, weight_decay=0, random_state=0).fit(X, Y)
    sklearn_head = Ridge(alpha=0).fit(X, Y)
    np.testing.assert_allclose(head.coef_, sklearn_head.coef_, rtol=1e-3)
    np.testing.assert_allclose(head.predict(X), sklearn_head.predict(X), rtol=1e-3)
    np.testing.assert_allclose(head.intercept_, sklearn_head.intercept_, rtol=1e-4)


@pytest.mark.parametrize("kind", [*CLASSIFIERS, *REGRESSORS])
def test_fits_are_reproducible_and_leave_the_state_of_torch_unchanged(kind):
    X, y = make_features(120, 30, 3)
    dropout = {"dropout": 0.3} if "MLP" in kind.__name__ else {}
    state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    with torch.no_grad():
        first = kind(epochs=4, early_stopping=True, random_state=3, **dropout).fit(X, y)
    second = clone(first).fit(X[:50], y[:50]).fit(X, y)
    for first_array, second_array in zip(
        first.coefs_ + first.intercepts_, second.coefs_ + second.intercepts_, strict=True
    ):
        np.testing.assert_array_equal(first_array, second_array)
    assert first.loss_curve_ == second.loss_curve_
    assert torch.equal(state, torch.get_rng_state())
    assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002


def test_fitted_weights_are_numpy_arrays_in_the_type_of_the_features():
    X, y = make_features(60, 10, 3)
    head = MLPClassifier((8, 4), epochs=2, random_state=0).fit(X.astype(np.float32), y)
    assert [coef.shape for coef in head.coefs_] == [(10, 8), (8, 4), (4, 3)]
    assert all(type(a) is np.ndarray and a.dtype == np.float32 for a in head.coefs_ + head.intercepts_)
    assert head.predict_proba(X).sum(axis=1) == pytest.approx(1)


def test_early_stopping_returns_the_best_epoch_and_not_the_last():
    X, y = make_features(150, 40, 3, spread=0.4)
    settings = {"learning_rate": 0.02, "schedule": "constant", "random_state": 0}
    head = MLPClassifier(64, epochs=50, early_stopping=True, validation_fraction=0.3, patience=4, **settings).fit(X, y)
    assert head.best_epoch_ == np.argmin(head.validation_curve_) + 1
    assert head.n_iter_ == head.best_epoch_ + 4 < 50
    retrained = clone(head).set_params(epochs=head.best_epoch_).fit(X, y)
    for stopped_coef, retrained_coef in zip(head.coefs_, retrained.coefs_, strict=True):
        np.testing.assert_array_equal(stopped_coef, retrained_coef)


def test_early_stopping_with_too_few_rows_is_refused():
    with pytest.raises(ValueError, match=r"early_stopping has no validation rows: 0\.1 of n_samples=4"):
        LinearClassifier(early_stopping=True).fit([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1])


def test_diverging_training_is_an_error():
    X, y = make_features(60, 10, 3)
    with pytest.raises(ValueError, match="diverged in epoch"):
        LinearRegressor(optimizer="sgd", learning_rate=1e6, random_state=0).fit(X, y)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_class_weights_change_the_predictions_of_trained_classifiers(kind):
    rng = np.random.default_rng(0)
    y = (rng.random(400) < 0.1).astype(int)
    X = rng.normal(size=(400, 5)) + 0.7 * y[:, None]
    settings = {"learning_rate": 0.02, "random_state": 0}
    plain = kind(**settings).fit(X, y)
    balanced = kind(class_weight="balanced", **settings).fit(X, y)
    weighted = kind(**settings).fit(X, y, sample_weight=np.where(y == 1, 9.0, 1.0))
    assert plain.predict(X).mean() < 0.15
    assert balanced.predict(X).mean() > 0.2
    assert weighted.predict(X).mean() > 0.2


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_label_smoothing_bounds_the_confidence(kind):
    X, y = make_features(100, 20, 2, spread=3)
    settings = {"learning_rate": 0.05, "epochs": 60, "random_state": 0}
    sharp = kind(**settings).fit(X, y).predict_proba(X).max(axis=1).mean()
    smooth = kind(label_smoothing=0.2, **settings).fit(X, y).predict_proba(X).max(axis=1).mean()
    assert sharp > 0.97
    assert smooth == pytest.approx(0.9, abs=0.03)


def test_balanced_weights_ignore_constant_labels():
    X, y = make_features(90, 10, 3)
    Y = np.column_stack([y == 0, np.zeros_like(y)])
    head = LinearClassifier(class_weight="balanced", epochs=3, random_state=0).fit(X, Y)
    assert np.isfinite(head.predict_proba(X)).all()


def test_importing_heads_and_predicting_needs_no_torch():
    code = (
        "import sys, pickle, numpy\n"
        "from featpipe import heads\n"
        "from featpipe.config import parse_settings\n"
        "heads.list_heads('regression'), heads.describe('mlp'), parse_settings(['C=1'])\n"
        "assert not {'torch', 'sklearn'} & set(sys.modules)\n"
        "from featpipe.heads.neural import estimators\n"
        "heads.build('mlp'); heads.build('logistic').fit([[0.], [1.]], [0, 1]).predict([[2.]])\n"
        "head = pickle.load(sys.stdin.buffer).predict(numpy.zeros((3, 4)))\n"
        "assert 'torch' not in sys.modules\n"
    )
    head = LinearClassifier(epochs=1).fit(np.eye(4), [0, 1, 0, 1])
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(head), check=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"c": 1}, "head 'logistic' has no setting 'c'.*`featpipe heads logistic` lists"),
        ({"scale__with_maen": False}, "did you mean 'scale__with_mean'"),
        ({"multilabel": True}, "no setting 'multilabel'"),
        ({"C": 0}, "C is 0; give a number above 0"),
        ({"C": True}, "C is True"),
        ({"C": float("inf")}, "C is inf"),
        ({"max_iter": 1.5}, "max_iter is 1.5; give a whole number of 1 or more"),
        ({"class_weight": "equal"}, "class_weight is 'equal'"),
        ({"C": 1, "head__C": 2}, "the same setting"),
        ({"scale": "no"}, "scale is 'no'"),
    ],
)
def test_unknown_settings_and_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        heads.build("logistic", params=settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden": 0}, {"hidden": "wide"}, {"hidden": (64, 2.5)}, {"epochs": 0}, {"optimizer": "lion"}, {"dropout": 1},
        {"learning_rate": 0}, {"momentum": 1}, {"label_smoothing": -0.1}, {"early_stopping": 1}, {"patience": 0},
        {"validation_fraction": 1.0}, {"weight_decay": -1}, {"schedule": "cyclic"}, {"batch_size": "8"},
    ],
)  # fmt: skip
def test_training_settings_out_of_range_are_refused_before_any_data(settings):
    with pytest.raises(ConfigError, match=f"head 'mlp': {next(iter(settings))} is"):
        heads.build("mlp", params=settings)


def test_settings_are_passed_to_the_named_pipeline_step():
    pipeline = heads.build("logistic", params={"C": 10, "scale__with_mean": False})
    assert (pipeline.named_steps["head"].C, pipeline.named_steps["scale"].with_mean) == (10, False)
    assert heads.build("mlp", params={"scale": "passthrough"}).named_steps["scale"] == "passthrough"
    assert heads.build("mlp", random_state=7).named_steps["head"].random_state == 7
    assert heads.build("mlp", params={"random_state": 8}).named_steps["head"].random_state == 8


def test_unknown_heads_and_tasks_suggest_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'logistic'"):
        heads.build("logistik")
    with pytest.raises(ConfigError, match="did you mean 'regression'"):
        heads.list_heads("regresion")
    with pytest.raises(
        ConfigError, match=r"head 'logistic' supports classification and multilabel, .* use mlp or linear"
    ):
        heads.build("logistic", "regression")


def test_settings_from_the_command_line_are_parsed_by_type():
    assignments = [
        "C=10",
        "tol=1e-3",
        "hidden=256,128",
        "one=64,",
        "a=true",
        "b=None",
        "c='1'",
        "d=x=y",
        "e=(3, 4)",
        "f=",
    ]
    assert parse_settings(assignments) == {
        "C": 10, "tol": 1e-3, "hidden": (256, 128), "one": (64,), "a": True, "b": None, "c": "1", "d": "x=y",
        "e": (3, 4), "f": "",
    }  # fmt: skip


@pytest.mark.parametrize("assignments", [["C"], ["=3"], ["C=1", "C=2"]])
def test_settings_without_key_or_given_twice_are_refused(assignments):
    with pytest.raises(ConfigError, match=r"KEY=VALUE|given twice"):
        parse_settings(assignments)


def test_a_grid_search_over_a_head_equals_one_over_its_scikit_learn_equivalent():
    X, y = make_features(90, 12, 3)
    grid = {"head__C": [0.001, 0.1, 10.0]}
    sklearn_head = Pipeline([("scale", StandardScaler()), ("head", LogisticRegression(tol=1e-10, max_iter=10_000))])
    head_search, sklearn_search = (
        GridSearchCV(head, grid, cv=3, scoring="neg_log_loss").fit(X, y)
        for head in (heads.build("logistic"), sklearn_head)
    )
    np.testing.assert_allclose(
        head_search.cv_results_["mean_test_score"], sklearn_search.cv_results_["mean_test_score"], rtol=1e-4
    )
    assert head_search.best_params_ == sklearn_search.best_params_


@pytest.fixture(scope="module")
def saved_head() -> bytes:
    X, y = make_features(60, 6, 3)
    return heads.dumps(heads.build("logistic").fit(X, y))


def test_a_saved_lda_omits_the_covariance_that_predictions_do_not_need():
    X, y = make_features(90, 200, 3)
    head = heads.build("lda", "classification").fit(X, y)
    data = heads.dumps(head)
    assert len(data) < 200 * 200 * 8 / 4
    assert head[-1].covariance_.shape == (200, 200)
    np.testing.assert_array_equal(heads.loads(data).predict_proba(X), head.predict_proba(X))


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -30])
def test_damaged_bytes_are_a_model_error(saved_head, cut):
    with pytest.raises(ModelError, match="damaged"):
        heads.loads(saved_head[:cut] if cut else b"")


def test_every_flipped_bit_is_refused_or_harmless(saved_head):
    X, _ = make_features(60, 6, 3)
    expected = heads.loads(saved_head).predict_proba(X)
    for position in np.random.default_rng(0).integers(0, len(saved_head), 150):
        flipped = bytearray(saved_head)
        flipped[position] ^= 1 << (position % 8)
        try:
            actual = heads.loads(bytes(flipped))
        except ModelError:
            continue
        np.testing.assert_array_equal(actual.predict_proba(X), expected)


def test_an_estimator_with_an_untrusted_type_cannot_be_saved():
    with pytest.raises(ModelError, match=r"cannot be saved so that it loads again: .*may not be loaded"):
        heads.dumps(FunctionTransformer(subprocess.run))


def test_bytes_with_an_untrusted_type_are_refused():
    import skops.io

    with pytest.raises(ModelError, match=r"holds .*run, which may not be loaded"):
        heads.loads(skops.io.dumps(FunctionTransformer(subprocess.run)))


def test_bytes_that_hold_no_estimator_are_refused():
    import skops.io

    with pytest.raises(ModelError, match="is a dict, not an estimator"):
        heads.loads(skops.io.dumps({"C": 1.0}))


def test_a_zip_bomb_is_refused():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as container:
        container.writestr("schema.json", b" " * 10_000_000)
    with pytest.raises(ModelError, match="a compressed member"):
        heads.loads(packed.getvalue())


def test_heads_survive_pickle_and_joblib(tmp_path):
    X, y = make_features(60, 6, 3)
    for kind in [SoftmaxRegression(), LinearClassifier(epochs=2), MLPRegressor(4, epochs=2)]:
        head = kind.fit(X, y)
        joblib.dump(head, tmp_path / "head")
        for restored in (pickle.loads(pickle.dumps(head)), joblib.load(tmp_path / "head")):
            np.testing.assert_array_equal(restored.predict(X), head.predict(X))
