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

FEW = (1e-3, 1e-1, 10.0)
WEIGHTED_ROWS = "a row of weight two is in one fold, two rows may be in two: as with scikit-learn's own"


@parametrize_with_checks(
    [SoftmaxRegressionCV(Cs=FEW, cv=3)],
    expected_failed_checks=lambda estimator: {
        "check_sample_weight_equivalence_on_dense_data": WEIGHTED_ROWS,
        "check_sample_weight_equivalence_on_sparse_data": WEIGHTED_ROWS,
    },
)
def test_the_search_passes_the_estimator_checks_of_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        check(estimator)


def rows(n: int, d: int, k: int, *, noise: float = 1.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    X = np.maximum(rng.normal(size=(k, d))[y] + noise * rng.normal(size=(n, d)), 0)
    return (X - X.mean(axis=0)) / X.std(axis=0), y


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(400, 20, 4), (60, 90, 3), (300, 15, 2), (3000, 40, 12)])
def test_every_solution_of_a_path_is_near_its_minimum(shape):
    k = shape[-1]
    X, y = rows(*shape)
    Y, link = (y[:, None], "sigmoid") if k == 2 else (y, "softmax")
    problem = LogisticProblem(X, Y, np.ones(Y.shape), link, 1 if k == 2 else k)
    strengths = np.array(C_GRID[::4])
    for C, actual in zip(strengths, solve_path(problem, 1 / strengths, tol=1e-4, max_iter=200), strict=True):
        there = LogisticProblem(X, Y, np.full(Y.shape, C), link, problem.k)
        lowest = minimize(there, tol=1e-9, max_iter=5000).value
        value = there.evaluate(np.column_stack([actual.W, actual.b])).values.sum()
        assert value <= lowest * (1 + 5e-3), C


@pytest.mark.parametrize("scoring", [None, "neg_log_loss"])
def test_scores_equal_those_of_separate_fits_on_each_fold(scoring):
    X, y = rows(300, 12, 4)
    cv = StratifiedKFold(4, shuffle=True, random_state=1)
    actual = SoftmaxRegressionCV(FEW, cv=cv, scoring=scoring, tol=1e-8).fit(X, y)
    sklearn_heads = [LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12) for C in FEW]
    expected = [cross_val_score(head, X, y, cv=cv, scoring=scoring) for head in sklearn_heads]
    # A row of 75 may lie on the border.
    np.testing.assert_allclose(actual.scores_.T, expected, atol=1e-4 if scoring else 1 / 75)
    assert FEW[int(np.mean(expected, axis=1).argmax())] == actual.C_
    np.testing.assert_array_equal(actual.coef_, SoftmaxRegression(actual.C_).fit(X, y).coef_)


def test_a_fold_does_not_depend_on_its_held_out_rows():
    X, y = rows(240, 30, 3)
    cv = list(StratifiedKFold(4).split(X, y))
    honest = SoftmaxRegressionCV(FEW, cv=cv).fit(X, y).scores_
    for train, test in cv:
        spoilt = y.copy()
        spoilt[test] = (y[test] + 1) % 3
        search = SoftmaxRegressionCV(FEW, cv=[(train, test)], scoring=lambda head, X, y: np.abs(head.coef_).sum())
        np.testing.assert_array_equal(search.fit(X, y).scores_, search.fit(X, spoilt).scores_)
    alone = [SoftmaxRegressionCV(FEW, cv=[split]).fit(X, y).scores_[0] for split in cv]
    np.testing.assert_array_equal(honest, alone)


def test_random_labels_score_at_chance_level_for_every_penalty():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(300, 200)), rng.integers(0, 2, 300)
    assert abs(SoftmaxRegressionCV(cv=5, random_state=0).fit(X, y).scores_.mean() - 0.5) < 0.06


def test_one_standard_error_selects_the_strongest_penalty_within_it():
    X, y = rows(200, 20, 3)
    settings = {"Cs": C_GRID[::3], "cv": 5}
    best = SoftmaxRegressionCV(**settings).fit(X, y)
    simple = SoftmaxRegressionCV(**settings, one_standard_error=True).fit(X, y)
    means = best.scores_.mean(axis=0)
    error = best.scores_[:, means.argmax()].std(ddof=1) / np.sqrt(5)
    fit = means >= means.max() - error
    assert simple.C_ == best.Cs_[fit][0] < best.C_ == best.Cs_[means.argmax()]


