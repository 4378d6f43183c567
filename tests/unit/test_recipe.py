"""A recipe is read into the stages' own settings; what is wrong with it is named by file, table and key."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from featpipe.config import ExtractionConfig
from featpipe.errors import ConfigError
from featpipe.experiments import BACKBONE_FIELDS, EXTRACTION_KEYS, Recipe, parse_changes, read_recipe


def test_what_is_not_said_has_the_default_of_its_stage():
    recipe = read_recipe({})
    assert recipe == Recipe("recipe", "recipe", extractions=(ExtractionConfig(cache=str(Path("cache").absolute())),))


def test_a_list_is_a_sweep_and_a_list_in_a_list_is_one_value():
    recipe = read_recipe(
        {
            "backbones": [{"name": ["a", "b"], "precision": ["fp32", "bf16"], "outputs": ["pooled", "x:avg"]}],
            "heads": [{"name": ["logistic", "svm"], "C": [1, 2]}, {"name": "mlp", "hidden": [[256, 128]]}],
        }
    )
    assert [(one.backbone, one.precision) for one in recipe.extractions] == [
        ("a", "fp32"), ("a", "bf16"), ("b", "fp32"), ("b", "bf16"),
    ]  # fmt: skip
    assert {one.outputs for one in recipe.extractions} == {("pooled", "x:avg")}
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
        ("archive = 3\n", "wrong.toml: archive is 3; give text or a list of it"),
        ("[[backbones]]\nprecision = 'fp31'\n", "wrong.toml: [backbones.0] unknown precision 'fp31'; did you mean"),
        ("[[backbones]]\nnaem = 'x'\n", "wrong.toml: [backbones.0] unknown key 'naem'; did you mean 'name'?"),
        ("[extraction]\ndevise = 'cpu'\n", "wrong.toml: [extraction] unknown key 'devise'; did you mean 'device'"),
        ("a = \n", "wrong.toml: is not TOML (Invalid value (at line 1, column 5)"),
    ],
)
def test_what_is_wrong_is_named_by_file_table_and_key(tmp_path, text, message):
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(tmp_path / "wrong.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_typed_wrong_is_not_blamed_on_the_file():
    with pytest.raises(ConfigError, match=r"^--set: \[split\] unknown key 'tset'; did you mean 'test'"):
        read_recipe({}, {"split.tset": 1})
    with pytest.raises(ConfigError, match=r"^--set heads\.3\.C: there is no '3' there"):
        read_recipe({}, {"heads.3.C": 1})


def test_a_recipe_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown recipe 'linear-prob'; did you mean 'linear-probe'"):
        read_recipe("linear-prob")
    with pytest.raises(ConfigError, match=r"there is no such recipe; `featpipe run --list` names"):
        read_recipe("mine.toml")


def test_paths_of_a_file_are_relative_to_it_and_typed_ones_to_here(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.toml").write_text(
        'archive = ["photos", "featpipe:tiles"]\n[split]\ngroups = "visits.csv:patient"\n[[backbones]]\n'
        'weights = ["none", "w/a.safetensors"]\n'
    )
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("there/a.toml", {"evaluation.archive": "others"})
    assert recipe.samples.archive == (str(tmp_path / "there" / "photos"), "featpipe:tiles")
    assert recipe.split.groups == f"{tmp_path / 'there' / 'visits.csv'}:patient"
    assert recipe.evaluation.archive == (str(tmp_path / "others"),)
    weights = [one.weights for one in recipe.extractions]
    assert weights == ["none", str(tmp_path / "there" / "w" / "a.safetensors")]
    assert read_recipe("there/a.toml", archive="here").samples.archive == (str(tmp_path / "here"),)


def test_values_are_typed_as_in_toml_or_as_text():
    texts = ["heads.0.C=1e-2", "a=1,10", "b=photos/", "c=[[256, 128]]", "d=true", "e=x,y", "f='1,2'", "g="]
    assert parse_changes(texts) == {
        "heads.0.C": 0.01, "a": [1, 10], "b": "photos/", "c": [[256, 128]], "d": True, "e": ["x", "y"], "f": "1,2",
        "g": None,
    }  # fmt: skip
    for wrong in ("heads", "=3", "a..b=3"):
        with pytest.raises(ConfigError, match=r"is not KEY=VALUE"):
            parse_changes([wrong])


def test_an_empty_value_takes_the_key_out_and_tables_are_added():
    document = {"images": 5, "heads": [{"name": "knn"}]}
    recipe = read_recipe(document, {"images": None, "heads.1.name": "lda", "heads.1.output": "pooled"})
    assert recipe.samples.images is None
    assert [(head.name, head.output) for head in recipe.heads] == [("knn", None), ("lda", "pooled")]
    assert document == {"images": 5, "heads": [{"name": "knn"}]}


def test_dates_are_texts():
    recipe = read_recipe({}, parse_changes(["split.times=visits.csv:date", "split.since=2024-03-01"]))
    assert recipe.split.since == "2024-03-01"


def test_every_setting_of_an_extraction_has_its_place_in_a_recipe():
    elsewhere = {"transform": "code", "labels": "a key of the whole", "out": "a run's own", "overwrite": "a run's own"}
    elsewhere["time_limit"] = "of one call, and not of what it asks for"
    assert {field.name for field in fields(ExtractionConfig)} == {
        *BACKBONE_FIELDS.values(),
        *EXTRACTION_KEYS,
        *elsewhere,
    }
