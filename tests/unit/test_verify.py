"""Verification finds damage and names it; repair changes nothing else."""

from __future__ import annotations

import os
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
from tests.support.caches import flip
from tests.support.images import jpeg
from tests.support.networks import Tiny, tiny_transform


@pytest.fixture
def made(make_folder, tiny, tmp_path, log) -> FeatureCache:
    """18 images, one of them damaged, which is logged, one a duplicate."""
    folder = make_folder()
    (folder / "ape" / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
    shutil.copy(folder / "ape" / "00.jpg", folder / "ape" / "twin.jpg")
    for path in folder.rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))  # long ago, so that time and size are trusted
    return featpipe.extract(folder, backbone=tiny, out=tmp_path / "cache" / "a.h5")


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """How many images were embedded, one entry for each forward pass."""
    seen: list[int] = []
    from featpipe import inference

    def embed(self, images, embed=inference.Engine.embed):
        seen.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(inference.Engine, "embed", embed)
    return seen


def test_a_cache_that_was_just_made_is_whole(made, tiny):
    found = verify(made.path, sample=100, backbone=tiny)
    assert found.whole
    assert found.checked
    assert (found.embedded, found.changed, found.farthest) == (19, 0, 0.0)
    assert found.facts()["whole"] is True


def test_without_a_sample_nothing_is_embedded_and_no_archive_is_needed(made, tmp_path, count):
    shutil.rmtree(tmp_path / "photos")
    assert verify(made.path).whole
    assert count == []


@pytest.mark.parametrize(("name", "width"), [("features/pooled", 32), ("samples/digest", 32), ("samples/status", 1)])
def test_a_flipped_bit_is_found_in_the_row_where_it_is(made, name, width):
    for row in (0, 7, 19):
        flip(made.path, name, row * width + width // 2)
        found = verify(made.path)
        assert [(damage.row, damage.id, damage.what) for damage in found.damaged] == [(row, made.ids[row], "checksum")]
        assert found.columns == ([] if name.startswith("features") else [name])
        flip(made.path, name, row * width + width // 2)
    assert verify(made.path).whole


@pytest.mark.parametrize(
    "name", ["samples/id_bytes", "samples/stamp", "samples/split", "labels/values", "checks/pooled"]
)
def test_a_flipped_bit_elsewhere_names_its_column(made, name):
    flip(made.path, name, 1)
    found = verify(made.path)
    assert found.columns == [name]
    assert not found.whole
    assert [damage.row for damage in found.damaged] == ([0] if name.startswith("checks") else [])


def test_features_that_agree_with_their_checksum_and_not_with_the_network_are_found(made, tiny):
    """As a wrong writer would leave them: only embedding again tells."""
    from featpipe.cache import write_cache

    features = np.array(made.features())
    features[3] *= 1.01
    manifest = {key: value for key, value in made.manifest.items() if key != "columns"}
    write_cache(made.path, made.table(), manifest, made.shapes, "float32", lambda output, a, b: features[a:b])
    assert verify(made.path).whole
    found = verify(made.path, sample=100, backbone=tiny)
    assert [(damage.row, damage.what) for damage in found.damaged] == [(3, "answer")]
    assert found.damaged[0].distance == pytest.approx(0.01, rel=0.02)
    assert found.farthest == found.damaged[0].distance
    after = repair(made.path, found, backbone=tiny)
    assert after.whole
    assert FeatureCache(made.path).features().tobytes() == made.features().tobytes()


def test_the_sample_is_as_large_as_asked_and_decided_by_the_seed(made, tiny, count):
    assert verify(made.path, sample=5, backbone=tiny, seed=1).embedded == 5
    assert sum(count) == 5


def test_images_that_changed_or_are_gone_are_counted_and_no_damage(made, tiny, tmp_path):
    (tmp_path / "photos" / "bee" / "00.jpg").write_bytes(jpeg(77))
    (tmp_path / "photos" / "bee" / "01.jpg").unlink()
    found = verify(made.path, sample=100, backbone=tiny)
    assert found.whole
    assert (found.embedded, found.changed) == (17, 2)


def test_an_archive_that_moved_is_given(made, tiny, tmp_path):
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    with pytest.raises(ArchiveError, match="photos"):
        verify(made.path, sample=3, backbone=tiny)
    assert verify(made.path, sample=3, backbone=tiny, archives=[tmp_path / "elsewhere"]).embedded == 3


def test_single_images_are_found_where_they_were(make_folder, tiny, tmp_path, monkeypatch):
    folder = make_folder()
    monkeypatch.chdir(folder)
    cache = featpipe.extract(["ape/00.jpg", folder / "bee" / "01.jpg"], backbone=tiny, out=tmp_path / "b.h5")
    monkeypatch.chdir(tmp_path)
    assert verify(cache.path, sample=9, backbone=tiny).embedded == 2


def test_several_archives_are_found_by_their_ids(make_folder, tiny, tmp_path):
    one, two = make_folder(name="one"), make_folder(classes=("dog",), name="two")
    cache = featpipe.extract([one, two], backbone=tiny, out=tmp_path / "b.h5")
    assert verify(cache.path, sample=100, backbone=tiny).embedded == 24


def test_the_images_of_a_merged_cache_are_found_where_they_were_read(made, make_folder, tiny, tmp_path):
    other = make_folder(classes=("dog",), name="more")
    for path in other.rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))
    more = featpipe.extract(other, backbone=tiny, out=tmp_path / "b.h5")
    both = featpipe.merge([made.path, more.path], tmp_path / "both.h5")
    assert verify(both.path, sample=100, backbone=tiny).embedded == 19 + 6


