"""Trials of a recipe, their names, and the resolved recipe file."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from typing import Any

import pytest

from featpipe.experiments import read_recipe
from featpipe.experiments.grid import list_trials, resolve_recipe
from featpipe.experiments.result import recipe_to_toml

DOCUMENT: dict[str, Any] = {
    "archive": "photos",
    "backbones": [{"name": ["resnet18", "resnet50"], "weights": "none", "outputs": ["pooled", "layer3:avg"]}],
    "heads": [
        {"name": "logistic", "C": [0.1, 1.0], "output": "layer3:avg"},
        {"name": "mlp", "hidden": [[256, 128], [64]], "class_weight": "balanced", "epochs": 30},
        {"name": "centroid", "grid": {"shrink_threshold": [0.1, 0.2]}},
        {"name": "lda", "shrinkage": "none", "solver": "svd"},
    ],
    "split": {"groups": "visits.csv:patient", "test": 0.3},
    "training": {"prior": {"cat": 0.9}, "metric": "macro_f1"},
    "finetune": {"unfreeze": "2 stages", "augmentation": {"flip": True}},
    "report": {"title": 'A "title" = [1]'},
}


def test_the_written_recipe_is_read_as_the_same_trials():
    recipe = resolve_recipe(read_recipe(DOCUMENT), "classification")
    toml_text = recipe_to_toml(recipe, "classification", {"featpipe": "1"})
    reparsed = resolve_recipe(read_recipe(tomllib.loads(toml_text)), "classification")
    assert replace(reparsed, heads=()) == replace(recipe, heads=())
    assert reparsed.heads == recipe.heads
    assert [trial.slug for trial in list_trials(reparsed)] == [trial.slug for trial in list_trials(recipe)]
    assert recipe_to_toml(reparsed, "classification", {"featpipe": "1"}) == toml_text


def test_the_written_recipe_has_every_default_except_tuned_settings():
    recipe = resolve_recipe(read_recipe({"heads": [{}, {"name": "mlp"}]}), "classification")
    first, second = tomllib.loads(recipe_to_toml(recipe, "classification", {}))["heads"]
    assert first["max_iter"] == 2000
    assert "C" not in first, "it is tuned"
    assert second["hidden"] == [[512]]
    assert second["learning_rate"] == "auto"


def test_a_setting_equal_to_the_default_adds_no_trial():
    recipe = resolve_recipe(
        read_recipe({"heads": [{"name": "mlp", "epochs": [30, 10], "dropout": 0.0}]}), "classification"
    )
    assert [trial.slug for trial in list_trials(recipe)] == ["mlp", "mlp-epochs=10"]
    recipe = resolve_recipe(read_recipe({"heads": [{"name": "logistic", "C": 1.0}]}), "classification")
    assert dict(recipe.heads[0].settings) == {"C": 1.0}, "or it would be tuned"


@pytest.mark.parametrize(
    "values", [[1e-9, 1.1e-9], [-1, 1], ["a b", "a-b"], ["a:b", "a/b"], ["x" * 120 + "a", "x" * 120 + "b"]]
)
def test_different_trials_have_different_file_names(values):
    head = read_recipe({}).heads[0]
    recipe = replace(read_recipe({}), heads=tuple(replace(head, settings={"C": value}) for value in values))
    slugs = [trial.slug for trial in list_trials(recipe)]
    assert len({*slugs}) == 2
    assert all("/" not in slug and len(slug) < 110 for slug in slugs)


def test_the_name_all_stands_for_the_heads_of_the_task():
    recipe = resolve_recipe(read_recipe({"heads": [{"name": "all"}]}), "regression")
    assert [head.name for head in recipe.heads] == ["mlp", "linear", "ridge", "knn", "keras"]
