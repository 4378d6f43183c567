"""Class-incremental learning on embeddings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featpipe import FeatureCache, evaluate, expand, load_model, train
from featpipe.errors import CacheError, CacheMismatchError, ConfigError, ModelError
from featpipe.incremental import METHODS, Expansion
from featpipe.incremental.dataset import ClassMapping
from featpipe.metrics import compute_logits
from featpipe.model import Model
from tests.support.expansion import FACTS, NAMES
from tests.support.logs import logged_warning


@pytest.fixture(scope="module")
def old_cache(make_cache: Any) -> FeatureCache:
    return make_cache({"ant": 40, "bee": 30, "cow": 25}, seed=1)


@pytest.fixture(scope="module")
def new_cache(make_cache: Any) -> FeatureCache:
    return make_cache({"dog": 30, "eel": 25}, seed=2)


@pytest.fixture(scope="module")
def evaluation_cache(make_cache: Any) -> FeatureCache:
    return make_cache(dict.fromkeys(NAMES[:5], 40), seed=3)


@pytest.fixture(scope="module")
def models(old_cache: FeatureCache) -> Callable[..., Model]:
    """Trained models, each trained once."""
    trained: dict[Any, Model] = {}

    def model(head: str = "logistic", keep: str = "all", **params: Any) -> Model:
        key = (head, keep, repr(params))
        if key not in trained:
            trained[key] = train(old_cache, head, keep=keep, tune=False, params=params)
        return replace(trained[key], history=dict(trained[key].history))

    return model


@pytest.fixture(scope="module")
def comparison(
    models: Any, old_cache: FeatureCache, new_cache: FeatureCache, evaluation_cache: FeatureCache
) -> Expansion:
    return expand(models(), [old_cache, new_cache], method="all", test=evaluation_cache)


def compute_accuracy(model: Model, cache: FeatureCache, names: Sequence[str] = NAMES) -> float:
    rows = np.isin(cache.y.astype(str), names)
    return float((model.predict_features(cache.X[rows]) == cache.y[rows]).mean())


def test_each_method_learns_new_classes_and_remembers_old_ones_as_documented(comparison: Expansion) -> None:
    rows = {row.method: row for row in comparison.outcomes}
    assert set(rows) == set(METHODS)
    assert rows["naive"].old.value < 0.05
    assert rows["naive"].new.value > 0.9
    for name in ("joint", "replay", "statistics", "frozen-old"):
        assert rows[name].all.value > rows["joint"].all.value - 0.03, name
    for name in ("distill", "ewc"):
        assert rows[name].old.value > 0.5, name
        assert rows[name].new.value > 0.5, name
    assert comparison.recommended == comparison.method
    assert comparison.method not in ("joint", "naive")


@pytest.mark.parametrize("head", ["lda", "ridge", "centroid"])
def test_statistics_give_the_model_of_training_on_all_images(
    head: str, models: Any, old_cache: FeatureCache, new_cache: FeatureCache, make_cache: Any
) -> None:
    """In two steps, of which the last adds images of an old class too."""
    more_cache = make_cache({"fox": 12} | ({} if head == "lda" else {"bee": 7}), seed=4)
    model = models(head, "statistics").expand(new_cache, method="statistics").expand(more_cache, method="statistics")
    assert model.classes == NAMES
    X = np.concatenate([cache.X for cache in (old_cache, new_cache, more_cache)])
    names = np.concatenate([cache.y for cache in (old_cache, new_cache, more_cache)]).astype(str)
    from featpipe import heads

    expected_head = heads.build(head, params=get_head_params(model)).fit(
        X.astype(np.float64), np.searchsorted(NAMES, names)
    )
    logits, expected_logits = (
        compute_logits(model.head, X.astype(np.float64)),
        compute_logits(expected_head, X.astype(np.float64)),
    )
    assert np.abs(logits - expected_logits).max() < 1e-8 * np.abs(expected_logits).max()
    assert model.kept.counts.tolist() == [np.count_nonzero(names == name) for name in NAMES]


def get_head_params(model: Model) -> dict[str, Any]:
    return {key: value for key, value in model.head[-1].get_params().items() if key in ("alpha", "shrinkage")}


@pytest.mark.parametrize(
    ("head", "params"),
    [("logistic", {"C": 1.0}), ("mlp", {"epochs": 5, "hidden": 16}), ("svm", {}), ("knn", {}), ("ridge", {})],
)
@pytest.mark.parametrize("keep", ["all", "none"])
def test_frozen_old_keeps_the_scores_of_old_classes_bit_for_bit(
    head: str,
    params: dict[str, Any],
    keep: str,
    models: Any,
    new_cache: FeatureCache,
    evaluation_cache: FeatureCache,
    make_cache: Any,
    tmp_path: Path,
) -> None:
    model = models(head, keep, **params)
    expanded = model.expand(new_cache, method="frozen-old")
    expanded_again = expanded.expand(make_cache({"fox": 15}, seed=4), method="frozen-old")
    loaded = load_model(expanded_again.save(tmp_path / "grown.model"))
    old_scores = compute_logits(model.head, evaluation_cache.X)
    for later_model in (expanded, expanded_again, loaded):
        assert np.array_equal(compute_logits(later_model.head, evaluation_cache.X)[:, :3], old_scores)
    assert np.array_equal(
        loaded.predict_proba_features(evaluation_cache.X), expanded_again.predict_proba_features(evaluation_cache.X)
    )
    assert compute_accuracy(expanded, evaluation_cache) > (0.85 if keep == "all" else 0.5)


def test_joint_equals_training_on_old_and_new_images_with_the_same_settings(
    models: Any, old_cache: FeatureCache, new_cache: FeatureCache, evaluation_cache: FeatureCache
) -> None:
    from featpipe import heads

    model = models(C=0.5).expand([old_cache, new_cache], method="joint")
    X, names = np.concatenate([old_cache.X, new_cache.X]), np.concatenate([old_cache.y, new_cache.y]).astype(str)
    expected_head = heads.build("logistic", params={"C": 0.5}).fit(X, np.searchsorted(NAMES, names))
    assert np.allclose(
        model.predict_proba_features(evaluation_cache.X), expected_head.predict_proba(evaluation_cache.X), atol=1e-5
    )
    assert model.kept.counts.tolist() == [40, 30, 25, 30, 25]


@pytest.mark.parametrize("head", ["logistic", "mlp", "svm", "knn", "lda"])
def test_replay_works_with_any_head_and_retains_its_exemplars(
    head: str, models: Any, new_cache: FeatureCache, evaluation_cache: FeatureCache, tmp_path: Path
) -> None:
    params = {"epochs": 5, "hidden": 16} if head == "mlp" else {}
    model = models(head, "rows=10", **params).expand(new_cache, method="replay")
    assert compute_accuracy(model, evaluation_cache) > 0.85
    assert np.bincount(model.kept.codes).tolist() == [10] * 5
    fewer = models(head, "rows=10", **params).expand(new_cache, method="replay", memory=4)
    assert np.bincount(fewer.kept.codes).tolist() == [4] * 5
    assert np.array_equal(fewer.kept.rows[:4], model.kept.rows[:4])
    assert np.array_equal(load_model(model.save(tmp_path / "m.model")).kept.rows, model.kept.rows)


def test_replay_works_with_exemplars_selected_at_random(
    models: Any, old_cache: Any, new_cache: FeatureCache, evaluation_cache: Any
) -> None:
    model = models("logistic", "none").expand(
        [old_cache, new_cache], method="replay", memory=8, params={"selection": "random"}, keep="rows=8"
    )
    assert compute_accuracy(model, evaluation_cache) > 0.85
    assert np.bincount(model.kept.codes).tolist() == [8] * 5


def test_old_classes_keep_their_order_and_new_ones_follow(models: Any, make_cache: Any) -> None:
    cache = make_cache({"dog": 20, "eel": 20, "ant": 5}, seed=5, called={"dog": "aardvark", "eel": "zebra"})
    expansion = expand(models(), cache, method="frozen-old")
    assert expansion.model.classes == ("ant", "bee", "cow", "aardvark", "zebra")
    assert expansion.new == ("aardvark", "zebra")
    assert expansion.images["learnt"] == 45


def test_new_class_names_and_images_that_resemble_old_classes_are_reported(
    models: Any, make_cache: Any, log: list[str]
) -> None:
    cache = make_cache({"cow": 20, "eel": 20}, seed=6, called={"cow": "Cow", "eel": "calf"})
    with logged_warning("^new class 'Cow' looks like 'cow'; if they are the same, give --merge cow,Cow=cow$"):
        expand(models(), cache, method="frozen-old")
    assert any(
        re.match(r"the model predicts 'cow' for \d+% of the images of the new class 'Cow'", text) for text in log
    )


def test_a_known_class_under_a_new_name_is_refused_with_the_remedy(models: Any, make_cache: Any) -> None:
    renamed = make_cache({"ant": 40, "eel": 10}, seed=1, called={"ant": "formica"})
    with pytest.raises(ConfigError, match=r"'formica' is new, but .* 40 of its 40 .* --merge ant,formica=formica"):
        models().expand(renamed)
    model = models().expand(renamed, method="replay", merge={"formica": ["ant", "formica"]})
    assert model.classes == ("formica", "bee", "cow", "eel")


def test_new_images_of_known_classes_are_trained_on_and_known_images_refused(
    models: Any, old_cache: Any, make_cache: Any, log: list[str]
) -> None:
    with pytest.raises(ConfigError, match="trained on all 95 images, and no class is new; give new images"):
        models().expand(old_cache)
    expansion = expand(models(), make_cache({"ant": 9, "bee": 9}, seed=8), method="statistics")
    assert expansion.model.classes == ("ant", "bee", "cow")
    assert "no new class: training on 18 new images of the 3 known classes" in log
    assert expansion.model.kept.counts.tolist() == [49, 39, 25]
    with pytest.raises(ConfigError, match="trains only new classes, and there are none"):
        models().expand(make_cache({"ant": 9, "bee": 9}, seed=8), method="frozen-old")


@pytest.mark.parametrize("head", ["logistic", "knn", "lda"])
def test_classes_are_dropped_and_merged_without_images(head: str, models: Any, evaluation_cache: FeatureCache) -> None:
    """Probabilities of the remaining classes are renormalized, those of merged classes are summed."""
    model = models(head)
    probabilities = model.predict_proba_features(evaluation_cache.X)
    dropped = model.expand((), drop=["bee"])
    merged = model.expand((), merge={"insect": ["ant", "bee"]})
    assert dropped.classes == ("ant", "cow")
    assert merged.classes == ("insect", "cow")
    if head == "lda":
        assert compute_accuracy(dropped, evaluation_cache, ["ant", "cow"]) > 0.9
        return
    usable = probabilities[:, [0, 2]].sum(axis=1) > 1e-6
    remaining = probabilities[usable][:, [0, 2]]
    assert np.allclose(
        dropped.predict_proba_features(evaluation_cache.X[usable]),
        remaining / remaining.sum(axis=1, keepdims=True),
        atol=1e-6,
    )
    merged_probabilities = np.column_stack([probabilities[:, 0] + probabilities[:, 1], probabilities[:, 2]])
    assert np.allclose(merged.predict_proba_features(evaluation_cache.X), merged_probabilities, atol=1e-6)


def test_models_with_dropped_and_merged_classes_are_expanded_further(
    models: Any, new_cache: FeatureCache, evaluation_cache: FeatureCache, make_cache: Any
) -> None:
    for head in ("logistic", "lda"):
        model = models(head).expand((), merge={"insect": ["ant", "bee"]}).expand(new_cache, drop=["cow"])
        assert model.classes == ("insect", "dog", "eel")
        assert model.kept.counts.tolist() == [70, 30, 25]
        assert compute_accuracy(model, evaluation_cache, ["dog", "eel"]) > 0.9
        insects = np.isin(evaluation_cache.y.astype(str), ["ant", "bee"])
        assert (model.predict_features(evaluation_cache.X[insects]) == "insect").mean() > 0.85
        history = model.history
        assert [step["classes"] for step in history["steps"]] == [["insect"], ["dog", "eel"]]
        assert [record["dropped"] for record in history["expansions"]] == [[], ["cow"]]


@pytest.mark.parametrize(
    ("drop", "merge", "problem"),
    [
        (["ent"], {}, "unknown class 'ent'.*did you mean 'ant'"),
        ([], {"x": ["bea"]}, "unknown class 'bea'.*did you mean 'bee'"),
        (["ant"], {"x": ["ant", "bee"]}, "is merged twice, or merged and dropped"),
        ([], {"cow": ["ant", "bee"]}, "'cow' is an existing class; to merge the others into it, give ant,bee,cow=cow"),
        (["ant", "bee", "cow"], {}, "0 of them old"),
        (["ant", "bee"], {}, "1 classes would remain"),
        ([], {"x": "ant"}, "give a name and a list"),
    ],
)
def test_invalid_class_names_are_refused(drop: Any, merge: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ClassMapping.from_labels(("ant", "bee", "cow"), (), drop, merge)


@pytest.mark.parametrize("method", ["replay", "statistics", "frozen-old", "distill", "ewc"])
def test_classes_are_added_in_several_unequal_steps(
    method: str, models: Any, make_cache: Any, evaluation_cache: Any
) -> None:
    """A class of one image is learnt too, and the first classes are not forgotten."""
    model = models()
    for step, counts in enumerate(({"dog": 60}, {"eel": 1}, {"fox": 8, "ant": 3})):
        model = model.expand(make_cache(counts, seed=20 + step), method=method, test=evaluation_cache)
    assert model.classes == NAMES
    assert compute_accuracy(model, evaluation_cache, NAMES[:3]) > {"distill": 0.25, "ewc": 0.25}.get(method, 0.75)
    assert compute_accuracy(model, evaluation_cache, ["dog"]) > 0.5
    assert [step["method"] for step in model.history["steps"]] == ["train", method, method, method]
    assert model.history["trained_on"]["rows"] == 95 + 72
    assert model.was_trained_on(make_cache({"eel": 1}, seed=21).digests).all()
    if method in ("replay", "statistics"):
        assert compute_accuracy(model, evaluation_cache, ["eel"]) > 0.5


def test_accuracy_is_measured_on_rows_that_were_never_trained_on(
    models: Any, old_cache: FeatureCache, new_cache: FeatureCache, evaluation_cache: FeatureCache
) -> None:
    expansion = expand(models(), new_cache, method="replay", test=[evaluation_cache, old_cache])
    assert expansion.images == {"learnt": 55, "old": 0, "tested": 200}
    assert "left out: 95 test images that were trained on" in expansion.notes
    row = expansion.outcomes[0]
    assert row.old.value == compute_accuracy(expansion.model, evaluation_cache, NAMES[:3])
    assert row.new.value == compute_accuracy(expansion.model, evaluation_cache, NAMES[3:])
    assert row.all.value == compute_accuracy(expansion.model, evaluation_cache)
    old_accuracy = compute_accuracy(models(), evaluation_cache, NAMES[:3])
    assert expansion.before.value == old_accuracy
    assert row.forgetting.value == pytest.approx(old_accuracy - row.old.value)
    assert row.backward.value == pytest.approx(row.old.value - old_accuracy)
    assert row.forgetting.low <= row.forgetting.value <= row.forgetting.high
    assert [outcome.method for outcome in expansion.outcomes] == ["replay", "naive"]


def test_forgetting_is_relative_to_the_best_and_backward_transfer_to_the_first_accuracy(
    models: Any, make_cache: Any, evaluation_cache: FeatureCache
) -> None:
    """Both are means over the earlier steps, on the same rows each time."""
    first = expand(models(), make_cache({"dog": 30}, seed=30), method="replay", test=evaluation_cache)
    second = expand(first.model, make_cache({"eel": 30}, seed=31), method="distill", test=evaluation_cache)
    step_classes = [NAMES[:3], ("dog",)]
    accuracies_when_added = [
        compute_accuracy(models(), evaluation_cache, step_classes[0]),
        compute_accuracy(first.model, evaluation_cache, step_classes[1]),
    ]
    accuracies_before = [compute_accuracy(first.model, evaluation_cache, names) for names in step_classes]
    accuracies_now = [compute_accuracy(second.model, evaluation_cache, names) for names in step_classes]
    row = second.outcomes[0]
    assert row.steps[:2] == pytest.approx(accuracies_now)
    assert row.backward.value == pytest.approx(np.mean(np.subtract(accuracies_now, accuracies_when_added)))
    assert row.forgetting.value == pytest.approx(
        np.mean(np.maximum(accuracies_when_added, accuracies_before)) - np.mean(accuracies_now)
    )


def test_intervals_have_the_width_of_paired_resamples(comparison: Expansion, evaluation_cache: FeatureCache) -> None:
    row = next(row for row in comparison.outcomes if row.method == "ewc")
    for name in ("old", "new", "all", "forgetting", "backward"):
        interval = getattr(row, name)
        assert interval.low < interval.value < interval.high
    n = 200
    spread = np.sqrt(row.all.value * (1 - row.all.value) / n)
    assert row.all.high - row.all.low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_without_test_images_a_fifth_of_the_new_ones_is_held_out(models: Any, make_cache: Any) -> None:
    new = make_cache({"dog": 50, "eel": 50, "fox": 2}, seed=40)
    expansion = expand(models(), new, method="replay")
    assert expansion.how.endswith("new images, held out and trained on afterwards")
    assert 8 <= expansion.images["tested"] <= 32
    assert expansion.before is None
    assert expansion.outcomes[0].old is None
    assert expansion.model.kept.counts.tolist() == [40, 30, 25, 50, 50, 2]
    assert expansion.images["learnt"] == 102


def test_rows_marked_as_test_are_tested_and_not_trained_on(models: Any, make_cache: Any) -> None:
    train_rows, test_rows = (
        make_cache({"dog": 30}, 41, split="train"),
        make_cache({"dog": 10, "ant": 10}, 42, split="test"),
    )
    expansion = expand(models(), [train_rows, test_rows], method="statistics")
    assert expansion.images == {"learnt": 30, "old": 0, "tested": 20}
    assert not expansion.model.was_trained_on(test_rows.digests).any()


def test_curves_record_old_and_new_classes_by_epoch(comparison: Expansion) -> None:
    rows = {row.method: row for row in comparison.outcomes}
    for name in ("replay", "frozen-old", "distill", "ewc", "naive"):
        curves = rows[name].curves
        assert {len(values) for values in curves.values()} == {len(curves["epochs"])}
        assert curves["epochs"][0] == 0
        assert curves["train_loss"][-1] < curves["train_loss"][0]
    assert rows["naive"].curves["old_accuracy"][0] > 0.5
    assert rows["naive"].curves["old_accuracy"][-1] < 0.05
    assert not rows["statistics"].curves
    assert len(comparison.as_table()) == 2 + len(METHODS)


def test_the_result_survives_saving_and_loading(comparison: Expansion, tmp_path: Path) -> None:
    model = load_model(comparison.model.save(tmp_path / "m.model"))
    restored = Expansion.from_dict(model, model.scores["expansion"]["result"])
    assert restored.to_dict() == comparison.to_dict()
    assert restored.as_table() == comparison.as_table()


def test_the_recommended_method_stays_within_the_budget(
    models: Any, new_cache: FeatureCache, evaluation_cache: FeatureCache
) -> None:
    expansion = expand(models(), new_cache, method="all", test=evaluation_cache, budget=400)
    assert expansion.outcomes[0].bytes <= 400
    assert expansion.model.kept is None or expansion.model.kept.nbytes <= 400 + 8 * 5


def test_a_model_without_retained_data_names_the_missing_part_and_the_remedy(
    models: Any, old_cache: FeatureCache, new_cache: FeatureCache
) -> None:
    model = models(keep="none")
    assert model.kept is None
    for method, problem in {
        "replay": r"needs rows of the old classes, and the model retains none: train it with --keep rows=20",
        "statistics": r"needs statistics of the old classes.* --keep statistics",
        "ewc": r"needs importances of the old classes.* --keep importances",
        "joint": r"needs old images of every class, and there are none of 'ant', 'bee', 'cow'",
    }.items():
        with pytest.raises(ConfigError, match=problem + r".*Available methods: frozen-old, distill, naive") as caught:
            model.expand(new_cache, method=method)
        assert "\n" not in str(caught.value)
    for method in ("distill", "frozen-old"):
        assert model.expand(new_cache, method=method).kept is None
    for method in METHODS:  # all of it can be computed from the old images
        assert model.expand([old_cache, new_cache], method=method, params={"epochs": 5}).classes == NAMES[:5]


def test_heads_without_a_softmax_layer_are_refused(models: Any, new_cache: FeatureCache) -> None:
    for method in ("distill", "ewc", "naive"):
        with pytest.raises(ConfigError, match=r"softmax layer \(logistic, linear, mlp, keras\), and .* a KNeigh"):
            models("knn").expand(new_cache, method=method)


def test_the_default_method_depends_on_the_available_data(models: Any, old_cache: Any, new_cache: Any) -> None:
    def select_method(model: Model, data: Any) -> str:
        return expand(model, data).method

    assert select_method(models(), [old_cache, new_cache]) == "joint"
    assert select_method(models("lda"), new_cache) == "statistics"
    assert select_method(models(), new_cache) == "replay"
    assert select_method(models(keep="statistics"), new_cache) == "statistics"
    assert select_method(models(keep="importances"), new_cache) == "frozen-old"


def test_statistics_replace_other_heads_by_ridge_with_a_note(
    models: Any, old_cache: Any, new_cache: Any, evaluation_cache: Any, make_cache: Any, tmp_path: Path
) -> None:
    """After two steps, of which the second adds images of an old class, it equals a fit to all rows within 1e-8."""
    from featpipe import heads

    more_cache = make_cache({"fox": 1, "bee": 7}, seed=4)
    expansion = expand(models(), new_cache, method="statistics", test=evaluation_cache)
    assert expansion.model.head_name == "ridge"
    assert any("the head is now ridge, since logistic has no closed form" in note for note in expansion.notes)
    document = json.loads(json.dumps(expansion.to_dict()))
    assert {"kind": "head_changed", "head": "ridge", "old_head": "logistic"} in document["notes"]
    assert Expansion.from_dict(expansion.model, document).notes == expansion.notes
    earlier = {**document, "notes": ["the text of an earlier version"], "unavailable": {"joint": "needs all images"}}
    assert Expansion.from_dict(expansion.model, earlier).unavailable == {"joint": "needs all images"}
    assert Expansion.from_dict(expansion.model, earlier).notes == ("the text of an earlier version",)
    model = load_model(expansion.model.expand(more_cache, method="statistics").save(tmp_path / "m.model"))
    X = np.concatenate([cache.X for cache in (old_cache, new_cache, more_cache)]).astype(np.float64)
    names = np.concatenate([cache.y for cache in (old_cache, new_cache, more_cache)]).astype(str)
    expected_head = heads.build("ridge", params=model.history["params"]).fit(X, np.searchsorted(NAMES, names))
    scores, expected_scores = compute_logits(model.head, X), compute_logits(expected_head, X)
    assert np.abs(scores - expected_scores).max() < 1e-8 * np.abs(expected_scores).max()
    assert model.head[-1].alpha_ == pytest.approx(expected_head[-1].alpha_, rel=1e-8)
    assert compute_accuracy(model, make_cache({"fox": 40}, seed=9)) > 0.5  # of one image


def test_retained_statistics_of_an_lda_give_an_lda(models: Any, old_cache: Any, new_cache: FeatureCache) -> None:
    from featpipe.heads.closed_form.sufficient_statistics import compute_statistics

    model = models()
    codes = np.searchsorted(NAMES, old_cache.y.astype(str))
    model.kept = replace(model.kept, statistics=compute_statistics("apart", old_cache.X.astype(np.float64), codes, 3))
    assert model.expand(new_cache, method="statistics").head_name == "lda"


def test_a_ridge_head_is_calibrated_on_held_out_rows(models: Any, make_cache: Any, tmp_path: Path) -> None:
    """Its confidence is close to its accuracy; too few rows leave the temperature unchanged."""
    from featpipe.metrics import calibration_error, fit_temperature

    model = models("ridge")
    counts = {"dog": 60, "eel": 60}
    expanded = model.expand(make_cache(counts, seed=70), method="statistics")
    assert expanded.calibration.temperature != model.calibration.temperature
    fresh_cache = make_cache(counts, seed=71)
    best_temperature = fit_temperature(
        compute_logits(expanded.head, fresh_cache.X), np.searchsorted(NAMES, fresh_cache.y.astype(str))
    )
    assert 0.2 < expanded.calibration.temperature / best_temperature < 5
    probabilities = expanded.predict_proba_features(fresh_cache.X)
    assert calibration_error(probabilities, np.searchsorted(NAMES, fresh_cache.y.astype(str))) < 0.1
    few_images = make_cache({"dog": 2}, seed=72)
    assert model.expand(few_images, method="statistics").calibration == model.calibration
    assert models().expand(few_images, method="statistics").calibration.temperature == 0.25


@pytest.fixture(scope="module")
def calibrated_model(old_cache: FeatureCache) -> Model:
    return train(old_cache, "logistic", params={"C": 0.1}, cv=3, keep="all")


def test_the_novelty_score_is_updated_and_calibrated_for_old_and_new_images(
    calibrated_model: Model, new_cache: FeatureCache, make_cache: Any, tmp_path: Path
) -> None:
    fresh_cache = make_cache(dict.fromkeys(NAMES[:5], 200), seed=80)
    unknown_class = make_cache({"fox": 100}, seed=81)
    for method in ("replay", "statistics", "frozen-old"):
        expanded = calibrated_model.expand(new_cache, method=method)
        expanded = load_model(expanded.save(tmp_path / "m.model"))
        novelty = expanded.novelty_features(fresh_cache.X)
        assert (novelty >= 0.9).mean() == pytest.approx(0.1, abs=0.05)
        is_old = np.isin(fresh_cache.y.astype(str), NAMES[:3])
        assert np.median(calibrated_model.novelty_features(fresh_cache.X[~is_old])) > np.median(novelty[~is_old])
        assert np.median(expanded.novelty_features(unknown_class.X)) > 0.8
    assert len(expanded.trust.novelty.references) == 95 + 55


def test_prediction_sets_cover_held_out_images_at_the_requested_level(
    calibrated_model: Model, old_cache: FeatureCache, new_cache: FeatureCache, make_cache: Any, tmp_path: Path
) -> None:
    """They are calibrated on the given images; with all old and new images, by cross-fitting."""
    calibration_cache = make_cache(dict.fromkeys(NAMES[:5], 100), seed=82)
    fresh_cache = make_cache(dict.fromkeys(NAMES[:5], 200), seed=83)
    for method in ("replay", "statistics", "distill"):
        expansion = expand(calibrated_model, new_cache, method=method, calibration=calibration_cache)
        model = load_model(expansion.model.save(tmp_path / "m.model"))
        assert not model.was_trained_on(calibration_cache.digests).any()
        assert measure_coverage(model, fresh_cache, 0.8) > 0.76
    joint = expand(calibrated_model, [old_cache, new_cache], method="joint").model
    assert measure_coverage(joint, fresh_cache, 0.8) > 0.76
    assert len(joint.trust.conformal.scores) == 150


def measure_coverage(model: Model, cache: FeatureCache, level: float) -> float:
    sets = model.predict_sets_features(cache.X, level)
    return float(
        np.mean([name in prediction_set for name, prediction_set in zip(cache.y.astype(str), sets, strict=True)])
    )


def test_validation_rows_calibrate_and_missing_ones_are_reported(
    calibrated_model: Model, new_cache: FeatureCache, make_cache: Any, evaluation_cache: FeatureCache
) -> None:
    validation_cache = make_cache(dict.fromkeys(NAMES[:5], 20), seed=84, split="validation")
    expansion = expand(calibrated_model, [new_cache, validation_cache], method="replay", test=evaluation_cache)
    assert expansion.images["learnt"] == 55
    assert len(expansion.model.trust.conformal.scores) == 100
    uncalibrated = expand(
        calibrated_model,
        [new_cache, make_cache({"ant": 20}, 85, split="validation")],
        method="replay",
        test=evaluation_cache,
    )
    assert any("has no prediction sets" in note and "--calibration" in note for note in uncalibrated.notes)
    with pytest.raises(ConfigError, match=r"expanded without held-out images .*--calibration"):
        uncalibrated.model.predict_sets_features(new_cache.X, 0.9)


def test_prediction_sets_survive_renaming_and_merging_but_not_dropping(
    calibrated_model: Model, make_cache: Any
) -> None:
    fresh_cache = make_cache(dict.fromkeys(NAMES[:3], 100), seed=86)
    merged = calibrated_model.expand((), merge={"insect": ["ant", "bee"]})
    sets = merged.predict_sets_features(fresh_cache.X, 0.9)
    truth = np.where(fresh_cache.y == "cow", "cow", "insect")
    assert np.mean([name in prediction_set for name, prediction_set in zip(truth, sets, strict=True)]) > 0.87
    assert calibrated_model.expand((), merge={"calf": ["cow"]}).trust.conformal is calibrated_model.trust.conformal
    assert calibrated_model.expand((), drop=["ant"]).trust.conformal is None


def test_invalid_input_is_refused(
    models: Any, new_cache: FeatureCache, make_cache: Any, old_cache: FeatureCache
) -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'replai'.*did you mean 'replay'"):
        models().expand(new_cache, method="replai")
    with pytest.raises(ConfigError, match=r"unknown setting 'epoch'"):
        models().expand(new_cache, params={"epoch": 3})
    with pytest.raises(ConfigError, match="temperature is 0"):
        models().expand(new_cache, params={"temperature": 0})
    with pytest.raises(ConfigError, match=r"no class is new|no labelled images to train on"):
        models().expand(())
    with pytest.raises(CacheMismatchError, match="not those that the model was trained on"):
        models().expand(make_cache({"dog": 5}, 50, facts=FACTS | {"precision": "bf16"}))
    unlabelled = make_cache({"dog": 5}, 51)
    unlabelled.manifest["task"] = "none"
    with pytest.raises(CacheError, match="has no labels"):
        models().expand(unlabelled)
    with pytest.raises(ConfigError, match="compared on test images, and there are none"):
        expand(models(), make_cache({"dog": 3}, 52), method="all")


def test_retained_data_of_other_embeddings_is_refused(models: Any, tmp_path: Path) -> None:
    model, centroid_model = models(), models("centroid")
    for invalid_memory in (
        replace(model.kept, rows=model.kept.rows[:, :-1]),
        replace(model.kept, importances=model.kept.importances[:, :-1]),
        replace(model.kept, statistics=centroid_model.kept.statistics),
    ):
        path = replace(model, kept=invalid_memory).save(tmp_path / "wrong.model")
        with pytest.raises(ModelError, match=r"wrong\.model: is damaged"):
            load_model(path)


def test_an_expanded_model_is_evaluated_like_any_other(
    comparison: Expansion, evaluation_cache: FeatureCache, tmp_path: Path
) -> None:
    loaded = load_model(comparison.model.save(tmp_path / "m.model"))
    evaluation = evaluate(loaded, evaluation_cache)
    assert evaluation.scores.metrics["accuracy"].value == comparison.outcomes[0].all.value
    assert evaluation.scores.classes == NAMES[:5]


def test_the_accuracies_of_each_step_are_recorded_for_the_next_one(comparison: Expansion) -> None:
    records = comparison.model.history["judged"]
    assert [set(record) for record in records] == [{"rows", "learnt", "best", "now"}] * 2
    assert records[0]["best"] >= records[0]["now"]


def test_a_note_says_that_the_model_was_trained_on_resampled_rows(
    old_cache: FeatureCache, new_cache: FeatureCache
) -> None:
    model = train(old_cache, tune=False, balance="over")
    assert any("resampled rows" in note for note in expand(model, new_cache, method="frozen-old").notes)
