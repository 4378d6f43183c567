"""The contract of every registered head and of each estimator of the package."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import clone, is_regressor
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from featpipe import heads
from featpipe.heads import (
    LinearClassifier,
    LinearRegressor,
    MLPClassifier,
    MLPRegressor,
    SoftmaxRegression,
    SoftmaxRegressionCV,
)
from featpipe.heads.closed_form.solve import BayesianRidgeClassifier
from featpipe.heads.registry import _import_object
from featpipe.metrics import Calibration, compute_logits

ESTIMATORS = [
    BayesianRidgeClassifier(),
    SoftmaxRegression(),
    LinearClassifier(),
    LinearRegressor(),
    MLPClassifier(),
    MLPRegressor(),
]
HEADS_AND_TASKS = [(name, task) for name in heads.list_heads() for task in heads.HEAD_REGISTRY[name].estimators]


@parametrize_with_checks(ESTIMATORS)
def test_estimators_pass_the_checks_of_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        check(estimator)


def make_data(task: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(90, 8)).astype(np.float32)
    if task == "classification":
        return X, np.array(["ant", "bee", "cat"], dtype=object)[(X[:, 0] > 0).astype(int) + (X[:, 1] > 0.5)]
    if task == "multilabel":
        return X, (X[:, :4] + 0.3 * rng.normal(size=(90, 4)) > 0.3).astype(np.int8)
    return X, X[:, :2] @ [[2.0, 0.0], [1.0, -50.0]] + 1e3


def make_settings(name: str, **overrides: object) -> dict[str, object]:
    """Settings for eight columns: enough steps for heads trained by minibatches, and a weaker penalty for svm."""
    if name == "svm":
        return {"C": 1.0}
    training_settings = overrides or {"learning_rate": 0.05, "epochs": 20, "batch_size": 16}
    return training_settings if name in ("mlp", "linear", "keras") else {}


def predict_probabilities(head: Any, X: np.ndarray) -> np.ndarray:
    """Probabilities; for heads without them, the softmax of their scores."""
    if hasattr(head, "predict_proba"):
        return head.predict_proba(X)
    return Calibration().compute_probabilities(compute_logits(head, X))


@pytest.mark.parametrize(("name", "task"), HEADS_AND_TASKS)
def test_a_head_learns_its_task_and_predicts_in_the_expected_shape(name, task):
    X, y = make_data(task)
    head = heads.build(name, task, params=make_settings(name)).fit(X, y)
    assert head.predict(X).shape == y.shape
    if task == "regression":
        assert head.score(X, y) > (0.75 if name == "knn" else 0.95)
        return
    p = predict_probabilities(head, X)
    if task == "classification":
        assert p.shape == (90, 3)
        np.testing.assert_allclose(p.sum(axis=1), 1)
        assert (head.predict(X) == head.classes_[p.argmax(axis=1)]).all()
    else:
        assert p.shape == y.shape
        np.testing.assert_array_equal(head.predict(X), p > 0.5)
    assert (head.predict(X) == y).mean() > 0.75


@pytest.mark.parametrize(("name", "task"), HEADS_AND_TASKS)
def test_a_saved_head_predicts_the_same_bits(name, task):
    X, y = make_data(task)
    head = heads.build(name, task, params=make_settings(name, epochs=2)).fit(X, y)
    restored, X = (
        heads.loads(heads.dumps(head)),
        X.copy(),
    )  # a copy, because scikit-learn's neighbours treat the training array itself differently
    np.testing.assert_array_equal(restored.predict(X), head.predict(X))
    if task != "regression":
        np.testing.assert_array_equal(predict_probabilities(restored, X), predict_probabilities(head, X))
    assert restored.get_params()["head"].get_params() == head.get_params()["head"].get_params()
    assert type(restored["head"]) is type(head["head"])


@pytest.mark.parametrize(("name", "task"), HEADS_AND_TASKS)
def test_an_unfitted_head_raises_not_fitted_and_can_be_cloned(name, task):
    head = heads.build(name, task)
    with pytest.raises(NotFittedError):
        clone(head).named_steps["head"].predict(np.zeros((2, 3)))


@pytest.mark.parametrize(("name", "task"), HEADS_AND_TASKS)
def test_a_prediction_does_not_depend_on_other_rows(name, task):
    X, y = make_data(task)
    head = heads.build(name, task, params=make_settings(name, epochs=2)).fit(X, y)
    predict = head.predict if task == "regression" else partial(predict_probabilities, head)
    np.testing.assert_allclose(np.concatenate([predict(X[i : i + 1]) for i in range(9)]), predict(X)[:9], rtol=1e-5)


@pytest.mark.parametrize(("name", "task"), HEADS_AND_TASKS)
def test_every_registered_estimator_is_trusted_by_the_loader(name, task):
    estimator_class = _import_object(heads.HEAD_REGISTRY[name].estimators[task])
    module = estimator_class.__module__
    assert not module.startswith("featpipe.") or f"{module}.{estimator_class.__qualname__}" in heads.TRUSTED_TYPES


@pytest.mark.parametrize("name", heads.list_heads())
def test_every_head_is_described_in_one_sentence(name):
    assert 20 < len(heads.describe(name)) < 120
    assert "\n" not in heads.describe(name)


ALL_ESTIMATORS = [*ESTIMATORS, SoftmaxRegressionCV(cv=3, Cs=(0.1, 1.0))]


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
def test_an_estimator_has_a_notebook_representation_and_routes_sample_weights(estimator):
    X, y = make_data("regression" if is_regressor(estimator) else "classification")
    assert type(estimator).__name__ in clone(estimator)._repr_html_()
    assert type(estimator).__name__ in clone(estimator).fit(X, y)._repr_html_()
    with config_context(enable_metadata_routing=True):
        head = clone(estimator).set_fit_request(sample_weight=True)
        pipeline = Pipeline([("scale", StandardScaler().set_fit_request(sample_weight=False)), ("head", head)])
        weights = np.random.default_rng(1).integers(1, 4, len(X))
        routed = pipeline.fit(X, y, sample_weight=weights)
    plain = clone(estimator).fit(StandardScaler().fit_transform(X), y, sample_weight=weights)
    if getattr(estimator, "random_state", 0) is not None:  # others are random
        expected = plain.predict(StandardScaler().fit(X).transform(X))
        assert (routed.predict(X) == expected).all()


def test_the_scaler_of_a_head_returns_data_frames_if_configured():
    X, y = make_data("classification")
    head = heads.build("logistic").set_output(transform="pandas").fit(pd.DataFrame(X, columns=list("abcdefgh")), y)
    assert list(head["scale"].transform(pd.DataFrame(X, columns=list("abcdefgh"))).columns) == list("abcdefgh")
    assert list(head["head"].feature_names_in_) == list("abcdefgh")
