"""No command replaces a file that it did not write, and none writes to a file that it reads."""

from __future__ import annotations

import json
import os

import pytest

from featpipe.diagnostics import FINDING_NAMES
from tests.support.commands import run_command
from tests.support.expansion import make_cache_writer
from tests.support.images import jpeg
from tests.support.networks import CUSTOM_NETWORK_CODE


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache with its model; evaluation rows in a second cache."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "photos" / "ant").mkdir(parents=True)
    (folder / "photos" / "ant" / "a.jpg").write_bytes(jpeg(0))
    write = make_cache_writer(folder)
    (folder / "train.h5").symlink_to(write({"ant": 20, "bee": 20}, 0).path)
    (folder / "test.h5").symlink_to(write({"ant": 10, "bee": 10}, 1).path)
    run_command("train", folder / "train.h5", "--head", "centroid", "--out", folder / "pets.model")
    return folder


COMMANDS = {  # the output that is tested is OUT
    "train": ["train", "train.h5", "--out", "OUT"],
    "train --head all": ["train", "train.h5", "--head", "all", "--out", "OUT"],
    "train --findings": ["train", "train.h5", "--out", "new.model", "--findings", "DIR"],
    "expand": ["expand", "pets.model", "test.h5", "--out", "OUT"],
    "finetune": ["finetune", "pets.model", "photos", "--out", "OUT"],
    "evaluate --report": ["evaluate", "pets.model", "test.h5", "--report", "OUT"],
    "evaluate --findings": ["evaluate", "pets.model", "test.h5", "--findings", "DIR"],
    "predict": ["predict", "pets.model", "photos", "--out", "OUT"],
    "extract": ["extract", "photos", "--out", "OUT"],
    "merge": ["merge", "train.h5", "test.h5", "--out", "OUT"],
    "pack": ["pack", "train.h5", "--out", "OUT"],
    "run": ["run", "linear-probe", "photos", "--out", "RUN"],
    "demo": ["demo", "--out", "RUN"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_of_somebody_else_is_not_replaced(home, tmp_path, monkeypatch, name):
    monkeypatch.chdir(home)
    suffix = {"predict": ".csv", "extract": ".h5", "merge": ".h5", "pack": ".h5"}.get(name, ".model")
    files = {"OUT": tmp_path / f"out{suffix}", "DIR": tmp_path / f"{FINDING_NAMES[0]}.csv", "RUN": tmp_path / "notes"}
    for path in files.values():
        path.write_text("mine")
    options = {"OUT": str(files["OUT"]), "DIR": str(tmp_path), "RUN": str(tmp_path)}
    result = run_command(*(options.get(word, word) for word in COMMANDS[name]), code=1)
    assert any(f"{path}: " in result.stderr for path in (*files.values(), tmp_path)), result.stderr
    assert any(text in result.stderr for text in ("--out", "--findings", "--report", "not an HDF5 file"))
    visible = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert {path: path.read_text() for path in visible} == dict.fromkeys(files.values(), "mine")


INPUTS = {  # an output that is the command's own input
    "train": ["train", "train.h5", "--out", "train.h5"],
    "train --without": ["train", "train.h5", "--without", "table.csv", "--out", "table.csv"],
    "train --groups": ["train", "train.h5", "--groups", "table.csv:patient", "--out", "table.csv"],
    "expand": ["expand", "pets.model", "test.h5", "--out", "pets.model"],
    "expand --test": ["expand", "pets.model", "--test", "test.h5", "--out", "./test.h5"],
    "finetune": ["finetune", "pets.model", "photos", "--out", "pets.model"],
    "finetune --labels": ["finetune", "pets.model", "photos", "--labels", "table.csv", "--out", "table.csv"],
    "evaluate": ["evaluate", "pets.model", "test.h5", "--report", "pets.model"],
    "evaluate --against": ["evaluate", "no.model", "test.h5", "--against", "pets.model", "--report", "pets.model"],
    "predict": ["predict", "pets.model", "table.csv", "--out", "table.csv"],
    "extract": ["extract", "table.csv", "--out", "table.csv"],
    "merge": ["merge", "train.h5", "test.h5", "--out", "test.h5"],
}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("name", INPUTS)
def test_an_output_that_is_an_input_is_an_error(home, monkeypatch, name, overwrite):
    monkeypatch.chdir(home)
    (home / "table.csv").write_text("path,patient\na.jpg,x\n")
    files = {path: path.read_bytes() for path in home.iterdir() if path.is_file()}
    result = run_command(*INPUTS[name], *overwrite, code=1)
    assert "is an input of this command; choose another" in result.stderr
    assert {path: path.read_bytes() for path in home.iterdir() if path.is_file()} == files


def test_the_same_command_replaces_its_own_model_and_another_asks_for_overwrite(home, tmp_path):
    out = tmp_path / "a.model"
    arguments = ["train", home / "train.h5", "--head", "centroid", "--cv", "2", "--out", out]
    run_command(*arguments)
    first = out.read_bytes()
    assert "up to date" in run_command(*arguments).stderr
    run_command(*arguments, "--json")  # how a result is shown does not matter
    other = run_command("train", home / "train.h5", "--head", "ridge", "--cv", "2", "--out", out, code=1)
    assert f"{out}: exists and was not written by this command" in other.stderr
    assert out.read_bytes() == first
    run_command("train", home / "train.h5", "--head", "ridge", "--cv", "2", "--out", out, "--overwrite")
    assert out.read_bytes() != first


def test_a_table_that_was_edited_is_not_replaced(home, tmp_path):
    arguments = ["evaluate", home / "pets.model", home / "test.h5", "--findings", tmp_path / "findings"]
    run_command(*arguments)
    tables = sorted((tmp_path / "findings").glob("*.csv"))
    os.utime(tables[0])  # another time, the same bytes
    run_command(*arguments)
    tables[-1].write_text(tables[-1].read_text() + "checked by me\n")
    assert f"{tables[-1]}: exists" in run_command(*arguments, code=1).stderr
    assert tables[-1].read_text().endswith("checked by me\n")


def test_paths_count_as_absolute_ones(home, tmp_path, monkeypatch):
    report = tmp_path / "page.html"
    run_command("evaluate", home / "pets.model", home / "test.h5", "--report", report)
    monkeypatch.chdir(home)
    run_command("evaluate", "pets.model", "./test.h5", "--report", report)
    result = run_command("evaluate", "pets.model", "train.h5", "--report", report, code=1)
    assert "not written by this command" in result.stderr


def test_a_copy_is_not_replaced(home, tmp_path):
    arguments = ["train", home / "train.h5", "--head", "centroid", "--out"]
    run_command(*arguments, tmp_path / "a.model")
    (tmp_path / "b.model").write_bytes((tmp_path / "a.model").read_bytes())
    assert "b.model: exists" in run_command(*arguments, tmp_path / "b.model", code=1).stderr


def test_a_damaged_receipt_is_none(home, tmp_path):
    arguments = ["train", home / "train.h5", "--head", "centroid", "--out", tmp_path / "a.model"]
    run_command(*arguments)
    receipt = tmp_path / ".a.model.made.json"
    for text in ("", "[]", "{", json.dumps({"command": 3}), "\0"):
        receipt.write_text(text)
        assert "--overwrite" in run_command(*arguments, code=1).stderr


def test_folders_are_not_made_two_levels_deep(home, tmp_path):
    out = tmp_path / "no" / "such" / "a.model"
    result = run_command("train", home / "train.h5", "--out", out, code=1)
    assert f"{out}: the folder {out.parent} does not exist; create it" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_other_settings_needs_another_folder(home, tmp_path, monkeypatch, make_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(CUSTOM_NETWORK_CODE.format(slow=0))
    photos = make_folder(("ant", "bee"))
    settings = ["--set", "backbones.0.name=nets:make", "--set", "training.cv=2"]
    arguments = ["run", "linear-probe", photos, *settings, "--out", tmp_path / "run"]
    run_command(*arguments, "--set", "heads.0.C=1", cwd=tmp_path)
    run_command(*arguments, "--set", "heads.0.C=1", cwd=tmp_path)
    run_command("run", tmp_path / "run" / "recipe.toml", "--out", tmp_path / "run", cwd=tmp_path)
    resolved_recipe = (tmp_path / "run" / "recipe.toml").read_bytes()
    result = run_command(*arguments, "--set", "heads.0.C=2", cwd=tmp_path, code=1)
    assert "choose another --out, or pass --overwrite" in result.stderr
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == resolved_recipe
    run_command(*arguments, "--set", "heads.0.C=2", "--overwrite", cwd=tmp_path)
    assert (tmp_path / "run" / "recipe.toml").read_bytes() != resolved_recipe
