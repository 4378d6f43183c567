"""Every built-in recipe runs, answers its question in a table, and runs again from its resolved file."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import featpipe
from featpipe.experiments import (
    EvaluationConfig,
    RecipeTraining,
    ReportConfig,
    SamplesConfig,
    SplitConfig,
    list_builtin_recipes,
    read_question,
    read_recipe,
)
from featpipe.experiments.recipe.parse import TABLE_NAMES
from tests.support.recipes import RECIPES_MODULE, get_measurements, photos  # noqa: F401

ROOT = Path(__file__).parents[2]
RECIPE_FILES = sorted((ROOT / "pipelines").glob("*.toml"))


CHANGES: dict[str, dict[str, Any]] = {  # besides a tiny network and two folds: settings that are fast on a tiny archive
    "compare-backbones": {
        "backbones.0.name": [f"{RECIPES_MODULE}:tiny", f"{RECIPES_MODULE}:other"],
        "images": 60,
        "heads.0.C": 1,
    },
    "compare-heads": {"heads.0.tune": False},
    "few-shot": {"split.draws": 2, "heads.0.C": 1},
    "fine-tune": {"backbones.0.name": f"{RECIPES_MODULE}:ladder", "heads.0.C": 1, "finetune.epochs": 1},
    "imbalanced": {"heads.0.C": 1, "heads.1.C": 1, "heads.2.epochs": 3},
    "linear-probe": {"heads.0.C": [0.1, 1]},
    "regression": {"labels": "brightness.csv", "heads.1.epochs": 3},
}


def make_changes(name: str) -> dict[str, Any]:
    return {"backbones.0.name": f"{RECIPES_MODULE}:tiny", "training.cv": 2, **CHANGES.get(name, {})}


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_")  # centroid, of a feature that is always zero
@pytest.mark.parametrize(
    "name",
    [
        path.stem if path.stem == "linear-probe" else pytest.param(path.stem, marks=pytest.mark.thorough)
        for path in RECIPE_FILES
        if path.stem != "smoke"
    ],
)
def test_a_recipe_runs_and_its_resolved_file_gives_the_same_numbers(name, photos, monkeypatch):  # noqa: F811
    monkeypatch.chdir(photos)
    result = featpipe.run(name, "photos", changes=make_changes(name), out=f"runs/{name}")
    repeated = featpipe.run(f"runs/{name}/recipe.toml", out=f"repeated/{name}")
    assert get_measurements(repeated) == get_measurements(result)
    assert repeated.recipe.heads == result.recipe.heads
    assert result.report.read_text().startswith("<!doctype html>")
    assert result.recipe.question in result.report.read_text().replace("&#39;", "'")
    assert result.model.path == result.best.model
    document = json.loads((photos / "runs" / name / "results.json").read_text())
    assert [row["name"] for row in document["results"]] == [row.name for row in result.results]
    assert (photos / "runs" / name / "table.txt").read_text() == f"{result}\n"


def test_the_readme_explains_every_key_of_the_results(photos, monkeypatch):  # noqa: F811
    monkeypatch.chdir(photos)
    result = featpipe.run("keras-feature-extraction", "photos", changes=make_changes("keras-feature-extraction"))
    readme, document = (ROOT / "pipelines" / "README.md").read_text(), result.to_dict()
    for table in (document, document["results"][0], document["backbones"][0]):
        for key in table:
            assert re.search(rf"`(results\[\]\.)?{key}`", readme), key
    for table in TABLE_NAMES:
        assert f"[{table}]" in readme
    for stage in (SamplesConfig, SplitConfig, RecipeTraining, EvaluationConfig, ReportConfig):
        for field in fields(stage):
            assert re.search(rf"\b{field.name}\b", readme), field.name


def test_the_smoke_recipe_runs_unchanged_and_beats_guessing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = featpipe.run("smoke")
    assert result.folder == Path("runs/smoke")
    assert {row.head for row in result.results} == {"logistic", "ridge"}
    assert result.best.held_out["low"] > 1 / 17, "no better than a guess among seventeen photographs"
    assert result.embedded[0].samples == 170


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_a_recipe_states_its_question_and_its_duration(path):
    text = path.read_text()
    document = tomllib.loads(text)
    assert document["question"] == read_question(path.stem)
    assert document["question"].endswith("?")
    assert re.search(r"^# .*(second|minute)s?\b.* on two cores", text, re.MULTILINE | re.IGNORECASE), "no duration"
    readme = (ROOT / "pipelines" / "README.md").read_text()
    assert f"`{path.stem}`" in readme
    assert document["question"] in readme


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_a_recipe_sets_no_key_to_its_default(path):
    document = tomllib.loads(path.read_text())
    parsed = read_recipe(document)
    for table in [document, *(value for key in document for value in list_tables(document[key]))]:
        for key in [key for key, value in table.items() if not list_tables(value) and key != "name"]:
            value = table.pop(key)
            assert read_recipe(document) != parsed, f"{key} = {value!r} is the default"
            table[key] = value


def list_tables(value: Any) -> list[dict[str, Any]]:
    """The tables in a value of a recipe, which may be a table or an array of tables."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, dict)]


def test_the_package_contains_every_recipe():
    assert list_builtin_recipes() == [path.stem for path in RECIPE_FILES]
    assert len(RECIPE_FILES) >= 8