def test_labels_share_a_penalty_and_a_constant_label_is_harmless():
    X, y = rows(300, 12, 4)
    Y = np.column_stack([y == 0, y > 1, np.zeros_like(y)]).astype(int)
    actual = SoftmaxRegressionCV(FEW, cv=3, tol=1e-8).fit(X, Y)
    for fold, (train, test) in enumerate(KFold(3).split(X)):
        for column, C in enumerate(FEW):
            expected = SoftmaxRegression(C).fit(X[train], Y[train]).score(X[test], Y[test])
            assert actual.scores_[fold, column] == pytest.approx(expected, abs=0.011)
    assert actual.predict_proba(X).shape == (300, 3)


def test_sample_weights_affect_fits_and_scores():
    X, y = rows(240, 8, 3)
    weights = np.random.default_rng(0).random(240) + 0.2
    cv = list(StratifiedKFold(3).split(X, y))
    actual = SoftmaxRegressionCV(FEW, cv=cv, tol=1e-9, class_weight="balanced", scoring="neg_log_loss")
    actual.fit(X, y, sample_weight=weights)
    for fold, (train, test) in enumerate(cv):
        for column, C in enumerate(FEW):
            head = SoftmaxRegression(C, class_weight="balanced").fit(X[train], y[train], sample_weight=weights[train])
            expected = -log_loss(y[test], head.predict_proba(X[test]), sample_weight=weights[test])
            assert actual.scores_[fold, column] == pytest.approx(expected, abs=1e-4)


def test_a_class_absent_from_a_fold_is_never_predicted():
    X, y = rows(90, 6, 3)
    groups = np.where(y == 2, 0, np.random.default_rng(0).integers(1, 3, 90))
    cv = list(GroupKFold(3).split(X, y, groups))
    actual = SoftmaxRegressionCV(FEW, cv=cv).fit(X, y)
    fold = next(i for i, (train, _) in enumerate(cv) if 2 not in y[train])
    assert (actual.scores_[fold] == 0).all()
    assert actual.predict_proba(X).shape == (90, 3)


def test_folds_in_several_processes_give_the_same_result():
    X, y = rows(120, 6, 3)
    one, two = (SoftmaxRegressionCV(FEW, cv=3, n_jobs=jobs).fit(X, y) for jobs in (None, 2))
    np.testing.assert_array_equal(one.scores_, two.scores_)
    np.testing.assert_array_equal(one.coef_, two.coef_)


@pytest.mark.parametrize(("jobs", "several"), [(None, True), (1, False)])
def test_the_joblib_context_sets_the_number_of_processes(jobs, several):
    X, y = rows(80, 6, 2)
    with parallel_config(n_jobs=2):
        actual = SoftmaxRegressionCV((1.0,), cv=2, n_jobs=jobs, scoring=_process).fit(X, y).scores_
    assert (os.getpid() not in actual) == several


def _process(head: object, X: object, y: object) -> float:
    return float(os.getpid())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parallel_folds_equal_sequential_folds_to_the_bit(threads, monkeypatch):
    X, y = rows(400, 24, 5)
    search = SoftmaxRegressionCV(FEW, cv=5, refit=False, scoring="neg_log_loss")
    with threadpool_limits(threads, user_api="blas"):
        together = clone(search).fit(X, y)
        monkeypatch.setattr(cv, "MAX_THREADED_PRODUCTS", 0)
        in_turn = clone(search).fit(X, y)
    np.testing.assert_array_equal(together.scores_, in_turn.scores_)
    np.testing.assert_array_equal(together.coef_, in_turn.coef_)


@pytest.mark.parametrize("jobs", [None, 2])
def test_folds_use_the_scikit_learn_configuration_of_the_caller(jobs):
    X, y = rows(80, 6, 2)
    search = SoftmaxRegressionCV((1.0,), cv=4, scoring=_is_routing, n_jobs=jobs)
    assert not search.fit(X, y).scores_.any()
    with config_context(enable_metadata_routing=True):
        assert search.fit(X, y).scores_.all()


def _is_routing(head: object, X: object, y: object) -> float:
    return float(get_config()["enable_metadata_routing"])


def test_without_refit_the_parameters_of_the_folds_are_averaged():
    X, y = rows(150, 6, 3)
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
        SoftmaxRegressionCV(**settings).fit(*rows(60, 4, 3))


def test_a_saved_search_predicts_the_same():
    X, y = rows(90, 5, 3)
    actual = SoftmaxRegressionCV(FEW, cv=3).fit(X, y)
    np.testing.assert_array_equal(loads(dumps(actual)).predict_proba(X), actual.predict_proba(X))
