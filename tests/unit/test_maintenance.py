"""Packing, merging, cleaning and comparing caches: rows are copied unchanged, and files in use are kept."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from featpipe import data
from featpipe.cache import FeatureCache, SampleTable, parts_directory, shards_directory, write_cache, writer
from featpipe.config import ExtractionConfig
from featpipe.data import Labels, order_classes
from featpipe.errors import CacheError, CacheMismatchError, ConfigError
from featpipe.extraction import extract, extract_index
from featpipe.maintenance import clean, merge, pack, remove_abandoned
from featpipe.maintenance.diff import diff_with_cache, diff_with_request
from featpipe.runtime import Progress
from featpipe.status import Status
from featpipe.storage import StagingArea, StringColumn, lock_file
from tests.support.images import jpeg, make_files_old

clean_module = import_module("featpipe.maintenance.clean")

FEATURE_WIDTH = 1024
SHARD_BYTES = 65536  # shards of 32 rows, the smallest number that fills whole pages in both outputs


def make_facts(**changed):
    outputs = {"pooled": {"node": "pooled", "pool": "none"}, "tail": {"node": "tail", "pool": "avg"}}
    backbone = {"name": "net", "source": "user", "weights": "0" * 64, "transform": {}, "outputs": outputs}
    return {"backbone": backbone, "precision": "fp32", "storage": "float32", "extraction": 1, **changed}


def compute_features(digest: bytes, output: str) -> np.ndarray:
    """Compute an embedding that depends only on the bytes of the image."""
    rng = np.random.default_rng([*digest[:8], len(output)])
    return rng.normal(size=FEATURE_WIDTH if output == "pooled" else 512).astype(np.float32)


def make_cache(path, images, *, labels=None, split=None, status=None, shard_bytes=None, facts=None, **manifest):
    """Write a cache; ``images`` maps each id to a text that stands for the bytes of the image."""
    n = len(images)
    status = np.array(status if status is not None else [0] * n, np.uint8)
    digests = [hashlib.sha256(text.encode()).digest() for text in images.values()]
    table = SampleTable(
        StringColumn.from_strings(images),
        status,
        np.frombuffer(b"".join(digests), np.uint8).reshape(n, 32) * (status == 0)[:, None],
        np.frombuffer(b"".join(hashlib.sha256(d).digest()[:16] for d in digests), np.uint8).reshape(n, 16),
        np.array(split if split is not None else [0] * n, np.uint8),
        labels if labels is not None else Labels.unlabeled(n),
    )
    shapes = {"pooled": (FEATURE_WIDTH,), "tail": (512,)}
    values = {output: np.stack([compute_features(digest, output) for digest in digests]) for output in shapes}
    for rows in values.values():
        rows[status != 0] = np.nan
    stored = {"facts": facts or make_facts(), "archives": [f"/data/{path.stem}"], "created": "today", **manifest}
    gather = lambda output, start, stop: values[output][start:stop]  # noqa: E731
    write_cache(path, table, stored, shapes, "float32", gather, shard_bytes)
    return FeatureCache(path)


def make_images(n, start=0):
    return {f"a/{i}.jpg": f"image {i}" for i in range(start, start + n)}


def assert_same_rows(cache, expected):
    """Assert that ids, columns and features are equal, bit for bit."""
    assert cache.table().same_as(expected.table())
    for output in expected.outputs:
        assert np.array_equal(cache.features(output).view("u4"), expected.features(output).view("u4"))
    assert cache.outputs == expected.outputs
    assert cache.facts == expected.facts


def flip_bit_in_file(file: Path, content: bytes) -> None:
    """Flip a bit at the first occurrence of these bytes in a file."""
    data = bytearray(file.read_bytes())
    start = data.index(content)
    data[start + 5] ^= 4
    file.write_bytes(data)


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------- pack
def test_packing_a_sharded_cache_gives_one_file_with_the_same_rows(tmp_path):
    status = [0, 5, *[0] * 98]
    sharded = make_cache(tmp_path / "a.h5", make_images(100), status=status, shard_bytes=SHARD_BYTES)
    assert len(sharded.shard_files) == 4
    packed = pack(sharded, tmp_path / "elsewhere" / "b.h5")
    assert packed.shard_files == ()
    assert_same_rows(packed, sharded)
    assert list_names(tmp_path / "elsewhere") == ["b.h5"]
    assert packed.manifest["created"] == "today"
    assert packed.damaged_columns() == []
    for output in packed.outputs:
        assert packed.whole_rows(np.arange(100), output).all()
    shutil.rmtree(shards_directory(sharded.path))
    assert_same_rows(FeatureCache(packed.path), sharded)


def test_packing_in_place_removes_the_shards_and_open_arrays_stay_readable(tmp_path):
    sharded = make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    packed = pack(tmp_path / "a.h5")
    assert list_names(tmp_path) == ["a.h5"]
    assert_same_rows(packed, sharded)


def test_packing_again_writes_nothing(tmp_path, log):
    make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    pack(tmp_path / "a.h5", tmp_path / "b.h5")
    stamps = [os.stat(tmp_path / "b.h5")]
    pack(tmp_path / "a.h5", tmp_path / "b.h5")
    pack(tmp_path / "b.h5")
    stamps.append(os.stat(tmp_path / "b.h5"))
    assert (stamps[0].st_ino, stamps[0].st_mtime_ns) == (stamps[1].st_ino, stamps[1].st_mtime_ns)
    assert [line.rpartition(": ")[2] for line in log] == [
        "up to date, with the same rows",
        "is one file already",
    ]


def test_packing_replaces_another_cache_only_with_overwrite(tmp_path):
    make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    other_cache = make_cache(tmp_path / "b.h5", make_images(3))
    with pytest.raises(CacheMismatchError, match=r"b\.h5: exists.*--overwrite"):
        pack(tmp_path / "a.h5", tmp_path / "b.h5")
    assert_same_rows(FeatureCache(tmp_path / "b.h5"), other_cache)
    assert len(pack(tmp_path / "a.h5", tmp_path / "b.h5", overwrite=True)) == 40
    with pytest.raises(ConfigError, match=r"ends in \.h5"):
        pack(tmp_path / "a.h5", tmp_path / "b.hdf")


def test_damaged_rows_are_named_and_not_copied(tmp_path):
    cache = make_cache(tmp_path / "a.h5", make_images(100), shard_bytes=SHARD_BYTES)
    for row in (17, 90):
        flip_bit_in_file(cache.shard_files[row // 32], cache.features()[row].tobytes()[:64])
    for out in (None, tmp_path / "b.h5"):
        with pytest.raises(CacheError, match=r"2 of its 100 rows.*\(a/17\.jpg, a/90\.jpg\).*verify --repair"):
            pack(tmp_path / "a.h5", out)
    assert list_names(tmp_path) == ["a.h5", "a.h5.shards"]


def test_damaged_ids_are_an_error_before_a_row_is_copied(tmp_path):
    make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    flip_bit_in_file(tmp_path / "a.h5", b"a/7.jpga/8.jpg")
    for copy_rows in (lambda: pack(tmp_path / "a.h5"), lambda: merge([tmp_path / "a.h5"], tmp_path / "b.h5")):
        with pytest.raises(CacheError, match=r"samples/id_bytes is damaged"):
            copy_rows()
    assert list_names(tmp_path) == ["a.h5", "a.h5.shards"]


def test_packing_a_copied_main_file_keeps_the_shards_of_the_original(tmp_path):
    original = make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    shutil.copy(tmp_path / "a.h5", tmp_path / "b.h5")
    pack(tmp_path / "b.h5")
    assert_same_rows(FeatureCache(tmp_path / "a.h5"), original)
    assert_same_rows(FeatureCache(tmp_path / "b.h5"), original)


def test_packing_keeps_the_parts_of_an_unfinished_extraction(tmp_path):
    make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    parts = make_unfinished_extraction(tmp_path / "a.h5")
    pack(tmp_path / "a.h5")
    assert [part.rows for part in parts.load_committed()] == [3]


def test_packing_waits_for_the_writer_of_the_cache(tmp_path):
    make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    code = f"import sys; from featpipe import pack; pack({str(tmp_path / 'a.h5')!r}); print('packed')"
    with StagingArea(parts_directory(tmp_path / "a.h5"), "").lock_for_writing():
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
        assert len(FeatureCache(tmp_path / "a.h5").shard_files) == 2
    assert process.communicate(timeout=60)[0] == "packed\n"
    assert FeatureCache(tmp_path / "a.h5").shard_files == ()


KILL_CODE = """
import os, sys
from featpipe import FeatureCache, merge, pack
from featpipe.cache import writer
writer.WRITE_BLOCK_BYTES = 65536
left = int(sys.argv[1])
whole = FeatureCache.whole_rows
def counted(self, rows, output=None):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return whole(self, rows, output)
FeatureCache.whole_rows = counted
eval(sys.argv[2])
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    "statement",
    ["pack('a.h5')", "pack('a.h5', 'c.h5')", "merge(['a.h5', 'b.h5'], 'a.h5', overwrite=True, shard_bytes=65536)"],
)
@pytest.mark.parametrize("calls_before_kill", [0, 2, 5])
def test_a_kill_while_rows_are_copied_leaves_the_old_files_intact_and_the_next_attempt_succeeds(
    tmp_path, monkeypatch, statement, calls_before_kill
):
    old_cache = make_cache(tmp_path / "a.h5", make_images(100), shard_bytes=SHARD_BYTES)
    make_cache(tmp_path / "b.h5", make_images(100, 50))
    command = [sys.executable, "-c", KILL_CODE, str(calls_before_kill), statement]
    assert subprocess.run(command, cwd=tmp_path, timeout=60).returncode == 9
    assert_same_rows(FeatureCache(tmp_path / "a.h5"), old_cache)
    assert len(FeatureCache(tmp_path / "a.h5").shard_files) == 4
    assert not (tmp_path / "c.h5").exists()
    monkeypatch.chdir(tmp_path)
    new_cache = eval(statement)
    assert len(new_cache) == (150 if "merge" in statement else 100)
    assert np.array_equal(new_cache.features()[:100], old_cache.features())
    assert not [path.name for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".parts")]


