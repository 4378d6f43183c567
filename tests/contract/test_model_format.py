"""Models written by earlier versions can be loaded, and give the same predictions."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import sklearn
from click.testing import CliRunner
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from threadpoolctl import threadpool_info

import featpipe
from featpipe import ModelError, heads
from featpipe.cli import cli
from featpipe.heads.persistence import ALIASES
from featpipe.incremental import Expansion

GOLDEN = Path(__file__).parents[1] / "data" / "golden-models-1.2"  # by tests/data/make_golden_models.py
NAMES = sorted(path.name.removesuffix(".model") for path in GOLDEN.glob("*.model"))
NOT_WRITTEN = {"keras-multilabel", "keras-regression"}  # same estimators as mlp
# The BLAS that computed the recorded predictions: it reproduces them bit for bit. Others sum in another order, which
# changes float32 predictions, those of the neural heads, by about 1e-6.
GOLDEN_BLAS = {("openblas", "0.3.30", "Haswell"), ("openblas", "0.3.31.188.0", "Haswell")}
STORED_TYPE = re.compile(r'"(featpipe[\w.]*)"')


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "answers.npz") as arrays:
        return dict(arrays)


def assert_recorded_predictions(model: featpipe.Model, name: str, recorded: dict[str, np.ndarray]) -> None:
    X = recorded["X10" if name == "lda-finetuned" else "X"]
    predictions = model.predict_features(X) if model.task == "regression" else model.predict_proba_features(X)
    assert_equal(predictions, recorded[name])
    if f"{name}/novelty" in recorded:
        assert_equal(model.novelty_features(X), recorded[f"{name}/novelty"])


def assert_equal(actual: np.ndarray, expected: np.ndarray) -> None:
    blas = {(library["internal_api"], library["version"], library.get("architecture")) for library in threadpool_info()}
    if blas >= GOLDEN_BLAS:
        np.testing.assert_array_equal(actual, expected)
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def read_head_schema(model_path: Path) -> str:
    with ZipFile(model_path) as model, ZipFile(io.BytesIO(model.read("head.skops"))) as head:
        return head.read("schema.json").decode()


def test_the_golden_models_cover_every_head_and_task() -> None:
    for head, spec in heads.HEAD_REGISTRY.items():
        for task in spec.estimators:
            assert (head if task == "classification" else f"{head}-{task}") in {*NAMES, *NOT_WRITTEN}


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_model_gives_the_recorded_predictions(name: str, recorded: dict[str, Any], log: list[str]) -> None:
    assert_recorded_predictions(featpipe.load_model(GOLDEN / f"{name}.model", backbone=None), name, recorded)
    assert all("predictions may differ" in message for message in log)  # another version of scikit-learn wrote it


@pytest.mark.parametrize("name", sorted({*NAMES} - {"lda-finetuned"}))  # it needs the code of its network
def test_a_golden_model_saved_again_names_only_stable_types(
    name: str, recorded: dict[str, Any], tmp_path: Path, log: list[str]
) -> None:
    featpipe.load_model(GOLDEN / f"{name}.model", backbone=None).save(tmp_path / "again.model")
    assert_recorded_predictions(featpipe.load_model(tmp_path / "again.model", backbone=None), name, recorded)
    assert set(STORED_TYPE.findall(read_head_schema(tmp_path / "again.model"))) <= {"featpipe.heads"}
    assert all("predictions may differ" in message for message in log)


def test_a_head_of_another_version_of_scikit_learn_is_read_with_one_warning(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other_version:
        other_version.setattr("sklearn.base.__version__", "1.0.0")
        data = heads.dumps(
            make_pipeline(StandardScaler(), LinearDiscriminantAnalysis()).fit([[0.0], [1.0], [2.0]], [0, 1, 1])
        )
    heads.loads(data)
    assert log == [
        f"the head was saved with scikit-learn 1.0.0 and is read with {sklearn.__version__}: "
        "predictions may differ; check some predictions, or train it again"
    ]


def test_sentences_in_older_models_are_shown_unchanged() -> None:
    """Older models store sentences under ``how``; newer ones store data."""
    outputs = {}
    for name in ("logistic", "lda-finetuned", "logistic-expanded-replay"):
        result = CliRunner().invoke(cli, ["info", str(GOLDEN / f"{name}.model")])
        assert result.exit_code == 0, result.output
        outputs[name] = " ".join(result.output.split())
    assert "3-fold cross-validation on the 60 training images" in outputs["logistic"]
    assert "9 images held out" in outputs["lda-finetuned"]
    assert "10 new images held out, and learnt afterwards" in outputs["logistic-expanded-replay"]
    model = featpipe.load_model(GOLDEN / "logistic-expanded-replay.model", backbone=None)
    expansion = Expansion.from_dict(model, model.scores["expansion"]["result"])
    assert expansion.how == "10 new images held out, and learnt afterwards"
    assert expansion.to_dict() == model.scores["expansion"]["result"]


ESTIMATORS = {
    "BayesianRidgeClassifier": lambda: heads.BayesianRidgeClassifier(),
    "ExpandedClassifier": lambda: heads.ExpandedClassifier(),
    "LinearClassifier": lambda: heads.LinearClassifier(),
    "LinearRegressor": lambda: heads.LinearRegressor(),
    "MLPClassifier": lambda: heads.MLPClassifier(),
    "MLPRegressor": lambda: heads.MLPRegressor(),
    "SoftmaxRegression": lambda: heads.SoftmaxRegression(),
    "SoftmaxRegressionCV": lambda: heads.SoftmaxRegressionCV(),
    "nearness": lambda: FunctionTransformer(heads.nearness),
}


def rewrite_type(data: bytes, old_type: tuple[str, str], new_type: tuple[str, str]) -> bytes:
    """Replace the name of a type in a saved head."""
    with ZipFile(io.BytesIO(data)) as head:
        members = {name: head.read(name) for name in head.namelist()}
    schema = members["schema.json"].decode()
    as_stored = [f'"__class__": "{name}",\n{{0}}"__module__": "{module}"' for module, name in (old_type, new_type)]
    indent = re.search(r'"__class__": "' + old_type[1] + r'",\n( +)', schema)
    assert indent
    members["schema.json"] = schema.replace(*(text.format(indent[1]) for text in as_stored)).encode()
    assert members["schema.json"] != schema.encode()
    rewritten = io.BytesIO()
    with ZipFile(rewritten, "w") as head:
        for name, content in members.items():
            head.writestr(name, content)
    return rewritten.getvalue()


@pytest.mark.parametrize("alias", ALIASES, ids=".".join)
def test_a_type_is_loaded_under_each_of_its_old_names(alias: tuple[str, str]) -> None:
    estimator = ESTIMATORS[ALIASES[alias][1]]()
    old_data = rewrite_type(heads.dumps(estimator), ALIASES[alias], alias)
    assert b'"featpipe.heads"' not in old_data
    loaded = heads.loads(old_data)
    assert type(loaded) is type(estimator)
    assert loaded.get_params() == estimator.get_params()


@pytest.mark.parametrize(
    "name",
    [
        ("featpipe.heads.softmax", "MLPClassifier"),
        ("featpipe.heads.softmax", "np"),
        ("featpipe.heads.softmax.x", "SoftmaxRegression"),
        ("featpipe.heads.logistic.estimator", "SoftmaxRegression"),
        ("featpipe.heads", "fit_streamed"),
        ("os", "system"),
    ],
    ids=".".join,
)
def test_a_type_name_that_no_version_wrote_is_refused(name: tuple[str, str]) -> None:
    data = rewrite_type(heads.dumps(heads.SoftmaxRegression()), ("featpipe.heads", "SoftmaxRegression"), name)
    with pytest.raises(ModelError, match=rf"{name[0]}\.{name[1]}, which may not be loaded"):
        heads.loads(data)


def test_a_forbidden_type_beside_an_old_name_is_refused() -> None:
    pipeline = make_pipeline(FunctionTransformer(heads.nearness), heads.SoftmaxRegression())
    data = rewrite_type(
        heads.dumps(pipeline), ("featpipe.heads", "SoftmaxRegression"), ("featpipe.heads.softmax", "SoftmaxRegression")
    )
    with pytest.raises(ModelError, match=r"holds posix\.system, which may not be loaded"):
        heads.loads(rewrite_type(data, ("featpipe.heads", "nearness"), ("posix", "system")))


@pytest.mark.parametrize("stable_name", sorted({name for _, name in ALIASES.values()}))
def test_a_stable_name_is_public_trusted_and_used_by_pickle(stable_name: str) -> None:
    public = getattr(heads, stable_name)
    assert stable_name in heads.__all__
    assert (public.__module__, public.__qualname__) == ("featpipe.heads", stable_name)
    assert f"featpipe.heads.{stable_name}" in heads.TRUSTED_TYPES
    assert pickle.loads(pickle.dumps(public)) is public
    assert b"featpipe.heads\n" in pickle.dumps(public, protocol=0)
