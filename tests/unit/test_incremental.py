"""Class-incremental learning on embeddings."""

from __future__ import annotations

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
def old(make_cache: Any) -> FeatureCache:
    return make_cache({"ant": 40, "bee": 30, "cow": 25}, seed=1)


@pytest.fixture(scope="module")
def new(make_cache: Any) -> FeatureCache:
    return make_cache({"dog": 30, "eel": 25}, seed=2)


@pytest.fixture(scope="module")
def test(make_cache: Any) -> FeatureCache:
    return make_cache(dict.fromkeys(NAMES[:5], 40), seed=3)


@pytest.fixture(scope="module")
def models(old: FeatureCache) -> Callable[..., Model]:
    """Trained models, each made once."""
    trained: dict[Any, Model] = {}

    def model(head: str = "logistic", keep: str = "all", **params: Any) -> Model:
        key = (head, keep, repr(params))
        if key not in trained:
            trained[key] = train(old, head, keep=keep, tune=False, params=params)
        return replace(trained[key], history=dict(trained[key].history))

    return model


@pytest.fixture(scope="module")
def compared(models: Any, old: FeatureCache, new: FeatureCache, test: FeatureCache) -> Expansion:
    return expand(models(), [old, new], method="all", test=test)


def accuracy(model: Model, cache: FeatureCache, names: Sequence[str] = NAMES) -> float:
    rows = np.isin(cache.y.astype(str), names)
    return float((model.predict_features(cache.X[rows]) == cache.y[rows]).mean())


# -- methods ---------------------------------------------------------------------------------------------------------


def test_each_method_learns_new_classes_and_remembers_old_ones_as_documented(compared: Expansion) -> None:
    rows = {row.method: row for row in compared.outcomes}
    assert set(rows) == set(METHODS)
    assert rows["naive"].old.value < 0.05
    assert rows["naive"].new.value > 0.9
    for name in ("joint", "replay", "statistics", "frozen-old"):
        assert rows[name].all.value > rows["joint"].all.value - 0.03, name
    for name in ("distill", "ewc"):
        assert rows[name].old.value > 0.5, name
        assert rows[name].new.value > 0.5, name
    assert compared.recommended == compared.method
    assert compared.method not in ("joint", "naive")


@pytest.mark.parametrize("head", ["lda", "ridge", "centroid"])
def test_statistics_give_the_model_that_training_on_everything_gives(
    head: str, models: Any, old: FeatureCache, new: FeatureCache, make_cache: Any
) -> None:
    """In one step, in two, and in any order of classes; the last step brings more images of an old class."""
    more = make_cache({"fox": 12} | ({} if head == "lda" else {"bee": 7}), seed=4)
    model = models(head, "statistics").expand(new, method="statistics").expand(more, method="statistics")
    assert model.classes == NAMES
    X = np.concatenate([cache.X for cache in (old, new, more)])
    names = np.concatenate([cache.y for cache in (old, new, more)]).astype(str)
    from featpipe import heads

    peer = heads.build(head, params=_params(model)).fit(X.astype(np.float64), np.searchsorted(NAMES, names))
    expansion, expected = compute_logits(model.head, X.astype(np.float64)), compute_logits(peer, X.astype(np.float64))
    assert np.abs(expansion - expected).max() < 1e-8 * np.abs(expected).max()
    assert model.kept.counts.tolist() == [np.count_nonzero(names == name) for name in NAMES]


def _params(model: Model) -> dict[str, Any]:
    return {key: value for key, value in model.head[-1].get_params().items() if key in ("alpha", "shrinkage")}


@pytest.mark.parametrize(
    ("head", "params"),
    [("logistic", {"C": 1.0}), ("mlp", {"epochs": 5, "hidden": 16}), ("svm", {}), ("knn", {}), ("ridge", {})],
)
@pytest.mark.parametrize("keep", ["all", "none"])
def test_frozen_old_scores_are_bit_for_bit_what_they_were(
    head: str,
    params: dict[str, Any],
    keep: str,
    models: Any,
    new: FeatureCache,
    test: FeatureCache,
    make_cache: Any,
    tmp_path: Path,
) -> None:
    model = models(head, keep, **params)
    grown = model.expand(new, method="frozen-old")
    expanded_again = grown.expand(make_cache({"fox": 15}, seed=4), method="frozen-old")
    loaded = load_model(expanded_again.save(tmp_path / "grown.model"))
    before = compute_logits(model.head, test.X)
    for after in (grown, expanded_again, loaded):
        assert np.array_equal(compute_logits(after.head, test.X)[:, :3], before)
    assert np.array_equal(loaded.predict_proba_features(test.X), expanded_again.predict_proba_features(test.X))
    assert accuracy(grown, test) > (0.85 if keep == "all" else 0.5)


