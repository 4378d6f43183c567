"""A type checker finds a misspelt keyword in a call of a public verb."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from featpipe.config import (
    ComparisonOptions,
    ExpandKeywords,
    ExtractionConfig,
    ExtractionOptions,
    FineTuneConfig,
    FineTuneKeywords,
    FineTuneOptions,
    Settings,
    TrainingConfig,
    TrainingOptions,
    get_field_types,
)
from featpipe.finetuning import finetune
from featpipe.incremental import expand
from featpipe.prediction import PredictConfig, PredictOptions

ROOT = Path(__file__).parents[2]

CORRECT_CALLS = """
import featpipe

model = featpipe.load_model("photos.model")
cache = featpipe.extract("photos/", backbone="resnet18", precision="bf16", workers=2, max_bad="5%")
featpipe.train(cache, "mlp", params={"hidden": 64}, balance="over", cv=5)
featpipe.compare(cache, ["mlp", "svm"], tune=True, metric="macro_f1", random_state=1)
featpipe.evaluate(model, cache, against=[model], near=0.95)
featpipe.predict(model, "photos/", "predictions.csv", top=3, cache="cache/", time_limit="3h")
featpipe.finetune(model, "photos/", unfreeze="last", learning_rate="find", schedule="one-cycle", out="new.model")
featpipe.expand(model, cache, method="replay", drop=["cat"])
model.finetune("photos/", epochs=3, labels="labels.csv")
model.expand(cache, method="replay", merge={"pet": ["cat", "dog"]})
checked = featpipe.verify("photos.h5", sample=3)
featpipe.repair("photos.h5", checked, device="cpu")
"""

WRONG_CALLS = {  # call: what mypy says
    'featpipe.extract("photos/", bakbone="resnet18")': 'Unexpected keyword argument "bakbone" for "extract"',
    'featpipe.extract("photos/", precision="fp31")': 'Argument "precision" to "extract" has incompatible type',
    'featpipe.train(cache, balence="over")': 'Unexpected keyword argument "balence" for "train"',
    'featpipe.compare(cache, tunes=True)': 'Unexpected keyword argument "tunes" for "compare"',
    'featpipe.evaluate(model, cache, agianst=[model])': 'Unexpected keyword argument "agianst" for "evaluate"',
    'featpipe.predict(model, "photos/", tops=3)': 'Unexpected keyword argument "tops" for "predict"',
    'featpipe.finetune(model, "photos/", unfreze="all")': 'Unexpected keyword argument "unfreze" for "finetune"',
    'featpipe.finetune(model, "photos/", schedule="cosin")': 'Argument "schedule" to "finetune" has incompatible type',
    'featpipe.expand(model, cache, metod="replay")': 'Unexpected keyword argument "metod" for "expand"',
    'model.finetune("photos/", epoch=3)': 'Unexpected keyword argument "epoch" for "finetune" of "Model"',
    'model.expand(cache, metod="replay")': 'Unexpected keyword argument "metod" for "expand" of "Model"',
    'featpipe.verify("photos.h5", samples=3)': 'Unexpected keyword argument "samples" for "verify"',
    'featpipe.repair("photos.h5", checked, archive=["photos/"])': 'Unexpected keyword argument "archive" for "repair"',
    'featpipe.merge(["a.h5"], "b.h5", over=True)': 'Unexpected keyword argument "over" for "merge"',
    'featpipe.run("smoke", chages={})': 'Unexpected keyword argument "chages" for "run"',
}  # fmt: skip


@pytest.mark.thorough  # mypy without a cache takes a minute
@pytest.mark.timeout(600)
def test_mypy_finds_each_misspelt_keyword_and_accepts_correct_calls(tmp_path):
    calls = CORRECT_CALLS.splitlines()
    (tmp_path / "calls.py").write_text("\n".join([*calls, *WRONG_CALLS]) + "\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--follow-imports",
        "silent",
    ]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), str(tmp_path / "calls.py")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    errors = {int(line): message for line, message in re.findall(r"^\S+calls\.py:(\d+): error: (.*)", output, re.M)}
    expected = dict(enumerate(WRONG_CALLS.values(), len(calls) + 1))
    assert errors.keys() == expected.keys(), output
    for line, message in expected.items():
        assert message in errors[line]


@pytest.mark.parametrize(
    ("keywords", "settings"),
    [(ExtractionOptions, ExtractionConfig), (FineTuneOptions, FineTuneConfig), (PredictOptions, PredictConfig)],
)
def test_the_keywords_of_a_stage_are_the_fields_of_its_settings(keywords: Any, settings: type[Settings]):
    assert get_type_hints(keywords, include_extras=True) == get_field_types(settings)


def get_keyword_types(function: Any) -> dict[str, Any]:
    """The annotations of a function's keyword-only parameters."""
    types = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: types[parameter.name] for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_the_methods_of_a_model_take_the_keywords_of_the_functions():
    assert get_type_hints(ExpandKeywords, include_extras=True) == get_keyword_types(expand)
    annotations = get_type_hints(FineTuneKeywords, include_extras=True)
    own_keywords = {name: annotations[name] for name in annotations if name not in FineTuneOptions.__annotations__}
    assert own_keywords == get_keyword_types(finetune)


def test_the_keywords_of_training_are_the_fields_of_its_settings():
    head = {"head": str}
    assert head | get_type_hints(TrainingOptions, include_extras=True) == get_field_types(TrainingConfig)
    assert TrainingOptions.__annotations__.keys() - ComparisonOptions.__annotations__ == {"params", "findings"}


@pytest.mark.parametrize("settings", [ExtractionConfig, TrainingConfig, FineTuneConfig, PredictConfig])
def test_the_docstring_of_a_settings_class_describes_every_field(settings: type[Settings]):
    described = {
        name.strip()
        for line in inspect.getdoc(settings).splitlines()
        if (match := re.match(r"([a-z_, ]+?)( : .*)?$", line)) and line[0] != " "
        for name in match[1].split(",")
    }
    assert set(get_field_types(settings)) <= described
