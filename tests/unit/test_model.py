"""A model is one file: it answers the same after a round trip, and no file that a stranger made can do any harm."""

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


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def bundle(path: Path, parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return path


def forged(path: Path, **changes: object) -> Path:
    """The same model with other things in its model.json, and with digests that fit."""
    parts = members(path)
    document = json.loads(parts["model.json"]) | changes
    parts["model.json"] = json.dumps(document).encode()
    return bundle(path, parts)


def with_head(path: Path, head: bytes) -> Path:
    parts = members(path)
    document = json.loads(parts["model.json"])
    document["files"]["head.skops"] = hashlib.sha256(head).hexdigest()
    return bundle(path, parts | {"head.skops": head, "model.json": json.dumps(document).encode()})


def by_hand(backbone: Any, data: bytes) -> np.ndarray:
    picture = backbone.transform(torch.from_numpy(decode_image(data)).permute(2, 0, 1))
    with torch.inference_mode():
        return backbone.network(picture[None])[0].numpy()


# -- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["logistic", "mlp", "linear"])
def test_a_saved_model_answers_bit_for_bit_as_before(head: str, tiny: Any, make_folder: Any, tmp_path: Path) -> None:
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
    again = load_model(saved).save(tmp_path / "again.model")
    assert read_document(again) | {"files": 0} == read_document(saved) | {"files": 0}


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

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ModelError, match=r"photos\.model: cannot be written \(No space left on device\)"):
            model.save(saved)
    with monkeypatch.context() as patch:
        patch.setattr("featpipe.model.model.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.glob(".*")] == []


def test_a_place_that_cannot_be_written_is_one_line(model: Model, saved: Path, tmp_path: Path) -> None:
    for place in (tmp_path, saved / "below-a-file.model"):
        with pytest.raises(ModelError, match="cannot be written") as caught:
            model.save(place)
        assert "\n" not in str(caught.value)


# -- strangers -------------------------------------------------------------------------------------------------------


class Boom:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (Path.touch, (self.place,))


def test_a_pickle_is_not_loaded(saved: Path, tmp_path: Path) -> None:
    data = pickle.dumps(Boom(tmp_path / "ran"))
    for path in (
        bundle(tmp_path / "a.model", {"data.pkl": data}),
        bundle(tmp_path / "b.model", members(saved) | {"data.pkl": data}),
        with_head(saved, data),
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
        load_model(with_head(saved, skops.io.dumps(head)))


def test_a_head_of_other_classes_is_refused(saved: Path) -> None:
    head = LogisticRegression().fit([[0.0], [1.0], [2.0]], ["x", "y", "z"])
    with pytest.raises(ModelError, match="not trained on its 3 classes"):
        load_model(with_head(saved, dumps(head)))
    with pytest.raises(ModelError, match="damaged or not a featpipe model"):
        load_model(with_head(saved, dumps(LogisticRegression())))


def test_a_member_too_many_packed_doubled_missing_or_changed_is_refused(saved: Path, tmp_path: Path) -> None:
    parts, path = members(saved), tmp_path / "other.model"
    cases = {
        "extra.txt": lambda: bundle(path, parts | {"extra.txt": b""}),
        "compressed": lambda: bundle(path, parts, zipfile.ZIP_DEFLATED),
        "members that its model.json does not name": lambda: bundle(path, parts | {"backbone.safetensors": b""}),
        "trained_on.bin is damaged": lambda: bundle(path, parts | {"trained_on.bin": bytes(16)}),
        "head.skops is damaged": lambda: bundle(path, parts | {"head.skops": parts["head.skops"] + b"\0"}),
        **{
            f"has no {name}": lambda name=name: bundle(path, {k: v for k, v in parts.items() if k != name})
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
def test_a_document_that_does_not_hold_together_is_refused(change: dict[str, object], saved: Path) -> None:
    forged(saved, **change)
    with pytest.raises(ModelError, match=r"photos\.model: ") as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


def test_json_that_is_no_document_is_refused(saved: Path) -> None:
    parts = members(saved)
    for text in (b"[]", b"7", b"{", b"\xff", b"[" * 100_000, b""):
        bundle(saved, parts | {"model.json": text})
        for read in (load_model, read_document):
            with pytest.raises(ModelError, match=r"photos\.model: "):
                read(saved)


def test_a_cut_file_is_refused_wherever_it_is_cut(saved: Path, tmp_path: Path) -> None:
    data, cut = saved.read_bytes(), tmp_path / "cut.model"
    for length in np.linspace(0, len(data) - 1, 30).astype(int):
        cut.write_bytes(data[:length])
        for read in (load_model, read_document):
            with pytest.raises(ModelError, match=r"cut\.model: "):
                read(cut)


def outcome(path: Path, images: list[Path], backbone: Any) -> object:
    """What a file answers, or the error."""
    try:
        loaded = load_model(path)
        carried = {name: value.tolist() for name, value in read_state_dicts(path)[0].items()}
    except (ModelError, WeightsError) as error:
        return str(error)
    return loaded.attach(backbone).predict_proba(images).tolist(), loaded.facts, loaded.classes, carried


def test_flipped_bytes_are_refused_or_change_no_answer(
    model: Model, tiny: Any, photos: list[Path], tmp_path: Path
) -> None:
    path = model.save(tmp_path / "flipped.model", portable=True)
    whole, expected = path.read_bytes(), outcome(path, photos[:2], tiny)
    rng = np.random.default_rng(0)
    refused = 0
    for place in [*rng.integers(0, len(whole), 150), *rng.integers(len(whole) - 700, len(whole), 50)]:
        data = bytearray(whole)
        data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        found = outcome(path, photos[:2], tiny)
        if isinstance(found, str):
            assert found.startswith(f"{path}: ")
            assert "\n" not in found
            refused += 1
        else:
            assert found == expected
    assert refused > 150


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.model: there is no such model file; `featpipe train`"):
        load_model(tmp_path / "gone.model")
    with pytest.raises(ModelError, match="Is a directory"):
        load_model(tmp_path)


# -- the backbone ----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of somebody's own that leaves a trace when it is imported."""
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
def test_code_of_somebody_s_own_runs_only_when_it_is_asked_for(
    portable: bool, own_code: str, make_folder: Any, tmp_path: Path
) -> None:
    folder = make_folder()
    model = train(extract(folder, backbone=own_code, cache=tmp_path / "cache"))
    expected = model.attach(own_code).predict_proba([folder / "ape/00.jpg"])
    path = model.save(tmp_path / "own.model", portable=portable)
    del sys.modules["their_code"]
    (tmp_path / "ran").unlink()
    loaded = load_model(path)
    with pytest.raises(ModelError, match="not run by default; if you trust it, pass --backbone"):
        loaded.predict([folder / "ape/00.jpg"])
    assert not (tmp_path / "ran").exists()
    trusted = load_model(path, backbone=own_code)
    assert (tmp_path / "ran").exists()
    assert np.array_equal(trusted.predict_proba([folder / "ape/00.jpg"]), expected)


def test_a_forged_backbone_name_runs_nothing(model: Model, saved: Path, photos: list[Path], tmp_path: Path) -> None:
    model.save(saved, portable=True)
    ran = tmp_path / "ran"
    (tmp_path / "forged_code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    document = read_document(saved)
    for name in ("forged_code:make", "os:getcwd", "timm/hf-hub:somebody/thing", "timm/local-dir:/tmp"):
        forged(saved, backbone=document["backbone"] | {"name": name})
        with pytest.raises(ModelError, match="not run by default"):
            load_model(saved).predict(photos[:1])
    assert not ran.exists()


def weights_of(backbone: Any, path: Path) -> Path:
    torch.save(backbone.network.state_dict(), path)
    return path


@pytest.fixture
def library(tmp_path: Path) -> Any:
    """A small network of a library's, with weights from a file."""
    made = backbones.load("timm/test_resnet", weights="none", seed=5)
    return weights_of(made, tmp_path / "weights.pth")


def test_a_portable_model_works_when_the_weights_are_gone(library: Path, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(each=3)
    cache = extract(folder, backbone="timm/test_resnet", weights=library, cache=tmp_path / "cache")
    model = train(cache)
    light = model.save(tmp_path / "light.model")
    whole = model.save(tmp_path / "whole.model", portable=True)
    images = [folder / "ape/00.jpg", folder / "cow/02.jpg"]
    expected = model.predict_proba(images)
    assert np.array_equal(load_model(light).predict_proba(images), expected)
    library.unlink()
    assert np.array_equal(load_model(whole).predict_proba(images), expected)
    again = load_model(whole).save(tmp_path / "again.model")
    assert np.array_equal(load_model(again).predict_proba(images), expected)
    with pytest.raises(WeightsError, match="no such file"):
        load_model(light).predict(images)


def test_other_weights_than_the_model_s_own_are_refused(library: Path, make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder(each=3)
    cache = extract(folder, backbone="timm/test_resnet", weights=library, cache=tmp_path / "cache")
    path = train(cache).save(tmp_path / "light.model")
    weights_of(backbones.load("timm/test_resnet", weights="none", seed=6), library)
    with pytest.raises(WeightsError, match=r"light\.model: was made with another backbone \(weights is "):
        load_model(path).predict([folder / "ape/00.jpg"])


def test_a_portable_model_keeps_the_transform_that_its_published_weights_had(tmp_path: Path) -> None:
    # ResNet-50's two published weights have different transforms; a file of weights alone cannot tell which.
    old = backbones.Transform(resize=256, crop=(224, 224))
    backbone = backbones.load("squeezenet1_1", weights="none", transform=old)
    model = made_by_hand(backbone)
    loaded = load_model(model.save(tmp_path / "m.model", portable=True))
    assert loaded.backbone.transform == old


def made_by_hand(backbone: Any) -> Model:
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


def test_tied_weights_can_be_carried(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Conv2d(3, 3, 1)
            self.two = torch.nn.Conv2d(3, 3, 1)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x)).mean((2, 3))

    model = made_by_hand(backbones.load(Tied(), transform=lambda x: x[:, :8, :8].float()))
    names = json.loads(members(model.save(tmp_path / "m.model", portable=True))["model.json"])["files"]
    assert set(names) == {"head.skops", "trained_on.bin", "backbone.safetensors"}


def test_another_backbone_is_refused_with_the_facts_that_differ(saved: Path, model: Model) -> None:
    other = backbones.load("timm/test_resnet", weights="none")
    with pytest.raises(WeightsError, match="name is 'timm/test_resnet'"):
        load_model(saved, backbone=other)
    with pytest.raises(ConfigError, match=r"backbone is a Flatten; give a name, or featpipe\.backbones\.load"):
        load_model(saved, backbone=torch.nn.Flatten())
    assert load_model(saved, backbone=model.backbone).backbone is model.backbone


def test_a_cache_of_other_embeddings_is_refused(model: Model, make_folder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    other = extract(folder, backbone="timm/test_resnet", weights="none", cache=tmp_path / "cache")
    with pytest.raises(CacheMismatchError, match=r"backbone\.name is 'timm/test_resnet'"):
        model.check_cache(other)
    half = extract(folder, backbone=model.backbone, storage="float16", cache=tmp_path / "half")
    with pytest.raises(CacheMismatchError, match="storage is 'float16', asked for 'float32'"):
        model.check_cache(half)


# -- images ----------------------------------------------------------------------------------------------------------


def test_images_of_every_kind_are_predicted_in_the_order_given(
    model: Model, photos: list[Path], tmp_path: Path
) -> None:
    data = [path.read_bytes() for path in photos]
    kinds = [
        lambda i: photos[i],
        lambda i: str(photos[i]),
        lambda i: data[i],
        lambda i: bytearray(data[i]),
        lambda i: Image.open(io.BytesIO(data[i])),
        lambda i: decode_image(data[i]),
    ]
    order = np.random.default_rng(0).permutation(len(photos)).tolist()
    images = [kinds[place % len(kinds)](i) for place, i in enumerate(order)]
    features = np.stack([by_hand(model.backbone, data[i]) for i in order])
    assert np.allclose(model.embed(images), features, atol=1e-6, rtol=0)
    assert np.allclose(model.predict_proba(images), model.head.predict_proba(features), atol=1e-5)
    assert (model.predict(images) == model.predict_features(features)).all()


def test_one_image_alone_and_among_others_is_the_same(model: Model, photos: list[Path]) -> None:
    together = model.embed(photos)
    assert all(np.array_equal(model.embed([path])[0], row) for path, row in zip(photos, together, strict=True))


def test_columns_and_stacks_of_images_are_lists_of_images(model: Model, photos: list[Path]) -> None:
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
def test_what_is_not_a_list_of_images_is_one_line(images: object, model: Model) -> None:
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


def test_an_embedding_that_is_not_finite_is_no_prediction() -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = x.mean((2, 3))
            return torch.where(values > 254, torch.nan, values)

    model = made_by_hand(backbones.load(Picky(), transform=lambda x: x[:, :8, :8].float()))
    gray, white = np.full((9, 9, 3), 99, np.uint8), np.full((9, 9, 3), 255, np.uint8)
    with pytest.raises(SampleError, match=r"image 2 \(ndarray\): not-finite"):
        model.predict([gray, gray, white])


def test_a_model_without_probabilities_says_so(tiny: Any) -> None:
    model = made_by_hand(tiny)
    model.task = "regression"
    with pytest.raises(ConfigError, match="no probabilities"):
        model.predict_proba_features(np.zeros((1, 8)))


def test_training_images_are_known_by_their_bytes(model: Model, photos: list[Path]) -> None:
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in photos]
    rows = np.frombuffer(b"".join([*digests, bytes(32)]), np.uint8).reshape(-1, 32)
    assert model.was_trained_on(rows).tolist() == [True] * len(photos) + [False]
    assert model.was_trained_on(rows[:0]).shape == (0,)
