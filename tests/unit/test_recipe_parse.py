"""A recipe is parsed into the settings of the stages; errors name file, table and key."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from featpipe.config import ExtractionConfig
from featpipe.errors import ConfigError
from featpipe.experiments import BACKBONE_FIELDS, EXTRACTION_KEYS, Recipe, parse_changes, read_recipe


def test_a_missing_key_has_the_default_of_its_stage():
    recipe = read_recipe({})
    assert recipe == Recipe("recipe", "recipe", extractions=(ExtractionConfig(cache=str(Path("cache").absolute())),))


def test_a_list_makes_a_sweep_and_a_nested_list_is_one_value():
    recipe = read_recipe(
        {
            "backbones": [{"name": ["a", "b"], "precision": ["fp32", "bf16"], "outputs": ["pooled", "x:avg"]}],
            "heads": [{"name": ["logistic", "svm"], "C": [1, 2]}, {"name": "mlp", "hidden": [[256, 128]]}],
        }
    )
    assert [(extraction.backbone, extraction.precision) for extraction in recipe.extractions] == [
        ("a", "fp32"), ("a", "bf16"), ("b", "fp32"), ("b", "bf16"),
    ]  # fmt: skip
    assert {extraction.outputs for extraction in recipe.extractions} == {("pooled", "x:avg")}
    assert [(head.name, dict(head.settings)) for head in recipe.heads] == [
        ("logistic", {"C": 1}),
        ("logistic", {"C": 2}),
        ("svm", {"C": 1}),
        ("svm", {"C": 2}),
        ("mlp", {"hidden": (256, 128)}),
    ]
    assert [head.table for head in recipe.heads] == ["heads.0"] * 4 + ["heads.1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[splitt]\n", "wrong.toml: unknown table 'splitt'; did you mean 'split'?"),
        ("imagse = 3\n", "wrong.toml: unknown key 'imagse'; did you mean 'images'?"),
        ("[split]\ntset = 0.1\n", "wrong.toml: [split] unknown key 'tset'; did you mean 'test'"),
        ("[split]\ntest = 'much'\n", "wrong.toml: [split] test is 'much'; give a number above 0 and below 1"),
        ("[split]\ntest = [0.1, 0.2]\n", "only heads and backbones take several values"),
        ("[split]\ntest = 2\n", "wrong.toml: [split] test is 2; give a number above 0 and below 1"),
        ("[training]\ncv = true\n", "wrong.toml: [training] cv is True; give a whole number of 2 or more"),
        ("[[heads]]\n[[heads]]\nbalance = 'upper'\n", "wrong.toml: [heads.1] unknown balance 'upper'; did you mean"),
        ("[[heads]]\nname = 3\n", "wrong.toml: [heads.0] name is 3; give text"),
        ("heads = 3\n", "wrong.toml: heads is 3; expected tables [[heads]]"),
        ("split = 3\n", "wrong.toml: split is 3; expected a table [split]"),
        ("archive = 3\n", "wrong.toml: archive is 3; give text or a list of such values"),
        ("[[backbones]]\nprecision = 'fp31'\n", "wrong.toml: [backbones.0] unknown precision 'fp31'; did you mean"),
        ("[[backbones]]\nnaem = 'x'\n", "wrong.toml: [backbones.0] unknown key 'naem'; did you mean 'name'?"),
        ("[extraction]\ndevise = 'cpu'\n", "wrong.toml: [extraction] unknown key 'devise'; did you mean 'device'"),
        ("a = \n", "wrong.toml: is not TOML (Invalid value (at line 1, column 5)"),
    ],
)
def test_an_error_names_file_table_and_key(tmp_path, text, message):
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(ConfigError) as error_info:
        read_recipe(tmp_path / "wrong.toml")
    assert message in str(error_info.value)
    assert "\n" not in str(error_info.value)


def test_an_error_in_an_override_names_the_option_set_instead_of_the_file():
    with pytest.raises(ConfigError, match=r"^--set: \[split\] unknown key 'tset'; did you mean 'test'"):
        read_recipe({}, {"split.tset": 1})
    with pytest.raises(ConfigError, match=r"^--set heads\.3\.C: the recipe has no '3' here"):
        read_recipe({}, {"heads.3.C": 1})


def test_the_error_for_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown recipe 'linear-prob'; did you mean 'linear-probe'"):
        read_recipe("linear-prob")
    with pytest.raises(ConfigError, match=r"there is no such recipe; `featpipe run --list` lists"):
        read_recipe("mine.toml")


def test_paths_in_a_file_are_relative_to_it_and_other_paths_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.toml").write_text(
        'archive = ["photos", "featpipe:tiles"]\n[split]\ngroups = "visits.csv:patient"\n[[backbones]]\n'
        'weights = ["none", "w/a.safetensors"]\n'
    )
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("recipes/a.toml", {"evaluation.archive": "others"})
    assert recipe.samples.archive == (str(tmp_path / "recipes" / "photos"), "featpipe:tiles")
    assert recipe.split.groups == f"{tmp_path / 'recipes' / 'visits.csv'}:patient"
    assert recipe.evaluation.archive == (str(tmp_path / "others"),)
    weights = [extraction.weights for extraction in recipe.extractions]
    assert weights == ["none", str(tmp_path / "recipes" / "w" / "a.safetensors")]
    assert read_recipe("recipes/a.toml", archive="other").samples.archive == (str(tmp_path / "other"),)


def test_override_values_are_toml_or_text():
    texts = ["heads.0.C=1e-2", "a=1,10", "b=photos/", "c=[[256, 128]]", "d=true", "e=x,y", "f='1,2'", "g="]
    assert parse_changes(texts) == {
        "heads.0.C": 0.01, "a": [1, 10], "b": "photos/", "c": [[256, 128]], "d": True, "e": ["x", "y"], "f": "1,2",
        "g": None,
    }  # fmt: skip
    for assignment in ("heads", "=3", "a..b=3"):
        with pytest.raises(ConfigError, match=r"is not KEY=VALUE"):
            parse_changes([assignment])


def test_an_empty_value_removes_the_key_and_the_next_number_adds_a_table():
    document = {"images": 5, "heads": [{"name": "knn"}]}
    recipe = read_recipe(document, {"images": None, "heads.1.name": "lda", "heads.1.output": "pooled"})
    assert recipe.samples.images is None
    assert [(head.name, head.output) for head in recipe.heads] == [("knn", None), ("lda", "pooled")]
    assert document == {"images": 5, "heads": [{"name": "knn"}]}


def test_a_number_sign_is_part_of_a_text_and_a_number_needs_no_leading_zero():
    assert parse_changes(["labels=photos#1.csv", "a=5#2", "b=.5", "c=-.5", "d='x#y'", "e=1,x#y"]) == {
        "labels": "photos#1.csv", "a": "5#2", "b": 0.5, "c": -0.5, "d": "x#y", "e": [1, "x#y"],
    }  # fmt: skip


def test_a_date_in_an_override_becomes_text():
    recipe = read_recipe({}, parse_changes(["split.times=visits.csv:date", "split.since=2024-03-01"]))
    assert recipe.split.since == "2024-03-01"


def test_every_extraction_setting_has_a_key_in_a_recipe():
    keys_outside_recipes = {
        "transform": "code",
        "labels": "a top-level key",
        "out": "set by the run",
        "overwrite": "set by the run",
    }
    keys_outside_recipes["time_limit"] = "belongs to one call"
    assert {field.name for field in fields(ExtractionConfig)} == {
        *BACKBONE_FIELDS.values(),
        *EXTRACTION_KEYS,
        *keys_outside_recipes,
    }
