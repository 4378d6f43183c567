"""The scikit-learn estimators on images: predictions, the contract, and every embedding computed once."""

from __future__ import annotations

import io
import pickle
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import featpipe
from featpipe import FeatureExtractor, TransferClassifier, TransferRegressor, heads
from featpipe.data import decode_image
from featpipe.errors import ConfigError, SampleError
from featpipe.estimators import _load_cached_backbone
from featpipe.status import Status

ESTIMATORS = (FeatureExtractor, TransferClassifier, TransferRegressor)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default folder of caches is in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photos(make_folder: Any) -> list[str]:
    return sorted(map(str, make_folder(each=8).rglob("*.jpg")))


@pytest.fixture
def y(photos: list[str]) -> np.ndarray:
    return np.array([Path(path).parent.name for path in photos])


def compute_embeddings(backbone: Any, paths: list[str]) -> np.ndarray:
    images = [torch.from_numpy(decode_image(Path(path).read_bytes())).permute(2, 0, 1) for path in paths]
    with torch.inference_mode():
        return backbone.network(torch.stack([backbone.transform(p) for p in images])).numpy()


@pytest.fixture
def counting_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A network that records each image that it embeds, in any process, but no blank test images."""
    get_reusable_executor().shutdown(wait=True)  # processes of an earlier test cannot import the module
    (home / "counting.py").write_text(
        textwrap.dedent(
            """
            import os, pathlib, torch

            class Counting(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.conv = torch.nn.Conv2d(3, 6, 3)
                    self.tip = torch.nn.Conv2d(6, 4, 3)

                def forward(self, x):
                    records = b"".join(b"%d\\n" % p.double().sum().mul(1000).long() for p in x if p.any())
                    log = os.open(pathlib.Path(__file__).with_name("embedded"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                    os.write(log, records)
                    os.close(log)
                    return self.tip(self.conv(x)).mean((2, 3))

            def transform(image):
                return torch.nn.functional.interpolate(image[None].float(), (12, 12), mode="area")[0] / 255

            def make():
                return Counting().requires_grad_(False), transform
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(home))
    _load_cached_backbone.cache_clear()
    yield "counting:make"
    sys.modules.pop("counting", None)


def count_embeddings(home: Path, photos: list[str]) -> list[int]:
    import counting

    images = [torch.from_numpy(decode_image(Path(path).read_bytes())).permute(2, 0, 1) for path in photos]
    keys = [int(counting.transform(p).double().sum().mul(1000).long()) for p in images]
    records = (home / "embedded").read_text().split()
    assert len(set(keys)) == len(keys)
    return [records.count(str(key)) for key in keys]


def test_embeddings_equal_the_output_of_the_network(tiny: Any, photos: list[str]) -> None:
    order = [*np.random.default_rng(0).permutation(photos).tolist(), photos[0], photos[0]]
    for cache in ("cache", None):
        features = FeatureExtractor(tiny, cache=cache).fit_transform(order)
        assert np.allclose(features, compute_embeddings(tiny, order), atol=1e-6, rtol=0)
        assert features.dtype == np.float32


def test_a_classifier_is_its_head_on_embeddings(tiny: Any, photos: list[str], y: np.ndarray) -> None:
    classifier = TransferClassifier(tiny, head_params={"C": 3}).fit(photos, y)
    features = FeatureExtractor(tiny).fit_transform(photos)
    oracle = heads.build("logistic", params={"C": 3}).fit(features, y)
    assert classifier.classes_.tolist() == ["ape", "bee", "cow"]
    assert np.array_equal(classifier.predict_proba(photos), oracle.predict_proba(features))
    assert np.array_equal(classifier.predict(photos), oracle.predict(features))
    assert np.array_equal(
        classifier.classes_[classifier.predict_proba(photos).argmax(axis=1)], oracle.predict(features)
    )
    assert classifier.score(photos, y) == oracle.score(features, y)


@pytest.mark.parametrize("labels", [[10, 9, 2], ["b", "a", "c"], [True, False, True]], ids=str)
def test_columns_of_probabilities_follow_the_classes(labels: list[Any], tiny: Any, photos: list[str]) -> None:
    y = np.repeat(labels, 8)
    classifier = TransferClassifier(tiny, head_params={"C": 1000}).fit(photos, y)
    assert classifier.classes_.tolist() == sorted(set(labels))
    assert np.array_equal(
        classifier.classes_[classifier.predict_proba(photos).argmax(axis=1)], classifier.predict(photos)
    )
    assert classifier.predict(photos).dtype == y.dtype
    assert classifier.score(photos, y) > 0.9


@pytest.mark.parametrize("targets", [1, 2])
def test_a_regressor_is_its_head_on_embeddings(targets: int, tiny: Any, photos: list[str]) -> None:
    features = FeatureExtractor(tiny).fit_transform(photos)
    Y = features @ np.random.default_rng(0).normal(size=(8, targets))
    y = Y[:, 0] if targets == 1 else Y
    regressor = TransferRegressor(tiny, head_params={"epochs": 5}).fit(photos, y)
    oracle = heads.build("linear", "regression", params={"epochs": 5}).fit(features, np.asarray(y, np.float64))
    assert regressor.predict(photos).shape == y.shape
    assert np.array_equal(regressor.predict(photos), oracle.predict(features))
    assert regressor.score(photos, y) == oracle.score(features, y)


def test_images_may_be_paths_bytes_pillow_images_or_arrays(tiny: Any, photos: list[str], y: np.ndarray) -> None:
    pandas = pytest.importorskip("pandas")
    data = [Path(path).read_bytes() for path in photos]
    series = pandas.Series(photos, index=range(100, 124))
    extractor = FeatureExtractor(tiny).fit(photos)
    expected = extractor.transform(photos)
    image_lists: list[Any] = [
        tuple(photos),
        np.array(photos),
        np.array(photos, object).reshape(-1, 1),
        [Path(path) for path in photos],
        series,
        series.to_frame("path"),
        data,
        [Image.open(io.BytesIO(item)) for item in data],
        [decode_image(item) for item in data],
        np.stack([decode_image(item) for item in data]),
        [photos[0], *data[1:]],
    ]
    for images in image_lists:
        assert np.array_equal(extractor.transform(images), expected)
    fitted = TransferClassifier(tiny).fit(series, pandas.Series(y))
    assert np.array_equal(fitted.predict_proba(data), TransferClassifier(tiny).fit(photos, y).predict_proba(photos))


def test_images_in_memory_leave_no_cache(tiny: Any, photos: list[str], home: Path) -> None:
    FeatureExtractor(tiny).fit_transform([Path(path).read_bytes() for path in photos])
    FeatureExtractor(tiny, cache=None).fit_transform(photos)
    assert not (home / "cache").exists()
    FeatureExtractor(tiny, cache="features").fit_transform(photos)
    assert list((home / "features").glob("*.h5"))


def test_any_output_of_a_backbone_is_embedded(tiny: Any, photos: list[str]) -> None:
    with torch.inference_mode():
        images = [torch.from_numpy(decode_image(Path(path).read_bytes())).permute(2, 0, 1) for path in photos]
        maps = tiny.network.conv(torch.stack([tiny.transform(p) for p in images])).numpy()
    for cache in ("cache", None):
        averaged = FeatureExtractor(tiny, output="conv:avg", cache=cache).fit_transform(photos)
        assert np.allclose(averaged, maps.mean(axis=(2, 3)), atol=1e-6)
        flat = FeatureExtractor(tiny, output="conv:none", cache=cache).fit_transform(photos)
        assert np.allclose(flat, maps.reshape(len(maps), -1), atol=1e-6)
    assert tiny.shapes == {"pooled": (8,)}


def test_a_changed_weights_file_is_read_again(photos: list[str], home: Path) -> None:
    from featpipe import backbones

    def write_weights(seed: int) -> Any:
        backbone = backbones.load("timm/test_resnet", weights="none", seed=seed)
        torch.save(backbone.network.state_dict(), home / "weights.pth")
        return backbone

    for seed in (1, 2):
        backbone = write_weights(seed)
        features = FeatureExtractor("timm/test_resnet", weights="weights.pth").fit_transform(photos[:3])
        assert np.allclose(features, compute_embeddings(backbone, photos[:3]), atol=1e-5)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_constructor_only_stores_its_arguments(kind: Any) -> None:
    arguments = {name: object() for name in kind().get_params()}
    estimator = kind(**arguments)
    assert estimator.get_params(deep=False) == arguments
    assert vars(estimator) == arguments
    assert kind().set_params(output="x", seed=3).get_params() == {**kind().get_params(), "output": "x", "seed": 3}


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_clone_has_the_settings_and_is_not_fitted(kind: Any, tiny: Any, photos: list[str]) -> None:
    fitted = kind(tiny, cache="features", output="conv:avg").fit(photos, np.arange(24) % 3)
    copy = clone(fitted)
    assert [name for name in vars(copy) if name.endswith("_")] == []
    assert (copy.cache, copy.output) == ("features", "conv:avg")
    assert copy.backbone.digest == tiny.digest
    assert "conv:avg" in repr(copy)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_an_unfitted_estimator_raises_not_fitted_error(kind: Any, photos: list[str]) -> None:
    for method in ("predict", "predict_proba", "transform", "get_feature_names_out"):
        if hasattr(kind, method):
            with pytest.raises(NotFittedError):
                getattr(kind(), method)(photos) if method != "get_feature_names_out" else kind().get_feature_names_out()


def test_a_pickled_classifier_gives_the_same_predictions(tiny: Any, photos: list[str], y: np.ndarray) -> None:
    for cache in ("cache", None):
        fitted = TransferClassifier("timm/test_resnet", weights="none", cache=cache).fit(photos, y)
        data = pickle.dumps(fitted)
        assert len(data) < 100_000  # the network is stored by name
        assert np.array_equal(pickle.loads(data).predict_proba(photos), fitted.predict_proba(photos))


def test_an_extractor_is_a_step_of_a_pipeline(tiny: Any, photos: list[str], y: np.ndarray) -> None:
    pipe = make_pipeline(FeatureExtractor(tiny), StandardScaler(), LogisticRegression()).fit(photos, y)
    features = compute_embeddings(tiny, photos)
    oracle = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, y)
    assert np.allclose(pipe.predict_proba(photos), oracle.predict_proba(features), atol=1e-4)
    assert pipe[:-2].get_feature_names_out().tolist() == [f"pooled{i}" for i in range(8)]


def test_output_can_be_a_table(tiny: Any, photos: list[str]) -> None:
    pandas = pytest.importorskip("pandas")
    extractor = FeatureExtractor(tiny).set_output(transform="pandas").fit(photos)
    table = extractor.transform(photos)
    assert table.columns.tolist() == extractor.get_feature_names_out().tolist()
    assert np.allclose(table.to_numpy(), compute_embeddings(tiny, photos), atol=1e-6)
    series = pandas.Series(photos[:4], index=[7, 5, 9, 6])
    assert extractor.transform(series).index.tolist() == [7, 5, 9, 6]


def test_a_second_fit_does_not_depend_on_the_first(tiny: Any, photos: list[str], y: np.ndarray) -> None:
    classifier = TransferClassifier(tiny).fit(photos, y).fit(photos[:16], y[:16])
    assert classifier.classes_.tolist() == ["ape", "bee"]
    assert classifier.predict_proba(photos).shape == (24, 2)


def test_a_search_over_heads_embeds_every_image_once(
    counting_network: str, photos: list[str], y: np.ndarray, home: Path
) -> None:
    grid = {"head_params": [{"C": 0.1}, {"C": 10.0}]}
    search = GridSearchCV(TransferClassifier(counting_network, cache=home / "features"), grid, cv=3, n_jobs=2)
    search.fit(photos, y)
    assert count_embeddings(home, photos) == [1] * 24
    search.predict(photos)
    assert count_embeddings(home, photos) == [1] * 24
    features = FeatureExtractor(counting_network, cache=home / "features").fit_transform(photos)
    for number, params in enumerate(grid["head_params"]):
        oracle = GridSearchCV(heads.build("logistic", params=params), {"head__tol": [1e-4]}, cv=3)
        scores = oracle.fit(features, y).cv_results_["mean_test_score"]
        assert search.cv_results_["mean_test_score"][number] == pytest.approx(scores[0])


def test_a_search_over_outputs_embeds_every_image_once_for_each(
    counting_network: str, photos: list[str], y: np.ndarray, home: Path
) -> None:
    pipe = make_pipeline(FeatureExtractor(counting_network), StandardScaler(), LogisticRegression())
    grid = {"featureextractor__output": ["pooled", "conv:avg", "conv:max"], "logisticregression__C": [0.1, 1]}
    search = GridSearchCV(pipe, grid, cv=2).fit(photos, y)
    assert count_embeddings(home, photos) == [3] * 24
    assert search.best_estimator_.predict(photos).shape == (24,)


def test_only_new_images_are_embedded(counting_network: str, photos: list[str], home: Path) -> None:
    extractor = FeatureExtractor(counting_network).fit(photos)
    extractor.transform(photos[:10])
    extractor.transform(photos[5:])
    extractor.transform(photos[::-1])
    assert count_embeddings(home, photos) == [1] * 24


def test_predictions_of_held_out_images_equal_those_of_the_head(tiny: Any, photos: list[str], y: np.ndarray) -> None:
    features = FeatureExtractor(tiny).fit_transform(photos)
    predictions = cross_val_predict(TransferClassifier(tiny), photos, y, cv=4, method="predict_proba")
    assert np.array_equal(
        predictions, cross_val_predict(heads.build("logistic"), features, y, cv=4, method="predict_proba")
    )


def assert_raises_one_line(error: type[Exception], match: str, call: Any, *arguments: Any) -> Any:
    with pytest.raises(error, match=match) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("cache", ["cache", None])
def test_an_image_that_cannot_be_read_is_named(
    cache: str | None, tiny: Any, photos: list[str], y: np.ndarray, home: Path
) -> None:
    classifier = TransferClassifier(tiny, cache=cache).fit(photos, y)
    (home / "bad.jpg").write_bytes(b"no image")
    error = assert_raises_one_line(
        SampleError, r"image 2 \(.*bad\.jpg\): unsupported", classifier.predict, [*photos[:2], "bad.jpg"]
    )
    assert error.status == Status.UNSUPPORTED
    assert_raises_one_line(SampleError, r"image 1 \(gone\.jpg\): missing", classifier.predict, [photos[0], "gone.jpg"])
    assert_raises_one_line(SampleError, r"image 0 \(bytes\): empty", classifier.predict, [b"", b""])
    assert_raises_one_line(
        SampleError, r"image 0 \(bad\.jpg\)", TransferClassifier(tiny, cache=cache).fit, ["bad.jpg", *photos[1:]], y
    )


def test_labels_of_another_shape_or_type_are_value_errors(tiny: Any, photos: list[str], y: np.ndarray) -> None:
    classifier, regressor = TransferClassifier(tiny), TransferRegressor(tiny)
    assert_raises_one_line(ValueError, "X has 24 images, y has shape", classifier.fit, photos, y[:-1])
    assert_raises_one_line(ValueError, "X has 24 images, y has shape", regressor.fit, photos, np.arange(25))
    assert_raises_one_line(ValueError, "X has 24 images, y has shape", regressor.fit, photos, 3)
    assert_raises_one_line(ValueError, "Unknown label type", classifier.fit, photos, np.linspace(0, 1, 24))
    assert_raises_one_line(ValueError, "one class", classifier.fit, photos, ["a"] * 24)
    assert_raises_one_line(ValueError, "Unknown label type", classifier.fit, photos, np.eye(24, 3, dtype=int))
    assert_raises_one_line(ValueError, "could not convert", regressor.fit, photos, y)


@pytest.mark.parametrize(
    "X", ["a.jpg", b"...", [], np.zeros((9, 9, 3), np.uint8), iter(["a.jpg"])], ids=lambda X: type(X).__name__
)
def test_an_input_that_is_not_a_list_of_images_is_a_value_error(X: Any, tiny: Any) -> None:
    assert_raises_one_line(ValueError, "list", FeatureExtractor(tiny).fit(X).transform, X)


def test_errors_for_wrong_settings_have_one_line(tiny: Any, photos: list[str], y: np.ndarray) -> None:
    assert_raises_one_line(ConfigError, "unknown backbone 'resnet81'", FeatureExtractor("resnet81").fit, photos)
    assert_raises_one_line(
        ConfigError,
        r"backbone is a Tiny; give a name, or featpipe\.backbones\.load",
        FeatureExtractor(tiny.network).fit,
        photos,
    )
    assert_raises_one_line(
        ConfigError, "unknown head 'mpl'; did you mean 'mlp'", TransferClassifier(tiny, "mpl").fit, photos, y
    )
    assert_raises_one_line(
        ConfigError, "has no setting 'D'", TransferClassifier(tiny, head_params={"D": 1}).fit, photos, y
    )
    assert_raises_one_line(
        ConfigError, "unknown precision 'fp31'", FeatureExtractor(tiny, precision="fp31").fit, photos
    )
    maps = TransferClassifier(tiny, output="conv:none")
    assert_raises_one_line(
        ConfigError,
        r"feature maps of shape \(8, 10, 10\); heads train on pooled outputs: conv:avg",
        maps.fit,
        photos,
        y,
    )


def test_examples_from_the_documentation_run(make_folder: Any, home: Path) -> None:
    make_folder(each=5)
    Path("a.jpg").write_bytes(Path("photos/ape/00.jpg").read_bytes())
    paths, y = sorted(map(str, Path("photos").rglob("*.jpg"))), ["ape"] * 5 + ["bee"] * 5 + ["cow"] * 5
    lite0 = {"backbone": "efficientnet_lite0"}

    cache = featpipe.extract("photos/", backbone="efficientnet_lite0", cache="cache/")
    assert featpipe.FeatureCache(cache.path).ids == [path.removeprefix("photos/") for path in paths]
    assert cache.X.shape == (15, 1280)
    assert cache.y is not None
    assert cache.y.tolist() == y
    model = featpipe.train(cache, head="logistic", cv=5)
    model.save("photos.model")
    model = featpipe.load_model("photos.model")
    data = Path("a.jpg").read_bytes()
    assert model.predict(["a.jpg", data, Image.open("a.jpg"), decode_image(data)]).tolist() == ["ape"] * 4
    assert np.allclose(model.predict_proba(paths), model.predict_proba_features(cache.X), atol=1e-6)

    classifier = featpipe.TransferClassifier(backbone="efficientnet_lite0", head="mlp").fit(paths, y)
    assert classifier.score(paths, y) > 0.9
    regressor = featpipe.TransferRegressor(**lite0).fit(paths, np.arange(15.0))
    assert regressor.predict(["a.jpg"]).shape == (1,)
    embed = featpipe.FeatureExtractor(**lite0).fit(paths)
    assert np.array_equal(embed.transform(paths), cache.X)
    softmax = featpipe.SoftmaxRegression(C=1.0).fit(cache.X, cache.y)
    assert softmax.score(cache.X, cache.y) == 1.0
    # the estimators copied what was extracted before
    assert sum(featpipe.FeatureCache(path).manifest["embedded"] for path in Path("cache").glob("*.h5")) <= 16


@pytest.mark.parametrize(("head", "methods"), [
    ("svm", {"decision_function"}), ("knn", {"predict_proba"}), ("logistic", {"decision_function", "predict_proba"}),
    ("featpipe.SoftmaxRegressionCV", {"decision_function", "predict_proba"}),
])  # fmt: skip
def test_a_classifier_has_the_methods_of_its_head(
    head: str, methods: set[str], tiny: Any, photos: list[str], y: np.ndarray
) -> None:
    clf = TransferClassifier(tiny, head, head_params={"cv": 2} if "CV" in head else None)
    for _ in range(2):  # before and after it was fitted
        for name in ("decision_function", "predict_proba"):
            assert hasattr(clf, name) == (name in methods)
        clf.fit(photos, y)
    for name in methods:
        assert len(getattr(clf, name)(photos[:3])) == 3
