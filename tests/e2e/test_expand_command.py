"""`featpipe expand`: results, reuse and errors; and `featpipe info` on expanded models."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from featpipe import FeatureCache, expand, load_model, train
from featpipe.cli import cli
from featpipe.errors import ConfigError, FeatpipeError
from featpipe.incremental.metrics import MethodEvaluator
from tests.support.commands import run_command


@pytest.fixture(scope="module")
def home(make_cache, tmp_path_factory) -> dict[str, Path]:
    """A model of three classes, a cache of two more, and a test cache."""
    folder = tmp_path_factory.mktemp("expand")
    old_cache = make_cache({"ant": 30, "bee": 30, "cow": 30}, seed=1)
    model = train(old_cache, tune=False, keep="all").save(folder / "three.model")
    new, test = (
        make_cache({"dog": 25, "eel": 25}, seed=2),
        make_cache(dict.fromkeys(("ant", "bee", "cow", "dog", "eel"), 10), 3),
    )
    return {"model": model, "old": old_cache.path, "new": new.path, "test": test.path, "folder": folder}


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_expand_prints_path_and_table_and_reuses_the_model_the_second_time(home):
    result = run("expand", home["model"], home["new"], "--test", home["test"], "--method", "replay")
    assert result.exit_code == 0, result.output
    path = Path(result.stdout.strip())
    assert path == home["folder"] / "three.5-classes.model"
    for word in ("epoch", "old accuracy", "forgetting", "backward transfer", "replay", "naive", "before"):
        assert word in result.stderr
    assert "50 given test images" in result.stderr
    written_at = path.stat().st_mtime_ns
    repeated = run("expand", home["model"], home["new"], "--test", home["test"], "--method", "replay")
    assert repeated.stdout == result.stdout
    assert "up to date, nothing to do" in repeated.stderr
    assert "naive" in repeated.stderr  # the table is shown again
    assert path.stat().st_mtime_ns == written_at
    run("expand", home["model"], home["new"], "--test", home["test"], "--method", "distill", "--overwrite")
    assert path.stat().st_mtime_ns > written_at


def test_the_report_of_an_expanded_model_shows_old_and_new_classes_and_every_method(home, tmp_path):
    path = tmp_path / "five.model"
    result = run(
        "expand", home["model"], home["new"], "--test", home["test"], "--method", "replay", "--out", path, "--json"
    )
    result = json.loads(result.stdout)
    run("evaluate", path, home["test"], "--report", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "dog, eel; method replay" in page
    for words in ("Accuracy of old classes", "Loss on new classes", "Method naive", "forgetting"):
        assert words in page
    old_accuracy = result["outcomes"][0]["old"]["value"]
    assert f"old classes {old_accuracy:.3f}" in page


def test_expanding_a_model_in_place_does_nothing_the_second_time(home, tmp_path):
    path = tmp_path / "in-place.model"
    path.write_bytes(home["model"].read_bytes())
    expand(path, home["new"], drop=["bee"], method="replay", out=path)
    written_at = path.stat().st_mtime_ns
    expand(path, home["new"], drop=["bee"], method="replay", out=path)
    assert path.stat().st_mtime_ns == written_at
    assert load_model(path).classes == ("ant", "cow", "dog", "eel")


def test_expand_prints_results_as_json(home, tmp_path):
    result = json.loads(
        run("expand", home["model"], home["new"], "--method", "all", "--out", tmp_path / "m.model", "--json").stdout
    )
    assert result["model"] == str(tmp_path / "m.model")
    assert result["classes"] == ["ant", "bee", "cow", "dog", "eel"]
    assert result["recommended"] == result["method"]
    assert "joint" in result["unavailable"]
    outcome = result["outcomes"][0]
    assert outcome["new"]["low"] <= outcome["new"]["value"] <= outcome["new"]["high"]
    assert outcome["old"] is None


def test_classes_are_dropped_merged_and_renamed(home, tmp_path):
    result = run(
        "expand", home["model"], "--drop", "cow", "--merge", "ant,bee=insect", "--merge", "dog=hound",
        home["new"], "--method", "statistics", "--out", tmp_path / "m.model",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert load_model(tmp_path / "m.model").classes == ("insect", "eel", "hound")
    for merge in ("ant", "ant=", "=x", ",=x"):
        assert run("expand", home["model"], "--merge", merge).exit_code == 2


def test_info_shows_retained_data_and_the_steps_that_added_classes(home, tmp_path):
    model_path = run(
        "expand", home["model"], home["new"], "--method", "replay", "--out", tmp_path / "m.model"
    ).stdout.strip()
    text = run("info", model_path).stdout
    assert "100 embeddings, at most 20 of a class" in text
    assert "statistics:" in text
    assert "3 classes by train from" in text
    assert "2 classes by replay from" in text
    details = json.loads(run("info", model_path, "--json").stdout)
    assert details["keeps"]["rows"] == 100
    assert details["history"]["expansions"][0]["new"] == ["dog", "eel"]
    result_without_data = run(
        "expand", home["model"], home["new"], "--method", "replay", "--keep", "none", "--out", model_path, "--overwrite"
    )
    assert result_without_data.exit_code == 0
    assert "nothing of its training data but the digests" in run("info", model_path).stdout
    assert load_model(model_path).kept is None


@pytest.mark.parametrize("keep", ["none", "rows=7", "statistics", None])
def test_train_keep_selects_the_retained_data(keep, home, tmp_path):
    options = [] if keep is None else ["--keep", keep]
    result = run("train", home["old"], "--no-tune", "--cv", "0", "--out", tmp_path / "t.model", *options)
    assert result.exit_code == 0, result.output
    retained = json.loads(run("info", tmp_path / "t.model", "--json").stdout)["keeps"]
    expected = {"none": None, "rows=7": {"rows"}, "statistics": {"statistics"}, None: {"statistics", "importances"}}
    assert (retained and set(retained["bytes"])) == expected[keep]
    with pytest.raises(ConfigError, match="expected none, all, or a list of"):
        run("train", home["old"], "--keep", "everything")


def test_statistics_of_streamed_rows_equal_those_of_rows_in_memory(home, tmp_path):
    retained = []
    for memory in ("1k", "1G"):
        model_path = tmp_path / f"{memory}.model"
        options = ["--head", "lda", "--cv", "0", "--memory", memory, "--keep", "statistics", "--out", model_path]
        assert run("train", home["old"], *options).exit_code == 0
        retained.append(load_model(model_path).kept.to_arrays())
    for name, array in retained[0].items():
        assert np.allclose(array, retained[1][name], rtol=1e-9, atol=1e-7), name
    assert load_model(run("train", home["old"], "--head", "lda", "--memory", "1k").stdout.strip()).kept is None
    with pytest.raises(ConfigError, match="only statistics of features that stay in the file can be retained"):
        run("train", home["old"], "--head", "lda", "--memory", "1k", "--keep", "rows", "--overwrite")


def test_an_error_is_one_line_that_names_the_problem(home, tmp_path):
    for arguments, problem in {
        (home["model"],): "no labelled images to train on",
        (home["model"], home["old"]): "no class is new; give new images",
        (home["model"], home["new"], "--method", "replays"): "did you mean 'replay'",
        (home["model"], home["new"], tmp_path): "caches and archives are mixed",
        (home["model"], home["new"], "--set", "epochs=0"): "epochs is 0",
        (home["model"], home["new"], "--keep", "rows=0"): "keep is 'rows=0'",
        (home["model"], home["new"], "--unfreeze", "last"): "is a cache, and --unfreeze trains on images",
        (
            home["model"],
            home["new"],
            "--keep",
            "network",
        ): "need a pass of images through it, and embeddings are not enough",
        (tmp_path / "no.model", home["new"]): "there is no such model file",
    }.items():
        with pytest.raises(FeatpipeError, match=problem) as error_info:
            run("expand", *arguments)
        assert "\n" not in str(error_info.value)


def test_an_interrupted_expansion_leaves_no_model(home, tmp_path, monkeypatch):
    """The interrupt comes before the second method is fitted."""
    make_epoch_callback, curves = MethodEvaluator.make_epoch_callback, []

    def interrupt(evaluator, curve):
        curves.append(curve)
        if len(curves) == 2:
            signal.raise_signal(signal.SIGINT)
        return make_epoch_callback(evaluator, curve)

    monkeypatch.setattr(MethodEvaluator, "make_epoch_callback", interrupt)
    model_path = tmp_path / "interrupted.model"
    arguments = ["--method", "all", "--test", home["test"], "--out", model_path]
    result = run_command("expand", home["model"], home["new"], *arguments, code=1)
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_older_models_without_retained_data_are_read(home, tmp_path):
    """A model of format version 1.1 without retained data loads, and is expanded by a method that needs none."""
    import zipfile

    bare_path = train(FeatureCache(home["old"]), tune=False, keep="none").save(tmp_path / "bare.model")
    with zipfile.ZipFile(bare_path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    document = json.loads(parts["model.json"])
    del document["kept"]
    parts["model.json"] = json.dumps(document | {"format_version": "1.1"}).encode()
    with zipfile.ZipFile(bare_path, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    assert run("info", bare_path).exit_code == 0
    result = run("expand", bare_path, home["new"])
    assert result.exit_code == 0, result.output
    assert "method: frozen-old" in result.stderr
