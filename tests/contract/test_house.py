"""The promises of the house: imports go down, each dependency has one owner, what is public is documented."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import featpipe
from featpipe import cli

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "featpipe"
MODULES = sorted(PACKAGE.rglob("*.py"))

FLOORS = [
    {
        "allowance",
        "deadline",
        "durable",
        "status",
        "errors",
        "names",
        "strings",
        "labels",
        "progress",
        "fingerprint",
        "recipe",
        "image",
        "reliability",
        "split",
        "workers",
    },
    {"archive", "backbone", "cache", "calibration", "decoding", "findings", "heads", "scores", "trust"},
    {"commit", "engine", "grouping", "kept", "known", "loader"},
    {"extraction", "model"},
    {"training", "evaluation", "expansion", "finetuning", "limits", "prediction", "verification", "upkeep"},
    {"cli", "demo", "estimators", "pipeline", "report", "tiles", "__main__", "__init__"},
]
FACE = len(FLOORS) - 1
GROUND = 0
OWNERS = {
    "h5py": {"cache"},
    "PIL": {"image"},
    "click": {"cli"},
    "torchvision": {"backbone", "decoding", "finetuning"},
    "timm": {"backbone"},
    "jinja2": {"report"},
    "openvino": {"engine"},
    "skops": {"heads"},
    "skimage": {"tiles"},
    "cleanlab": {"findings"},
    "tqdm": {"cli"},
    "tomli_w": {"pipeline"},
}
NEIGHBOURS = {  # of one floor, and yet used: with the reason
    ("commit", "cache"): "a part is of a cache, and lies beside it",
    ("evaluation", "training"): "a learning curve fits the model's head anew",
    ("expansion", "finetuning"): "an expansion may go on into the network, by its loop",
    ("expansion", "training"): "rows that came are added to what is known of how new an image looks",
    ("finetuning", "training"): "the probe is fitted again, on rows that do not judge it",
    ("heads", "calibration"): "a head that grew asks the old one for its scores",
    ("model", "expansion"): "model.expand, which imports it when it is called",
    ("model", "finetuning"): "model.finetune, likewise",
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def imports(path: Path) -> set[str]:
    """The dotted names that a module imports, anywhere in it but for type checkers."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_room_has_its_floor():
    assert {room(path) for path in MODULES} == set().union(*FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_and_rooms_of_one_floor_do_not_know_each_other(path):
    here = room(path)
    if here == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "featpipe" or len(parts) == 1 or parts[1] == here or parts[1] == "__version__":
            continue
        there = parts[1]
        allowed = floor(there) < floor(here) or (floor(here) in (GROUND, FACE) and floor(there) == floor(here))
        assert allowed or (here, there) in NEIGHBOURS, f"{here} imports {there}"


def test_the_ground_floor_has_no_cycle():
    graph = {
        room(path): {name.split(".")[1] for name in imports(path) if name.startswith("featpipe.")} for path in MODULES
    }
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...] = ()) -> None:
        assert name not in above, f"{' → '.join([*above, name])}"
        if name not in order:
            for below in sorted(graph.get(name, set()) & FLOORS[GROUND]):
                if below != name:
                    visit(below, (*above, name))
            order.append(name)

    for name in FLOORS[GROUND]:
        visit(name)


@pytest.mark.parametrize("package", OWNERS)
def test_each_dependency_has_one_owner(package):
    users = {room(path) for path in MODULES if any(name.split(".")[0] == package for name in imports(path))}
    assert users <= OWNERS[package]


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
        "from featpipe.cli import run; from featpipe.experiments import read_recipe; read_recipe('smoke')",
    ],
)
def test_what_only_reads_imports_no_torch(statement):
    code = f"{statement}\nimport sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_help_imports_no_numpy():
    code = (
        "import sys; from featpipe.cli import cli; sys.argv = ['featpipe', '--help']\n"
        "try: cli()\nexcept SystemExit: pass\nsys.exit(any(m in sys.modules for m in ('numpy', 'torch', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, stdout=subprocess.DEVNULL).returncode == 0


def test_all_is_true():
    assert sorted(featpipe.__all__) == list(featpipe.__all__)
    for name in featpipe.__all__:
        assert getattr(featpipe, name).__doc__, name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for_and_what_it_offers(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no docstring"
    if path.stem == "__main__":
        return
    relative = path.relative_to(ROOT).with_suffix("")
    name = ".".join(relative.parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    for offered in module.__all__:
        assert hasattr(module, offered), offered


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_stay_short(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node) is not None
            first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 60, f"{node.name} is {node.end_lineno - first.lineno} lines long"


def every_command() -> dict[str, click.Command]:
    context = click.Context(cli.cli)
    return {name: cli.cli.get_command(context, name) for name in cli.cli.list_commands(context)}


@pytest.mark.parametrize("name", cli.COMMAND_SUMMARIES)
def test_every_command_is_in_the_readme_and_has_a_summary_and_an_example(name):
    command = every_command()[name]
    assert f"featpipe {name}" in (ROOT / "README.md").read_text()
    shown = command.get_help(click.Context(command, info_name=name))
    assert re.search(rf"^\s+Example:\n\s+featpipe {name}\b", shown, re.MULTILINE)
    assert cli.COMMAND_SUMMARIES[name] == command.short_help
    assert command.help.startswith(command.short_help.removesuffix(".")), "help and summary say different things"
    assert name == "completion" or any("--json" in parameter.opts for parameter in command.params)


@pytest.mark.parametrize("name", cli.COMMAND_SUMMARIES)
def test_every_option_is_explained(name):
    for parameter in every_command()[name].params:
        if isinstance(parameter, click.Option) and not isinstance(parameter.type, click.Choice):
            assert parameter.help, parameter.name
