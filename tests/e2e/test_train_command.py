"""`featpipe train` and `featpipe heads`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import featpipe
from featpipe import FeatureCache, load_model
from featpipe.cache import SampleTable, write_cache
from featpipe.cli import cli
from featpipe.data import Labels
from featpipe.errors import ConfigError, ModelError
from featpipe.storage import StringColumn
from tests.support.commands import run_command
from tests.support.datasets import FACTS, digests

N = 90


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ninety rows in three classes of unequal size, ten rows for each patient."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [50, 25, 15])[rng.permutation(N)]
    X = (2 * rng.normal(size=(3, 6))[codes] + rng.normal(size=(N, 6))).astype(np.float32)
    table = SampleTable(
        ids=StringColumn.from_strings(f"{i:03}.jpg" for i in range(N)),
        status=np.zeros(N, np.uint8),
        digests=digests(N),
        stamps=np.zeros((N, 16), np.uint8),
        split=np.zeros(N, np.uint8),
        labels=Labels.from_class_names([["ant", "bee", "cat=big"][c] for c in codes.tolist()]),
    )
    folder = tmp_path_factory.mktemp("train")
    manifest = {"facts": FACTS, "backbone": {"name": "x:y", "outputs": ["pooled"]}}
    write_cache(folder / "made.h5", table, manifest, {"pooled": (6,)}, "float32", lambda _, start, stop: X[start:stop])
    (folder / "visits.csv").write_text(
        "path,patient,date\n" + "".join(f"{i:03}.jpg,p{i // 10},2024-01-{1 + i // 4:02}\n" for i in range(N))
    )
    return folder / "made.h5"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train_as_json(*arguments: object) -> dict[str, Any]:
    result = run("train", *arguments, "--overwrite", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_best_of_several_heads_is_saved_and_a_table_compares_them(cache):
    result = run("train", cache, "--head", "knn", "--head", "centroid", "--head", "lda", "--cv", "3")
    header, *lines = result.stderr[result.stderr.index("head ") :].splitlines()
    assert " ".join(header.split()) == "head accuracy balanced_accuracy macro_f1 fit 1,000 rows size tuned"
    names = [line.split()[0] for line in lines[:3]]
    assert set(names) == {"knn", "centroid", "lda"}
    assert result.stdout.strip() == str(cache.with_suffix(f".{names[0]}.model"))
    assert load_model(result.stdout.strip()).head_name == names[0]
    assert "selected by these scores, so they are optimistic" in result.stderr


def test_all_heads_are_compared_and_printed_as_json(cache):
    result = train_as_json(cache, "--head", "all", "--cv", "2", "--metric", "macro_f1")["scores"]["comparison"]
    assert {row["head"] for row in result} == {
        "logistic", "mlp", "linear", "svm", "ridge", "lda", "knn", "centroid", "keras",
    }  # fmt: skip
    assert all(row["metric"] == "macro_f1" and row["seconds_to_fit"] > 0 and row["bytes"] > 0 for row in result)


@pytest.mark.parametrize("heads", [["lda"], ["lda", "centroid"]])
def test_the_same_command_again_reuses_the_model(cache, tmp_path, heads):
    model_path = tmp_path / "again.model"
    arguments = [
        "train",
        cache,
        *(text for head in heads for text in ("--head", head)),
        "--cv",
        "2",
        "--out",
        model_path,
    ]
    first, written_at = run(*arguments), model_path.stat().st_mtime_ns
    second = run(*arguments)
    assert second.stdout == first.stdout == f"{model_path}\n"
    table = first.stderr.rpartition("on 90 images\n")[2]
    assert second.stderr == f"{model_path}: up to date, nothing to do\n{table}"
    assert model_path.stat().st_mtime_ns == written_at


def test_a_model_is_trained_again_when_the_request_or_the_file_changes(cache, tmp_path):
    model_path, findings = tmp_path / "again.model", tmp_path / "findings"
    command = ["train", cache, "--head", "lda", "--cv", "2", "--out", model_path]
    run(*command)
    changes: list[list[object]] = [
        ["--cv", "3"], ["--seed", "1"], ["--set", "shrinkage=0.5"], ["--balance", "over"], ["--calibrate"],
        ["--prior", "bee=0.1"], ["--keep", "none"], ["--groups", f"{cache.with_name('visits.csv')}:patient"],
        ["--findings", findings], ["--findings", findings],
    ]  # fmt: skip
    for change in changes:
        assert "fitting lda" in run(*command, *change, "--overwrite").stderr, change
    run(*command, "--overwrite")
    assert "up to date" in run(*command, "--memory", "1G").stderr
    featpipe.expand(model_path, merge={"insect": ["ant", "bee"]}, out=model_path)
    assert "fitting lda" in run(*command, "--overwrite").stderr, "expand changed the model"
    model_path.write_bytes(model_path.read_bytes()[:-100])
    assert "fitting lda" in run(*command, "--overwrite").stderr, "the file is damaged"


def test_a_grid_is_searched_and_the_selected_values_are_logged(cache):
    result = run(
        "train", cache, "--head", "knn", "--grid", "n_neighbors=1,7", "--metric", "macro_f1", "--cv", "3", "--overwrite"
    )
    assert "knn: n_neighbors=" in result.stderr
    assert "by macro_f1, best of 2 on 5 inner folds of 90 rows" in result.stderr
    result = train_as_json(cache, "--head", "ridge", "--tune", "--cv", "0")["history"]["chosen"]
    assert {record["settings"]["alpha"] for record in result["tried"]} == {1.0, 10.0, 100.0, 1e3, 1e4}


def test_groups_stay_together_and_folds_are_scored_on_later_times(cache):
    table = cache.with_name("visits.csv")
    result = train_as_json(cache, "--cv", "3", "--no-tune", "--head", "lda", "--groups", f"{table}:patient")
    assert result["scores"]["cross_validation"]["how"]["groups"] == 9
    result = train_as_json(cache, "--cv", "3", "--no-tune", "--head", "knn", "--time", f"{table}:date")
    assert result["scores"]["cross_validation"]["n"] < N
    result = train_as_json(cache, "--no-tune", "--head", "knn", "--time", f"{table}:date", "--since", "2024-01-15")
    assert result["scores"]["cross_validation"]["how"] == {"kind": "since", "since": "2024-01-15", "n": 34}
    with pytest.raises(ConfigError, match="did you mean 'patient'"):
        run("train", cache, "--groups", f"{table}:patiens")


def test_probabilities_are_calibrated_and_corrected(cache):
    model_path, priors = cache.with_name("p.model"), ["--prior", "cat=big=0.02", "--prior", "bee=0.08"]
    result = run("train", cache, "--calibrate", *priors, "--out", model_path)
    assert "calibration_error" in result.stderr
    model = load_model(cache.with_name("p.model"))
    assert model.calibration is not None
    assert len(model.calibration.offsets) == 3
    assert model.predict_proba_features(FeatureCache(cache).X)[:, 2].mean() < 0.15
    for prior in ("bee", "=0.1", "bee=much"):
        assert run("train", cache, "--prior", prior).exit_code == 2


def test_training_rows_are_resampled_with_balance(cache):
    result = train_as_json(cache, "--balance", "smote", "--no-tune", "--cv", "3")
    assert result["history"]["balance"] == "smote"


def test_features_above_the_memory_limit_stay_in_the_file(cache):
    assert train_as_json(cache, "--head", "lda", "--memory", "1k")["history"]["streamed"]
    assert not train_as_json(cache, "--head", "lda", "--memory", "1.5 GiB")["history"]["streamed"]
    assert run("train", cache, "--memory", "much").exit_code == 2


def test_an_unwritable_output_is_refused_before_any_fit(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("featpipe.training.train_or_load", lambda *_, **__: pytest.fail("fitted"))
    for model_path in (tmp_path, tmp_path / "file" / "a.model"):
        with pytest.raises(ModelError, match="cannot be written"):
            run("train", cache, "--head", "knn", "--out", model_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_settings_with_several_heads_are_wrong_usage(cache):
    result = run("train", cache, "--head", "knn", "--head", "lda", "--set", "C=1")
    assert result.exit_code == 2
    assert "--set, --grid and --findings need a single --head" in result.output


def test_an_import_path_selects_any_estimator_as_head(cache):
    name = "sklearn.naive_bayes.GaussianNB"
    path = run("train", cache, "--head", name, "--set", "var_smoothing=0.1").stdout.strip()
    assert os.path.basename(path) == "made.sklearn-naive-bayes-GaussianNB.model"
    assert load_model(path).predict_proba_features(FeatureCache(cache).X).shape == (N, 3)


def test_an_estimator_that_cannot_be_saved_is_refused_before_any_work(cache):
    with pytest.raises(ModelError, match=r"RandomForestClassifier cannot be saved so that it loads again.*Tree"):
        run("train", cache, "--head", "sklearn.ensemble.RandomForestClassifier", "--cv", "2")


@pytest.mark.parametrize("name", ["logistic", "mlp", "knn", "lda", "keras", "sklearn.naive_bayes.GaussianNB"])
def test_heads_lists_the_settings_of_a_head(name):
    text = run("heads", name).stdout
    settings = json.loads(run("heads", name, "--json").stdout)
    assert all(key in text for key in settings["settings"])
    assert settings["settings"].keys() >= settings["grid"].keys()


def test_the_keras_head_has_the_settings_of_the_guides_of_keras(cache):
    model = load_model(run("train", cache, "--head", "keras", "--cv", "0").stdout.strip())
    head = model.head["head"]
    assert (head.hidden, head.optimizer, head.epochs, head.batch_size) == ((1024,), "adam", 10, 32)
    assert model.head["scale"] == "passthrough"


def test_an_interrupted_training_says_that_nothing_was_written(cache, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("featpipe.training.train_or_load", interrupt)
    result = run_command("train", cache, "--out", tmp_path / "a.model", code=1)
    assert result.stderr.splitlines()[-1] == "featpipe: interrupted; no output was written"
    assert list(tmp_path.iterdir()) == []


def test_train_and_compare_take_the_path_of_a_cache(cache):
    assert featpipe.train(str(cache), "centroid", cv=2).head_name == "centroid"
    assert featpipe.compare(cache, ["centroid", "lda"], cv=2).model.head_name in ("centroid", "lda")
