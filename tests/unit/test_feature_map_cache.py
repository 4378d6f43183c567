"""Cached feature maps give the embeddings and losses of the images, and are computed once."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

import featpipe
from featpipe import backbones, data
from featpipe.backbones.partition import partition_network
from featpipe.cli.info import cache_to_dict, format_cache
from featpipe.data import decode_image
from featpipe.errors import ConfigError
from featpipe.finetuning import feature_map_cache, finetune
from featpipe.finetuning.augmentation import Augmentation, AugmentedTransform
from featpipe.finetuning.feature_map_cache import estimate_caching_gain, make_feature_map_dataset
from featpipe.inference import Engine
from featpipe.maintenance import clean, verify
from tests.support.finetuning import Ladder, small_transform, write_photos

clean_module = import_module("featpipe.maintenance.clean")

AUGMENTATION = Augmentation(flip=0.5, color=0.3)
FROZEN_MODULES = ["stem", "layer1", "layer2"]
QUICK_SETTINGS = {"epochs": 4, "batch": 16, "learning_rate": 3e-3, "device": "cpu", "unfreeze": "last", "patience": 0}


@pytest.fixture(scope="module")
def ladder():
    return backbones.load(Ladder(), transform=small_transform)


@pytest.fixture
def index(tmp_path):
    return data.index(write_photos(tmp_path / "photos", each=5))


def copy_and_partition(ladder):
    """A copy of the network that may be trained, and its partition at the frozen boundary."""
    network = copy.deepcopy(ladder.network)
    return network, partition_network(replace(ladder, network=network), FROZEN_MODULES)


def decode_views(index, rows, view):
    with index.open() as reader:
        decoded = [torch.from_numpy(decode_image(reader.read(row))).permute(2, 0, 1) for row in rows]
    return torch.stack([view(image) for image in decoded])


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_feature_maps_give_the_embeddings_of_the_same_views_of_the_images(tmp_path, index, ladder, storage, tolerance):
    network, partition = copy_and_partition(ladder)
    rows = np.array([1, 4, 5, 9, 13])
    settings = {"cache": tmp_path / "cache", "storage": storage}
    dataset = make_feature_map_dataset(
        index, rows, ladder, partition, augmentation=AUGMENTATION, n_views=2, seed=3, settings=settings
    )
    shuffled = np.array([9, 1, 13])
    for epoch in range(3):
        view = AugmentedTransform(ladder.transform, AUGMENTATION, epoch % 2, seed=3)
        with torch.no_grad():
            expected = network(decode_views(index, shuffled, view))
            embeddings = dataset.network(dataset.batch(shuffled, epoch))
        torch.testing.assert_close(embeddings, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_second_run_computes_no_map_and_other_rows_have_another_cache(tmp_path, index, ladder, monkeypatch):
    _, partition = copy_and_partition(ladder)
    options = {"augmentation": Augmentation(), "settings": {"cache": tmp_path / "cache"}}
    training_rows, other_rows = np.arange(0, 10), np.arange(10, 15)
    dataset = make_feature_map_dataset(index, training_rows, ladder, partition, **options)
    make_feature_map_dataset(index, other_rows, ladder, partition, **options)
    monkeypatch.setattr(Engine, "embed", lambda *_: pytest.fail("embedded again"))
    reopened = make_feature_map_dataset(index, training_rows, ladder, partition, **options)
    assert torch.equal(reopened.batch(training_rows, 0), dataset.batch(training_rows, 0))
    assert make_feature_map_dataset(index, other_rows, ladder, partition, **options).n_bytes == 5 * 16 * 8 * 8 * 2
    assert len(list((tmp_path / "cache").glob("*.h5"))) == 2


def test_each_view_has_its_own_cache_with_its_augmentation_in_the_fingerprint(tmp_path, index, ladder):
    _, partition = copy_and_partition(ladder)
    settings = {"cache": tmp_path / "cache"}
    make_feature_map_dataset(
        index, np.arange(4), ladder, partition, augmentation=AUGMENTATION, n_views=3, settings=settings
    )
    caches = [featpipe.FeatureCache(path) for path in (tmp_path / "cache").glob("*.h5")]
    facts = [cache.facts["backbone"]["transform"] for cache in caches]
    assert sorted(fact["view"] for fact in facts) == [0, 1, 2]
    assert all(fact["augmentation"]["color"] == 0.3 for fact in facts)
    assert all(cache.outputs == ("layer2:none",) and cache.features().dtype == np.float16 for cache in caches)


def test_with_a_frozen_network_the_existing_embeddings_are_used(tmp_path, index, ladder, monkeypatch):
    cache = featpipe.extract(tmp_path / "photos", backbone=ladder, cache=tmp_path / "cache")
    monkeypatch.setattr(Engine, "embed", lambda *_: pytest.fail("embedded again"))
    partition = partition_network(ladder, ["stem", "layer1", "layer2", "layer3"])
    options = {"augmentation": Augmentation(), "settings": {"cache": tmp_path / "cache"}}
    dataset = make_feature_map_dataset(index, np.array([3, 7]), ladder, partition, **options)
    np.testing.assert_array_equal(dataset.network(dataset.batch(np.array([7, 3]), 0)), cache.features()[[7, 3]])


def test_values_beyond_the_range_of_the_storage_are_an_error_with_the_remedy(tmp_path, index):
    network = Ladder()
    with torch.no_grad():
        network.layer2[1].skip.weight.mul_(1e7)
    loaded = backbones.load(network, transform=small_transform)
    partition = partition_network(loaded, FROZEN_MODULES)
    options = {"augmentation": Augmentation(), "settings": {"cache": tmp_path / "cache"}}
    message = r"15 images have no feature map .*: not-finite.*--cache-activations no"
    with pytest.raises(ConfigError, match=message):
        make_feature_map_dataset(index, np.arange(15), loaded, partition, **options)


def test_caching_pays_off_with_many_epochs_and_not_with_few(tmp_path, ladder):
    _, partition = copy_and_partition(ladder)
    many_epochs, one_epoch = (estimate_caching_gain(ladder, partition, 100, epochs, 1, tmp_path) for epochs in (10, 1))
    assert many_epochs.worthwhile
    assert not one_epoch.worthwhile
    assert many_epochs.n_bytes == 100 * 16 * 8 * 8 * 2
    assert 1 < one_epoch.gain + 1e-9 < many_epochs.gain
    assert "computed once and cached, 0.2 MB" in many_epochs.reason
    assert "for 1 epochs of 1 view would save too little: 1.0 times less work" in one_epoch.reason
    assert not estimate_caching_gain(ladder, partition, 100, 10, 10, tmp_path).worthwhile  # as many views as epochs


def test_maps_that_do_not_fit_the_disk_are_not_cached(tmp_path, ladder, monkeypatch):
    _, partition = copy_and_partition(ladder)
    monkeypatch.setattr(feature_map_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 150_000}))
    estimate = estimate_caching_gain(ladder, partition, 100, 10, 1, tmp_path / "missing" / "folder")
    assert not estimate.worthwhile
    assert "0.2 MB, and 0.1 MB are free" in estimate.reason


@pytest.fixture
def model(tmp_path, ladder):
    cache = featpipe.extract(write_photos(tmp_path / "photos", each=14), backbone=ladder, cache=tmp_path / "cache")
    return featpipe.train(cache, head="lda").attach(ladder)


@pytest.mark.parametrize("augmentation", [{}, {"flip": 0.5, "color": 0.3}])
def test_training_on_maps_gives_the_losses_of_training_on_images(tmp_path, model, augmentation):
    """The losses of all epochs are equal up to the rounding of float16, with as many views as epochs."""
    curves = {}
    for cache_activations in ("no", "yes"):
        settings = {
            **QUICK_SETTINGS,
            "cache_activations": cache_activations,
            "augmentation": augmentation,
            "views": 4,
            "keep_worse": True,
        }
        result = finetune(model, tmp_path / "photos", cache=tmp_path / cache_activations, **settings)
        curves[cache_activations] = [[epoch["loss"], epoch["validation_loss"]] for epoch in result.curve[1:]]
    np.testing.assert_allclose(curves["yes"], curves["no"], rtol=5e-3)
    assert not list((tmp_path / "no").glob("boundary-*"))
    assert list((tmp_path / "yes").glob("boundary-*"))


def test_caching_is_selected_with_a_note_and_mixup_prevents_it(tmp_path, model, log):
    settings = {**QUICK_SETTINGS, "cache": tmp_path / "cache", "epochs": 10, "keep_worse": True}
    finetune(model, tmp_path / "photos", **settings)
    assert any("times less work" in text for text in log)
    log.clear()
    settings["epochs"] = 2
    finetune(model, tmp_path / "photos", mixup=0.2, **settings)
    assert any("mixup and cutmix mix images" in text for text in log)
    with pytest.raises(ConfigError, match="cache_activations=yes: mixup and cutmix mix images"):
        finetune(model, tmp_path / "photos", mixup=0.2, cache_activations="yes", **settings)


def test_info_and_verify_read_the_cache_of_a_view_and_repair_refuses_it(tmp_path, index, ladder):
    _, partition = copy_and_partition(ladder)
    make_feature_map_dataset(
        index, np.arange(4), ladder, partition, augmentation=AUGMENTATION, settings={"cache": tmp_path}
    )
    (path,) = tmp_path.glob("boundary-*.h5")
    assert cache_to_dict(path)["view"] == {"number": 0, "seed": 0, "flip": 0.5, "color": 0.3}
    assert "view         number 1 of the augmented views" in format_cache(cache_to_dict(path))
    assert verify(path).whole
    with pytest.raises(
        ConfigError, match="contains feature maps of randomly augmented images; only its checksums can be verified"
    ):
        verify(path, sample=1, backbone=ladder)


def test_clean_treats_reused_maps_as_new(tmp_path, index, ladder, monkeypatch):
    _, partition = copy_and_partition(ladder)

    def open_maps():
        make_feature_map_dataset(
            index, np.arange(4), ladder, partition, augmentation=Augmentation(), settings={"cache": tmp_path}
        )

    open_maps()
    (path,) = tmp_path.glob("boundary-*.h5")
    os.utime(path, (0, 0))
    open_maps()
    assert time.time() - path.stat().st_mtime < 60
    later_time = time.time() + 7200
    monkeypatch.setattr(clean_module.time, "time", lambda: later_time)
    assert [(removed.kind, removed.path) for removed in clean(tmp_path)] == [("maps", path)]