def test_a_failure_while_rows_are_copied_leaves_the_old_files_intact(tmp_path, monkeypatch):
    old_cache = make_cache(tmp_path / "a.h5", make_images(100), shard_bytes=SHARD_BYTES)
    monkeypatch.setattr(writer, "WRITE_BLOCK_BYTES", SHARD_BYTES)

    def raise_disk_full(progress: Progress) -> None:
        if progress.done > 60:
            raise OSError(28, "No space left on device")

    with pytest.raises(CacheError, match="No space left"):
        pack(tmp_path / "a.h5", progress=raise_disk_full)
    assert_same_rows(FeatureCache(tmp_path / "a.h5"), old_cache)
    assert list_names(tmp_path) == ["a.h5", "a.h5.shards"]


# --------------------------------------------------------------------------------------------------------- merge
def get_features_by_id(*caches):
    """Map each id to the features of its image, as the reference."""
    return {name: cache.features()[row] for cache in caches for row, name in enumerate(cache.ids)}


@pytest.mark.parametrize("shard_bytes", [2**30, SHARD_BYTES])
def test_merging_concatenates_rows_and_keeps_duplicates_once(tmp_path, shard_bytes, log):
    a = make_cache(tmp_path / "a.h5", make_images(60), shard_bytes=SHARD_BYTES)
    b = make_cache(tmp_path / "b.h5", make_images(60, 40), status=[0] * 59 + [5])
    merged = merge([a, b.path], tmp_path / "c.h5", shard_bytes=shard_bytes)
    assert list(merged.ids) == list(make_images(100))
    assert bool(merged.shard_files) == (shard_bytes == SHARD_BYTES)
    expected = get_features_by_id(a, b)
    for row, name in enumerate(merged.ids):
        assert np.array_equal(merged.features()[row], expected[name], equal_nan=True)
    assert np.array_equal(merged.digests[:60], a.digests)
    assert np.array_equal(merged.stamps[60:], b.stamps[20:])
    assert merged.bad_rows() == {"damaged": 1}
    assert log == ["100 rows of 2 caches; 20 duplicate rows were merged"]
    assert merged.manifest["archives"] == ["/data/a", "/data/b"]
    assert [source["samples"] for source in merged.manifest["merged_from"]] == [60, 60]
    assert all(merged.whole_rows(np.arange(100), output).all() for output in merged.outputs)


