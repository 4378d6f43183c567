"""A model file gives the same predictions after a round trip, and a malicious file does no harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer

from featpipe import backbones, extract, load_model, train
from featpipe.backbones.weights import read_state_dicts
from featpipe.data import decode_image, get_modality
from featpipe.errors import CacheMismatchError, ConfigError, ModelError, SampleError, WeightsError
from featpipe.heads import dumps
from featpipe.model import Model, read_document
from featpipe.status import Status


@pytest.fixture
def model(tiny: Any, make_folder: Any, tmp_path: Path) -> Model:
    return train(extract(make_folder(), backbone=tiny, cache=tmp_path / "cache"), tune=False).attach(tiny)


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    return model.save(tmp_path / "photos.model")


@pytest.fixture
def photos(model: Model, tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "photos").rglob("*.jpg"))


def read_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def write_bundle(path: Path, parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return path


def rewrite_document(path: Path, **changes: object) -> Path:
    """Change fields of model.json; all digests stay valid."""
    parts = read_members(path)
    document = json.loads(parts["model.json"]) | changes
    parts["model.json"] = json.dumps(document).encode()
    return write_bundle(path, parts)


def replace_head(path: Path, head: bytes) -> Path:
    parts = read_members(path)
    document = json.loads(parts["model.json"])
    document["files"]["head.skops"] = hashlib.sha256(head).hexdigest()
    return write_bundle(path, parts | {"head.skops": head, "model.json": json.dumps(document).encode()})


def embed_directly(backbone: Any, data: bytes) -> np.ndarray:
    picture = backbone.transform(torch.from_numpy(decode_image(data)).permute(2, 0, 1))
    with torch.inference_mode():
        return backbone.network(picture[None])[0].numpy()


# round trip


@pytest.mark.parametrize("head", ["logistic", "mlp", "linear"])
def test_a_saved_model_gives_bit_identical_predictions(head: str, tiny: Any, make_folder: Any, tmp_path: Path) -> None:
    cache = extract(make_folder(), backbone=tiny, cache=tmp_path / "cache")
    params = {} if head == "logistic" else {"epochs": 3}
    model = train(cache, head=head, cv=3, params=params)
    loaded = load_model(model.save(tmp_path / "m.model"), backbone=tiny)
    X = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    assert np.array_equal(loaded.predict_proba_features(X), model.predict_proba_features(X))
    assert np.array_equal(loaded.predict_features(X), model.predict_features(X))
    assert (loaded.scores, loaded.classes, loaded.task) == (model.scores, model.classes, model.task)
    assert (loaded.facts, loaded.request, loaded.output) == (model.facts, model.request, model.output)
    assert np.array_equal(loaded.trained_on, model.trained_on)
    assert {**model.history, "portable": False} == loaded.history


def test_saving_twice_writes_the_same_document(model: Model, saved: Path, tmp_path: Path) -> None:
    saved_again = load_model(saved).save(tmp_path / "again.model")
    assert read_document(saved_again) | {"files": 0} == read_document(saved) | {"files": 0}


@pytest.mark.parametrize(
    ("names", "order"),
    [(("9", "10", "2"), ("2", "9", "10")), (("b", "B", "ä"), ("B", "b", "ä")), (("10", "9", "x"), ("10", "9", "x"))],
)
def test_classes_keep_their_order(
    names: tuple[str, ...], order: tuple[str, ...], tiny: Any, make_folder: Any, tmp_path: Path
) -> None:
    cache = extract(make_folder(names), backbone=tiny, cache=tmp_path / "cache")
    model = load_model(train(cache).save(tmp_path / "m.model"))
    assert model.classes == cache.classes == order
    probabilities = model.predict_proba_features(cache.X)
    assert (np.array(order)[probabilities.argmax(axis=1)] == model.predict_features(cache.X)).all()
    assert (model.predict_features(cache.X) == cache.y).mean() > 0.6


def test_any_setting_of_a_head_can_be_saved(tiny: Any, make_folder: Any, tmp_path: Path) -> None:
    cache = extract(make_folder(), backbone=tiny, cache=tmp_path / "cache")
    params = {"C": np.int64(2), "class_weight": {"bee": 3.0, "ape": 1.0}}
    model = load_model(train(cache, params=params).save(tmp_path / "m.model"))
    assert model.history["params"] == {"C": 2, "class_weight": {"bee": 3.0, "ape": 1.0}}
    assert model.head["head"].class_weight == {1: 3.0, 0: 1.0}


def test_a_failed_save_leaves_the_old_file(model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def raise_no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_no_space)
        with pytest.raises(ModelError, match=r"photos\.model: cannot be written \(No space left on device\)"):
            model.save(saved)
    with monkeypatch.context() as patch:
        patch.setattr("featpipe.model.model.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.glob(".*")] == []


def test_a_path_that_cannot_be_written_is_a_one_line_error(model: Model, saved: Path, tmp_path: Path) -> None:
    for path in (tmp_path, saved / "below-a-file.model"):
        with pytest.raises(ModelError, match="cannot be written") as caught:
            model.save(path)
        assert "\n" not in str(caught.value)


# malicious files


class TouchOnUnpickling:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_is_not_loaded(saved: Path, tmp_path: Path) -> None:
    data = pickle.dumps(TouchOnUnpickling(tmp_path / "ran"))
    for path in (
        write_bundle(tmp_path / "a.model", {"data.pkl": data}),
        write_bundle(tmp_path / "b.model", read_members(saved) | {"data.pkl": data}),
        replace_head(saved, data),
    ):
        with pytest.raises(ModelError, match=path.name):
            load_model(path)
    (tmp_path / "c.model").write_bytes(data)
    with pytest.raises(ModelError, match="damaged or not a featpipe model"):
        load_model(tmp_path / "c.model")
    assert not (tmp_path / "ran").exists()


def test_a_type_that_is_not_trusted_is_not_loaded(saved: Path) -> None:
    import skops.io

    head = FunctionTransformer(os.system)
    with pytest.raises(ModelError, match=r"photos\.model: the head holds posix\.system, which may not be loaded"):
        load_model(replace_head(saved, skops.io.dumps(head)))


def test_a_head_of_other_classes_is_refused(saved: Path) -> None:
    head = LogisticRegression().fit([[0.0], [1.0], [2.0]], ["x", "y", "z"])
    with pytest.raises(ModelError, match="not trained on its 3 classes"):
        load_model(replace_head(saved, dumps(head)))
    with pytest.raises(ModelError, match="damaged or not a featpipe model"):
        load_model(replace_head(saved, dumps(LogisticRegression())))


def test_an_extra_compressed_duplicate_missing_or_changed_member_is_refused(saved: Path, tmp_path: Path) -> None:
    parts, path = read_members(saved), tmp_path / "other.model"
    cases = {
        "extra.txt": lambda: write_bundle(path, parts | {"extra.txt": b""}),
        "compressed": lambda: write_bundle(path, parts, zipfile.ZIP_DEFLATED),
        "members that its model.json does not name": lambda: write_bundle(path, parts | {"backbone.safetensors": b""}),
        "trained_on.bin is damaged": lambda: write_bundle(path, parts | {"trained_on.bin": bytes(16)}),
        "head.skops is damaged": lambda: write_bundle(path, parts | {"head.skops": parts["head.skops"] + b"\0"}),
        **{
            f"has no {name}": lambda name=name: write_bundle(path, {k: v for k, v in parts.items() if k != name})
            for name in parts
        },
    }
    for problem, make in cases.items():
        with pytest.raises(ModelError, match=problem):
            load_model(make())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(saved, "a") as file:
        file.writestr("head.skops", parts["head.skops"])
    with pytest.raises(ModelError, match="a member twice"):
        load_model(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "pickle"},
        {"format_version": "2.0"},
        {"classes": "abc"},
        {"classes": ["a", "a", "b"]},
        {"classes": [1, 2, 3]},
        {"classes": ["a", "b"]},
        {"task": "detection"},
        {"files": {}},
        {"facts": {}},
        {"facts": {"backbone": {"outputs": ["pooled"], "transform": 1}, "precision": "fp32", "storage": "float32"}},
        {"backbone": {"name": 7}},
        {"backbone": {"name": "resnet18", "weights": 7}},
        {"backbone": {"name": "resnet18", "seed": "x"}},
        {"output": "fc"},
        {"history": None},
    ],
)
def test_an_inconsistent_document_is_refused(change: dict[str, object], saved: Path) -> None:
    rewrite_document(saved, **change)
    with pytest.raises(ModelError, match=r"photos\.model: ") as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


def test_invalid_json_is_refused(saved: Path) -> None:
    parts = read_members(saved)
    for text in (b"[]", b"7", b"{", b"\xff", b"[" * 100_000, b""):
        write_bundle(saved, parts | {"model.json": text})
        for read_model in (load_model, read_document):
            with pytest.raises(ModelError, match=r"photos\.model: "):
                read_model(saved)


def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path) -> None:
    data, truncated = saved.read_bytes(), tmp_path / "cut.model"
    for length in np.linspace(0, len(data) - 1, 30).astype(int):
        truncated.write_bytes(data[:length])
        for read_model in (load_model, read_document):
            with pytest.raises(ModelError, match=r"cut\.model: "):
                read_model(truncated)


def load_and_predict(path: Path, images: list[Path], backbone: Any) -> object:
    """Load a model file; return its predictions and contents, or the error message."""
    try:
        loaded = load_model(path)
        weights = {name: value.tolist() for name, value in read_state_dicts(path)[0].items()}
    except (ModelError, WeightsError) as error:
        return str(error)
    return loaded.attach(backbone).predict_proba(images).tolist(), loaded.facts, loaded.classes, weights


def test_flipped_bytes_are_refused_or_change_no_prediction(
    model: Model, tiny: Any, photos: list[Path], tmp_path: Path
) -> None:
    path = model.save(tmp_path / "flipped.model", portable=True)
    original, expected = path.read_bytes(), load_and_predict(path, photos[:2], tiny)
    rng = np.random.default_rng(0)
    refused = 0
    for position in [*rng.integers(0, len(original), 150), *rng.integers(len(original) - 700, len(original), 50)]:
        data = bytearray(original)
        data[position] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        actual = load_and_predict(path, photos[:2], tiny)
        if isinstance(actual, str):
            assert actual.startswith(f"{path}: ")
            assert "\n" not in actual
            refused += 1
        else:
            assert actual == expected
    assert refused > 150


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.model: there is no such model file; `featpipe train`"):
        load_model(tmp_path / "gone.model")
    with pytest.raises(ModelError, match="Is a directory"):
        load_model(tmp_path)


# the backbone


@pytest.fixture
def custom_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A custom network whose module creates a file when it is imported."""
    (tmp_path / "their_code.py").write_text(
        textwrap.dedent(
            """
            import pathlib, torch
            pathlib.Path(__file__).with_name("ran").touch()

            def transform(image):
                return torch.nn.functional.interpolate(image[None].float(), (8, 8), mode="area")[0] / 255

            def make():
                layers = torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
                return torch.nn.Sequential(*layers), transform
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    yield "their_code:make"
    sys.modules.pop("their_code", None)


@pytest.mark.parametrize("portable", [False, True])
def test_custom_code_runs_only_on_request(portable: bool, custom_code: str, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder()
    model = train(extract(folder, backbone=custom_code, cache=tmp_path / "cache"))
    expected = model.attach(custom_code).predict_proba([folder / "ape/00.jpg"])
    path = model.save(tmp_path / "own.model", portable=portable)
    del sys.modules["their_code"]
    (tmp_path / "ran").unlink()
    loaded = load_model(path)
    with pytest.raises(ModelError, match="not run by default; if you trust it, pass --backbone"):
        loaded.predict([folder / "ape/00.jpg"])
    assert not (tmp_path / "ran").exists()
    trusted = load_model(path, backbone=custom_code)
    assert (tmp_path / "ran").exists()
    assert np.array_equal(trusted.predict_proba([folder / "ape/00.jpg"]), expected)


def test_a_forged_backbone_name_runs_nothing(model: Model, saved: Path, photos: list[Path], tmp_path: Path) -> None:
    model.save(saved, portable=True)
    ran = tmp_path / "ran"
    (tmp_path / "forged_code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    document = read_document(saved)
    for name in ("forged_code:make", "os:getcwd", "timm/hf-hub:somebody/thing", "timm/local-dir:/tmp"):
        rewrite_document(saved, backbone=document["backbone"] | {"name": name})
        with pytest.raises(ModelError, match="not run by default"):
            load_model(saved).predict(photos[:1])
    assert not ran.exists()


def save_weights(backbone: Any, path: Path) -> Path:
    torch.save(backbone.network.state_dict(), path)
    return path


@pytest.fixture
def library_weights(tmp_path: Path) -> Any:
    """A weights file of a small library network."""
    backbone = backbones.load("timm/test_resnet", weights="none", seed=5)
    return save_weights(backbone, tmp_path / "weights.pth")


def test_a_portable_model_works_without_the_weights_file(
    library_weights: Path, make_folder: Any, tmp_path: Path
) -> None:
    folder = make_folder(each=3)
    cache = extract(folder, backbone="timm/test_resnet", weights=library_weights, cache=tmp_path / "cache")
    model = train(cache)
    referring = model.save(tmp_path / "light.model")
    portable = model.save(tmp_path / "whole.model", portable=True)
    images = [folder / "ape/00.jpg", folder / "cow/02.jpg"]
    expected = model.predict_proba(images)
    assert np.array_equal(load_model(referring).predict_proba(images), expected)
    library_weights.unlink()
    assert np.array_equal(load_model(portable).predict_proba(images), expected)
    saved_again = load_model(portable).save(tmp_path / "again.model")
    assert np.array_equal(load_model(saved_again).predict_proba(images), expected)
    with pytest.raises(WeightsError, match="no such file"):
        load_model(referring).predict(images)


def test_weights_other_than_those_of_training_are_refused(
    library_weights: Path, make_folder: Any, tmp_path: Path
) -> None:
    folder = make_folder(each=3)
    cache = extract(folder, backbone="timm/test_resnet", weights=library_weights, cache=tmp_path / "cache")
    path = train(cache).save(tmp_path / "light.model")
    save_weights(backbones.load("timm/test_resnet", weights="none", seed=6), library_weights)
    with pytest.raises(WeightsError, match=r"light\.model: was made with another backbone \(weights is "):
        load_model(path).predict([folder / "ape/00.jpg"])


def test_a_portable_model_keeps_the_transform_of_its_training(tmp_path: Path) -> None:
    # The two published weights of ResNet-50 have different transforms, which a weights file does not store.
    transform = backbones.Transform(resize=256, crop=(224, 224))
    backbone = backbones.load("squeezenet1_1", weights="none", transform=transform)
    model = make_model(backbone)
    loaded = load_model(model.save(tmp_path / "m.model", portable=True))
    assert loaded.backbone.transform == transform


def make_model(backbone: Any) -> Model:
    d = backbone.width
    head = LogisticRegression().fit(np.eye(4, d), [0, 1, 0, 1])
    facts = {"backbone": backbone.to_dict(), "precision": "fp32", "storage": "float32", "extraction": 1}
    model = Model(
        head,
        "logistic",
        "classification",
        ("a", "b"),
        "pooled",
        facts,
        dict(backbone.request),
        np.zeros((0, 16), np.uint8),
    )
    return model.attach(backbone)


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)
            self.tied_conv = torch.nn.Conv2d(3, 3, 1)
            self.tied_conv.weight = self.conv.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tied_conv(self.conv(x)).mean((2, 3))

    model = make_model(backbones.load(Tied(), transform=lambda x: x[:, :8, :8].float()))
    names = json.loads(read_members(model.save(tmp_path / "m.model", portable=True))["model.json"])["files"]
    assert set(names) == {"head.skops", "trained_on.bin", "backbone.safetensors"}


def test_another_backbone_is_refused_with_the_differing_settings(saved: Path, model: Model) -> None:
    other_backbone = backbones.load("timm/test_resnet", weights="none")
    with pytest.raises(WeightsError, match="name is 'timm/test_resnet'"):
        load_model(saved, backbone=other_backbone)
    with pytest.raises(ConfigError, match=r"backbone is a Flatten; give a name, or featpipe\.backbones\.load"):
        load_model(saved, backbone=torch.nn.Flatten())
    assert load_model(saved, backbone=model.backbone).backbone is model.backbone


def test_a_cache_of_other_embeddings_is_refused(model: Model, make_folder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    other_cache = extract(folder, backbone="timm/test_resnet", weights="none", cache=tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=r"backbone\.name is 'timm/test_resnet'"):
        model.check_cache(other_cache)
    float16_cache = extract(folder, backbone=model.backbone, storage="float16", cache=tmp_path / "half")
    with pytest.raises(CacheMismatchError, match="storage is 'float16', asked for 'float32'"):
        model.check_cache(float16_cache)


# images


def test_images_of_every_kind_are_predicted_in_the_order_given(
    model: Model, photos: list[Path], tmp_path: Path
) -> None:
    data = [path.read_bytes() for path in photos]
    loaders = [
        lambda i: photos[i],
        lambda i: str(photos[i]),
        lambda i: data[i],
        lambda i: bytearray(data[i]),
        lambda i: Image.open(io.BytesIO(data[i])),
        lambda i: decode_image(data[i]),
    ]
    order = np.random.default_rng(0).permutation(len(photos)).tolist()
    images = [loaders[position % len(loaders)](i) for position, i in enumerate(order)]
    features = np.stack([embed_directly(model.backbone, data[i]) for i in order])
    assert np.allclose(model.embed(images), features, atol=1e-6, rtol=0)
    assert np.allclose(model.predict_proba(images), model.head.predict_proba(features), atol=1e-5)
    assert (model.predict(images) == model.predict_features(features)).all()


def test_the_embedding_of_an_image_is_the_same_alone_and_among_others(model: Model, photos: list[Path]) -> None:
    embeddings = model.embed(photos)
    assert all(np.array_equal(model.embed([path])[0], row) for path, row in zip(photos, embeddings, strict=True))


def test_columns_and_stacked_arrays_are_accepted_as_lists_of_images(model: Model, photos: list[Path]) -> None:
    pandas = pytest.importorskip("pandas")
    expected = model.embed(photos[:5])
    names = [str(path) for path in photos[:5]]
    stack = np.stack([decode_image(path.read_bytes()) for path in photos[:5]])
    series = pandas.Series(names, index=[3, 1, 4, 0, 5])
    for images in (names, tuple(names), np.array(names), np.array(names, object)[:, None], series, series.to_frame()):
        assert np.array_equal(model.embed(images), expected)
    assert np.array_equal(model.embed(stack), expected)


@pytest.mark.parametrize(
    "images",
    ["a.jpg", b"...", Path("a.jpg"), Image.new("RGB", (4, 4)), np.zeros((9, 9, 3), np.uint8), None, 7,
     np.zeros((9, 9), np.uint8), np.zeros((0, 4, 4, 3), np.uint8), {"a.jpg": 1}, {"a.jpg"}, iter(["a.jpg"]), []],
    ids=lambda images: type(images).__name__,
)  # fmt: skip
def test_an_argument_that_is_not_a_list_of_images_is_a_one_line_error(images: object, model: Model) -> None:
    with pytest.raises(ConfigError, match="list") as caught:
        model.predict(images)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_table_of_several_columns_is_not_a_list_of_images() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ConfigError, match="DataFrame"):
        get_modality("image").to_list(pandas.DataFrame({"path": ["a.jpg"], "label": ["a"]}))


def test_an_image_that_cannot_be_read_is_named(model: Model, photos: list[Path]) -> None:
    cases: list[tuple[object, str, Status]] = [
        ("gone.jpg", r"image 1 \(gone\.jpg\): missing", Status.MISSING),
        (b"no image", r"image 1 \(bytes\): unsupported", Status.UNSUPPORTED),
        (b"", r"image 1 \(bytes\): empty", Status.EMPTY),
        (photos[1].read_bytes()[:400], r"image 1 \(bytes\): damaged", Status.DAMAGED),
    ]
    for item, text, status in cases:
        with pytest.raises(SampleError, match=text) as caught:
            model.predict([photos[0], item, photos[1]])
        assert (caught.value.status, caught.value.sample_id) == (status, "1")
    with pytest.raises(SampleError, match="image 0"):
        model.predict([b"", b""])


def test_a_non_finite_embedding_gives_no_prediction() -> None:
    class NanForWhite(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = x.mean((2, 3))
            return torch.where(values > 254, torch.nan, values)

    model = make_model(backbones.load(NanForWhite(), transform=lambda x: x[:, :8, :8].float()))
    gray, white = np.full((9, 9, 3), 99, np.uint8), np.full((9, 9, 3), 255, np.uint8)
    with pytest.raises(SampleError, match=r"image 2 \(ndarray\): not-finite"):
        model.predict([gray, gray, white])


def test_a_model_without_probabilities_refuses_to_predict_them(tiny: Any) -> None:
    model = make_model(tiny)
    model.task = "regression"
    with pytest.raises(ConfigError, match="no probabilities"):
        model.predict_proba_features(np.zeros((1, 8)))


def test_training_images_are_recognized_by_their_bytes(model: Model, photos: list[Path]) -> None:
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in photos]
    rows = np.frombuffer(b"".join([*digests, bytes(32)]), np.uint8).reshape(-1, 32)
    assert model.was_trained_on(rows).tolist() == [True] * len(photos) + [False]
    assert model.was_trained_on(rows[:0]).shape == (0,)
