"""Extraction: no image is embedded twice, and committed work is never lost."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from featpipe import backbones, data, extraction
from featpipe.cache import FeatureCache
from featpipe.config import ExtractionConfig
from featpipe.data import decode_image
from featpipe.errors import ArchiveError, CacheError, CacheMismatchError, ConfigError, SampleError
from featpipe.extraction import embed_files, extract, make_facts
from featpipe.inference import Engine
from featpipe.runtime import Progress
from featpipe.status import Status
from featpipe.storage import staging
from tests.support.images import jpeg, make_files_old
from tests.support.logs import logged_warning
from tests.support.networks import Tiny, tiny_transform


@pytest.fixture
def embedding_counter(monkeypatch):
    """Count the images that go through the network; returns the counter and a function that resets it."""
    counts = []
    embed = Engine.embed
    monkeypatch.setattr(Engine, "embed", lambda self, x: counts.append(len(x)) or embed(self, x))
    return lambda: sum(counts), counts.clear


@pytest.fixture
def count_embedded(embedding_counter):
    return embedding_counter[0]


def compute_embeddings(folder, ids):
    network = Tiny().eval()
    pictures = [decode_image((folder / name).read_bytes()) for name in ids]
    with torch.inference_mode():
        return torch.cat(
            [network(tiny_transform(torch.from_numpy(p).permute(2, 0, 1))[None]) for p in pictures]
        ).numpy()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_each_row_equals_the_network_applied_to_its_image(make_folder, tiny, tmp_path, workers, batch):
    folder = make_folder()
    cache = extract(folder, backbone=tiny, cache=tmp_path / "c", workers=workers, batch=batch)
    assert list(cache.ids) == [f"{label}/{i:02}.jpg" for label in ("ape", "bee", "cow") for i in range(6)]
    assert np.allclose(cache.features(), compute_embeddings(folder, cache.ids), rtol=1e-5, atol=1e-6)
    assert cache.y.tolist() == [name.split("/")[0] for name in cache.ids]


def test_a_rerun_does_no_forward_pass_and_logs_it(make_folder, tiny, tmp_path, count_embedded, log):
    folder = make_files_old(make_folder())
    first_cache = extract(folder, backbone=tiny, cache=tmp_path / "c")
    count_before = count_embedded()
    second_cache = extract(folder, backbone=tiny, cache=tmp_path / "c")
    assert (count_before, count_embedded()) == (18, 18)
    assert second_cache.path == first_cache.path
    assert any("no forward pass" in text for text in log)


def test_a_rerun_reads_no_image(make_folder, tiny, tmp_path, monkeypatch):
    folder = make_files_old(make_folder())
    first_cache = extract(folder, backbone=tiny, cache=tmp_path / "c")
    stat_before = first_cache.path.stat()
    monkeypatch.setattr(data.SampleReader, "read", lambda *_: pytest.fail("an image was read"))
    second_cache = extract(folder, backbone=tiny, cache=tmp_path / "c")
    assert second_cache.path.stat().st_mtime_ns == stat_before.st_mtime_ns


def test_a_change_that_keeps_the_modification_time_is_detected(make_folder, tiny, tmp_path, count_embedded):
    folder = make_folder(("ape",), 2)
    extract(folder, backbone=tiny, cache=tmp_path / "c")
    path = folder / "ape" / "00.jpg"
    file_stat, size = path.stat(), path.stat().st_size
    new_bytes = jpeg(77)[:size].ljust(size, b"\0")
    path.write_bytes(new_bytes)
    os.utime(path, ns=(file_stat.st_atime_ns, file_stat.st_mtime_ns))
    cache = extract(folder, backbone=tiny, cache=tmp_path / "c")
    assert cache.digests[0].tobytes() == hashlib.sha256(new_bytes).digest()


def test_recently_written_images_are_read_once_more_before_their_stamps_are_trusted(
    make_folder, tiny, tmp_path, monkeypatch, log
):
    folder, settings = make_folder(("ape",), 2), {"backbone": tiny, "cache": tmp_path / "c"}
    path = extract(folder, **settings).path
    assert not FeatureCache(path).stamps.any()
    make_files_old(folder)
    extract(folder, **settings)
    assert any("modification times" in text for text in log)
    assert FeatureCache(path).stamps.any(axis=1).all()
    monkeypatch.setattr(data.SampleReader, "read", lambda *_: pytest.fail("an image was read"))
    cache_bytes = path.read_bytes()
    extract(folder, **settings)
    assert path.read_bytes() == cache_bytes


def test_content_is_checked_on_request(make_folder, tiny, tmp_path):
    folder = make_files_old(make_folder(("ape",), 2))
    extract(folder, backbone=tiny, cache=tmp_path / "c")
    path = folder / "ape" / "00.jpg"
    file_stat, size = path.stat(), path.stat().st_size
    path.write_bytes(jpeg(77)[:size].ljust(size, b"\0"))
    os.utime(path, ns=(file_stat.st_atime_ns, file_stat.st_mtime_ns))
    trusted_digest = extract(folder, backbone=tiny, cache=tmp_path / "c").digests[0].copy()
    checked_digest = extract(folder, backbone=tiny, cache=tmp_path / "c", check_content=True).digests[0]
    assert not np.array_equal(trusted_digest, checked_digest)


@pytest.mark.parametrize("change", ["rename", "move", "add", "remove", "tar", "copy"])
def test_only_images_with_new_bytes_are_embedded(make_folder, tiny, tmp_path, embedding_counter, change):
    count_embedded, clear = embedding_counter
    folder = make_folder()
    archive = folder
    first_cache = extract(folder, backbone=tiny, cache=tmp_path / "c")
    features_by_digest = {d.tobytes(): f for d, f in zip(first_cache.digests, first_cache.features(), strict=True)}
    clear()
    if change == "rename":
        (folder / "ape" / "00.jpg").rename(folder / "ape" / "zz.jpg")
    elif change == "move":
        (folder / "ape" / "00.jpg").rename(folder / "cow" / "a.jpg")
    elif change == "add":
        (folder / "bee" / "new.jpg").write_bytes(jpeg(500))
    elif change == "remove":
        (folder / "bee" / "03.jpg").unlink()
    elif change == "tar":
        archive = tmp_path / "photos.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(folder, "photos")
    else:
        shutil.copytree(folder, archive := tmp_path / "elsewhere")
    second_cache = extract(archive, backbone=tiny, cache=tmp_path / "c")
    assert count_embedded() == (1 if change == "add" else 0)
    for digest, row in zip(second_cache.digests, second_cache.features(), strict=True):
        if digest.tobytes() in features_by_digest:
            assert np.array_equal(row, features_by_digest[digest.tobytes()])
    assert np.allclose(second_cache.features(), compute_archive_embeddings(archive, second_cache), rtol=1e-5, atol=1e-6)


def compute_archive_embeddings(archive, cache):
    index = data.index(archive)
    with index.open() as reader:
        pictures = [decode_image(reader.read(row)) for row in range(len(index))]
    with torch.inference_mode():
        tensors = [tiny_transform(torch.from_numpy(p).permute(2, 0, 1)) for p in pictures]
        return Tiny().eval()(torch.stack(tensors)).numpy()


def test_duplicates_within_an_archive_are_embedded_once(make_folder, tiny, tmp_path, count_embedded):
    folder = make_folder(("ape",), 4)
    for i in range(20):
        shutil.copy(folder / "ape" / "00.jpg", folder / "ape" / f"copy{i}.jpg")
    cache = extract(folder, backbone=tiny, cache=tmp_path / "c", workers=4, batch=2)
    assert count_embedded() == 4
    assert np.allclose(cache.features(), compute_embeddings(folder, cache.ids), rtol=1e-5, atol=1e-6)


def test_duplicates_of_a_damaged_image_are_all_damaged(make_folder, tiny, tmp_path):
    folder = make_folder(("ape",), 2)
    for i in range(5):
        (folder / "ape" / f"bad{i}.jpg").write_bytes(jpeg(9)[:150])
    with logged_warning("5 of 7 images have no features: 5 damaged"):
        cache = extract(folder, backbone=tiny, cache=tmp_path / "c", workers=3, batch=1)
    assert cache.status.tolist() == ["ok", "ok"] + ["damaged"] * 5
    assert np.isnan(cache.features()[2:]).all()
    assert np.isfinite(cache.features()[:2]).all()


def test_new_labels_need_no_forward_pass(make_folder, tiny, tmp_path, embedding_counter):
    count_embedded, clear = embedding_counter
    folder = make_folder(("ape", "bee"), 3)
    extract(folder, backbone=tiny, cache=tmp_path / "c")
    clear()
    table = tmp_path / "labels.csv"
    table.write_text(
        "path,label\n" + "".join(f"{c}/0{i}.jpg,{c.upper()}{i}\n" for c in ("ape", "bee") for i in range(3))
    )
    cache = extract(folder, backbone=tiny, cache=tmp_path / "c", labels=table)
    assert count_embedded() == 0
    assert cache.y.tolist() == ["APE0", "APE1", "APE2", "BEE0", "BEE1", "BEE2"]


@pytest.mark.parametrize("batches_before_interrupt", [1, 3, 7])
def test_an_interrupted_extraction_resumes_and_gives_the_same_bytes(
    make_folder, tiny, tmp_path, embedding_counter, batches_before_interrupt
):
    count_embedded, clear = embedding_counter
    folder = make_folder()
    uninterrupted = extract(folder, backbone=tiny, cache=tmp_path / "whole", batch=2)
    clear()

    def interrupt(progress: Progress) -> None:
        if progress.done >= 2 * batches_before_interrupt:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(folder, backbone=tiny, cache=tmp_path / "c", batch=2, progress=interrupt)
    parts = list((tmp_path / "c").glob("*.parts/*.record"))
    assert len(parts) == 1
    assert not list((tmp_path / "c").glob("*.h5"))
    count_before = count_embedded()
    resumed = extract(folder, backbone=tiny, cache=tmp_path / "c", batch=2)
    assert count_before >= 2 * batches_before_interrupt
    assert count_embedded() <= 18 + 2 * 8  # batches that were in flight were not committed
    assert resumed.features().tobytes() == uninterrupted.features().tobytes()
    assert not list((tmp_path / "c").glob("*.parts"))


def test_parts_are_committed_during_the_extraction(make_folder, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction.worker, "MAX_PART_SECONDS", 0.0)
    folder = make_folder()
    part_sizes = []
    commit = staging.StagingArea.commit
    monkeypatch.setattr(
        staging.StagingArea, "commit", lambda self, a: part_sizes.append(len(a["digest"])) or commit(self, a)
    )
    cache = extract(folder, backbone=tiny, cache=tmp_path / "c", batch=2, workers=2)
    assert len(part_sizes) >= 9
    assert sum(part_sizes) == 18
    assert np.allclose(cache.features(), compute_embeddings(folder, cache.ids), rtol=1e-5, atol=1e-6)


def test_one_changed_bit_in_the_weights_gives_another_cache(make_folder, tmp_path, embedding_counter):
    count_embedded, clear = embedding_counter
    folder = make_folder(("ape",), 3)
    network = Tiny()
    extract(folder, backbone=backbones.load(network, transform=tiny_transform), cache=tmp_path / "c")
    clear()
    with torch.no_grad():
        network.conv.bias[0] = torch.nextafter(network.conv.bias[0], torch.tensor(9.0))
    extract(folder, backbone=backbones.load(network, transform=tiny_transform), cache=tmp_path / "c")
    assert count_embedded() == 3
    assert len(list((tmp_path / "c").glob("*.h5"))) == 2


@pytest.mark.parametrize("changed", [{"precision": "bf16"}, {"storage": "float16"}])
def test_precision_and_storage_are_part_of_the_identity(tiny, changed):
    assert make_facts(tiny, ExtractionConfig(**changed)) != make_facts(tiny, ExtractionConfig())


def test_float16_storage_rounds_the_embeddings(make_folder, tiny, tmp_path):
    folder = make_folder()
    float32_cache = extract(folder, backbone=tiny, cache=tmp_path / "c")
    float16_cache = extract(folder, backbone=tiny, cache=tmp_path / "c", storage="float16")
    assert float16_cache.features().dtype == np.float16
    assert np.allclose(float16_cache.features(), float32_cache.features(), rtol=1e-3, atol=1e-4)


def test_several_outputs_come_from_one_forward_pass(make_folder, tmp_path, count_embedded):
    net = backbones.load(Tiny(), transform=tiny_transform, outputs=["pooled", "conv:avg", "conv:none"])
    cache = extract(make_folder(("ape",), 3), backbone=net, cache=tmp_path / "c")
    assert count_embedded() == 3
    assert cache.outputs == ("pooled", "conv:avg", "conv:none")
    assert cache.features("conv:none").shape == (3, 8, 10, 10)
    assert np.allclose(cache.features("conv:none").mean((2, 3)), cache.features("conv:avg"), atol=1e-5)


def test_too_many_bad_images_stop_the_extraction_and_lose_nothing(make_folder, tiny, tmp_path, count_embedded):
    folder = make_folder(("ape",), 10)
    for i in (3, 6, 9):
        (folder / "ape" / f"0{i}.jpg").write_bytes(b"no image")
    for limit in (2, "20%", 0.2, "0.2"):
        with pytest.raises(ArchiveError, match=r"3 images have no features \(3 unsupported\).*--max-bad"):
            extract(folder, backbone=tiny, cache=tmp_path / "c", max_bad=limit, batch=4, workers=1)
    count_before = count_embedded()
    with logged_warning("3 unsupported"):
        cache = extract(folder, backbone=tiny, cache=tmp_path / "c", max_bad=3, batch=4, workers=1)
    assert count_before == count_embedded() == 7
    assert len(cache.X) == 7


@pytest.mark.parametrize("limit", ["many", -1, "120%", 1.5])
def test_an_invalid_max_bad_is_refused(limit):
    with pytest.raises(ConfigError, match="max-bad"):
        ExtractionConfig(max_bad=limit)


def test_an_archive_without_readable_images_is_an_error(tmp_path, tiny):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with (
        pytest.raises(ArchiveError, match=r"none of the 1 images.*1 empty"),
        logged_warning("1 empty"),
    ):
        extract(tmp_path / "photos", backbone=tiny, cache=tmp_path / "c")


def test_a_cache_with_other_facts_is_replaced_only_with_overwrite(make_folder, tiny, tmp_path):
    folder, out = make_folder(("ape",), 2), tmp_path / "x.h5"
    extract(folder, backbone=tiny, out=out)
    with pytest.raises(CacheMismatchError, match=r"precision is 'fp32', asked for 'bf16'.*--overwrite"):
        extract(folder, backbone=tiny, out=out, precision="bf16")
    assert not list(tmp_path.glob("*.parts"))
    assert extract(folder, backbone=tiny, out=out, precision="bf16", overwrite=True).facts["precision"] == "bf16"


def test_a_cache_of_another_archive_is_not_replaced_without_overwrite(make_folder, tiny, tmp_path):
    archive, other_archive, out = make_folder(("ape",), 2), make_folder(("bee",), 2, "others"), tmp_path / "x.h5"
    extract(archive, backbone=tiny, out=out)
    with pytest.raises(CacheMismatchError, match=r"others.*--overwrite"):
        extract(other_archive, backbone=tiny, out=out)


def test_an_out_without_the_suffix_h5_is_refused_before_any_work(make_folder, tiny, tmp_path, count_embedded):
    with pytest.raises(ConfigError, match=r"ends in \.h5"):
        extract(make_folder(), backbone=tiny, out=tmp_path / "x.npy")
    assert count_embedded() == 0


def test_a_cache_folder_that_cannot_be_created_is_an_error(make_folder, tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="cannot be created"):
        extract(make_folder(), backbone=tiny, cache=tmp_path / "file" / "cache")


def test_an_unknown_setting_suggests_the_nearest_match(make_folder):
    with pytest.raises(ConfigError, match="'precision'"):
        extract(make_folder(), precison="fp32")


def test_infinite_embeddings_get_a_status_and_no_features(make_folder, tmp_path):
    class Overflowing(Tiny):
        def forward(self, x):
            return super().forward(x) / (x.mean((1, 2, 3)) > 0.99).float()[:, None].sub(1).abs()

    folder = make_folder(("ape",), 2)
    Image.new("RGB", (20, 20), "white").save(folder / "ape" / "white.png")
    net = backbones.load(Tiny(), transform=tiny_transform)
    net = replace(net, network=Overflowing().eval().requires_grad_(False))
    with logged_warning("1 not-finite"):
        cache = extract(folder, backbone=net, cache=tmp_path / "c")
    assert cache.status_codes.tolist() == [0, 0, Status.NOT_FINITE]
    assert np.isnan(cache.features()[2]).all()


def test_embed_files_uses_the_caches_of_the_folder(make_folder, tiny, tmp_path, embedding_counter, log):
    count_embedded, clear = embedding_counter
    folder = make_folder()
    cache = extract(folder, backbone=tiny, cache=tmp_path / "c")
    clear()
    new_path = tmp_path / "new.jpg"
    new_path.write_bytes(jpeg(99))
    paths = [folder / "cow" / "05.jpg", new_path, folder / "ape" / "00.jpg", new_path, tmp_path / "none.jpg"]
    features, status = embed_files(paths, tiny, ExtractionConfig(cache=tmp_path / "c"))
    assert count_embedded() == 1
    assert status.tolist() == [0, 0, 0, 0, Status.MISSING]
    assert np.array_equal(features[[0, 2]], cache.features()[[17, 0]])
    assert np.array_equal(features[1], features[3])
    assert np.isnan(features[4]).all()


def test_unreadable_images_are_retried_and_damaged_images_are_not(make_folder, tiny, tmp_path, monkeypatch):
    folder = make_files_old(make_folder(("ape",), 3))
    (folder / "ape" / "01.jpg").write_bytes(jpeg(1)[:99])
    make_files_old(folder)
    read = data.SampleReader.read
    rows_read = []

    def read_or_fail(self, row):
        rows_read.append(row)
        if row == 2 and len(rows_read) <= 3:
            raise SampleError("the disk hiccuped", status=Status.UNREADABLE)
        return read(self, row)

    monkeypatch.setattr(data.SampleReader, "read", read_or_fail)
    with logged_warning("1 unreadable, 1 damaged"):
        extract(folder, backbone=tiny, cache=tmp_path / "c", workers=1)
    n_read_first = len(rows_read)
    with logged_warning("1 of 3 images have no features: 1 damaged"):
        cache = extract(folder, backbone=tiny, cache=tmp_path / "c", workers=1)
    assert rows_read[n_read_first:] == [2]
    assert cache.status.tolist() == ["ok", "damaged", "ok"]


def test_a_cache_of_several_outputs_serves_a_request_for_one_of_them(make_folder, tmp_path, embedding_counter):
    count_embedded, clear = embedding_counter
    folder = make_folder(("ape",), 3)
    two_outputs = backbones.load(Tiny(), transform=tiny_transform, outputs=["pooled", "conv:max"])
    one_output = backbones.load(Tiny(), transform=tiny_transform, outputs=["conv:max"])
    first_cache = extract(folder, backbone=two_outputs, cache=tmp_path / "c")
    clear()
    second_cache = extract(folder, backbone=one_output, cache=tmp_path / "c")
    assert count_embedded() == 0
    assert second_cache.outputs == ("conv:max",)
    assert np.array_equal(second_cache.features(), first_cache.features("conv:max"))


def test_the_first_requested_output_is_the_default_of_the_cache(make_folder, tmp_path, embedding_counter):
    count_embedded, clear = embedding_counter
    folder = make_folder(("ape",), 3)
    for outputs in (["pooled", "conv:max"], ["conv:max", "pooled"]):
        clear()
        net = backbones.load(Tiny(), transform=tiny_transform, outputs=outputs)
        assert extract(folder, backbone=net, cache=tmp_path / "c").outputs == tuple(outputs)
    assert count_embedded() == 0


def test_each_table_of_labels_has_its_own_cache(make_folder, tiny, tmp_path):
    folder = make_folder(("ape", "bee"), 2)
    paths = [f"{label}/0{i}.jpg" for label in ("ape", "bee") for i in range(2)]
    for name in ("one", "two"):
        rows = "".join(f"{path},{name}{position % 2}\n" for position, path in enumerate(paths))
        (tmp_path / f"{name}.csv").write_text(f"path,label\n{rows}")
    caches = [
        extract(folder, backbone=tiny, cache=tmp_path / "c", labels=labels)
        for labels in (None, tmp_path / "one.csv", tmp_path / "two.csv")
    ]
    assert len({cache.path for cache in caches}) == 3
    assert [FeatureCache(cache.path).classes for cache in caches] == [
        ("ape", "bee"),
        ("one0", "one1"),
        ("two0", "two1"),
    ]


def test_a_failure_before_the_first_embedding_leaves_no_file(make_folder, tmp_path):
    class Leaking(Tiny):
        def forward(self, x):
            return super().forward(x) - super().forward(x).mean(0)

    folder = make_folder(("ape",), 3)
    net = replace(backbones.load(Tiny(), transform=tiny_transform), network=Leaking().eval().requires_grad_(False))
    with pytest.raises(ConfigError, match="depends on its neighbours"):
        extract(folder, backbone=net, cache=tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_the_device_and_the_precision_are_logged(make_folder, tiny, tmp_path, log):
    extract(make_folder(("ape",), 2), backbone=tiny, cache=tmp_path / "c", device="auto")
    assert any("embedding on cpu in fp32" in text or "embedding on cuda" in text for text in log)


def test_images_that_listing_found_permanently_unreadable_are_not_read(make_folder, tiny, tmp_path, log):
    folder = make_folder()
    (folder / "empty.jpg").touch()
    make_files_old(folder)
    first_cache = extract(folder, backbone=tiny, cache=tmp_path / "cache")
    assert first_cache.bad_rows() == {"empty": 1}
    log.clear()
    progress_calls: list[Progress] = []
    second_cache = extract(folder, backbone=tiny, cache=tmp_path / "cache", progress=progress_calls.append)
    assert second_cache.manifest == first_cache.manifest
    assert progress_calls == []
    assert not any("embedding on" in text for text in log)


def test_embedding_is_logged_only_if_an_image_is_embedded(make_folder, tiny, tmp_path, log):
    folder = make_folder()
    extract(folder, backbone=tiny, cache=tmp_path / "cache")
    folder.rename(tmp_path / "moved")
    progress_calls: list[Progress] = []
    log.clear()
    extract(tmp_path / "moved", backbone=tiny, cache=tmp_path / "cache", progress=progress_calls.append)
    assert any("no forward pass" in text for text in log)
    assert not any("embedding" in text for text in [*log, *(progress.stage for progress in progress_calls)])
