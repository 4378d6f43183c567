from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
from joblib import parallel_config
from sklearn import config_context, get_config
from sklearn.base import clone
from sklearn.exceptions import SkipTestWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from threadpoolctl import threadpool_limits

from featpipe.heads import SoftmaxRegression, SoftmaxRegressionCV, dumps, loads
from featpipe.heads.logistic import cv
from featpipe.heads.logistic.cv import C_GRID, solve_path
from featpipe.heads.logistic.objective import LogisticProblem
from featpipe.heads.logistic.solver import minimize

FEW_CS = (1e-3, 1e-1, 10.0)
WEIGHTS_AND_FOLDS = (
    "a row of weight two is in one fold, but two rows may be in two folds, as with scikit-learn's searches"
)


@parametrize_with_checks(
    [SoftmaxRegressionCV(Cs=FEW_CS, cv=3)],
    expected_failed_checks=lambda estimator: {
        "check_sample_weight_equivalence_on_dense_data": WEIGHTS_AND_FOLDS,
        "check_sample_weight_equivalence_on_sparse_data": WEIGHTS_AND_FOLDS,
    },
)
def test_the_search_passes_the_estimator_checks_of_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        check(estimator)


def make_rows(n: int, d: int, k: int, *, noise: float = 1.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    X = np.maximum(rng.normal(size=(k, d))[y] + noise * rng.normal(size=(n, d)), 0)
    return (X - X.mean(axis=0)) / X.std(axis=0), y


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(400, 20, 4), (60, 90, 3), (300, 15, 2), (3000, 40, 12)])
def test_every_solution_of_a_path_is_near_its_minimum(shape):
    k = shape[-1]
    X, y = make_rows(*shape)
    Y, link = (y[:, None], "sigmoid") if k == 2 else (y, "softmax")
    problem = LogisticProblem(X, Y, np.ones(Y.shape), link, 1 if k == 2 else k)
    strengths = np.array(C_GRID[::4])
    for C, actual in zip(strengths, solve_path(problem, 1 / strengths, tol=1e-4, max_iter=200), strict=True):
        problem_at_C = LogisticProblem(X, Y, np.full(Y.shape, C), link, problem.k)
        lowest = minimize(problem_at_C, tol=1e-9, max_iter=5000).value
        value = problem_at_C.evaluate(np.column_stack([actual.W, actual.b])).values.sum()
        assert value <= lowest * (1 + 5e-3), C


@pytest.mark.parametrize("scoring", [None, "neg_log_loss"])
def test_scores_equal_those_of_separate_fits_on_each_fold(scoring):
    X, y = make_rows(300, 12, 4)
    cv = StratifiedKFold(4, shuffle=True, random_state=1)
    actual = SoftmaxRegressionCV(FEW_CS, cv=cv, scoring=scoring, tol=1e-8).fit(X, y)
    sklearn_heads = [LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12) for C in FEW_CS]
    expected = [cross_val_score(head, X, y, cv=cv, scoring=scoring) for head in sklearn_heads]
    # One of 75 rows may lie on the decision boundary.
    np.testing.assert_allclose(actual.scores_.T, expected, atol=1e-4 if scoring else 1 / 75)
    assert FEW_CS[int(np.mean(expected, axis=1).argmax())] == actual.C_
    np.testing.assert_array_equal(actual.coef_, SoftmaxRegression(actual.C_).fit(X, y).coef_)


def test_a_fold_does_not_depend_on_its_held_out_rows():
    X, y = make_rows(240, 30, 3)
    cv = list(StratifiedKFold(4).split(X, y))
    all_scores = SoftmaxRegressionCV(FEW_CS, cv=cv).fit(X, y).scores_
    for train, test in cv:
        changed_y = y.copy()
        changed_y[test] = (y[test] + 1) % 3
        search = SoftmaxRegressionCV(FEW_CS, cv=[(train, test)], scoring=lambda head, X, y: np.abs(head.coef_).sum())
        np.testing.assert_array_equal(search.fit(X, y).scores_, search.fit(X, changed_y).scores_)
    separate_scores = [SoftmaxRegressionCV(FEW_CS, cv=[split]).fit(X, y).scores_[0] for split in cv]
    np.testing.assert_array_equal(all_scores, separate_scores)


def test_random_labels_score_at_chance_level_for_every_penalty():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(300, 200)), rng.integers(0, 2, 300)
    assert abs(SoftmaxRegressionCV(cv=5, random_state=0).fit(X, y).scores_.mean() - 0.5) < 0.06


def test_one_standard_error_selects_the_strongest_penalty_within_it():
    X, y = make_rows(200, 20, 3)
    settings = {"Cs": C_GRID[::3], "cv": 5}
    best = SoftmaxRegressionCV(**settings).fit(X, y)
    simple = SoftmaxRegressionCV(**settings, one_standard_error=True).fit(X, y)
    means = best.scores_.mean(axis=0)
    error = best.scores_[:, means.argmax()].std(ddof=1) / np.sqrt(5)
    is_within_error = means >= means.max() - error
    assert simple.C_ == best.Cs_[is_within_error][0] < best.C_ == best.Cs_[means.argmax()]


