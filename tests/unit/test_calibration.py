"""Temperature scaling, correction for another class prior, and the calibration error."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier

from featpipe.errors import ConfigError
from featpipe.metrics import Calibration, calibration_error, compute_logits, compute_prior_offsets, fit_temperature


def draw_rows(temperature: float, n: int = 20_000, k: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are ``temperature`` times too large, and classes drawn with the true probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, k)) * 2
    p = softmax(logits, axis=1)
    return temperature * logits, (p.cumsum(axis=1) > rng.random(n)[:, None]).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_a_known_temperature_is_recovered(temperature):
    logits, y = draw_rows(temperature)
    assert fit_temperature(logits, y) == pytest.approx(temperature, rel=0.03)


def test_the_temperature_equals_that_of_scikit_learn():
    pytest.importorskip("sklearn", minversion="1.8")
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 5))
    y = (X[:, 0] + rng.normal(size=400) > 0).astype(int) + (X[:, 1] > 0.5)
    head = LogisticRegression(C=1e6).fit(X[:60], y[:60])
    sklearn_classifier = CalibratedClassifierCV(FrozenEstimator(head), method="temperature").fit(X[60:], y[60:])
    logits = compute_logits(head, X[60:])
    probabilities = Calibration(fit_temperature(logits, y[60:])).compute_probabilities(logits)
    np.testing.assert_allclose(probabilities, sklearn_classifier.predict_proba(X[60:]), atol=1e-3)


def test_multilabel_heads_have_one_temperature_for_all_labels():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5000, 3))
    y = (rng.random((5000, 3)) < 1 / (1 + np.exp(-logits))).astype(int)
    assert fit_temperature(4 * logits, y) == pytest.approx(4, rel=0.1)
    np.testing.assert_allclose(Calibration(2.0).compute_probabilities(logits, True), 1 / (1 + np.exp(-logits / 2)))


def test_separable_rows_give_a_temperature_within_bounds():
    logits = np.diag([1.0, 1.0])
    assert 0.009 < fit_temperature(logits, np.array([0, 1])) < 0.05
    assert 900 < fit_temperature(logits, np.array([1, 0])) < 1001


def test_calibration_lowers_the_calibration_error():
    logits, y = draw_rows(5.0)
    uncalibrated, calibrated = (
        softmax(logits, axis=1),
        Calibration(fit_temperature(logits, y)).compute_probabilities(logits),
    )
    assert calibration_error(uncalibrated, y) > 0.15
    assert calibration_error(calibrated, y) < 0.02
    assert (uncalibrated.argmax(axis=1) == calibrated.argmax(axis=1)).all()


def test_the_calibration_error_equals_a_value_computed_by_hand():
    p = np.array([[0.9, 0.1], [0.95, 0.05], [0.6, 0.4], [0.5, 0.5], [1.0, 0.0]])
    y = np.array([0, 1, 0, 0, 0])
    # bins of a fifteenth: 0.9 in [13/15, 14/15), 0.95 and 1.0 in the last, 0.6 in [9/15, 10/15), 0.5 in [7/15, 8/15)
    by_hand = (0.1 + abs(1.95 - 1) + 0.4 + 0.5) / 5
    assert calibration_error(p, y) == pytest.approx(by_hand)


def test_probabilities_for_another_prior_follow_bayes_rule():
    """Two normal classes of unit variance, whose posterior is known for any prior."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=1000)
    likelihood = np.stack([np.exp(-((x - m) ** 2) / 2) for m in (0.0, 1.5)], axis=1)

    def posterior(prior: np.ndarray) -> np.ndarray:
        joint = likelihood * prior
        return joint / joint.sum(axis=1, keepdims=True)

    trained, target = np.array([0.5, 0.5]), np.array([0.95, 0.05])
    offsets = compute_prior_offsets({"a": 500, "b": 500}, {"a": 0.95, "b": 0.05}, ["a", "b"])
    corrected = Calibration(offsets=offsets).compute_probabilities(np.log(posterior(trained)))
    np.testing.assert_allclose(corrected, posterior(target), rtol=1e-9)


def test_unnamed_classes_share_the_remaining_prior():
    offsets = compute_prior_offsets({"a": 10, "b": 30, "c": 60}, {"a": 0.4}, ["a", "b", "c"])
    corrected_prior = np.exp(offsets) * [0.1, 0.3, 0.6]
    np.testing.assert_allclose(corrected_prior, [0.4, 0.2, 0.4])


@pytest.mark.parametrize(("target", "message"), [
    ({"d": 0.5}, "not among the 3 classes"), ({"a": 0.0}, "not above 0"), ({"a": float("nan")}, "not above 0"),
    ({"a": 1.0}, "leaves nothing for the others"),
])  # fmt: skip
def test_invalid_priors_are_refused(target, message):
    with pytest.raises(ConfigError, match=message):
        compute_prior_offsets({"a": 1, "b": 1, "c": 1}, target, ["a", "b", "c"])


def test_logits_are_computed_from_decision_functions_or_from_probabilities():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 3)), np.arange(60) % 3
    ridge = RidgeClassifier().fit(X, y)
    np.testing.assert_array_equal(compute_logits(ridge, X), ridge.decision_function(X))
    binary_ridge = RidgeClassifier().fit(X, y > 0)
    np.testing.assert_array_equal(
        compute_logits(binary_ridge, X), np.column_stack([np.zeros(60), binary_ridge.decision_function(X)])
    )
    knn = KNeighborsClassifier().fit(X, y)
    np.testing.assert_allclose(softmax(compute_logits(knn, X), axis=1), knn.predict_proba(X), atol=1e-9)


def test_a_calibration_is_stored_as_json_and_validated():
    calibration = Calibration(1.7, (0.1, -0.2))
    assert Calibration.from_dict(calibration.to_dict(), 2) == calibration
    for invalid_record in (
        {"temperature": 0, "offsets": []}, {"temperature": float("nan"), "offsets": []},
        {"temperature": 1, "offsets": [0.1]}, {"temperature": 1, "offsets": [0.1, float("inf")]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the calibration has temperature"):
            Calibration.from_dict(invalid_record, 2)
