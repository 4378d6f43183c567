"""`featpipe run` and `featpipe completion`: tables, dry runs, reuse and resumption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import featpipe
from featpipe import load_model
from featpipe.cli import cli
from featpipe.errors import ConfigError
from featpipe.heads import SoftmaxRegression
from featpipe.runtime import Progress
from featpipe.splits import splits
from tests.support.commands import run_command
from tests.support.images import jpeg
from tests.support.logs import logged_messages
from tests.support.recipes import RECIPES_MODULE, get_measurements, photos  # noqa: F401

NETWORK = ["--set", f"backbones.0.name={RECIPES_MODULE}:tiny", "--set", "training.cv=2"]


@pytest.fixture(autouse=True)
def _work_in_folder_with_photos(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Each test works in its own folder, which has the photographs."""
    (tmp_path / "photos").symlink_to(photos / "photos")
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_sweep_embeds_once_and_prints_one_table():
    result = run("run", "linear-probe", "photos", *NETWORK, "--set", "heads.0.C=0.01,1", "--set", "heads.1.name=ridge")
    header, *lines = result.stdout.splitlines()
    assert " ".join(header.split()) == "head settings accuracy, cross-validated accuracy, held out fit head's size"
    rows = [" ".join(line.removeprefix("→").split()[:2]) for line in lines[:3]]
    assert {*rows} >= {"logistic C=0.01", "logistic C=1"}
    assert lines[0].startswith("→"), "the best comes first"
    assert result.stderr.count("embedding on cpu") == 1
    assert (
        "cross-validated: on the training images, ± standard deviation over 2 folds; selects the best" in result.stdout
    )
    assert sorted(path.name for path in Path("runs/linear-probe/models").iterdir()) == [
        "logistic-C=0.01.model", "logistic-C=1.model", "ridge.model",
    ]  # fmt: skip


def test_the_scores_of_a_run_equal_those_of_its_stages_run_one_by_one():
    document = json.loads(run("run", "linear-probe", "photos", *NETWORK, "--set", "heads.0.C=0.5", "--json").stdout)
    row, cache = document["results"][0], featpipe.FeatureCache(document["backbones"][0]["cache"])
    training_rows, test_rows = splits.make_holdout(cache.digests, cache.label_table.values, test=0.2)
    X, y = cache.X.astype(np.float64), cache.y
    mean, std = X[training_rows].mean(axis=0), X[training_rows].std(axis=0)
    std[std == 0] = 1
    oracle = SoftmaxRegression(C=0.5).fit((X[training_rows] - mean) / std, y[training_rows])
    assert row["held_out"]["n"] == len(test_rows)
    assert row["held_out"]["value"] == np.mean(oracle.predict((X[test_rows] - mean) / std) == y[test_rows])
    repeated = featpipe.train(cache, params={"C": 0.5}, cv=2, without=_write_row_table(cache, test_rows))
    assert row["cross_validated"]["value"] == repeated.scores["cross_validation"]["metrics"]["accuracy"]["value"]


def _write_row_table(cache: featpipe.FeatureCache, rows: np.ndarray) -> Path:
    path = Path("test-rows.csv")
    path.write_text("path\n" + "".join(f"{cache.ids[row]}\n" for row in rows.tolist()))
    return path


def test_the_report_of_a_subset_shows_its_images():
    run("run", "linear-probe", "photos", *NETWORK, "--set", "heads.0.C=1", "--set", "images=36")
    page = Path("runs/linear-probe/report.html").read_text()
    assert "No images are shown" not in page
    assert page.count("data:image/webp") >= 1


def test_a_dry_run_shows_remaining_stages_and_writes_nothing():
    dry_run = ("run", "linear-probe", "photos", *NETWORK, "--set", "heads.0.C=1", "--dry-run", "--json")
    other_dry_run = ("run", "linear-probe", "photos", *NETWORK, "--set", "heads.0.C=2", "--dry-run")
    plan = json.loads(run(*dry_run).stdout)
    assert plan["embed"][0]["images"] == plan["embed"][0]["unknown"] == 72
    assert plan["train"] == [{"name": "logistic-C=1", "trained": False, "scored": False}]
    assert [path.name for path in Path().iterdir()] == ["photos"]
    run("run", "linear-probe", "photos", *NETWORK, "--set", "heads.0.C=1")
    plan = json.loads(run(*dry_run, "--set", "heads.1.name=ridge").stdout)
    assert plan["embed"][0]["unknown"] == 0
    assert plan["train"] == [
        {"name": "logistic-C=1", "trained": True, "scored": True},
        {"name": "ridge", "trained": False, "scored": False},
    ]
    assert "to train" in run(*other_dry_run).stdout


