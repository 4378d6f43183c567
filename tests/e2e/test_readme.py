"""Every command and every Python example in the README runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import jpeg

pytestmark = pytest.mark.thorough

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the files that the README names: photos/, more-photos/, birds/, photos.zip, labels.csv."""
    home = tmp_path_factory.mktemp("home")
    pets, birds = ("cat", "dog"), ("finch", "owl")
    for folder, seed, labels in (("photos", 0, pets), ("more-photos", 500, pets), ("birds", 900, birds)):
        for number, label in enumerate(labels):
            (home / folder / label).mkdir(parents=True)
            for i in range(6):
                (home / folder / label / f"{i:03}.jpg").write_bytes(jpeg(seed + 100 * number + i, (120, 90)))
    shutil.make_archive(str(home / "photos"), "zip", home / "photos")
    rows = [f"{label}/{i:03}.jpg,{'xy'[i % 2]}" for label in ("cat", "dog") for i in range(6)]
    (home / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return home


def list_commands() -> list[str]:
    shell_lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    return [line for line in shell_lines if line.startswith("featpipe ")]


def test_continuous_integration_runs_the_two_set_up_commands():
    first_block = next(text for kind, text in BLOCKS if kind == "bash")
    steps = [step.strip() for line in first_block.splitlines() for step in line.split("&&")]
    assert steps == ["pip install '.[demo]'", "featpipe demo", "pip install '.[test]'", "pytest"]
    script = (Path(__file__).parents[2] / ".ci" / "run").read_text().replace("--quiet ", "")
    for step in steps:
        assert re.search(rf"^{re.escape(step)}", script, re.MULTILINE), step


@pytest.mark.parametrize("line", list_commands())
def test_each_command_of_the_readme_runs(home, line):
    """In the README's order, in one folder; `--backbone resnet18 --weights none` needs no network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        ["bash", "-c", line], cwd=home, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr


def test_the_python_examples_run(home, monkeypatch):
    monkeypatch.chdir(home)
    paths = sorted(map(str, Path("photos").rglob("*.jpg")))
    names = {"paths": paths, "y": [path.split("/")[1] for path in paths]}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), names)
    assert len(names["cache"].X) == 12
    assert list(names["model"].classes) == ["cat", "dog"]
