"""Fine-tuning a model on an archive, and the comparison with the probe on test images."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

import featpipe
from featpipe import backbones
from featpipe.config import FineTuneConfig
from featpipe.data import decode_image
from featpipe.errors import CacheError, ConfigError, WeightsError
from featpipe.finetuning import FineTuningResult, finetune
from featpipe.finetuning.split import make_splits
from featpipe.metrics import format_note
from tests.support.finetuning import Ladder, small_transform, write_photos
from tests.support.interrupts import interrupt_fine_tuning

QUICK_SETTINGS = {"epochs": 2, "batch": 16, "learning_rate": 3e-3, "device": "cpu", "unfreeze": "all"}


@pytest.fixture(scope="module")
def ladder():
    return backbones.load(Ladder(), transform=small_transform)


@pytest.fixture
def photos(tmp_path):
    """Images with old modification times, since caches do not rely on the times of fresh files."""
    folder = write_photos(tmp_path / "photos", each=14)
    for file in folder.rglob("*.png"):
        os.utime(file, (1e9, 1e9))
    return folder


@pytest.fixture
def model(tmp_path, photos, ladder):
    cache = featpipe.extract(photos, backbone=ladder, cache=tmp_path / "cache")
    trained = featpipe.train(cache, "ridge" if cache.task == "regression" else "lda", cv=3).attach(ladder)
    trained.save(tmp_path / "photos.model")
    return trained


def write_split_table(photos, path, marks) -> None:
    """Write a table of labels with a split: images are marked by their number, all others for training."""
    rows = []
    for file in sorted(photos.rglob("*.png")):
        number = int(file.stem)
        rows.append([f"{file.parent.name}/{file.name}", file.parent.name, marks.get(number, "train")])
    with open(path, "w") as table:
        csv.writer(table).writerows([["path", "label", "split"], *rows])


def test_fine_tuning_reduces_the_loss_and_compares_with_the_probe(tmp_path, photos, model):
    settings = {**QUICK_SETTINGS, "epochs": 12, "patience": 0, "learning_rate": 6e-3}
    result = finetune(model, photos, cache=tmp_path / "cache", out=tmp_path / "t.model", **settings)
    assert result.curve[result.best_epoch]["validation_loss"] < result.curve[0]["validation_loss"]
    assert result.kept == "fine-tuned"
    loaded = featpipe.load_model(tmp_path / "t.model", backbone=None)
    assert loaded.classes == model.classes
    assert loaded.facts["backbone"]["weights"] != model.facts["backbone"]["weights"]
    accuracy = next(row for row in result.comparison.metrics if row["name"] == "accuracy")
    assert accuracy["tuned"][0] >= accuracy["probe"][0]
    assert sum(row["rows"] for row in result.comparison.per_class) == result.comparison.n
    assert result.as_table()[1][0] == "Accuracy"
    assert not (tmp_path / "t.model.checkpoint").exists()


def test_the_model_predicts_from_embeddings_of_the_trained_network(tmp_path, photos, model):
    tuned = model.finetune(photos, cache=tmp_path / "cache", keep_worse=True, **QUICK_SETTINGS)
    files = sorted(photos.rglob("*.png"))[::5]
    images = [decode_image(file.read_bytes()) for file in files]
    batch = torch.stack([small_transform(torch.from_numpy(image).permute(2, 0, 1)) for image in images])
    with torch.no_grad():
        embeddings = tuned.backbone.network(batch)
    np.testing.assert_allclose(tuned.predict_proba(files), tuned.predict_proba_features(embeddings.numpy()), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in tuned.backbone.network.parameters())


def test_the_old_backbone_and_its_cache_are_not_changed(tmp_path, photos, model, ladder):
    cache_bytes = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("*.h5")}
    old_weights = {name: value.clone() for name, value in ladder.network.state_dict().items()}
    tuned = finetune(model, photos, cache=tmp_path / "cache", keep_worse=True, **QUICK_SETTINGS).model
    assert {name: (tmp_path / "cache" / name).read_bytes() for name in cache_bytes} == cache_bytes
    assert all(torch.equal(value, old_weights[name]) for name, value in ladder.network.state_dict().items())
    caches = [featpipe.FeatureCache(path) for path in (tmp_path / "cache").glob("*.h5")]
    assert {cache.facts["backbone"]["weights"] for cache in caches} == {ladder.digest, tuned.backbone.digest}


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_regression_and_multilabel_models_are_fine_tuned(tmp_path, photos, ladder, task):
    column, label_by_class = {
        "regression": ("target", {"ape": 1000.5, "bee": 1200.25, "cow": 1500.0}),
        "multilabel": ("labels", {"ape": "red;warm", "bee": "green", "cow": "blue;warm"}),
    }[task]
    names = [f"{file.parent.name}/{file.name}" for file in sorted(photos.rglob("*.png"))]
    with open(tmp_path / "t.csv", "w") as table:
        csv.writer(table).writerows([["path", column], *([name, label_by_class[name.split("/")[0]]] for name in names)])
    cache = featpipe.extract(photos, backbone=ladder, labels=tmp_path / "t.csv", cache=tmp_path / "cache")
    model = featpipe.train(cache, "ridge" if task == "regression" else "logistic").attach(ladder)
    settings = {**QUICK_SETTINGS, "epochs": 8, "learning_rate": 1e-3, "patience": 0}
    result = finetune(model, photos, labels=tmp_path / "t.csv", cache=tmp_path / "cache", keep_worse=True, **settings)
    assert result.curve[-1]["loss"] < 0.9 * result.curve[1]["loss"]
    predictions = result.model.predict(sorted(photos.rglob("*.png"))[:2])
    assert predictions.shape == ((2,) if task == "regression" else (2, 4))


def test_no_image_is_in_two_splits_and_the_split_depends_on_its_bytes(tmp_path, photos, model, ladder):
    shutil.copy(photos / "ape" / "03.png", photos / "ape" / "99.png")
    cache = featpipe.extract(photos, backbone=ladder, cache=tmp_path / "cache")
    splits = make_splits(model, cache, FineTuneConfig())
    row_sets = [set(split_rows.tolist()) for split_rows in (splits.train, splits.validation, splits.test)]
    assert len(set.union(*row_sets)) == sum(map(len, row_sets)) == len(cache)
    digests = [{cache.digests[row].tobytes() for row in split_rows} for split_rows in row_sets]
    assert not digests[0] & digests[1] | digests[0] & digests[2] | digests[1] & digests[2]
    write_photos(photos, each=3, first=500_000)  # replaces the first three images of each class
    changed = make_splits(model, featpipe.extract(photos, backbone=ladder, cache=tmp_path / "cache2"), FineTuneConfig())
    assert {cache.ids[row] for row in splits.test if int(cache.ids[row][-6:-4]) > 2} == {
        cache.ids[row] for row in changed.test if int(cache.ids[row][-6:-4]) > 2
    }


def test_the_split_of_the_labels_is_used(tmp_path, photos, model, ladder):
    write_split_table(photos, tmp_path / "s.csv", {0: "test", 1: "test", 2: "validation"})
    cache = featpipe.extract(photos, labels=tmp_path / "s.csv", backbone=ladder, cache=tmp_path / "cache")
    splits = make_splits(model, cache, FineTuneConfig())
    assert {cache.ids[row][-6:-4] for row in splits.test} == {"00", "01"}
    assert {cache.ids[row][-6:-4] for row in splits.validation} == {"02"}
    write_split_table(photos, tmp_path / "s2.csv", {0: "test"})
    partly_marked = featpipe.extract(photos, labels=tmp_path / "s2.csv", backbone=ladder, cache=tmp_path / "cache3")
    splits = make_splits(model, partly_marked, FineTuneConfig())
    assert {partly_marked.ids[row][-6:-4] for row in splits.test} == {"00"}
    assert len(splits.validation) > 2
    assert "(test marked by the labels)" in format_note(splits.note)


def test_a_probe_that_was_trained_on_test_images_is_fitted_again_without_them(tmp_path, photos, model, log):
    result = finetune(model, photos, cache=tmp_path / "cache", **QUICK_SETTINGS)
    notes = [text for text in log if "fitted again" in text]
    cache = next(
        c
        for c in map(featpipe.FeatureCache, (tmp_path / "cache").glob("*.h5"))
        if c.facts["backbone"]["weights"] == model.facts["backbone"]["weights"]
    )
    splits = make_splits(model, cache, FineTuneConfig())
    assert [int(text.split("again on ")[1].split()[0]) for text in notes] == [
        len(splits.train),
        len(splits.train_and_validation),
    ]
    y = cache.label_table.values
    from featpipe import heads

    refitted = heads.build("lda").fit(cache.X[splits.train_and_validation], y[splits.train_and_validation])
    expected = float(np.mean(refitted.predict(cache.X[splits.test]) == y[splits.test]))
    accuracy = next(row for row in result.comparison.metrics if row["name"] == "accuracy")
    assert accuracy["probe"][0] == pytest.approx(expected)


def test_a_probe_that_was_not_trained_on_test_images_is_used_unchanged(tmp_path, photos, ladder, log):
    write_split_table(photos, tmp_path / "s.csv", {0: "test", 1: "validation"})
    cache = featpipe.extract(photos, labels=tmp_path / "s.csv", backbone=ladder, cache=tmp_path / "cache")
    model = featpipe.train(cache, "lda").attach(ladder)
    finetune(model, photos, labels=tmp_path / "s.csv", cache=tmp_path / "cache", **QUICK_SETTINGS)
    assert not [text for text in log if "fitted again" in text]


def test_the_model_records_its_training_and_validation_images(tmp_path, photos, model, ladder):
    result = finetune(model, photos, cache=tmp_path / "cache", keep_worse=True, **QUICK_SETTINGS)
    tuned = result.model
    cache = featpipe.extract(photos, backbone=ladder, cache=tmp_path / "cache")
    splits = make_splits(model, cache, FineTuneConfig())
    counts = {"training": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)}
    assert result.images == counts
    document_of_earlier_version = {key: value for key, value in result.to_dict().items() if key != "images"}
    assert FineTuningResult.from_dict(tuned, document_of_earlier_version).images == {}
    assert tuned.was_trained_on(cache.digests[splits.train_and_validation]).all()
    assert not tuned.was_trained_on(cache.digests[splits.test]).any()
    evaluation = featpipe.evaluate(tuned, photos, cache=tmp_path / "cache")
    assert evaluation.left_out["trained on"] == len(splits.train_and_validation)
    assert evaluation.scores.n == len(splits.test)


def test_a_worse_network_is_reported_and_the_probe_is_returned(tmp_path, photos, model, monkeypatch):
    finetune_module = import_module("featpipe.finetuning.finetune")

    original_compare = finetune_module.compare_models

    def compare_rotated(task, truth, probe, tuned, classes):  # probabilities under the next class's name
        return original_compare(task, truth, probe, np.roll(tuned, 1, axis=1), classes)

    monkeypatch.setattr(finetune_module, "compare_models", compare_rotated)
    settings = {**QUICK_SETTINGS, "learning_rate": 1e-2}
    result = finetune(model, photos, cache=tmp_path / "cache", out=tmp_path / "k.model", **settings)
    assert result.comparison.verdict().startswith("fine-tuned is worse than the probe on ")
    assert result.kept == "probe"
    assert featpipe.load_model(tmp_path / "k.model").facts == model.facts
    record = featpipe.load_model(tmp_path / "k.model").history["finetuning"]["result"]
    assert record["kept"] == "probe"
    finetuned = finetune(model, photos, cache=tmp_path / "cache", out=tmp_path / "w.model", keep_worse=True, **settings)
    assert finetuned.kept == "fine-tuned"


def test_the_same_call_reuses_the_model_and_another_setting_trains_again(tmp_path, photos, model, log):
    out = tmp_path / "t.model"
    first = finetune(model, photos, cache=tmp_path / "cache", out=out, keep_worse=True, **QUICK_SETTINGS)
    data = out.read_bytes()
    second = finetune(model, photos, cache=tmp_path / "cache", out=out, keep_worse=True, **QUICK_SETTINGS)
    assert out.read_bytes() == data
    assert second.to_dict() == json.loads(json.dumps(first.to_dict()))
    assert any("up to date, nothing to do" in text for text in log)
    finetune(model, photos, cache=tmp_path / "cache", out=out, keep_worse=True, **{**QUICK_SETTINGS, "seed": 1})
    assert out.read_bytes() != data


def test_a_resumed_run_gives_the_same_model(tmp_path, photos, model, monkeypatch):
    uninterrupted = finetune(model, photos, cache=tmp_path / "cache", keep_worse=True, **QUICK_SETTINGS).model
    out = tmp_path / "t.model"
    trained_batches = interrupt_fine_tuning(monkeypatch, n_steps=3)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, photos, cache=tmp_path / "cache", out=out, keep_worse=True, **QUICK_SETTINGS)
    assert out.with_name("t.model.checkpoint").exists()
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"settings.epochs is 2, asked for 5"):
        finetune(model, photos, cache=tmp_path / "cache", out=out, **{**QUICK_SETTINGS, "epochs": 5})
    resumed = finetune(model, photos, cache=tmp_path / "cache", out=out, keep_worse=True, **QUICK_SETTINGS).model
    assert resumed.backbone.digest == uninterrupted.backbone.digest
    np.testing.assert_array_equal(resumed.head[-1].coefs_[0], uninterrupted.head[-1].coefs_[0])
    assert len(trained_batches) < 3 + 2 * 2


def test_the_fine_tuned_backbone_extracts_under_its_own_fingerprint(tmp_path, photos, ladder):
    """With a registered network, untrained, since this needs no published weights."""
    network = backbones.load("timm/test_resnet", weights="none")
    cache = featpipe.extract(photos, backbone=network, cache=tmp_path / "cache")
    model = featpipe.train(cache, "logistic", params={"C": 1e-4})
    settings = {**QUICK_SETTINGS, "epochs": 4, "unfreeze": "last", "learning_rate": 1e-3}
    out = tmp_path / "t.model"
    tuned = finetune(model, photos, cache=tmp_path / "cache", out=out, keep_worse=True, **settings).model
    for arguments in ({"backbone": str(out)}, {"backbone": "timm/test_resnet", "weights": str(out)}):
        loaded = backbones.load(arguments["backbone"], weights=arguments.get("weights"))
        assert loaded.to_dict() == tuned.backbone.to_dict()
        new_cache = featpipe.extract(photos, cache=tmp_path / "cache", **arguments)
        assert new_cache.manifest["embedded"] == 0 or new_cache.facts == tuned.facts
        assert new_cache.facts == tuned.facts
    assert backbones.load("timm/test_resnet", weights="none").to_dict() == network.to_dict() != tuned.backbone.to_dict()
    moved = featpipe.load_model(shutil.copy(out, tmp_path / "moved.model"))
    out.unlink()
    files = sorted(photos.rglob("*.png"))[:3]
    np.testing.assert_array_equal(moved.predict_proba(files), tuned.predict_proba(files))
    other_model = featpipe.train(featpipe.extract(photos, backbone=str(moved.path), cache=tmp_path / "cache4"), "lda")
    other_model.save(tmp_path / "other.model")
    assert featpipe.load_model(tmp_path / "other.model").backbone.digest == tuned.backbone.digest


def test_a_model_without_weights_loads_its_published_backbone_and_a_damaged_one_is_refused(tmp_path, photos):
    network = backbones.load("timm/test_resnet", weights="none", seed=3)
    model = featpipe.train(featpipe.extract(photos, backbone=network, cache=tmp_path / "cache"), "lda")
    plain = model.save(tmp_path / "plain.model")
    assert backbones.load(str(plain)).to_dict() == network.to_dict()
    with pytest.raises(WeightsError, match="contains no weights"):
        backbones.load("timm/test_resnet", weights=plain)
    portable = model.save(tmp_path / "whole.model", portable=True)
    data = bytearray(portable.read_bytes())
    data[-3000] ^= 1
    portable.write_bytes(data)
    with pytest.raises(WeightsError, match="is damaged"):
        backbones.load(str(portable))
    with pytest.raises(WeightsError, match="there is no such model file"):
        backbones.load(str(tmp_path / "gone.model"))


def test_weights_none_trains_the_untrained_architecture(tmp_path, photos, log):
    network = backbones.load("timm/test_resnet", weights="none", seed=3)
    model = featpipe.train(featpipe.extract(photos, backbone=network, cache=tmp_path / "cache"), "lda")
    settings = {"epochs": 1, "batch": 16, "device": "cpu", "weights": "none", "keep_worse": True}
    tuned = finetune(model, photos, cache=tmp_path / "cache", **settings)
    assert any("the architecture alone" in text for text in log)
    assert FineTuneConfig.from_settings(settings).unfreeze == "all"
    assert FineTuneConfig.from_settings(settings).batch_norm == "trained"
    statistics = [name for name in network.network.state_dict() if "running_mean" in name]
    trained_state = tuned.model.backbone.network.state_dict()
    assert all(not torch.equal(trained_state[name], network.network.state_dict()[name]) for name in statistics)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda photos: write_photos(photos / "..", 3, ("ape",)) and (photos.parent / "ape").rename(photos / "dog"),
         ConfigError, "has class 'dog', which the model does not know; add them with `featpipe expand`"),
        (lambda photos: shutil.rmtree(photos / "cow"), ConfigError,
         "has no image of class 'cow', which the model would forget"),
    ],
)  # fmt: skip
def test_labels_with_other_classes_than_the_model_are_refused(tmp_path, photos, model, change, error, message):
    change(photos)
    with pytest.raises(error, match=message):
        finetune(model, photos, cache=tmp_path / "cache", **QUICK_SETTINGS)


def test_images_without_labels_are_refused(tmp_path, photos, model):
    with pytest.raises(CacheError, match="has no labels, the model is for classification"):
        finetune(model, sorted(photos.rglob("*.png")), cache=tmp_path / "cache", **QUICK_SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unfreze": "all"}, "unknown setting 'unfreze'; did you mean 'unfreeze'"),
        ({"unfreeze": "layer7"}, "unknown part of the network 'layer7'; did you mean"),
        ({"epochs": 0}, "epochs is 0; give a whole number of 1 or more"),
        ({"learning_rate": "quick"}, "give a number above 0 or find"),
        ({"optimizer": "adma"}, "unknown optimizer 'adma'; did you mean 'adamw'"),
        ({"label_smoothing": 1}, "below 1"),
        ({"batch": 1, "batch_norm": "trained"}, "batch norms follow the batches.*batch of one"),
        ({"weights": "none"}, "not for the custom network"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, photos, model, settings, message):
    with pytest.raises(ConfigError, match=message):
        finetune(model, photos, cache=tmp_path / "cache", **{**QUICK_SETTINGS, **settings})


def test_an_image_that_changed_since_extraction_is_an_error(tmp_path, photos, model, monkeypatch):
    finetune_module = import_module("featpipe.finetuning.finetune")

    original_train = finetune_module.train_network

    def change_images_and_train(context, *arguments):
        write_photos(photos, each=14, first=77)
        return original_train(context, *arguments)

    monkeypatch.setattr(finetune_module, "train_network", change_images_and_train)
    with pytest.raises(featpipe.SampleError, match=r"\.png: the bytes have changed since the image was embedded"):
        finetune(model, photos, cache=tmp_path / "cache", **QUICK_SETTINGS)


def test_configs_that_differ_in_workers_alone_are_equal_after_replacement():
    first, second = FineTuneConfig(workers=1), FineTuneConfig(workers=2)
    assert replace(first, workers=2) == second


def test_epochs_are_logged_to_tensorboard_and_its_absence_is_an_error(tmp_path, monkeypatch):
    import sys
    import types

    from featpipe.finetuning.loop import make_tensorboard_logger
    from featpipe.finetuning.trainer import EpochRecord

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="TensorBoard is not installed; pip install tensorboard"):
        make_tensorboard_logger(tmp_path)
    written = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def add_scalar(self, *arguments: object) -> None:
            written.append(arguments)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    make_tensorboard_logger(tmp_path)(EpochRecord(2, float("nan"), 0.5, 0.75, 0.1))
    assert written == [("validation_loss", 0.5, 2), ("validation_score", 0.75, 2), ("rate", 0.1, 2)]