CHANGES: dict[str, Any] = {
    "backbones.0.name": f"{RECIPES_MODULE}:tiny",
    "training.cv": 2,
    "heads.0.name": ["ridge", "lda"],
}


def test_an_interrupted_run_resumes():
    def interrupt(progress: Progress) -> None:
        if Path("runs/linear-probe/models/ridge.model").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        featpipe.run("linear-probe", "photos", changes=CHANGES, progress=interrupt)
    folder = Path("runs/linear-probe")
    assert (folder / "models" / "ridge.model").exists()
    assert not (folder / "results.json").exists()
    stat_before = (folder / "models" / "ridge.model").stat()
    with logged_messages() as log:
        repeated = featpipe.run("linear-probe", "photos", changes=CHANGES)
    assert not any(text.startswith("ridge: ") for text in log)
    assert (folder / "models" / "ridge.model").stat().st_mtime_ns == stat_before.st_mtime_ns
    assert get_measurements(repeated) == get_measurements(
        featpipe.run("linear-probe", "photos", changes=CHANGES, out="elsewhere")
    )


def list_trained_heads(changes: dict[str, Any]) -> list[str]:
    """The heads that a run trains, by its log."""
    with logged_messages() as log:
        featpipe.run("linear-probe", "photos", changes={**CHANGES, **changes})
    return [text.split(":")[0] for text in log if ": training on " in text]


def test_a_head_is_trained_again_when_one_of_its_inputs_changes():
    assert list_trained_heads({}) == ["ridge", "lda"]
    assert list_trained_heads({}) == []
    assert list_trained_heads({"training.seed": 1}) == ["ridge", "lda"]
    assert list_trained_heads({"training.seed": 1, "split.seed": 4}) == ["ridge", "lda"]
    assert list_trained_heads({"training.jobs": 1}) == ["ridge", "lda"], "seed 0 again; its models were replaced"
    assert list_trained_heads({"heads.1.name": "knn"}) == ["knn"]
    model = Path("runs/linear-probe/models/lda.model")
    model.write_bytes(Path("runs/linear-probe/models/ridge.model").read_bytes())
    assert list_trained_heads({}) == ["lda"], "the file was replaced by another model"
    assert load_model(model).head_name == "lda"
    labels = "".join(
        f"{path.relative_to('photos')},{'xy'[i % 2]}\n" for i, path in enumerate(sorted(Path("photos").rglob("*.png")))
    )
    Path("other.csv").write_text(f"path,label\n{labels}")
    assert list_trained_heads({"labels": "other.csv"}) == ["ridge", "lda"]


def test_models_are_scored_on_the_evaluation_archive_and_no_row_is_held_out():
    for number, path in enumerate(sorted(Path("photos").rglob("*.png"))[::5]):
        copy_path = Path("others", path.parent.name, path.name)
        copy_path.parent.mkdir(parents=True, exist_ok=True)
        copy_path.write_bytes(jpeg(number) if number else path.read_bytes())
    result = featpipe.run("linear-probe", "photos", changes={**CHANGES, "evaluation.archive": "others"})
    assert result.best.cross_validated["how"]["n"] == 72
    assert result.best.held_out["n"] == 14
    assert result.best.held_out["left_out"] == {"trained on": 1}
    with pytest.raises(ConfigError, match=r"\[evaluation\] archive has labels for none"):
        featpipe.run("linear-probe", "photos", changes={**CHANGES, "evaluation.archive": "others/red"})


def test_fine_tuning_uses_the_held_out_images_of_the_run_and_is_reused():
    changes = {"backbones.0.name": f"{RECIPES_MODULE}:ladder", "training.cv": 2, "heads.0.C": 1, "finetune.epochs": 1}
    result = featpipe.run("fine-tune", "photos", changes=changes)
    probe, tuned = result.results
    comparison = result.tuned.comparison
    row = next(row for row in comparison.metrics if row["name"] == "accuracy")
    assert comparison.n == probe.held_out["n"] == tuned.held_out["n"]
    assert row["probe"][0] == probe.held_out["value"]
    assert row["tuned"][0] == pytest.approx(tuned.held_out["value"])
    assert comparison.verdict() in str(result)
    assert result.model.path == (tuned if result.tuned.kept == "fine-tuned" else probe).model
    with logged_messages() as log:
        repeated = featpipe.run("fine-tune", "photos", changes=changes)
    assert get_measurements(repeated) == get_measurements(result)
    assert any(text.endswith("up to date, nothing to do") for text in log)
    assert "writing the report" not in log


