"""Verification finds damage and names it; repair changes nothing else."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import featpipe
from featpipe import backbones
from featpipe.cache import FeatureCache
from featpipe.errors import ArchiveError, CacheError, CacheFormatError, ConfigError, WeightsError
from featpipe.maintenance import TOLERANCES, repair, verify
from featpipe.status import Status
from tests.support.caches import flip_bit
from tests.support.images import jpeg, make_files_old
from tests.support.networks import Tiny, tiny_transform


@pytest.fixture
def cache(make_folder, tiny, tmp_path, log) -> FeatureCache:
    """A cache of 20 images, one of them damaged and one a duplicate."""
    folder = make_folder()
    (folder / "ape" / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
    shutil.copy(folder / "ape" / "00.jpg", folder / "ape" / "twin.jpg")
    return featpipe.extract(make_files_old(folder), backbone=tiny, out=tmp_path / "cache" / "a.h5")


@pytest.fixture
def forward_passes(monkeypatch) -> list[int]:
    """The number of images of each forward pass."""
    batch_sizes: list[int] = []
    from featpipe import inference

    def embed(self, images, embed=inference.Engine.embed):
        batch_sizes.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(inference.Engine, "embed", embed)
    return batch_sizes


def test_a_new_cache_is_intact(cache, tiny):
    verification = verify(cache.path, sample=100, backbone=tiny)
    assert verification.whole
    assert verification.checked
    assert (verification.embedded, verification.changed, verification.farthest) == (19, 0, 0.0)
    assert verification.facts()["whole"] is True


def test_without_a_sample_nothing_is_embedded_and_no_archive_is_needed(cache, tmp_path, forward_passes):
    shutil.rmtree(tmp_path / "photos")
    assert verify(cache.path).whole
    assert forward_passes == []


@pytest.mark.parametrize(("name", "width"), [("features/pooled", 32), ("samples/digest", 32), ("samples/status", 1)])
def test_a_flipped_bit_in_a_row_is_reported_for_that_row(cache, name, width):
    for row in (0, 7, 19):
        flip_bit(cache.path, name, row * width + width // 2)
        verification = verify(cache.path)
        assert [(damaged_row.row, damaged_row.id, damaged_row.what) for damaged_row in verification.damaged] == [
            (row, cache.ids[row], "checksum")
        ]
        assert verification.columns == ([] if name.startswith("features") else [name])
        flip_bit(cache.path, name, row * width + width // 2)
    assert verify(cache.path).whole


@pytest.mark.parametrize(
    "name", ["samples/id_bytes", "samples/stamp", "samples/split", "labels/values", "checks/pooled"]
)
def test_a_flipped_bit_in_a_column_is_reported_for_that_column(cache, name):
    flip_bit(cache.path, name, 1)
    verification = verify(cache.path)
    assert verification.columns == [name]
    assert not verification.whole
    assert [damaged_row.row for damaged_row in verification.damaged] == ([0] if name.startswith("checks") else [])


def test_wrong_features_with_valid_checksums_are_found_by_embedding_again(cache, tiny):
    """A faulty writer could leave such features; only embedding the images again reveals them."""
    from featpipe.cache import write_cache

    features = np.array(cache.features())
    features[3] *= 1.01
    manifest = {key: value for key, value in cache.manifest.items() if key != "columns"}
    write_cache(
        cache.path, cache.table(), manifest, cache.shapes, "float32", lambda output, start, stop: features[start:stop]
    )
    assert verify(cache.path).whole
    verification = verify(cache.path, sample=100, backbone=tiny)
    assert [(damaged_row.row, damaged_row.what) for damaged_row in verification.damaged] == [(3, "answer")]
    assert verification.damaged[0].distance == pytest.approx(0.01, rel=0.02)
    assert verification.farthest == verification.damaged[0].distance
    repaired = repair(cache.path, verification, backbone=tiny)
    assert repaired.whole
    assert FeatureCache(cache.path).features().tobytes() == cache.features().tobytes()


def test_the_sample_has_the_requested_size(cache, tiny, forward_passes):
    assert verify(cache.path, sample=5, backbone=tiny, seed=1).embedded == 5
    assert sum(forward_passes) == 5


def test_changed_and_missing_images_are_counted_and_are_not_damage(cache, tiny, tmp_path):
    (tmp_path / "photos" / "bee" / "00.jpg").write_bytes(jpeg(77))
    (tmp_path / "photos" / "bee" / "01.jpg").unlink()
    verification = verify(cache.path, sample=100, backbone=tiny)
    assert verification.whole
    assert (verification.embedded, verification.changed) == (17, 2)


def test_the_new_path_of_a_moved_archive_can_be_given(cache, tiny, tmp_path):
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    with pytest.raises(ArchiveError, match="photos"):
        verify(cache.path, sample=3, backbone=tiny)
    assert verify(cache.path, sample=3, backbone=tiny, archives=[tmp_path / "elsewhere"]).embedded == 3


def test_single_images_are_found_at_their_paths(make_folder, tiny, tmp_path, monkeypatch):
    folder = make_folder()
    monkeypatch.chdir(folder)
    image_cache = featpipe.extract(["ape/00.jpg", folder / "bee" / "01.jpg"], backbone=tiny, out=tmp_path / "b.h5")
    monkeypatch.chdir(tmp_path)
    assert verify(image_cache.path, sample=9, backbone=tiny).embedded == 2


def test_several_archives_are_found_by_their_ids(make_folder, tiny, tmp_path):
    first_archive, second_archive = make_folder(name="one"), make_folder(classes=("dog",), name="two")
    two_archive_cache = featpipe.extract([first_archive, second_archive], backbone=tiny, out=tmp_path / "b.h5")
    assert verify(two_archive_cache.path, sample=100, backbone=tiny).embedded == 24


def test_the_images_of_a_merged_cache_are_found_in_their_archives(cache, make_folder, tiny, tmp_path):
    other_archive = make_files_old(make_folder(classes=("dog",), name="more"))
    other_cache = featpipe.extract(other_archive, backbone=tiny, out=tmp_path / "b.h5")
    merged = featpipe.merge([cache.path, other_cache.path], tmp_path / "both.h5")
    assert verify(merged.path, sample=100, backbone=tiny).embedded == 19 + 6


def test_repair_embeds_only_damaged_rows_and_restores_the_cache(cache, tiny, tmp_path, forward_passes):
    features_before, cache_bytes = np.array(cache.features()), cache.path.read_bytes()
    ids, digests, stamps = list(cache.ids), np.array(cache.digests), np.array(cache.stamps)
    for row in (2, 5, 11):
        flip_bit(cache.path, "features/pooled", row * 32 + 3)
    assert cache.path.read_bytes() != cache_bytes
    forward_passes.clear()
    repaired = repair(cache.path, found=verify(cache.path), backbone=tiny)
    assert repaired.whole
    assert (repaired.repaired, sum(forward_passes)) == (3, 3)
    repaired_cache = FeatureCache(cache.path)
    assert repaired_cache.features().tobytes() == features_before.tobytes()
    assert (list(repaired_cache.ids), repaired_cache.digests.tobytes(), repaired_cache.stamps.tobytes()) == (
        ids,
        digests.tobytes(),
        stamps.tobytes(),
    )
    assert repaired_cache.manifest["repaired"][0]["rows"] == 3
    assert sorted(path.name for path in cache.path.parent.iterdir()) == ["a.h5"]


def test_a_damaged_row_whose_image_is_missing_or_changed_loses_its_features(cache, tiny, tmp_path):
    (tmp_path / "photos" / "bee" / "00.jpg").write_bytes(jpeg(77))
    (tmp_path / "photos" / "bee" / "01.jpg").unlink()
    rows = [list(cache.ids).index(f"bee/0{i}.jpg") for i in (0, 1, 2)]
    for row in rows:
        flip_bit(cache.path, "features/pooled", row * 32)
    repaired = repair(cache.path, verify(cache.path), backbone=tiny)
    assert repaired.whole
    assert repaired.repaired == 1
    repaired_cache = FeatureCache(cache.path)
    assert repaired_cache.status_codes[rows].tolist() == [Status.MISSING, Status.MISSING, Status.OK]
    assert np.isnan(repaired_cache.features()[rows[:2]]).all()
    assert not repaired_cache.digests[rows[:2]].any()


def test_an_interrupted_repair_leaves_the_cache_unchanged_and_resumes(cache, tiny, monkeypatch, forward_passes):
    verify_module = import_module("featpipe.maintenance.verify")

    for row in (2, 5, 11):
        flip_bit(cache.path, "features/pooled", row * 32 + 3)
    damaged_bytes = cache.path.read_bytes()
    verification = verify(cache.path)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "write_cache", interrupt)
        with pytest.raises(KeyboardInterrupt):
            repair(cache.path, verification, backbone=tiny)
    assert cache.path.read_bytes() == damaged_bytes
    forward_passes.clear()
    assert repair(cache.path, verification, backbone=tiny).whole
    assert forward_passes == []
    assert [path.name for path in cache.path.parent.iterdir()] == ["a.h5"]


def test_extracting_new_images_into_a_damaged_cache_repairs_it(cache, tiny, tmp_path):
    flip_bit(cache.path, "features/pooled", 5)
    (tmp_path / "photos" / "ape" / "new.jpg").write_bytes(jpeg(5))
    featpipe.extract(tmp_path / "photos", backbone=tiny, out=cache.path)
    assert verify(cache.path).whole


def test_repair_succeeds_if_no_image_of_the_damaged_rows_is_readable(cache, tiny, tmp_path):
    flip_bit(cache.path, "features/pooled", 0)
    (tmp_path / "photos" / "ape" / "00.jpg").write_bytes(b"")
    repaired = repair(cache.path, verify(cache.path), backbone=tiny)
    assert (repaired.whole, repaired.repaired) == (True, 0)
    assert FeatureCache(cache.path).status_codes[0] != Status.OK


@pytest.mark.parametrize("name", ["samples/digest", "samples/status", "checks/pooled", "samples/stamp"])
def test_damaged_digests_statuses_and_checksums_are_repaired(cache, tiny, name):
    columns_before = np.array(cache.features()), np.array(cache.digests), np.array(cache.status_codes)
    flip_bit(cache.path, name, 32 if name == "samples/digest" else 1)
    repaired = repair(cache.path, verify(cache.path), backbone=tiny)
    assert repaired.whole
    repaired_cache = FeatureCache(cache.path)
    for repaired_column, expected_column in zip(
        (repaired_cache.features(), repaired_cache.digests, repaired_cache.status_codes), columns_before, strict=True
    ):
        assert repaired_column.tobytes() == expected_column.tobytes()


@pytest.mark.parametrize("name", ["samples/id_bytes", "labels/values", "samples/split"])
def test_damaged_ids_labels_and_splits_are_repaired_by_extracting_again_without_a_forward_pass(
    cache, tiny, tmp_path, name, forward_passes
):
    flip_bit(cache.path, name, 0)
    verification = verify(cache.path)
    with pytest.raises(CacheError, match=f"{name} cannot be repaired.*run the same extract command again"):
        repair(cache.path, verification, backbone=tiny)
    forward_passes.clear()
    extracted = featpipe.extract(tmp_path / "photos", backbone=tiny, out=cache.path)
    assert forward_passes == []
    assert verify(extracted.path).whole


def test_lost_shards_are_reported_and_only_their_rows_are_embedded_again(make_folder, tmp_path, forward_passes):
    class Wide(Tiny):
        def forward(self, x):
            return super().forward(x).repeat(1, 2048)  # 64 KiB a row: a row is a shard

    wide = backbones.load(Wide(), transform=tiny_transform)
    folder = make_folder()
    sharded = featpipe.extract(folder, backbone=wide, out=tmp_path / "w.h5", shard_bytes=4 * 65536)
    features_before = np.array(sharded.features())
    assert len(sharded.shard_files) == 5
    sharded.shard_files[1].unlink()
    with open(sharded.shard_files[3], "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CacheFormatError, match=r"2 of its 5 shards .* verify --repair"):
        FeatureCache(sharded.path)
    verification = verify(sharded.path)
    assert len(verification.shards) == 2
    assert [damaged_row.row for damaged_row in verification.damaged] == [*range(4, 8), *range(12, 16)]
    forward_passes.clear()
    repaired = repair(sharded.path, verification, backbone=wide)
    assert (repaired.whole, repaired.repaired, sum(forward_passes)) == (True, 8, 8)
    result = FeatureCache(sharded.path)
    assert result.features().tobytes() == features_before.tobytes()
    assert len(result.shard_files) == 5
    assert set((tmp_path / "w.h5.shards").iterdir()) == set(result.shard_files)


def test_a_damaged_row_is_never_copied_to_another_cache(cache, tiny, tmp_path):
    features_before = np.array(cache.features())
    flip_bit(cache.path, "features/pooled", 4 * 32)
    other_cache = featpipe.extract(tmp_path / "photos", backbone=tiny, out=cache.path.with_name("c.h5"))
    assert other_cache.manifest["embedded"] == 1
    assert other_cache.features().tobytes() == features_before.tobytes()


def test_a_damaged_row_is_not_copied_for_an_image_with_the_same_bytes_elsewhere(cache, tiny, tmp_path):
    flip_bit(cache.path, "features/pooled", 4 * 32)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "photos", moved)
    other_cache = featpipe.extract(moved, backbone=tiny, out=cache.path.with_name("c.h5"))
    assert other_cache.manifest["embedded"] == 1
    assert verify(other_cache.path, sample=100, backbone=tiny).whole


def test_the_code_of_a_custom_backbone_is_not_run_by_default(cache):
    flip_bit(cache.path, "features/pooled", 0)
    for run in (lambda: verify(cache.path, sample=1), lambda: repair(cache.path, verify(cache.path))):
        with pytest.raises(ConfigError, match="not run by default; if you trust it, pass --backbone"):
            run()


def test_another_backbone_is_refused(cache):
    with pytest.raises(WeightsError, match=r"was made with another backbone .*weights"):
        verify(cache.path, sample=1, backbone=backbones.load(Tiny(1), transform=tiny_transform))


def test_a_cache_of_format_1_0_is_reported_without_checksums():
    verification = verify(Path(__file__).parents[1] / "data" / "golden-1.0.h5")
    assert not verification.checked
    assert verification.whole


def test_every_precision_has_a_tolerance():
    from featpipe.config import PRECISIONS

    assert set(TOLERANCES) == set(PRECISIONS)


def test_repairing_an_intact_cache_writes_nothing(cache, tiny):
    mtime_before = cache.path.stat().st_mtime_ns
    assert repair(cache.path, verify(cache.path), backbone=tiny).whole
    assert cache.path.stat().st_mtime_ns == mtime_before
