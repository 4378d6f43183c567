"""Rules that import contracts cannot check: no torch for reading, documentation, short functions.

Layers, public interfaces, circular imports and owners of dependencies are contracts of import-linter in
`pyproject.toml`.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

import featpipe
from featpipe import FeatureCache, cli

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "featpipe"
MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    "statement",
    [
        "import featpipe",
        "import featpipe.cli",
        "from featpipe import FeatureCache",
        "import featpipe.heads",
        "from featpipe.backbones import names; names('resnet*')",
        "from featpipe.cli import info",
        "from featpipe.cli import extract",
        "from sklearn.linear_model import Ridge; from featpipe.heads import persistence; "
        "persistence.loads(persistence.dumps(Ridge().fit([[0], [1]], [0, 1])))",
        "from featpipe.cli import evaluate; from featpipe.evaluation import evaluate; "
        "from featpipe.report import write_report",
        "from featpipe.cli import run; from featpipe.experiments import read_recipe; read_recipe('smoke')",
    ],
)
def test_reading_imports_no_torch(statement):
    code = f"{statement}\nimport sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_help_imports_no_numpy():
    code = (
        "import sys; from featpipe.cli import cli; sys.argv = ['featpipe', '--help']\n"
        "try: cli()\nexcept SystemExit: pass\nsys.exit(any(m in sys.modules for m in ('numpy', 'torch', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, stdout=subprocess.DEVNULL).returncode == 0


def test_every_public_name_exists_and_is_documented():
    assert sorted(featpipe.__all__) == list(featpipe.__all__)
    for name in featpipe.__all__:
        assert getattr(featpipe, name).__doc__, name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_has_a_docstring_and_the_names_in_its_all(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no docstring"
    if path.stem == "__main__":
        return
    relative_path = path.relative_to(ROOT).with_suffix("")
    name = ".".join(relative_path.parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_has_60_lines(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            has_docstring = ast.get_docstring(node) is not None
            first_statement = node.body[1] if has_docstring and len(node.body) > 1 else node.body[0]
            n_lines = node.end_lineno - first_statement.lineno
            assert n_lines < 60, f"{node.name} has {n_lines} lines"


def get_commands() -> dict[str, click.Command]:
    context = click.Context(cli.cli)
    return {name: cli.cli.get_command(context, name) for name in cli.cli.list_commands(context)}


@pytest.mark.parametrize("name", cli.COMMAND_SUMMARIES)
def test_every_command_is_in_the_readme_and_has_a_summary_and_an_example(name):
    command = get_commands()[name]
    assert f"featpipe {name}" in (ROOT / "README.md").read_text()
    help_text = command.get_help(click.Context(command, info_name=name))
    assert re.search(rf"^\s+Example:\n\s+featpipe {name}\b", help_text, re.MULTILINE)
    assert command.help.startswith(cli.COMMAND_SUMMARIES[name].removesuffix("."))
    assert name == "completion" or any("--json" in parameter.opts for parameter in command.params)


@pytest.mark.parametrize("name", cli.COMMAND_SUMMARIES)
def test_every_option_has_a_help_text(name):
    for parameter in get_commands()[name].params:
        if isinstance(parameter, click.Option) and not isinstance(parameter.type, click.Choice):
            assert parameter.help, parameter.name


def test_benchmarks_and_documents_import_names_that_exist():
    """Also in the scripts that benchmarks keep as text for processes of their own."""
    for path in [*ROOT.glob("tests/benchmarks/*.py"), *ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        for module, names in re.findall(
            r"^(?:\s*|>>> )from (featpipe[\w.]*) import ([\w, ]+)$", path.read_text(), re.MULTILINE
        ):
            for name in re.split(r", *", names):
                name = name.split(" as ")[0]
                imported = importlib.import_module(module)
                exists = hasattr(imported, name) or (
                    hasattr(imported, "__path__") and find_spec(f"{module}.{name}") is not None
                )
                assert exists, f"{path.name}: from {module} import {name}"


LARGE_MODULES = {"huggingface_hub", "openvino", "pandas", "scipy", "sklearn", "skops", "timm", "torch", "torchvision"}


@pytest.mark.thorough
def test_commands_with_nothing_to_compute_import_no_large_module(make_folder, tmp_path):
    folder = make_folder()
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))  # a file that changed just now is read again
    code = (
        "import sys\nfrom featpipe.cli import main\nsys.argv[0] = 'featpipe'\nmain()\n"
        f"print(sorted({LARGE_MODULES!r} & sys.modules.keys()))"
    )

    def run(*arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300).stdout

    extract = ("extract", folder, "--out", "a.h5")
    output = run(*extract)
    assert "'torch'" in output
    assert "timm" not in output  # the packaged backbone is plain torch
    assert run(*extract) == "a.h5\n[]\n"
    (tmp_path / "labels.csv").write_text(
        "path,label\n" + "".join(f"{path.relative_to(folder)},x\n" for path in folder.rglob("*.*"))
    )
    assert run(*extract, "--labels", "labels.csv") == "a.h5\n[]\n"
    assert FeatureCache(tmp_path / "a.h5").classes == ("x",)
    assert run(*extract) == "a.h5\n[]\n"
    run("train", "a.h5", "--out", "a.model", "--cv", "2")
    predict = ("predict", "a.model", folder, "--out", "a.csv", "--cache", "cache")
    assert "'torch'" in run(*predict)
    assert run(*predict) == "a.csv\n[]\n"
    for information in (("info", "a.h5"), ("info", "a.model"), ("backbones", "resnet*")):
        assert run(*information).endswith("\n[]\n"), information
    (tmp_path / "a.csv").unlink()
    assert not {"torch", "torchvision", "timm"} & set(ast.literal_eval(run(*predict).splitlines()[-1]))