def test_merging_again_writes_nothing_and_merging_a_cache_with_itself_changes_nothing(tmp_path):
    a = make_cache(tmp_path / "a.h5", make_images(20), status=[0, 1, 5, *[0] * 17])
    merged = merge([a, a], tmp_path / "c.h5")
    assert_same_rows(merged, a)
    stat_before = os.stat(merged.path)
    merge([a, a], tmp_path / "c.h5")
    assert os.stat(merged.path).st_ino == stat_before.st_ino
    with pytest.raises(CacheMismatchError, match="exists and has other rows"):
        merge([a, make_cache(tmp_path / "b.h5", make_images(3, 50))], tmp_path / "c.h5")


def test_an_id_of_another_image_gets_a_free_number(tmp_path):
    a = make_cache(tmp_path / "a.h5", {"x": "one", "y": "two"})
    b = make_cache(tmp_path / "b.h5", {"x": "three", "x#2": "four"})
    c = make_cache(tmp_path / "c.h5", {"x": "five", "y": "two", "z": "six"})
    merged = merge([a, b, c], tmp_path / "d.h5")
    assert list(merged.ids) == ["x", "y", "x#3", "x#2", "x#4", "z"]
    for row, text in enumerate(["one", "two", "three", "four", "five", "six"]):
        assert np.array_equal(
            merged.features()[row], compute_features(hashlib.sha256(text.encode()).digest(), "pooled")
        )


