"""The evaluate command: findings as input of other commands, JSON, the report, and errors in one line."""

from __future__ import annotations

import contextlib
import csv
import json
from importlib.resources import files

import jsonschema
import pytest

from tests.support.commands import run_command as run
from tests.support.images import jpeg


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    """A folder with two caches and two models, written by the commands."""
    home = tmp_path_factory.mktemp("evaluate")
    for part, first_seed in (("train", 0), ("test", 50)):
        for number, label in enumerate(("ape", "bee")):
            (home / part / label).mkdir(parents=True)
            for i in range(9):
                (home / part / label / f"{i}.jpg").write_bytes(jpeg(1000 * number + first_seed + i))
    with contextlib.chdir(home):
        for part in ("train", "test"):
            run("extract", part, "--backbone", "resnet18", "--weights", "none", "--out", f"cache/{part}.h5")
        run("train", "cache/train.h5", "--set", "C=1", "--cv", "2", "--out", "a.model")
        run("train", "cache/train.h5", "--head", "centroid", "--cv", "0", "--out", "b.model")
    return home


@pytest.fixture
def home(models_folder, monkeypatch):
    monkeypatch.chdir(models_folder)
    return models_folder


def test_findings_tables_select_samples_for_evaluate_and_train(home):
    result = run("evaluate", "a.model", "cache/test.h5", "--against", "b.model", "--findings", "findings")
    assert "against centroid, on the same 18 rows" in result.stdout
    with open(home / "findings" / "unsure.csv", newline="") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    assert ids
    assert set(ids) <= {f"{label}/{i}.jpg" for label in ("ape", "bee") for i in range(9)}
    (home / "one.csv").write_text(f"id\n{ids[0]}\n")
    document_without_sample = json.loads(
        run("evaluate", "a.model", "cache/test.h5", "--without", "one.csv", "--json").stdout
    )
    assert document_without_sample["left_out"] == {"named by --without": 1}
    run("train", "cache/test.h5", "--without", "one.csv", "--set", "C=1", "--cv", "0", "--out", "c.model")
    document = json.loads(run("evaluate", "c.model", "cache/test.h5", "--json").stdout)
    assert (document["rows"], document["left_out"]) == (1, {"trained on": 17})


def test_json_matches_the_schema_and_a_report_is_written(home):
    result = run("evaluate", "a.model", "test", "--report", "page.html", "--json")
    schema = json.loads((files("featpipe.evaluation") / "schema.json").read_text("utf-8"))
    jsonschema.validate(json.loads(result.stdout), schema)
    page = (home / "page.html").read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert "featpipe evaluate a.model test --report page.html --json" in page
    assert len(page) < 2_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("b.model", "cache/none.h5"), "cache/none.h5"),
        (("a.model", "cache/test.h5", "--against", "none.model"), "none.model: there is no such model file"),
        (("a.model", "cache/test.h5", "--trained-on", "cache/test.h5"), "the model was trained on none of its images"),
        (("a.model", "cache/test.h5", "--without", "none.csv"), "none.csv: cannot be read"),
        (("a.model", "cache/test.h5", "--findings", "a.model/x"), "cannot write the findings"),
    ],
)
def test_an_error_is_one_line_that_names_the_problem(home, arguments, message):
    result = run("evaluate", *arguments, code=1)
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("featpipe: ")
    assert message in lines[-1]
    assert "Traceback" not in result.stderr


def test_prediction_sets_need_a_valid_level_and_a_calibrated_model(home):
    run("predict", "a.model", "test", "--sets", "0.8", "--out", "p.jsonl")
    rows = [json.loads(line) for line in (home / "p.jsonl").read_text().splitlines()]
    assert all(row["label"] in row["set"] and 0 <= row["novelty"] < 1 for row in rows)
    assert "between 0 and 1" in run("predict", "a.model", "test", "--sets", "9", code=1).stderr
    assert "train with --cv 2 or more" in run("predict", "b.model", "test", "--sets", "0.9", code=1).stderr