def test_a_cache_of_a_subset_does_not_replace_that_of_all_images():
    featpipe.run("linear-probe", "photos", changes=CHANGES)
    with logged_messages() as log:
        subset_run = featpipe.run("linear-probe", "photos", changes={**CHANGES, "images": 30}, out="some")
    assert subset_run.embedded[0].samples == 30
    assert "all 30 images are in a cache already: no forward pass" in log
    assert (
        featpipe.FeatureCache(subset_run.embedded[0].cache).label_table.values.tolist()
        == [0] * 10 + [1] * 10 + [2] * 10
    )
    assert list_trained_heads({}) == []


def test_an_invalid_recipe_is_refused_before_any_image_is_read(photos: Path):  # noqa: F811
    for changes, message in [
        (
            {"heads.0.name": "logistc"},
            r"linear-probe.toml: \[heads\.0\] unknown head 'logistc'; did you mean 'logistic'",
        ),
        ({"heads.0.name": "knn", "heads.0.C": 1}, r"linear-probe.toml: \[heads\.0\] head 'knn' has no setting 'C'"),
        (
            {"heads.0.name": "ridge", "labels": str(photos / "brightness.csv"), "split.per_class": [1]},
            "per_class needs classification",
        ),
        ({"training.metric": "mae"}, r"linear-probe.toml: \[training\] unknown metric 'mae'.*labels is classif"),
        ({"heads.0.name": "lda", "labels": str(photos / "brightness.csv")}, r"\[heads\.0\] head 'lda' supports class"),
    ]:
        with pytest.raises(ConfigError, match=message):
            featpipe.run("linear-probe", "photos", changes=changes)
    with pytest.raises(ConfigError, match=r"names no archive; give one, as in `featpipe run linear-probe photos/`"):
        featpipe.run("linear-probe")
    assert not Path("cache").exists()


def test_the_html_table_for_notebooks_shows_the_trials():
    result = featpipe.run("linear-probe", "photos", changes={**CHANGES, "heads.0.name": "ridge"})
    text = result._repr_html_()
    assert "<th>accuracy, held out</th>" in text
    assert "<td>ridge</td>" in text
    assert "→" not in text, "one row needs no mark"


def test_recipes_are_listed_with_their_questions():
    text = run("run", "--list").stdout
    assert "few-shot                  How many images of each class do I have to label?" in text


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("featpipe run co", {"compare-backbones", "compare-heads"}),
        ("featpipe run smoke --dr", {"--dry-run"}),
        ("featpipe train x.h5 --head l", {"logistic", "linear", "lda"}),
        ("featpipe extract x --backbone resnet1", {"resnet18", "resnet101", "resnet152"}),
    ],
)
def test_a_shell_completes_commands_options_and_names(words, completions):
    variables = {"_FEATPIPE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    result = subprocess.run(
        [sys.executable, "-m", "featpipe"], env={**os.environ, **variables}, capture_output=True, text=True, timeout=100
    )
    assert {line.split(",")[1] for line in result.stdout.splitlines() if line.startswith("plain,")} == completions


@pytest.mark.parametrize(
    ("shell", "mark"), [("bash", "complete -o nosort"), ("zsh", "#compdef featpipe"), ("fish", "complete --no")]
)
def test_completion_prints_the_script_of_each_shell(shell, mark):
    result = run("completion", shell)
    assert mark in result.stdout
    assert "_FEATPIPE_COMPLETE" in result.stdout


def test_recipes_are_listed_as_a_table_or_json():
    names = [row["recipe"] for row in json.loads(run_command("run", "--list", "--json").stdout)]
    assert names == sorted(names)
    assert [line.split()[0] for line in run_command("run", "--list").stdout.splitlines()[1:]] == names
    assert "Missing argument 'RECIPE'; --list shows the built-in ones" in run_command("run", code=2).stderr
