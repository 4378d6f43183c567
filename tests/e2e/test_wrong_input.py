"""Wrong input: every command prints a helpful error in one line and has the documented exit code."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.commands import run_command
from tests.support.images import jpeg
from tests.support.networks import CUSTOM_NETWORK_CODE

N_PER_CLASS = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with archives, tables, caches and models, some of them damaged."""
    home = tmp_path_factory.mktemp("wrong")
    ids = [f"{label}/{i:02}.jpg" for label in ("ape", "bee", "cow") for i in range(N_PER_CLASS)]
    for number, sample_id in enumerate([*(f"photos/{sample_id}" for sample_id in ids), "flat/a.jpg", "lone/ape/a.jpg"]):
        (home / sample_id).parent.mkdir(parents=True, exist_ok=True)
        (home / sample_id).write_bytes(jpeg(number))
    for name in ("empty", "text"):
        (home / name).mkdir()
    (home / "text" / "a.txt").write_text("no image")
    (home / "nets.py").write_text(CUSTOM_NETWORK_CODE.format(slow=0))
    (home / "file").write_text("not a folder")
    (home / "targets.csv").write_text("path,target\n" + "".join(f"{ids[i]},{i}.5\n" for i in range(len(ids))))
    (home / "missing.csv").write_text("path,label\nape/00.jpg,a\nape/none.jpg,b\n")
    (home / "columns.csv").write_text("picture,kind\nape/00.jpg,a\n")
    (home / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name, first_bytes in {"tar": b"", "h5": b"", "pth": b"", "model": b"PK", "toml": b"[["}.items():
        (home / f"damaged.{name}").write_bytes(first_bytes + b"x" * 700)
    extract = ["extract", "--backbone", "nets:make"]
    run_command(*extract, "photos", "--out", "a.h5", cwd=home)
    run_command(*extract, "photos", "--labels", "targets.csv", "--out", "targets.h5", cwd=home)
    run_command(*extract, "flat", "--out", "flat.h5", cwd=home)
    run_command("train", "a.h5", "--no-tune", "--cv", "2", "--out", "a.model", cwd=home)
    run_command("train", "targets.h5", "--head", "ridge", "--cv", "0", "--out", "targets.model", cwd=home)
    return home


ERRORS = {  # command line → part of its error line; exit code 1
    "extract nothing": "nothing: does not exist",
    "extract empty": "empty: no image",
    "extract text": "1 .txt",
    "extract damaged.tar": "damaged.tar",
    "extract a.h5": "expected a folder",
    "extract photos --labels missing.csv": "ape/none.jpg",
    "extract photos --labels columns.csv": "picture",
    "extract photos --labels none.csv": "none.csv: cannot be read",
    "extract photos --labels binary.csv": "not a CSV in UTF-8",
    "extract photos --labels photos": "photos: cannot be read: Is a directory",
    "extract photos --device cuda:7": "cuda:7",
    "extract photos --device gpu": "unknown device",
    "extract photos --backbone resnet19": "resnet1",
    "extract photos --backbone nets:nothing": "nets has no function 'nothing'",
    "extract photos --backbone nonets:make": "importing nonets failed",
    "extract photos --backbone resnet18 --weights none --output layer9": "layer",
    "extract photos --backbone nets:make --output pooled:best": "unknown pooling 'best'",
    "extract photos --weights none.pth": "none.pth",
    "extract photos --weights damaged.pth": "damaged.pth",
    "extract photos --cache file": "file: cannot be created",
    "extract photos --cache /proc/caches": "/proc",
    "extract photos --backbone nets:make --out file": "ends in .h5",
    "extract photos --backbone nets:make --out a.h5 --storage float16": "pass --overwrite",
    "extract photos --max-bad few": "max-bad",
    "extract photos --max-bad 200%": "a share at most 100%",
    "extract photos --time-limit soon": "time-limit is 'soon'",
    "train none.h5": "none.h5: there is no such file",
    "train damaged.h5": "damaged.h5",
    "train photos": "photos: is a folder",
    "train flat.h5": "--labels",
    "train a.h5 --head logistik": "did you mean 'logistic'",
    "train a.h5 --set D=1": "featpipe heads logistic",
    "train a.h5 --set C=-1": "C is -1",
    "train a.h5 --set C": "--set 'C' is not KEY=VALUE",
    "train a.h5 --set C=1 --set C=2": "given twice",
    "train a.h5 --cv 1": "cv is 1; give 2 folds or more",
    "train a.h5 --cv 100": "fewer than 100 folds; use at most 6 folds",
    "train a.h5 --metric accurcy": "did you mean 'accuracy'",
    "train a.h5 --groups none.csv:x": "none.csv: cannot be read",
    "train a.h5 --groups x": "TABLE:COLUMN",
    "train a.h5 --since 2024": "since is '2024', but the images have no times",
    "train a.h5 --output layer": "pooled",
    "train a.h5 --keep everything": "expected none, all, or a list of",
    "train a.h5 --prior elk=0.5": "'elk'",
    "train a.h5 --out photos": "photos: cannot be written",
    "train a.h5 --cv 2 --findings file/x": "file/x: cannot be created",
    "train a.h5 --cv 0 --findings f": "give cv",
    "train targets.h5 --head logistic": "not regression",
    "evaluate none.model photos": "none.model: there is no such model file",
    "evaluate a.model photos": "a custom network, whose code is not run by default",
    "evaluate a.model a.h5": "no row is left to score",
    "evaluate a.model flat.h5": "has no labels",
    "evaluate a.model targets.h5": "has labels for regression",
    "evaluate damaged.model a.h5": "damaged.model",
    "predict damaged.model photos": "damaged.model",
    "predict none.model photos": "none.model",
    "predict a.h5 photos": "not a featpipe model",
    "predict a.model photos --backbone nets:make --out p.txt": "'.txt'",
    "predict a.model photos --backbone nets:make --out file/p.csv": "file/p.csv: cannot be written",
    "predict targets.model photos --backbone nets:make --sets 0.9 --out p.csv": "train with --cv 2 or more",
    "finetune a.model photos": "a custom network, whose code is not run by default",
    "finetune a.model photos --backbone nets:make --epochs 0": "epochs is 0",
    "finetune a.model photos --backbone nets:make --learning-rate -1": "learning_rate is -1",
    "finetune a.model photos --backbone nets:make --set optimizer=adamm": "did you mean 'adamw'",
    "finetune a.model photos --backbone nets:make --set optimzer=adamw": "did you mean 'optimizer'",
    "finetune a.model photos --backbone nets:make --augment flop=1": "unknown augmentation 'flop'",
    "finetune a.model photos --backbone nets:make --augment flip=7": "augmentation flip is 7",
    "finetune a.model lone --backbone nets:make --cache c": "has no image of classes 'bee', 'cow'",
    "finetune a.model photos --backbone nets:make --out file/x": "file/x: cannot be written",
    "expand a.model": "give caches or archives, --drop or --merge",
    "expand a.model a.h5 --method replai": "did you mean 'replay'",
    "expand targets.model targets.h5": "expand is for classification",
    "expand a.model flat.h5": "flat.h5: has no labels",
    "expand a.model --drop elk": "unknown class 'elk'",
    "expand a.model --drop ape --drop bee --drop cow": "keep at least two",
    "expand a.model a.h5 --unfreeze last": "give the archives",
    "expand a.model a.h5 --set foo=1": "unknown setting 'foo'",
    "run linear-prob": "did you mean 'linear-probe'",
    "run none.toml": "there is no such recipe",
    "run damaged.toml": "is not TOML",
    "run linear-probe": "names no archive",
    "run linear-probe nothing": "nothing: does not exist",
    "run linear-probe flat": "flat: has no labels",
    "run linear-probe photos --set training.cv": "is not KEY=VALUE",
    "run linear-probe photos --set training.cv=x": "[training] cv is 'x'",
    "run linear-probe photos --set heads.5.C=1": "the recipe has no '5' here",
    "run linear-probe photos --set heads.0.name=forest": "unknown head 'forest'",
    "run linear-probe photos --out file": "file: cannot be created",
    "info nothing": "nothing: there is no such file",
    "info photos": "photos: is a folder",
    "info damaged.model": "damaged.model",
    "info a.h5 --why nothing": "nothing: does not exist",
    "verify a.model": "is not an HDF5 file",
    "verify a.h5 --sample 3": "a custom network, whose code is not run by default",
    "verify none.h5": "there is no such file",
    "verify photos": "photos: is a folder",
    "verify a.h5 --sample 2 --archive nowhere --backbone nets:make": "nowhere: does not exist",
    "merge a.h5 none.h5 --out m.h5": "none.h5: there is no such file",
    "merge a.h5 targets.h5 --out file/m.h5": "file: cannot be created",
    "pack a.h5 --out a.model": "ends in .h5",
    "pack a.h5 --out targets.h5": "choose another --out",
    "clean nothing": "nothing: No such file",
    "clean file": "file: Not a directory",
    "backbones nothing": "unknown backbone 'nothing'",
    "heads forest": "unknown head 'forest'",
    "bench nothing": "nothing: does not exist",
    "demo --out file": "cannot be created",
}
USAGE_ERRORS = {  # command line → part of the last line; exit code 2
    "extrakt photos": "did you mean 'extract'",
    "help": "`featpipe --help` lists the commands",
    "--log-format xml heads": "'xml' is not one of",
    "extract": "ARCHIVE",
    "extract photos --bakbone x": "--backbone",
    "extract photos --precision fp8": "fp16",
    "extract photos --workers 0": "0 is not in the range x>=1",
    "extract photos --min-cosine 2": "0<=x<=1",
    "extract photos --label-column x": "--labels",
    "train a.h5 --memory much": "an example is 2G",
    "train a.h5 --jobs x": "'x' is not a valid integer",
    "evaluate a.model": "CACHE|ARCHIVE",
    "evaluate a.model photos --near 2": "0<x<=1",
    "predict a.model photos --json": "give --out",
    "predict a.model photos --top 0": "x>=1",
    "finetune a.model photos --learning-rate fast": "an example is 3e-4, or find",
    "finetune a.model photos --backbone nets:make --set epochs=3": "use the option --epochs",
    "expand a.model a.h5 --merge ape": "A,B=C",
    "expand a.model a.h5 --backbone nets:make --augment flip=0.5": "--augment needs --unfreeze",
    "expand a.model a.h5 --budget x": "an example is 2G",
    "run": "RECIPE",
    "info a.h5 photos": "give --why",
    "verify a.h5 --sample -1": "x>=0",
    "merge a.h5": "--out",
    "clean --yes --dry-run": "give one of them",
    "bench flat --seconds 0": "x>=1",
    "completion tcsh": "'bash', 'zsh', 'fish'",
}


@pytest.mark.parametrize("line", ERRORS)
def test_an_error_is_one_line_and_exit_code_1(line: str, home: Path) -> None:
    files_before = {path for path in home.glob("*") if path.is_file()}
    result = run_command(*shlex.split(line), code=1, cwd=home)
    *notes, message = result.stderr.splitlines()
    assert message.startswith("featpipe: ")
    assert ERRORS[line] in message
    assert not any(note.startswith("featpipe: ") for note in notes)
    assert result.stdout == ""
    assert {path for path in home.glob("*") if path.is_file()} == files_before


@pytest.mark.parametrize("line", USAGE_ERRORS)
def test_wrong_usage_shows_the_usage_and_is_exit_code_2(line: str, home: Path) -> None:
    result = run_command(*shlex.split(line), code=2, cwd=home)
    assert USAGE_ERRORS[line] in result.stderr.splitlines()[-1]
    assert result.stdout == ""