def test_merged_classes_are_ordered_and_codes_are_remapped(tmp_path):
    a = make_cache(tmp_path / "a.h5", make_images(3), labels=Labels.from_class_names(["10", "9", None]))
    b = make_cache(tmp_path / "b.h5", make_images(3, 3), labels=Labels.from_class_names(["apple", "10", "apple"]))
    merged = merge([a, make_cache(tmp_path / "u.h5", make_images(1, 9)), b], tmp_path / "c.h5")
    assert merged.classes == ("10", "9", "apple") == order_classes(["9", "10", "apple"])
    assert list(merged.labels) == ["10", "9", None, None, "apple", "10", "apple"]


def test_a_labelled_row_is_negative_for_classes_of_other_caches(tmp_path):
    a = make_cache(tmp_path / "a.h5", make_images(3), labels=Labels.from_label_sets([{"x", "z"}, None, set()]))
    b = make_cache(tmp_path / "b.h5", make_images(2, 3), labels=Labels.from_label_sets([{"y"}, {"z"}]))
    merged = merge([b, a], tmp_path / "c.h5")
    assert merged.classes == ("x", "y", "z")
    assert merged.labels.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 1], [-1, -1, -1], [0, 0, 0]]


def test_regression_targets_merge_if_they_have_the_same_names(tmp_path):
    a = make_cache(tmp_path / "a.h5", make_images(2), labels=Labels.from_targets([[1.5], [np.nan]], ["kg"]))
    b = make_cache(tmp_path / "b.h5", make_images(2, 2), labels=Labels.from_targets([[3.5], [4.5]], ["kg"]))
    unlabelled = make_cache(tmp_path / "u.h5", make_images(2, 1))
    merged = merge([unlabelled, a, b], tmp_path / "c.h5")
    assert list(merged.ids) == ["a/1.jpg", "a/2.jpg", "a/0.jpg", "a/3.jpg"]
    assert np.array_equal(merged.labels, [np.nan, 3.5, 1.5, 4.5], equal_nan=True)
    other_targets = make_cache(tmp_path / "o.h5", make_images(1, 7), labels=Labels.from_targets([[1.0]], ["cm"]))
    with pytest.raises(CacheMismatchError, match=r"o\.h5: its targets are cm, those of .*a\.h5 kg"):
        merge([a, other_targets], tmp_path / "d.h5")


