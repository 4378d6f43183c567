"""`featpipe train` and `featpipe heads`, as they are typed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from featpipe import FeatureCache, load_model
from featpipe.cache import SampleTable, write_cache
from featpipe.cli import cli
from featpipe.data import Labels
from featpipe.errors import ConfigError, ModelError
from featpipe.storage import StringColumn
from tests.support.datasets import FACTS, digests

N = 90


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety rows of three classes of unequal size, ten to a patient."""
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
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def trained(*arguments: object) -> dict[str, Any]:
    done = run("train", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_best_of_several_heads_is_saved_and_a_table_compares_them(cache):
    done = run("train", cache, "--head", "knn", "--head", "centroid", "--head", "lda", "--cv", "3")
    header, *lines = done.stderr[done.stderr.index("head ") :].splitlines()
    assert " ".join(header.split()) == "head accuracy balanced_accuracy macro_f1 fit 1,000 rows size tuned"
    names = [line.split()[0] for line in lines[:3]]
    assert set(names) == {"knn", "centroid", "lda"}
    assert done.stdout.strip() == str(cache.with_suffix(f".{names[0]}.model"))
    assert load_model(done.stdout.strip()).head_name == names[0]
    assert "selected by these scores, so they are optimistic" in done.stderr


def test_all_heads_are_compared_and_printed_as_json(cache):
    result = trained(cache, "--head", "all", "--cv", "2", "--metric", "macro_f1")["scores"]["comparison"]
    assert {row["head"] for row in result} == {
        "logistic", "mlp", "linear", "svm", "ridge", "lda", "knn", "centroid", "keras",
    }  # fmt: skip
    assert all(row["metric"] == "macro_f1" and row["seconds_to_fit"] > 0 and row["bytes"] > 0 for row in result)


@pytest.mark.parametrize("heads", [["lda"], ["lda", "centroid"]])
def test_the_same_command_again_reuses_the_model(cache, tmp_path, heads):
    out = tmp_path / "again.model"
    arguments = ["train", cache, *(text for head in heads for text in ("--head", head)), "--cv", "2", "--out", out]
    first, written_at = run(*arguments), out.stat().st_mtime_ns
    second = run(*arguments)
    assert second.stdout == first.stdout == f"{out}\n"
    table = first.stderr.rpartition("on 90 images\n")[2]
    assert second.stderr == f"{out}: up to date, nothing to do\n{table}"
    assert out.stat().st_mtime_ns == written_at


def test_a_model_is_trained_again_when_the_request_or_the_file_changes(cache, tmp_path):
    out, findings = tmp_path / "again.model", tmp_path / "findings"
    command = ["train", cache, "--head", "lda", "--cv", "2", "--out", out]
    run(*command)
    changes: list[list[object]] = [
        ["--cv", "3"], ["--seed", "1"], ["--set", "shrinkage=0.5"], ["--balance", "over"], ["--calibrate"],
        ["--prior", "bee=0.1"], ["--keep", "none"], ["--groups", f"{cache.with_name('visits.csv')}:patient"],
        ["--findings", findings], ["--findings", findings],
    ]  # fmt: skip
    for change in changes:
        assert "fitting lda" in run(*command, *change).stderr, change
    run(*command)
    assert "up to date" in run(*command, "--memory", "1G").stderr
    run("expand", out, "--merge", "ant,bee=insect", "--out", out)
    assert "fitting lda" in run(*command).stderr, "expand changed the model"
    out.write_bytes(out.read_bytes()[:-100])
    assert "fitting lda" in run(*command).stderr, "the file is damaged"


def test_a_grid_is_searched_and_the_selected_values_are_logged(cache):
    done = run("train", cache, "--head", "knn", "--grid", "n_neighbors=1,7", "--metric", "macro_f1", "--cv", "3")
    assert "knn: n_neighbors=" in done.stderr
    assert "by macro_f1, best of 2 on 5 inner folds of 90 rows" in done.stderr
    result = trained(cache, "--head", "ridge", "--tune", "--cv", "0")["history"]["chosen"]
    assert {record["settings"]["alpha"] for record in result["tried"]} == {1.0, 10.0, 100.0, 1e3, 1e4}


def test_groups_stay_together_and_models_are_scored_on_later_times(cache):
    table = cache.with_name("visits.csv")
    result = trained(cache, "--cv", "3", "--no-tune", "--head", "lda", "--groups", f"{table}:patient")
    assert result["scores"]["cross_validation"]["how"]["groups"] == 9
    result = trained(cache, "--cv", "3", "--no-tune", "--head", "knn", "--time", f"{table}:date")
    assert result["scores"]["cross_validation"]["n"] < N
    result = trained(cache, "--no-tune", "--head", "knn", "--time", f"{table}:date", "--since", "2024-01-15")
    assert result["scores"]["cross_validation"]["how"] == {"kind": "since", "since": "2024-01-15", "n": 34}
    with pytest.raises(ConfigError, match="did you mean 'patient'"):
        run("train", cache, "--groups", f"{table}:patiens")


def test_probabilities_are_calibrated_and_corrected(cache):
    out, priors = cache.with_name("p.model"), ["--prior", "cat=big=0.02", "--prior", "bee=0.08"]
    done = run("train", cache, "--calibrate", *priors, "--out", out)
    assert "calibration_error" in done.stderr
    model = load_model(cache.with_name("p.model"))
    assert model.calibration is not None
    assert len(model.calibration.offsets) == 3
    assert model.predict_proba_features(FeatureCache(cache).X)[:, 2].mean() < 0.15
    for wrong in ("bee", "=0.1", "bee=much"):
        assert run("train", cache, "--prior", wrong).exit_code == 2


def test_rare_classes_are_balanced(cache):
    result = trained(cache, "--balance", "smote", "--no-tune", "--cv", "3")
    assert result["history"]["balance"] == "smote"


def test_features_that_may_not_be_loaded_stay_in_the_file(cache):
    assert trained(cache, "--head", "lda", "--memory", "1k")["history"]["streamed"]
    assert not trained(cache, "--head", "lda", "--memory", "1.5 GiB")["history"]["streamed"]
    assert run("train", cache, "--memory", "much").exit_code == 2


def test_an_unwritable_output_is_refused_before_any_fit(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("featpipe.training.train_or_load", lambda *_, **__: pytest.fail("fitted"))
    for out in (tmp_path, tmp_path / "file" / "a.model"):
        with pytest.raises(ModelError, match="cannot be written"):
            run("train", cache, "--head", "knn", "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_several_heads_take_no_settings(cache):
    done = run("train", cache, "--head", "knn", "--head", "lda", "--set", "C=1")
    assert done.exit_code == 2
    assert "--set, --grid and --findings need a single --head" in done.output


def test_any_estimator_is_a_head_by_its_import_path(cache):
    name = "sklearn.naive_bayes.GaussianNB"
    path = run("train", cache, "--head", name, "--set", "var_smoothing=0.1").stdout.strip()
    assert os.path.basename(path) == "made.sklearn-naive-bayes-GaussianNB.model"
    assert load_model(path).predict_proba_features(FeatureCache(cache).X).shape == (N, 3)


def test_an_estimator_that_cannot_be_saved_is_refused_before_any_work(cache):
    with pytest.raises(ModelError, match=r"RandomForestClassifier cannot be saved so that it loads again.*Tree"):
        run("train", cache, "--head", "sklearn.ensemble.RandomForestClassifier", "--cv", "2")


@pytest.mark.parametrize("name", ["logistic", "mlp", "knn", "lda", "keras", "sklearn.naive_bayes.GaussianNB"])
def test_heads_lists_the_settings_of_a_head(name):
    shown = run("heads", name).stdout
    facts = json.loads(run("heads", name, "--json").stdout)
    assert all(key in shown for key in facts["settings"])
    assert facts["settings"].keys() >= facts["grid"].keys()


def test_the_keras_head_follows_the_guides_of_keras(cache):
    model = load_model(run("train", cache, "--head", "keras", "--cv", "0").stdout.strip())
    head = model.head["head"]
    assert (head.hidden, head.optimizer, head.epochs, head.batch_size) == ((1024,), "adam", 10, 32)
    assert model.head["scale"] == "passthrough"