def test_joint_equals_training_on_old_and_new_images_with_the_same_settings(
    models: Any, old: FeatureCache, new: FeatureCache, test: FeatureCache
) -> None:
    from featpipe import heads

    model = models(C=0.5).expand([old, new], method="joint")
    X, names = np.concatenate([old.X, new.X]), np.concatenate([old.y, new.y]).astype(str)
    peer = heads.build("logistic", params={"C": 0.5}).fit(X, np.searchsorted(NAMES, names))
    assert np.allclose(model.predict_proba_features(test.X), peer.predict_proba(test.X), atol=1e-5)
    assert model.kept.counts.tolist() == [40, 30, 25, 30, 25]


@pytest.mark.parametrize("head", ["logistic", "mlp", "svm", "knn", "lda"])
def test_replay_works_with_any_head_and_retains_its_exemplars(
    head: str, models: Any, new: FeatureCache, test: FeatureCache, tmp_path: Path
) -> None:
    params = {"epochs": 5, "hidden": 16} if head == "mlp" else {}
    model = models(head, "rows=10", **params).expand(new, method="replay")
    assert accuracy(model, test) > 0.85
    assert np.bincount(model.kept.codes).tolist() == [10] * 5
    fewer = models(head, "rows=10", **params).expand(new, method="replay", memory=4)
    assert np.bincount(fewer.kept.codes).tolist() == [4] * 5
    assert np.array_equal(fewer.kept.rows[:4], model.kept.rows[:4])
    assert np.array_equal(load_model(model.save(tmp_path / "m.model")).kept.rows, model.kept.rows)


def test_replay_works_with_exemplars_selected_at_random(models: Any, old: Any, new: FeatureCache, test: Any) -> None:
    model = models("logistic", "none").expand(
        [old, new], method="replay", memory=8, params={"selection": "random"}, keep="rows=8"
    )
    assert accuracy(model, test) > 0.85
    assert np.bincount(model.kept.codes).tolist() == [8] * 5


# -- which classes ---------------------------------------------------------------------------------------------------


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


def test_new_images_without_a_new_class_are_learnt_and_known_images_are_refused(
    models: Any, old: Any, make_cache: Any, log: list[str]
) -> None:
    with pytest.raises(ConfigError, match="trained on all 95 images, and no class is new: nothing to learn"):
        models().expand(old)
    expansion = expand(models(), make_cache({"ant": 9, "bee": 9}, seed=8), method="statistics")
    assert expansion.model.classes == ("ant", "bee", "cow")
    assert "no new class: learning 18 new images of 3 known ones" in log
    assert expansion.model.kept.counts.tolist() == [49, 39, 25]
    with pytest.raises(ConfigError, match="trains new classes alone, and there are none"):
        models().expand(make_cache({"ant": 9, "bee": 9}, seed=8), method="frozen-old")


@pytest.mark.parametrize("head", ["logistic", "knn", "lda"])
def test_classes_are_dropped_and_merged_without_images(head: str, models: Any, test: FeatureCache) -> None:
    """Of what is left of the probabilities, and their sums; an LDA is that of the other sums."""
    model = models(head)
    probabilities = model.predict_proba_features(test.X)
    dropped = model.expand((), drop=["bee"])
    merged = model.expand((), merge={"insect": ["ant", "bee"]})
    assert dropped.classes == ("ant", "cow")
    assert merged.classes == ("insect", "cow")
    if head == "lda":
        assert accuracy(dropped, test, ["ant", "cow"]) > 0.9
        return
    usable = probabilities[:, [0, 2]].sum(axis=1) > 1e-6
    left = probabilities[usable][:, [0, 2]]
    assert np.allclose(
        dropped.predict_proba_features(test.X[usable]), left / left.sum(axis=1, keepdims=True), atol=1e-6
    )
    together = np.column_stack([probabilities[:, 0] + probabilities[:, 1], probabilities[:, 2]])
    assert np.allclose(merged.predict_proba_features(test.X), together, atol=1e-6)