def test_a_missing_label_split_or_feature_is_taken_from_another_cache(tmp_path):
    """A label and a split; different labels of one sample are two rows."""
    a = make_cache(tmp_path / "a.h5", {"p": "one", "q": "two"})
    b = make_cache(
        tmp_path / "b.h5", {"q": "two", "p": "one"}, labels=Labels.from_class_names(["cat", "dog"]), split=[1, 3]
    )
    merged = merge([a, b], tmp_path / "c.h5")
    assert list(zip(merged.ids, merged.labels, merged.split.tolist(), strict=True)) == [
        ("p", "dog", 3),
        ("q", "cat", 1),
    ]
    other_label = make_cache(tmp_path / "d.h5", {"p": "one"}, labels=Labels.from_class_names(["cow"]))
    assert list(merge([a, b, other_label], tmp_path / "e.h5").ids) == ["p", "q", "p#2"]


def test_a_sample_in_two_splits_is_an_error(tmp_path):
    a = make_cache(tmp_path / "a.h5", {"p": "one"}, split=[1])
    b = make_cache(tmp_path / "b.h5", {"p": "one"}, split=[3])
    with pytest.raises(CacheMismatchError, match="p: is in split train in one cache and test in another"):
        merge([a, b], tmp_path / "c.h5")
    assert list_names(tmp_path) == ["a.h5", "b.h5"]


def test_merging_caches_with_other_facts_or_tasks_is_refused_and_the_difference_named(tmp_path):
    a = make_cache(tmp_path / "a.h5", make_images(2), labels=Labels.from_class_names(["x", "y"]))
    b = make_cache(tmp_path / "b.h5", make_images(2), facts=make_facts(precision="bf16"))
    with pytest.raises(CacheMismatchError, match=r"b\.h5: has other facts \(precision is 'bf16', in .*a\.h5 'fp32'\)"):
        merge([a, b], tmp_path / "c.h5")
    multilabel = make_cache(tmp_path / "s.h5", make_images(2), labels=Labels.from_label_sets([{"x"}, {"y"}]))
    with pytest.raises(CacheMismatchError, match=r"s\.h5: its labels are multilabel, those of .*a\.h5 classification"):
        merge([a, multilabel], tmp_path / "c.h5")
    with pytest.raises(ConfigError, match="at least one"):
        merge([], tmp_path / "c.h5")


def test_a_damaged_row_is_not_merged(tmp_path):
    a = make_cache(tmp_path / "a.h5", make_images(20))
    b = make_cache(tmp_path / "b.h5", make_images(20, 20))
    flip_bit_in_file(b.path, b.features("tail")[3].tobytes()[:64])
    with pytest.raises(CacheError, match=r"b\.h5: 1 of its 20 rows differ from what was written \(a/23\.jpg\)"):
        merge([a, b], tmp_path / "c.h5")
    assert list_names(tmp_path) == ["a.h5", "b.h5"]


def test_a_cache_of_format_1_0_is_merged_and_gets_checks(tmp_path):
    golden = FeatureCache(Path(__file__).parents[1] / "data" / "golden-1.0.h5")
    merged = merge([golden], tmp_path / "a.h5")
    assert merged.table().same_as(golden.table())
    assert np.array_equal(merged.features(), golden.features(), equal_nan=True)
    assert (golden.has_checks, merged.has_checks) == (False, True)