def test_labels_share_a_penalty_and_a_constant_label_is_harmless():
    X, y = make_rows(300, 12, 4)
    Y = np.column_stack([y == 0, y > 1, np.zeros_like(y)]).astype(int)
    actual = SoftmaxRegressionCV(FEW_CS, cv=3, tol=1e-8).fit(X, Y)
    for fold, (train, test) in enumerate(KFold(3).split(X)):
        for column, C in enumerate(FEW_CS):
            expected = SoftmaxRegression(C).fit(X[train], Y[train]).score(X[test], Y[test])
            assert actual.scores_[fold, column] == pytest.approx(expected, abs=0.011)
    assert actual.predict_proba(X).shape == (300, 3)


def test_sample_weights_affect_fits_and_scores():
    X, y = make_rows(240, 8, 3)
    weights = np.random.default_rng(0).random(240) + 0.2
    cv = list(StratifiedKFold(3).split(X, y))
    actual = SoftmaxRegressionCV(FEW_CS, cv=cv, tol=1e-9, class_weight="balanced", scoring="neg_log_loss")
    actual.fit(X, y, sample_weight=weights)
    for fold, (train, test) in enumerate(cv):
        for column, C in enumerate(FEW_CS):
            head = SoftmaxRegression(C, class_weight="balanced").fit(X[train], y[train], sample_weight=weights[train])
            expected = -log_loss(y[test], head.predict_proba(X[test]), sample_weight=weights[test])
            assert actual.scores_[fold, column] == pytest.approx(expected, abs=1e-4)


def test_a_class_absent_from_a_fold_is_never_predicted():
    X, y = make_rows(90, 6, 3)
    groups = np.where(y == 2, 0, np.random.default_rng(0).integers(1, 3, 90))
    cv = list(GroupKFold(3).split(X, y, groups))
    actual = SoftmaxRegressionCV(FEW_CS, cv=cv).fit(X, y)
    fold = next(i for i, (train, _) in enumerate(cv) if 2 not in y[train])
    assert (actual.scores_[fold] == 0).all()
    assert actual.predict_proba(X).shape == (90, 3)


def test_folds_in_several_processes_give_the_same_result():
    X, y = make_rows(120, 6, 3)
    in_process, in_processes = (SoftmaxRegressionCV(FEW_CS, cv=3, n_jobs=jobs).fit(X, y) for jobs in (None, 2))
    np.testing.assert_array_equal(in_process.scores_, in_processes.scores_)
    np.testing.assert_array_equal(in_process.coef_, in_processes.coef_)


@pytest.mark.parametrize(("jobs", "several"), [(None, True), (1, False)])
def test_the_joblib_context_sets_the_number_of_processes(jobs, several):
    X, y = make_rows(80, 6, 2)
    with parallel_config(n_jobs=2):
        actual = SoftmaxRegressionCV((1.0,), cv=2, n_jobs=jobs, scoring=get_process_id).fit(X, y).scores_
    assert (os.getpid() not in actual) == several


def get_process_id(head: object, X: object, y: object) -> float:
    return float(os.getpid())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parallel_folds_equal_sequential_folds_to_the_bit(threads, monkeypatch):
    X, y = make_rows(400, 24, 5)
    search = SoftmaxRegressionCV(FEW_CS, cv=5, refit=False, scoring="neg_log_loss")
    with threadpool_limits(threads, user_api="blas"):
        parallel = clone(search).fit(X, y)
        monkeypatch.setattr(cv, "MAX_THREADED_PRODUCTS", 0)
        sequential = clone(search).fit(X, y)
    np.testing.assert_array_equal(parallel.scores_, sequential.scores_)
    np.testing.assert_array_equal(parallel.coef_, sequential.coef_)


@pytest.mark.parametrize("jobs", [None, 2])
def test_folds_use_the_scikit_learn_configuration_of_the_caller(jobs):
    X, y = make_rows(80, 6, 2)
    search = SoftmaxRegressionCV((1.0,), cv=4, scoring=is_routing_enabled, n_jobs=jobs)
    assert not search.fit(X, y).scores_.any()
    with config_context(enable_metadata_routing=True):
        assert search.fit(X, y).scores_.all()


def is_routing_enabled(head: object, X: object, y: object) -> float:
    return float(get_config()["enable_metadata_routing"])


def test_without_refit_the_parameters_of_the_folds_are_averaged():
    X, y = make_rows(150, 6, 3)
    cv = list(StratifiedKFold(3).split(X, y))
    actual = SoftmaxRegressionCV((0.1,), cv=cv, refit=False, tol=1e-9).fit(X, y)
    expected = np.mean([SoftmaxRegression(0.1).fit(X[train], y[train]).coef_ for train, _ in cv], axis=0)
    np.testing.assert_allclose(actual.coef_, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"Cs": ()}, "Cs is"),
        ({"Cs": (1.0, 0.0)}, "each of Cs is 0.0; give a number above 0"),
        ({"scoring": "acuracy"}, "scoring is 'acuracy'"),
        ({"refit": 1}, "refit is 1"),
        ({"tol": 0}, "tol is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxRegressionCV(**settings).fit(*make_rows(60, 4, 3))


def test_a_saved_search_predicts_the_same():
    X, y = make_rows(90, 5, 3)
    actual = SoftmaxRegressionCV(FEW_CS, cv=3).fit(X, y)
    np.testing.assert_array_equal(loads(dumps(actual)).predict_proba(X), actual.predict_proba(X))