def test_only_damaged_rows_are_embedded_again_and_the_cache_is_then_what_it_was(made, tiny, tmp_path, count):
    before, raw = np.array(made.features()), made.path.read_bytes()
    ids, digests, stamps = list(made.ids), np.array(made.digests), np.array(made.stamps)
    for row in (2, 5, 11):
        flip(made.path, "features/pooled", row * 32 + 3)
    assert made.path.read_bytes() != raw
    count.clear()
    after = repair(made.path, found=verify(made.path), backbone=tiny)
    assert after.whole
    assert (after.repaired, sum(count)) == (3, 3)
    cache = FeatureCache(made.path)
    assert cache.features().tobytes() == before.tobytes()
    assert (list(cache.ids), cache.digests.tobytes(), cache.stamps.tobytes()) == (
        ids,
        digests.tobytes(),
        stamps.tobytes(),
    )
    assert cache.manifest["repaired"][0]["rows"] == 3
    assert sorted(path.name for path in made.path.parent.iterdir()) == ["a.h5"]


def test_a_damaged_row_whose_image_is_gone_or_another_loses_its_features(made, tiny, tmp_path):
    (tmp_path / "photos" / "bee" / "00.jpg").write_bytes(jpeg(77))
    (tmp_path / "photos" / "bee" / "01.jpg").unlink()
    rows = [list(made.ids).index(f"bee/0{i}.jpg") for i in (0, 1, 2)]
    for row in rows:
        flip(made.path, "features/pooled", row * 32)
    after = repair(made.path, verify(made.path), backbone=tiny)
    assert after.whole
    assert after.repaired == 1
    cache = FeatureCache(made.path)
    assert cache.status_codes[rows].tolist() == [Status.MISSING, Status.MISSING, Status.OK]
    assert np.isnan(cache.features()[rows[:2]]).all()
    assert not cache.digests[rows[:2]].any()


def test_a_repair_that_is_interrupted_leaves_the_cache_as_it_was_and_goes_on(made, tiny, monkeypatch, count):
    verification = import_module("featpipe.maintenance.verify")

    for row in (2, 5, 11):
        flip(made.path, "features/pooled", row * 32 + 3)
    damaged = made.path.read_bytes()
    found = verify(made.path)

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verification, "write_cache", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repair(made.path, found, backbone=tiny)
    assert made.path.read_bytes() == damaged
    count.clear()
    assert repair(made.path, found, backbone=tiny).whole
    assert count == []
    assert [path.name for path in made.path.parent.iterdir()] == ["a.h5"]


def test_extracting_new_images_to_a_damaged_cache_mends_it(made, tiny, tmp_path):
    flip(made.path, "features/pooled", 5)
    (tmp_path / "photos" / "ape" / "new.jpg").write_bytes(jpeg(5))
    featpipe.extract(tmp_path / "photos", backbone=tiny, out=made.path)
    assert verify(made.path).whole


def test_no_image_of_the_damaged_rows_left_is_no_error(made, tiny, tmp_path):
    flip(made.path, "features/pooled", 0)
    (tmp_path / "photos" / "ape" / "00.jpg").write_bytes(b"")
    after = repair(made.path, verify(made.path), backbone=tiny)
    assert (after.whole, after.repaired) == (True, 0)
    assert FeatureCache(made.path).status_codes[0] != Status.OK