# --------------------------------------------------------------------------------------------------------- clean
def make_unfinished_extraction(path, rows=3):
    """Leave what an extraction leaves that was killed after its first part."""
    parts = StagingArea(parts_directory(path), "f" * 64)
    with parts.lock_for_writing():
        parts.commit(
            {
                "digest": np.ones((rows, 32), np.uint8),
                "stamp": np.ones((rows, 16), np.uint8),
                "status": np.zeros(rows, np.uint8),
                "features/pooled": np.ones((rows, 2), np.float32),
            }
        )
    return parts


@pytest.fixture
def two_hours_later(monkeypatch):
    """Advance the clock by two hours."""
    now = time.time
    monkeypatch.setattr(clean_module.time, "time", lambda: now() + 7200)


def test_unfinished_extractions_are_listed_with_their_rows_and_removed_on_request(tmp_path):
    make_unfinished_extraction(tmp_path / "a.h5", 3)
    make_cache(tmp_path / "b.h5", make_images(2))
    parts_directory(tmp_path / "b.h5").mkdir()
    abandoned = clean(tmp_path)
    assert [(item.path.name, item.rows, item.renews) for item in abandoned] == [
        ("a.h5.parts", 3, False),
        ("b.h5.parts", 0, True),
    ]
    assert abandoned[0].nbytes == sum(path.stat().st_size for path in (tmp_path / "a.h5.parts").iterdir())
    assert abandoned[0].seconds < 60
    assert list_names(tmp_path) == ["a.h5.parts", "b.h5", "b.h5.parts"]
    assert [item.path for item in clean(tmp_path, yes=True)] == [item.path for item in abandoned]
    assert list_names(tmp_path) == ["b.h5"]


def test_files_that_a_process_is_writing_are_not_removed(tmp_path, two_hours_later):
    make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    parts = make_unfinished_extraction(tmp_path / "a.h5")
    abandoned = clean(tmp_path)
    (tmp_path / "a.h5").unlink()
    paths_before = sorted(tmp_path.rglob("*"))
    with parts.lock_for_writing(), lock_file(tmp_path / ".files-01234567.lock"):
        assert clean(tmp_path, yes=True) == []
        assert remove_abandoned(abandoned) == []
        assert sorted(tmp_path.rglob("*")) == [tmp_path / ".files-01234567.lock", *paths_before]


def test_an_extraction_that_resumed_after_it_was_listed_is_not_removed(tmp_path):
    parts = make_unfinished_extraction(tmp_path / "a.h5", 3)
    abandoned = clean(tmp_path)
    make_unfinished_extraction(tmp_path / "a.h5", 4)
    assert remove_abandoned(abandoned) == []
    assert sum(part.rows for part in parts.load_committed()) == 7


def test_foreign_files_and_their_folders_are_kept(tmp_path, two_hours_later):
    make_unfinished_extraction(tmp_path / "a.h5")
    foreign_files = [
        "a.h5.parts/notes.txt",
        "mine.parts/lock",
        "b.h5.parts/mine",
        "a.h5.shards/mine.h5",
        ".1.tmp",
        "x.lock",
    ]
    for name in foreign_files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "c.h5.parts").symlink_to(tmp_path / "mine.parts")
    assert [item.path.name for item in clean(tmp_path, yes=True)] == ["a.h5.parts"]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(foreign_files)


def test_orphaned_shards_are_listed_and_shards_of_renamed_caches_are_not(tmp_path, two_hours_later):
    for name in "abcd":
        make_cache(tmp_path / f"{name}.h5", make_images(40, ord(name)), shard_bytes=SHARD_BYTES)
    (tmp_path / "a.h5").rename(tmp_path / "renamed.h5")  # without its folder
    (tmp_path / "b.h5").rename(tmp_path / "moved.hdf5")  # with its folder, to a name of another kind
    shards_directory(tmp_path / "b.h5").rename(shards_directory(tmp_path / "moved.h5"))
    (tmp_path / "c.h5").unlink()
    abandoned = clean(tmp_path)
    assert [(item.kind, item.path.name, len(item.files)) for item in abandoned] == [("shards", "c.h5.shards", 2)]
    clean(tmp_path, yes=True)
    assert list_names(tmp_path) == [
        "a.h5.shards", "d.h5", "d.h5.shards", "moved.h5.shards", "moved.hdf5", "renamed.h5",
    ]  # fmt: skip
    assert len(FeatureCache(tmp_path / "renamed.h5")) == len(FeatureCache(tmp_path / "d.h5")) == 40