def test_dropped_and_merged_models_go_on_learning(
    models: Any, new: FeatureCache, test: FeatureCache, make_cache: Any
) -> None:
    for head in ("logistic", "lda"):
        model = models(head).expand((), merge={"insect": ["ant", "bee"]}).expand(new, drop=["cow"])
        assert model.classes == ("insect", "dog", "eel")
        assert model.kept.counts.tolist() == [70, 30, 25]
        assert accuracy(model, test, ["dog", "eel"]) > 0.9
        insects = np.isin(test.y.astype(str), ["ant", "bee"])
        assert (model.predict_features(test.X[insects]) == "insect").mean() > 0.85
        history = model.history
        assert [step["classes"] for step in history["steps"]] == [["insect"], ["dog", "eel"]]
        assert [record["dropped"] for record in history["expansions"]] == [[], ["cow"]]


@pytest.mark.parametrize(
    ("drop", "merge", "problem"),
    [
        (["ent"], {}, "unknown class 'ent'.*did you mean 'ant'"),
        ([], {"x": ["bea"]}, "unknown class 'bea'.*did you mean 'bee'"),
        (["ant"], {"x": ["ant", "bee"]}, "is merged, and dropped or merged again"),
        ([], {"cow": ["ant", "bee"]}, "'cow' is an existing class; to merge the others into it, give ant,bee,cow=cow"),
        (["ant", "bee", "cow"], {}, "0 of them old"),
        (["ant", "bee"], {}, "1 classes would remain"),
        ([], {"x": "ant"}, "give a name and a list"),
    ],
)
def test_invalid_class_names_are_refused(drop: Any, merge: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ClassMapping.from_labels(("ant", "bee", "cow"), (), drop, merge)


# -- sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["replay", "statistics", "frozen-old", "distill", "ewc"])
def test_several_steps_unequal_and_of_one_image_in_a_row(method: str, models: Any, make_cache: Any, test: Any) -> None:
    """The one-shot class is learnt too, and what was learnt first is still there."""
    model = models()
    for step, counts in enumerate(({"dog": 60}, {"eel": 1}, {"fox": 8, "ant": 3})):
        model = model.expand(make_cache(counts, seed=20 + step), method=method, test=test)
    assert model.classes == NAMES
    assert accuracy(model, test, NAMES[:3]) > {"distill": 0.25, "ewc": 0.25}.get(method, 0.75)
    assert accuracy(model, test, ["dog"]) > 0.5
    assert [step["method"] for step in model.history["steps"]] == ["train", method, method, method]
    assert model.history["trained_on"]["rows"] == 95 + 72
    assert model.was_trained_on(make_cache({"eel": 1}, seed=21).digests).all()
    if method in ("replay", "statistics"):
        assert accuracy(model, test, ["eel"]) > 0.5


# -- what is said of it ----------------------------------------------------------------------------------------------


def test_accuracy_is_that_of_rows_that_were_never_trained_on(
    models: Any, old: FeatureCache, new: FeatureCache, test: FeatureCache
) -> None:
    expansion = expand(models(), new, method="replay", test=[test, old])
    assert expansion.images == {"learnt": 55, "old": 0, "tested": 200}
    assert "left out: 95 test images that were trained on" in expansion.notes
    row = expansion.outcomes[0]
    assert row.old.value == accuracy(expansion.model, test, NAMES[:3])
    assert row.new.value == accuracy(expansion.model, test, NAMES[3:])
    assert row.all.value == accuracy(expansion.model, test)
    before = accuracy(models(), test, NAMES[:3])
    assert expansion.before.value == before
    assert row.forgetting.value == pytest.approx(before - row.old.value)
    assert row.backward.value == pytest.approx(row.old.value - before)
    assert row.forgetting.low <= row.forgetting.value <= row.forgetting.high
    assert [outcome.method for outcome in expansion.outcomes] == ["replay", "naive"]


def test_forgetting_is_since_the_best_and_backward_transfer_since_it_was_learnt(
    models: Any, make_cache: Any, test: FeatureCache
) -> None:
    """Averaged over the steps in which classes came, on the same rows each time."""
    first = expand(models(), make_cache({"dog": 30}, seed=30), method="replay", test=test)
    second = expand(first.model, make_cache({"eel": 30}, seed=31), method="distill", test=test)
    groups = [NAMES[:3], ("dog",)]
    at_first = [accuracy(models(), test, groups[0]), accuracy(first.model, test, groups[1])]
    between = [accuracy(first.model, test, names) for names in groups]
    now = [accuracy(second.model, test, names) for names in groups]
    row = second.outcomes[0]
    assert row.steps[:2] == pytest.approx(now)
    assert row.backward.value == pytest.approx(np.mean(np.subtract(now, at_first)))
    assert row.forgetting.value == pytest.approx(np.mean(np.maximum(at_first, between)) - np.mean(now))


def test_intervals_are_those_of_paired_resamples(compared: Expansion, test: FeatureCache) -> None:
    row = next(row for row in compared.outcomes if row.method == "ewc")
    for name in ("old", "new", "all", "forgetting", "backward"):
        interval = getattr(row, name)
        assert interval.low < interval.value < interval.high
    n = 200
    spread = np.sqrt(row.all.value * (1 - row.all.value) / n)
    assert row.all.high - row.all.low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_without_test_images_a_fifth_of_the_new_ones_is_held_out(models: Any, make_cache: Any) -> None:
    new = make_cache({"dog": 50, "eel": 50, "fox": 2}, seed=40)
    expansion = expand(models(), new, method="replay")
    assert expansion.how.endswith("new images, held out and learnt afterwards")
    assert 8 <= expansion.images["tested"] <= 32
    assert expansion.before is None
    assert expansion.outcomes[0].old is None
    assert expansion.model.kept.counts.tolist() == [40, 30, 25, 50, 50, 2]
    assert expansion.images["learnt"] == 102


def test_rows_marked_as_test_are_tested_and_not_learnt(models: Any, make_cache: Any) -> None:
    train_rows, test_rows = (
        make_cache({"dog": 30}, 41, split="train"),
        make_cache({"dog": 10, "ant": 10}, 42, split="test"),
    )
    expansion = expand(models(), [train_rows, test_rows], method="statistics")
    assert expansion.images == {"learnt": 30, "old": 0, "tested": 20}
    assert not expansion.model.was_trained_on(test_rows.digests).any()


def test_curves_record_old_and_new_classes_by_epoch(compared: Expansion) -> None:
    rows = {row.method: row for row in compared.outcomes}
    for name in ("replay", "frozen-old", "distill", "ewc", "naive"):
        curves = rows[name].curves
        assert {len(values) for values in curves.values()} == {len(curves["epochs"])}
        assert curves["epochs"][0] == 0
        assert curves["train_loss"][-1] < curves["train_loss"][0]
    assert rows["naive"].curves["old_accuracy"][0] > 0.5
    assert rows["naive"].curves["old_accuracy"][-1] < 0.05
    assert not rows["statistics"].curves
    assert len(compared.as_table()) == 2 + len(METHODS)


def test_the_result_survives_saving_and_loading(compared: Expansion, tmp_path: Path) -> None:
    model = load_model(compared.model.save(tmp_path / "m.model"))
    expanded_again = Expansion.from_dict(model, model.scores["expansion"]["result"])
    assert expanded_again.to_dict() == compared.to_dict()
    assert expanded_again.as_table() == compared.as_table()


def test_the_recommended_method_stays_within_the_budget(models: Any, new: FeatureCache, test: FeatureCache) -> None:
    expansion = expand(models(), new, method="all", test=test, budget=400)
    assert expansion.outcomes[0].bytes <= 400
    assert expansion.model.kept is None or expansion.model.kept.nbytes <= 400 + 8 * 5


# -- what a model lacks ----------------------------------------------------------------------------------------------


def test_a_model_without_retained_data_names_the_missing_part_and_the_remedy(
    models: Any, old: FeatureCache, new: FeatureCache
) -> None:
    bare = models(keep="none")
    assert bare.kept is None
    for method, problem in {
        "replay": r"needs rows of the old classes, and the model keeps none: train it with --keep rows=20",
        "statistics": r"needs statistics of the old classes.* --keep statistics",
        "ewc": r"needs importances of the old classes.* --keep importances",
        "joint": r"needs the images that the model was trained on, and there are none of 'ant', 'bee', 'cow'",
    }.items():
        with pytest.raises(ConfigError, match=problem + r".*What works: frozen-old, distill, naive") as caught:
            bare.expand(new, method=method)
        assert "\n" not in str(caught.value)
    for method in ("distill", "frozen-old"):
        assert bare.expand(new, method=method).kept is None
    for method in METHODS:  # all of it can be had from the old images
        assert bare.expand([old, new], method=method, params={"epochs": 5}).classes == NAMES[:5]


def test_heads_without_a_softmax_layer_are_refused(models: Any, new: FeatureCache) -> None:
    for method in ("distill", "ewc", "naive"):
        with pytest.raises(ConfigError, match=r"softmax layer \(logistic, linear, mlp, keras\), and .* a KNeigh"):
            models("knn").expand(new, method=method)


def test_the_default_method_depends_on_the_available_data(models: Any, old: Any, new: Any) -> None:
    def taken(model: Model, data: Any) -> str:
        return expand(model, data).method

    assert taken(models(), [old, new]) == "joint"
    assert taken(models("lda"), new) == "statistics"
    assert taken(models(), new) == "replay"
    assert taken(models(keep="statistics"), new) == "statistics"
    assert taken(models(keep="importances"), new) == "frozen-old"


def test_statistics_replace_other_heads_by_ridge_and_a_note_says_so(
    models: Any, old: Any, new: Any, test: Any, make_cache: Any, tmp_path: Path
) -> None:
    """In two steps, the second with more images of an old class, it is that of all rows at once, to 1e-8."""
    from featpipe import heads

    more = make_cache({"fox": 1, "bee": 7}, seed=4)
    expansion = expand(models(), new, method="statistics", test=test)
    assert expansion.model.head_name == "ridge"
    assert any("the head is now ridge, since logistic has no closed form" in note for note in expansion.notes)
    model = load_model(expansion.model.expand(more, method="statistics").save(tmp_path / "m.model"))
    X = np.concatenate([cache.X for cache in (old, new, more)]).astype(np.float64)
    names = np.concatenate([cache.y for cache in (old, new, more)]).astype(str)
    peer = heads.build("ridge", params=model.history["params"]).fit(X, np.searchsorted(NAMES, names))
    scores, expected = compute_logits(model.head, X), compute_logits(peer, X)
    assert np.abs(scores - expected).max() < 1e-8 * np.abs(expected).max()
    assert model.head[-1].alpha_ == pytest.approx(peer[-1].alpha_, rel=1e-8)
    assert accuracy(model, make_cache({"fox": 40}, seed=9)) > 0.5  # of one image


def test_retained_statistics_of_an_lda_give_an_lda(models: Any, old: Any, new: FeatureCache) -> None:
    from featpipe.heads.closed_form.sufficient_statistics import compute_statistics

    model = models()
    codes = np.searchsorted(NAMES, old.y.astype(str))
    model.kept = replace(model.kept, statistics=compute_statistics("apart", old.X.astype(np.float64), codes, 3))
    assert model.expand(new, method="statistics").head_name == "lda"


def test_a_ridge_head_is_calibrated_on_held_out_rows(models: Any, make_cache: Any, tmp_path: Path) -> None:
    """Its confidence is about how often it is right; too few rows leave the temperature as it was."""
    from featpipe.metrics import calibration_error, fit_temperature

    model = models("ridge")
    near = {"dog": 60, "eel": 60}
    grown = model.expand(make_cache(near, seed=70), method="statistics")
    assert grown.calibration.temperature != model.calibration.temperature
    fresh = make_cache(near, seed=71)
    best = fit_temperature(compute_logits(grown.head, fresh.X), np.searchsorted(NAMES, fresh.y.astype(str)))
    assert 0.2 < grown.calibration.temperature / best < 5
    probabilities = grown.predict_proba_features(fresh.X)
    assert calibration_error(probabilities, np.searchsorted(NAMES, fresh.y.astype(str))) < 0.1
    few = make_cache({"dog": 2}, seed=72)
    assert model.expand(few, method="statistics").calibration == model.calibration
    assert models().expand(few, method="statistics").calibration.temperature == 0.25


# -- what is known of held-out images --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(old: FeatureCache) -> Model:
    return train(old, "logistic", params={"C": 0.1}, cv=3, keep="all")


def test_the_novelty_score_is_updated_and_calibrated_for_old_and_new_images(
    judged: Model, new: FeatureCache, make_cache: Any, tmp_path: Path
) -> None:
    fresh = make_cache(dict.fromkeys(NAMES[:5], 200), seed=80)
    stranger = make_cache({"fox": 100}, seed=81)
    for method in ("replay", "statistics", "frozen-old"):
        grown = judged.expand(new, method=method)
        grown = load_model(grown.save(tmp_path / "m.model"))
        novelty = grown.novelty_features(fresh.X)
        assert (novelty >= 0.9).mean() == pytest.approx(0.1, abs=0.05)
        known = np.isin(fresh.y.astype(str), NAMES[:3])
        assert np.median(judged.novelty_features(fresh.X[~known])) > np.median(novelty[~known])
        assert np.median(grown.novelty_features(stranger.X)) > 0.8
    assert len(grown.trust.novelty.references) == 95 + 55


def test_prediction_sets_cover_held_out_images_at_the_requested_level(
    judged: Model, old: FeatureCache, new: FeatureCache, make_cache: Any, tmp_path: Path
) -> None:
    """Calibrated on the images given for it; with all old and new images, by cross-fitting."""
    check = make_cache(dict.fromkeys(NAMES[:5], 100), seed=82)
    fresh = make_cache(dict.fromkeys(NAMES[:5], 200), seed=83)
    for method in ("replay", "statistics", "distill"):
        expansion = expand(judged, new, method=method, calibration=check)
        model = load_model(expansion.model.save(tmp_path / "m.model"))
        assert not model.was_trained_on(check.digests).any()
        assert coverage(model, fresh, 0.8) > 0.76
    joint = expand(judged, [old, new], method="joint").model
    assert coverage(joint, fresh, 0.8) > 0.76
    assert len(joint.trust.conformal.scores) == 150


def coverage(model: Model, cache: FeatureCache, level: float) -> float:
    sets = model.predict_sets_features(cache.X, level)
    return float(np.mean([name in held for name, held in zip(cache.y.astype(str), sets, strict=True)]))


def test_validation_rows_calibrate_and_missing_ones_are_reported(
    judged: Model, new: FeatureCache, make_cache: Any, test: FeatureCache
) -> None:
    marked = make_cache(dict.fromkeys(NAMES[:5], 20), seed=84, split="validation")
    expansion = expand(judged, [new, marked], method="replay", test=test)
    assert expansion.images["learnt"] == 55
    assert len(expansion.model.trust.conformal.scores) == 100
    without = expand(judged, [new, make_cache({"ant": 20}, 85, split="validation")], method="replay", test=test)
    assert any("has no prediction sets" in note and "--calibration" in note for note in without.notes)
    with pytest.raises(ConfigError, match=r"expanded without held-out images .*--calibration"):
        without.model.predict_sets_features(new.X, 0.9)


def test_prediction_sets_survive_renaming_and_merging_but_not_dropping(judged: Model, make_cache: Any) -> None:
    fresh = make_cache(dict.fromkeys(NAMES[:3], 100), seed=86)
    joined = judged.expand((), merge={"insect": ["ant", "bee"]})
    sets = joined.predict_sets_features(fresh.X, 0.9)
    truth = np.where(fresh.y == "cow", "cow", "insect")
    assert np.mean([name in held for name, held in zip(truth, sets, strict=True)]) > 0.87
    assert judged.expand((), merge={"calf": ["cow"]}).trust.conformal is judged.trust.conformal
    assert judged.expand((), drop=["ant"]).trust.conformal is None


def test_invalid_input_is_refused(models: Any, new: FeatureCache, make_cache: Any, old: FeatureCache) -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'replai'.*did you mean 'replay'"):
        models().expand(new, method="replai")
    with pytest.raises(ConfigError, match=r"unknown setting 'epoch'"):
        models().expand(new, params={"epoch": 3})
    with pytest.raises(ConfigError, match="temperature is 0"):
        models().expand(new, params={"temperature": 0})
    with pytest.raises(ConfigError, match=r"nothing to learn|no labelled image to learn"):
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
    model, other = models(), models("centroid")
    for wrong in (
        replace(model.kept, rows=model.kept.rows[:, :-1]),
        replace(model.kept, importances=model.kept.importances[:, :-1]),
        replace(model.kept, statistics=other.kept.statistics),
    ):
        path = replace(model, kept=wrong).save(tmp_path / "wrong.model")
        with pytest.raises(ModelError, match=r"wrong\.model: is damaged"):
            load_model(path)


def test_an_expanded_model_is_evaluated_like_any_other(compared: Expansion, test: FeatureCache, tmp_path: Path) -> None:
    loaded = load_model(compared.model.save(tmp_path / "m.model"))
    expansion = evaluate(loaded, test)
    assert expansion.scores.metrics["accuracy"].value == compared.outcomes[0].all.value
    assert expansion.scores.classes == NAMES[:5]


def test_the_accuracies_of_each_step_are_recorded_for_the_next_one(compared: Expansion) -> None:
    judged = compared.model.history["judged"]
    assert [set(record) for record in judged] == [{"rows", "learnt", "best", "now"}] * 2
    assert judged[0]["best"] >= judged[0]["now"]


def test_a_note_says_that_the_model_was_trained_on_resampled_rows(old: FeatureCache, new: FeatureCache) -> None:
    model = train(old, tune=False, balance="over")
    assert any("resampled rows" in note for note in expand(model, new, method="frozen-old").notes)