@pytest.mark.parametrize("name", ["samples/digest", "samples/status", "checks/pooled", "samples/stamp"])
def test_damaged_digests_statuses_and_checksums_are_repaired_too(made, tiny, name):
    before = np.array(made.features()), np.array(made.digests), np.array(made.status_codes)
    flip(made.path, name, 32 if name == "samples/digest" else 1)
    after = repair(made.path, verify(made.path), backbone=tiny)
    assert after.whole
    cache = FeatureCache(made.path)
    for found, wanted in zip((cache.features(), cache.digests, cache.status_codes), before, strict=True):
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", ["samples/id_bytes", "labels/values", "samples/split"])
def test_what_only_the_archive_knows_is_repaired_by_extracting_again_and_costs_no_forward_pass(
    made, tiny, tmp_path, name, count
):
    flip(made.path, name, 0)
    found = verify(made.path)
    with pytest.raises(CacheError, match=f"{name} cannot be repaired.*run the same extract command again"):
        repair(made.path, found, backbone=tiny)
    count.clear()
    again = featpipe.extract(tmp_path / "photos", backbone=tiny, out=made.path)
    assert count == []
    assert verify(again.path).whole


def test_a_lost_shard_is_named_and_its_rows_alone_are_embedded_again(make_folder, tmp_path, count):
    class Wide(Tiny):
        def forward(self, x):
            return super().forward(x).repeat(1, 2048)  # 64 KiB a row: a row is a shard

    wide = backbones.load(Wide(), transform=tiny_transform)
    folder = make_folder()
    cache = featpipe.extract(folder, backbone=wide, out=tmp_path / "w.h5", shard_bytes=4 * 65536)
    before = np.array(cache.features())
    assert len(cache.shard_files) == 5
    cache.shard_files[1].unlink()
    with open(cache.shard_files[3], "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CacheFormatError, match=r"2 of its 5 shards .* verify --repair"):
        FeatureCache(cache.path)
    found = verify(cache.path)
    assert len(found.shards) == 2
    assert [damage.row for damage in found.damaged] == [*range(4, 8), *range(12, 16)]
    count.clear()
    after = repair(cache.path, found, backbone=wide)
    assert (after.whole, after.repaired, sum(count)) == (True, 8, 8)
    repaired = FeatureCache(cache.path)
    assert repaired.features().tobytes() == before.tobytes()
    assert len(repaired.shard_files) == 5
    assert set((tmp_path / "w.h5.shards").iterdir()) == set(repaired.shard_files)


def test_a_damaged_row_is_never_copied_to_another_cache(made, tiny, tmp_path):
    before = np.array(made.features())
    flip(made.path, "features/pooled", 4 * 32)
    again = featpipe.extract(tmp_path / "photos", backbone=tiny, out=made.path.with_name("c.h5"))
    assert again.manifest["embedded"] == 1
    assert again.features().tobytes() == before.tobytes()


def test_a_damaged_row_is_not_copied_for_an_image_with_the_same_bytes_elsewhere(made, tiny, tmp_path):
    flip(made.path, "features/pooled", 4 * 32)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "photos", moved)
    again = featpipe.extract(moved, backbone=tiny, out=made.path.with_name("c.h5"))
    assert again.manifest["embedded"] == 1
    assert verify(again.path, sample=100, backbone=tiny).whole


def test_code_of_somebodys_own_is_not_run_unasked(made):
    flip(made.path, "features/pooled", 0)
    for run in (lambda: verify(made.path, sample=1), lambda: repair(made.path, verify(made.path))):
        with pytest.raises(ConfigError, match="not run by default; if you trust it, pass --backbone"):
            run()


def test_another_backbone_is_refused(made):
    with pytest.raises(WeightsError, match=r"was made with another backbone .*weights"):
        verify(made.path, sample=1, backbone=backbones.load(Tiny(1), transform=tiny_transform))


def test_a_cache_of_format_1_0_says_that_it_has_no_checksums():
    found = verify(Path(__file__).parents[1] / "data" / "golden-1.0.h5")
    assert not found.checked
    assert found.whole


def test_every_precision_has_its_tolerance():
    from featpipe.config import PRECISIONS

    assert set(TOLERANCES) == set(PRECISIONS)


def test_a_repair_of_a_whole_cache_does_nothing(made, tiny):
    before = made.path.stat().st_mtime_ns
    assert repair(made.path, verify(made.path), backbone=tiny).whole
    assert made.path.stat().st_mtime_ns == before