def test_no_shard_is_removed_while_a_cache_in_the_folder_is_unreadable(tmp_path, two_hours_later):
    cache = make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    (tmp_path / "a.h5").write_bytes(b"x" + cache.path.read_bytes()[1:])
    assert clean(tmp_path, yes=True) == []
    assert len(list_names(tmp_path / "a.h5.shards")) == 2


@pytest.mark.parametrize("shard_bytes", [None, SHARD_BYTES])
def test_cached_feature_maps_are_removed_with_their_shards(tmp_path, two_hours_later, shard_bytes):
    shard_options = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    maps = "boundary-0123456789abcdef.h5"
    make_cache(tmp_path / maps, make_images(40), **shard_options)
    make_cache(tmp_path / "boundary-mine.h5", make_images(2))
    make_cache(tmp_path / "a.h5", make_images(3))
    names_before = {maps, f"{maps}.shards"} if shard_bytes else {maps}
    (abandoned,) = clean(tmp_path)
    assert (abandoned.kind, abandoned.path.name, abandoned.rows) == ("maps", maps, 40)
    assert abandoned.nbytes == sum(path.stat().st_size for path in abandoned.files)
    assert names_before <= set(list_names(tmp_path))
    assert [item.path for item in clean(tmp_path, yes=True)] == [abandoned.path]
    assert list_names(tmp_path) == ["a.h5", "boundary-mine.h5"]


def test_recently_used_feature_maps_are_kept(tmp_path):
    make_cache(tmp_path / "boundary-0123456789abcdef.h5", make_images(4))
    assert clean(tmp_path, yes=True) == []


def test_recent_files_are_kept(tmp_path):
    make_cache(tmp_path / "a.h5", make_images(40), shard_bytes=SHARD_BYTES)
    (tmp_path / "a.h5").unlink()
    (tmp_path / ".999999999.0123456789ab.tmp").write_text("half")
    (tmp_path / ".files-01234567.lock").touch()
    assert clean(tmp_path) == []


def test_temporary_files_of_ended_processes_and_free_locks_are_removed(tmp_path, two_hours_later):
    for process in (999999999, 10**30, os.getpid(), 1):
        (tmp_path / f".{process}.0123456789ab.tmp").write_text("half")
    (tmp_path / ".files-01234567.lock").touch()
    (tmp_path / ".files-89abcdef.lock").touch()
    with open(tmp_path / ".files-89abcdef.lock") as lock_handle:
        fcntl.flock(lock_handle, fcntl.LOCK_EX)
        removed = clean(tmp_path, yes=True)
    assert sorted(item.kind for item in removed) == ["lock", "temporary", "temporary"]
    assert list_names(tmp_path) == sorted(
        [f".{os.getpid()}.0123456789ab.tmp", ".1.0123456789ab.tmp", ".files-89abcdef.lock"]
    )


def test_a_lock_file_that_is_removed_while_another_process_waits_still_excludes(tmp_path):
    lock = tmp_path / ".files-01234567.lock"
    wait_code = (
        "import sys; from pathlib import Path; from featpipe.storage import lock_file\n"
        "with lock_file(Path(sys.argv[1])): print('held', Path(sys.argv[1]).exists())"
    )
    with lock_file(lock):
        process = subprocess.Popen([sys.executable, "-c", wait_code, lock], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        lock.unlink()
    assert process.communicate(timeout=30)[0] == "held True\n"


def test_a_missing_folder_is_an_error_in_one_line(tmp_path):
    with pytest.raises(CacheError, match="nothing: No such file or directory; pass the folder"):
        clean(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------------------------- diff
def test_images_are_compared_with_a_cache_without_reading_them(make_folder, tiny, tmp_path, monkeypatch):
    folder = make_files_old(make_folder())
    settings = ExtractionConfig(backbone=tiny, cache=tmp_path / "cache")
    cache = extract_index(data.index(folder), tiny, settings)
    monkeypatch.setattr(data.SampleReader, "read", None)
    diff = diff_with_request(cache, settings, [str(folder)])
    assert (diff.differences, diff.usable) == ([], True)
    assert vars(diff.samples) == {
        "images": 18, "unchanged": 18, "changed": 0, "new": 0, "gone": 0, "same_table": True
    }  # fmt: skip
    (folder / "ape" / "00.jpg").unlink()
    (folder / "ape" / "01.jpg").rename(folder / "bee" / "moved.jpg")
    (folder / "ape" / "02.jpg").write_bytes(jpeg(77))
    (folder / "cow" / "new.jpg").write_bytes(jpeg(78))
    diff = diff_with_request(cache, settings, [str(folder)])
    assert vars(diff.samples) == {
        "images": 18, "unchanged": 15, "changed": 1, "new": 2, "gone": 2, "same_table": False
    }  # fmt: skip


def test_each_differing_fact_of_a_request_is_one_line(make_folder, tiny, tmp_path):
    settings = ExtractionConfig(backbone=tiny, cache=tmp_path / "cache")
    cache = extract_index(data.index(make_folder()), tiny, settings)
    diff = diff_with_request(cache, replace(settings, precision="bf16", storage="float16"))
    assert diff.differences == [
        "precision is 'fp32', asked for 'bf16'",
        "storage is 'float32', asked for 'float16'",
    ]
    assert (diff.usable, diff.samples) == (False, None)


def test_a_cache_with_more_outputs_than_requested_is_usable(make_folder, tmp_path):
    folder, settings = make_folder(), {"backbone": "resnet18", "weights": "none", "cache": tmp_path / "cache"}
    cache = extract(folder, outputs=("pooled", "layer1:avg"), **settings)
    diff = diff_with_request(cache, ExtractionConfig.from_settings(settings))
    assert diff.usable
    assert len(diff.differences) == 1
    assert diff.differences[0].startswith("backbone.outputs.layer1:avg is {")
    assert extract(folder, **settings).manifest["embedded"] == 0
    assert not diff_with_request(cache, ExtractionConfig.from_settings(settings | {"seed": 1})).usable


def test_two_caches_are_compared_by_their_facts(tmp_path):
    a, b = (
        make_cache(tmp_path / "a.h5", make_images(1)),
        make_cache(tmp_path / "b.h5", make_images(2), facts=make_facts(precision="tf32")),
    )
    diff = diff_with_cache(a, b)
    assert diff.differences == [f"precision is 'fp32', in {b.path} 'tf32'"]
    assert diff_with_cache(a, make_cache(tmp_path / "c.h5", make_images(3))).differences == []


def test_a_row_with_a_transient_status_counts_as_changed(make_folder, tiny, tmp_path):
    folder = make_files_old(make_folder())
    settings = ExtractionConfig(backbone=tiny, cache=tmp_path / "cache")
    cache = extract_index(data.index(folder), tiny, settings)
    status = cache.status_codes.copy()
    status[4] = Status.OUT_OF_MEMORY
    table = replace(cache.table(), status=status)
    features = cache.features().copy()
    features[4] = np.nan
    gather = lambda output, start, stop: features[start:stop]  # noqa: E731
    write_cache(cache.path, table, json.loads(json.dumps(cache.manifest)), cache.shapes, "float32", gather)
    samples = diff_with_request(FeatureCache(cache.path), settings, [str(folder)]).samples
    assert (samples.unchanged, samples.changed) == (17, 1)
