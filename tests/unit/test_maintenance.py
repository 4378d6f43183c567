"""Caches packed, merged, cleaned up after and compared: no row changes on its way, nothing in use is touched."""

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
from tests.support.images import jpeg

cleaning = import_module("featpipe.maintenance.clean")

WIDTH = 1024
SHARD = 65536  # shards of 32 rows: as few as both outputs have in whole pages


def facts(**changed):
    outputs = {"pooled": {"node": "pooled", "pool": "none"}, "tail": {"node": "tail", "pool": "avg"}}
    backbone = {"name": "net", "source": "user", "weights": "0" * 64, "transform": {}, "outputs": outputs}
    return {"backbone": backbone, "precision": "fp32", "storage": "float32", "extraction": 1, **changed}


def row_of(digest: bytes, output: str) -> np.ndarray:
    """The embedding of an image: decided by its bytes, as it must be."""
    rng = np.random.default_rng([*digest[:8], len(output)])
    return rng.normal(size=WIDTH if output == "pooled" else 512).astype(np.float32)


def make(path, images, *, labels=None, split=None, status=None, shard_bytes=None, made_from=None, **manifest):
    """A cache of samples: id → what their image holds, as text; equal texts are equal bytes."""
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
    shapes = {"pooled": (WIDTH,), "tail": (512,)}
    values = {output: np.stack([row_of(digest, output) for digest in digests]) for output in shapes}
    for rows in values.values():
        rows[status != 0] = np.nan
    stored = {"facts": made_from or facts(), "archives": [f"/data/{path.stem}"], "created": "today", **manifest}
    gather = lambda output, start, stop: values[output][start:stop]  # noqa: E731
    write_cache(path, table, stored, shapes, "float32", gather, shard_bytes)
    return FeatureCache(path)


def many(n, start=0):
    return {f"a/{i}.jpg": f"image {i}" for i in range(start, start + n)}


def same_rows(found, wanted):
    """Ids, columns and features are equal, bit for bit."""
    assert found.table().same_as(wanted.table())
    for output in wanted.outputs:
        assert np.array_equal(found.features(output).view("u4"), wanted.features(output).view("u4"))
    assert found.outputs == wanted.outputs
    assert found.facts == wanted.facts


def damage(file: Path, wanted: bytes) -> None:
    """Flip a bit of these bytes, where a file holds them."""
    data = bytearray(file.read_bytes())
    at = data.index(wanted)
    data[at + 5] ^= 4
    file.write_bytes(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------- pack
def test_a_sharded_cache_becomes_one_file_of_the_same_rows(tmp_path):
    status = [0, 5, *[0] * 98]
    sharded = make(tmp_path / "a.h5", many(100), status=status, shard_bytes=SHARD)
    assert len(sharded.shard_files) == 4
    packed = pack(sharded, tmp_path / "elsewhere" / "b.h5")
    assert packed.shard_files == ()
    same_rows(packed, sharded)
    assert names(tmp_path / "elsewhere") == ["b.h5"]
    assert packed.manifest["created"] == "today"
    assert packed.damaged_columns() == []
    for output in packed.outputs:
        assert packed.whole_rows(np.arange(100), output).all()
    shutil.rmtree(shards_directory(sharded.path))
    same_rows(FeatureCache(packed.path), sharded)


def test_in_place_the_shards_go_and_who_has_them_open_goes_on_reading(tmp_path):
    before = make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
    packed = pack(tmp_path / "a.h5")
    assert names(tmp_path) == ["a.h5"]
    same_rows(packed, before)


def test_packing_again_writes_nothing(tmp_path, log):
    make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
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


def test_another_cache_of_that_name_stays_unless_told_otherwise(tmp_path):
    make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
    other = make(tmp_path / "b.h5", many(3))
    with pytest.raises(CacheMismatchError, match=r"b\.h5: exists.*--overwrite"):
        pack(tmp_path / "a.h5", tmp_path / "b.h5")
    same_rows(FeatureCache(tmp_path / "b.h5"), other)
    assert len(pack(tmp_path / "a.h5", tmp_path / "b.h5", overwrite=True)) == 40
    with pytest.raises(ConfigError, match=r"ends in \.h5"):
        pack(tmp_path / "a.h5", tmp_path / "b.hdf")


def test_damaged_rows_are_named_and_not_copied(tmp_path):
    cache = make(tmp_path / "a.h5", many(100), shard_bytes=SHARD)
    for row in (17, 90):
        damage(cache.shard_files[row // 32], cache.features()[row].tobytes()[:64])
    for out in (None, tmp_path / "b.h5"):
        with pytest.raises(CacheError, match=r"2 of its 100 rows.*\(a/17\.jpg, a/90\.jpg\).*verify --repair"):
            pack(tmp_path / "a.h5", out)
    assert names(tmp_path) == ["a.h5", "a.h5.shards"]


def test_damaged_ids_are_an_error_before_a_row_is_copied(tmp_path):
    make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
    damage(tmp_path / "a.h5", b"a/7.jpga/8.jpg")
    for act in (lambda: pack(tmp_path / "a.h5"), lambda: merge([tmp_path / "a.h5"], tmp_path / "b.h5")):
        with pytest.raises(CacheError, match=r"samples/id_bytes is damaged"):
            act()
    assert names(tmp_path) == ["a.h5", "a.h5.shards"]


def test_a_copy_of_the_main_file_packs_from_the_shards_of_the_first_and_leaves_them(tmp_path):
    first = make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
    shutil.copy(tmp_path / "a.h5", tmp_path / "b.h5")
    pack(tmp_path / "b.h5")
    same_rows(FeatureCache(tmp_path / "a.h5"), first)
    same_rows(FeatureCache(tmp_path / "b.h5"), first)


def test_the_finished_work_of_an_extraction_to_that_name_stays(tmp_path):
    make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
    parts = unfinished(tmp_path / "a.h5")
    pack(tmp_path / "a.h5")
    assert [part.rows for part in parts.load_committed()] == [3]


def test_packing_waits_for_the_writer_of_that_name(tmp_path):
    make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
    code = f"import sys; from featpipe import pack; pack({str(tmp_path / 'a.h5')!r}); print('packed')"
    with StagingArea(parts_directory(tmp_path / "a.h5"), "").lock_for_writing():
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
        assert len(FeatureCache(tmp_path / "a.h5").shard_files) == 2
    assert process.communicate(timeout=60)[0] == "packed\n"
    assert FeatureCache(tmp_path / "a.h5").shard_files == ()


KILLED = """
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
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_kill_while_rows_are_copied_leaves_the_old_files_whole_and_the_next_attempt_is_as_any(
    tmp_path, monkeypatch, statement, at
):
    old = make(tmp_path / "a.h5", many(100), shard_bytes=SHARD)
    make(tmp_path / "b.h5", many(100, 50))
    process = [sys.executable, "-c", KILLED, str(at), statement]
    assert subprocess.run(process, cwd=tmp_path, timeout=60).returncode == 9
    same_rows(FeatureCache(tmp_path / "a.h5"), old)
    assert len(FeatureCache(tmp_path / "a.h5").shard_files) == 4
    assert not (tmp_path / "c.h5").exists()
    monkeypatch.chdir(tmp_path)
    made = eval(statement)
    assert len(made) == (150 if "merge" in statement else 100)
    assert np.array_equal(made.features()[:100], old.features())
    assert not [path.name for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".parts")]


def test_a_failure_while_rows_are_copied_leaves_the_old_files_whole(tmp_path, monkeypatch):
    old = make(tmp_path / "a.h5", many(100), shard_bytes=SHARD)
    monkeypatch.setattr(writer, "WRITE_BLOCK_BYTES", SHARD)

    def full(progress: Progress) -> None:
        if progress.done > 60:
            raise OSError(28, "No space left on device")

    with pytest.raises(CacheError, match="No space left"):
        pack(tmp_path / "a.h5", progress=full)
    same_rows(FeatureCache(tmp_path / "a.h5"), old)
    assert names(tmp_path) == ["a.h5", "a.h5.shards"]


# --------------------------------------------------------------------------------------------------------- merge
def oracle(*caches):
    """Rows by id, as a plain dictionary: id → the features of its image."""
    return {name: cache.features()[row] for cache in caches for row, name in enumerate(cache.ids)}


@pytest.mark.parametrize("shard_bytes", [2**30, SHARD])
def test_rows_follow_one_another_and_what_both_hold_stands_once(tmp_path, shard_bytes, log):
    a = make(tmp_path / "a.h5", many(60), shard_bytes=SHARD)
    b = make(tmp_path / "b.h5", many(60, 40), status=[0] * 59 + [5])
    merged = merge([a, b.path], tmp_path / "c.h5", shard_bytes=shard_bytes)
    assert list(merged.ids) == list(many(100))
    assert bool(merged.shard_files) == (shard_bytes == SHARD)
    wanted = oracle(a, b)
    for row, name in enumerate(merged.ids):
        assert np.array_equal(merged.features()[row], wanted[name], equal_nan=True)
    assert np.array_equal(merged.digests[:60], a.digests)
    assert np.array_equal(merged.stamps[60:], b.stamps[20:])
    assert merged.bad_rows() == {"damaged": 1}
    assert log == ["100 rows of 2 caches; 20 that several of them hold stand once"]
    assert merged.manifest["archives"] == ["/data/a", "/data/b"]
    assert [source["samples"] for source in merged.manifest["merged_from"]] == [60, 60]
    assert all(merged.whole_rows(np.arange(100), output).all() for output in merged.outputs)


def test_merging_again_writes_nothing_and_a_cache_with_itself_is_itself(tmp_path):
    a = make(tmp_path / "a.h5", many(20), status=[0, 1, 5, *[0] * 17])
    merged = merge([a, a], tmp_path / "c.h5")
    same_rows(merged, a)
    before = os.stat(merged.path)
    merge([a, a], tmp_path / "c.h5")
    assert os.stat(merged.path).st_ino == before.st_ino
    with pytest.raises(CacheMismatchError, match="exists and has other rows"):
        merge([a, make(tmp_path / "b.h5", many(3, 50))], tmp_path / "c.h5")


def test_an_id_that_names_another_image_gets_a_number_that_is_free(tmp_path):
    a = make(tmp_path / "a.h5", {"x": "one", "y": "two"})
    b = make(tmp_path / "b.h5", {"x": "three", "x#2": "four"})
    c = make(tmp_path / "c.h5", {"x": "five", "y": "two", "z": "six"})
    merged = merge([a, b, c], tmp_path / "d.h5")
    assert list(merged.ids) == ["x", "y", "x#3", "x#2", "x#4", "z"]
    for row, text in enumerate(["one", "two", "three", "four", "five", "six"]):
        assert np.array_equal(merged.features()[row], row_of(hashlib.sha256(text.encode()).digest(), "pooled"))


def test_classes_are_united_in_their_order_and_codes_follow(tmp_path):
    a = make(tmp_path / "a.h5", many(3), labels=Labels.from_class_names(["10", "9", None]))
    b = make(tmp_path / "b.h5", many(3, 3), labels=Labels.from_class_names(["apple", "10", "apple"]))
    merged = merge([a, make(tmp_path / "u.h5", many(1, 9)), b], tmp_path / "c.h5")
    assert merged.classes == ("10", "9", "apple") == order_classes(["9", "10", "apple"])
    assert list(merged.labels) == ["10", "9", None, None, "apple", "10", "apple"]


def test_a_row_has_no_label_of_classes_that_only_another_cache_knows(tmp_path):
    a = make(tmp_path / "a.h5", many(3), labels=Labels.from_label_sets([{"x", "z"}, None, set()]))
    b = make(tmp_path / "b.h5", many(2, 3), labels=Labels.from_label_sets([{"y"}, {"z"}]))
    merged = merge([b, a], tmp_path / "c.h5")
    assert merged.classes == ("x", "y", "z")
    assert merged.labels.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 1], [-1, -1, -1], [0, 0, 0]]


def test_targets_are_joined_where_they_have_the_same_names(tmp_path):
    a = make(tmp_path / "a.h5", many(2), labels=Labels.from_targets([[1.5], [np.nan]], ["kg"]))
    b = make(tmp_path / "b.h5", many(2, 2), labels=Labels.from_targets([[3.5], [4.5]], ["kg"]))
    unlabelled = make(tmp_path / "u.h5", many(2, 1))
    merged = merge([unlabelled, a, b], tmp_path / "c.h5")
    assert list(merged.ids) == ["a/1.jpg", "a/2.jpg", "a/0.jpg", "a/3.jpg"]
    assert np.array_equal(merged.labels, [np.nan, 3.5, 1.5, 4.5], equal_nan=True)
    other = make(tmp_path / "o.h5", many(1, 7), labels=Labels.from_targets([[1.0]], ["cm"]))
    with pytest.raises(CacheMismatchError, match=r"o\.h5: its targets are cm, those of .*a\.h5 kg"):
        merge([a, other], tmp_path / "d.h5")


def test_what_one_cache_does_not_know_of_a_sample_comes_from_the_other(tmp_path):
    """A label, a split, and features after an attempt that ran out of memory."""
    a = make(tmp_path / "a.h5", {"p": "one", "q": "two"})
    b = make(tmp_path / "b.h5", {"q": "two", "p": "one"}, labels=Labels.from_class_names(["cat", "dog"]), split=[1, 3])
    merged = merge([a, b], tmp_path / "c.h5")
    assert list(zip(merged.ids, merged.labels, merged.split.tolist(), strict=True)) == [
        ("p", "dog", 3),
        ("q", "cat", 1),
    ]
    other = make(tmp_path / "d.h5", {"p": "one"}, labels=Labels.from_class_names(["cow"]))
    assert list(merge([a, b, other], tmp_path / "e.h5").ids) == ["p", "q", "p#2"]


def test_a_sample_in_two_splits_is_an_error_and_not_a_leak(tmp_path):
    a = make(tmp_path / "a.h5", {"p": "one"}, split=[1])
    b = make(tmp_path / "b.h5", {"p": "one"}, split=[3])
    with pytest.raises(CacheMismatchError, match="p: is in split train in one cache and test of another"):
        merge([a, b], tmp_path / "c.h5")
    assert names(tmp_path) == ["a.h5", "b.h5"]


def test_caches_of_other_facts_or_other_kinds_of_labels_are_refused_with_what_differs(tmp_path):
    a = make(tmp_path / "a.h5", many(2), labels=Labels.from_class_names(["x", "y"]))
    b = make(tmp_path / "b.h5", many(2), made_from=facts(precision="bf16"))
    with pytest.raises(CacheMismatchError, match=r"b\.h5: has other facts \(precision is 'bf16', in .*a\.h5 'fp32'\)"):
        merge([a, b], tmp_path / "c.h5")
    sets = make(tmp_path / "s.h5", many(2), labels=Labels.from_label_sets([{"x"}, {"y"}]))
    with pytest.raises(CacheMismatchError, match=r"s\.h5: its labels are multilabel, those of .*a\.h5 classification"):
        merge([a, sets], tmp_path / "c.h5")
    with pytest.raises(ConfigError, match="at least one"):
        merge([], tmp_path / "c.h5")


def test_a_damaged_row_is_not_merged(tmp_path):
    a = make(tmp_path / "a.h5", many(20))
    b = make(tmp_path / "b.h5", many(20, 20))
    damage(b.path, b.features("tail")[3].tobytes()[:64])
    with pytest.raises(CacheError, match=r"b\.h5: 1 of its 20 rows differ from what was written \(a/23\.jpg\)"):
        merge([a, b], tmp_path / "c.h5")
    assert names(tmp_path) == ["a.h5", "b.h5"]


def test_a_cache_of_format_1_0_is_merged_and_gets_checks(tmp_path):
    golden = FeatureCache(Path(__file__).parents[1] / "data" / "golden-1.0.h5")
    merged = merge([golden], tmp_path / "a.h5")
    assert merged.table().same_as(golden.table())
    assert np.array_equal(merged.features(), golden.features(), equal_nan=True)
    assert (golden.has_checks, merged.has_checks) == (False, True)


# --------------------------------------------------------------------------------------------------------- clean
def unfinished(path, rows=3):
    """An extraction that committed one part and was killed."""
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
def later(monkeypatch):
    """Two hours pass."""
    now = time.time
    monkeypatch.setattr(cleaning.time, "time", lambda: now() + 7200)


def test_unfinished_extractions_are_shown_with_what_they_hold_and_removed_on_request(tmp_path):
    unfinished(tmp_path / "a.h5", 3)
    make(tmp_path / "b.h5", many(2))
    parts_directory(tmp_path / "b.h5").mkdir()
    found = clean(tmp_path)
    assert [(thing.path.name, thing.rows, thing.renews) for thing in found] == [
        ("a.h5.parts", 3, False),
        ("b.h5.parts", 0, True),
    ]
    assert found[0].nbytes == sum(path.stat().st_size for path in (tmp_path / "a.h5.parts").iterdir())
    assert found[0].seconds < 60
    assert names(tmp_path) == ["a.h5.parts", "b.h5", "b.h5.parts"]
    assert [thing.path for thing in clean(tmp_path, yes=True)] == [thing.path for thing in found]
    assert names(tmp_path) == ["b.h5"]


def test_what_a_process_writes_now_is_not_touched(tmp_path, later):
    make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
    parts = unfinished(tmp_path / "a.h5")
    found = clean(tmp_path)
    (tmp_path / "a.h5").unlink()
    before = sorted(tmp_path.rglob("*"))
    with parts.lock_for_writing(), lock_file(tmp_path / ".files-01234567.lock"):
        assert clean(tmp_path, yes=True) == []
        assert remove_abandoned(found) == []
        assert sorted(tmp_path.rglob("*")) == [tmp_path / ".files-01234567.lock", *before]


def test_an_extraction_that_went_on_since_it_was_shown_is_not_removed(tmp_path):
    parts = unfinished(tmp_path / "a.h5", 3)
    found = clean(tmp_path)
    unfinished(tmp_path / "a.h5", 4)
    assert remove_abandoned(found) == []
    assert sum(part.rows for part in parts.load_committed()) == 7


def test_files_of_others_stay_and_their_folder_with_them(tmp_path, later):
    unfinished(tmp_path / "a.h5")
    kept = ["a.h5.parts/notes.txt", "mine.parts/lock", "b.h5.parts/mine", "a.h5.shards/mine.h5", ".1.tmp", "x.lock"]
    for name in kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "c.h5.parts").symlink_to(tmp_path / "mine.parts")
    assert [thing.path.name for thing in clean(tmp_path, yes=True)] == ["a.h5.parts"]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(kept)


def test_shards_that_no_cache_names_are_found_and_those_of_renamed_caches_are_not(tmp_path, later):
    for name in "abcd":
        make(tmp_path / f"{name}.h5", many(40, ord(name)), shard_bytes=SHARD)
    (tmp_path / "a.h5").rename(tmp_path / "renamed.h5")  # without its folder
    (tmp_path / "b.h5").rename(tmp_path / "moved.hdf5")  # with its folder, to a name of another kind
    shards_directory(tmp_path / "b.h5").rename(shards_directory(tmp_path / "moved.h5"))
    (tmp_path / "c.h5").unlink()
    found = clean(tmp_path)
    assert [(thing.kind, thing.path.name, len(thing.files)) for thing in found] == [("shards", "c.h5.shards", 2)]
    clean(tmp_path, yes=True)
    assert names(tmp_path) == [
        "a.h5.shards", "d.h5", "d.h5.shards", "moved.h5.shards", "moved.hdf5", "renamed.h5",
    ]  # fmt: skip
    assert len(FeatureCache(tmp_path / "renamed.h5")) == len(FeatureCache(tmp_path / "d.h5")) == 40


def test_no_shard_is_removed_while_a_cache_beside_it_cannot_be_read(tmp_path, later):
    cache = make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
    (tmp_path / "a.h5").write_bytes(b"x" + cache.path.read_bytes()[1:])
    assert clean(tmp_path, yes=True) == []
    assert len(names(tmp_path / "a.h5.shards")) == 2


@pytest.mark.parametrize("shard_bytes", [None, SHARD])
def test_feature_maps_that_fine_tuning_kept_go_with_their_shards_and_nothing_else_does(tmp_path, later, shard_bytes):
    more = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    maps = "boundary-0123456789abcdef.h5"
    make(tmp_path / maps, many(40), **more)
    make(tmp_path / "boundary-mine.h5", many(2))
    make(tmp_path / "a.h5", many(3))
    before = {maps, f"{maps}.shards"} if shard_bytes else {maps}
    (found,) = clean(tmp_path)
    assert (found.kind, found.path.name, found.rows) == ("maps", maps, 40)
    assert found.nbytes == sum(path.stat().st_size for path in found.files)
    assert before <= set(names(tmp_path))
    assert [thing.path for thing in clean(tmp_path, yes=True)] == [found.path]
    assert names(tmp_path) == ["a.h5", "boundary-mine.h5"]


def test_feature_maps_that_were_used_a_moment_ago_are_left_alone(tmp_path):
    make(tmp_path / "boundary-0123456789abcdef.h5", many(4))
    assert clean(tmp_path, yes=True) == []


def test_what_is_young_is_left_alone(tmp_path):
    make(tmp_path / "a.h5", many(40), shard_bytes=SHARD)
    (tmp_path / "a.h5").unlink()
    (tmp_path / ".999999999.0123456789ab.tmp").write_text("half")
    (tmp_path / ".files-01234567.lock").touch()
    assert clean(tmp_path) == []


def test_temporary_files_go_when_their_process_is_gone_and_locks_when_nobody_holds_them(tmp_path, later):
    for process in (999999999, 10**30, os.getpid(), 1):
        (tmp_path / f".{process}.0123456789ab.tmp").write_text("half")
    (tmp_path / ".files-01234567.lock").touch()
    (tmp_path / ".files-89abcdef.lock").touch()
    with open(tmp_path / ".files-89abcdef.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        removed = clean(tmp_path, yes=True)
    assert sorted(thing.kind for thing in removed) == ["lock", "temporary", "temporary"]
    assert names(tmp_path) == sorted(
        [f".{os.getpid()}.0123456789ab.tmp", ".1.0123456789ab.tmp", ".files-89abcdef.lock"]
    )


def test_a_lock_that_was_removed_while_one_waited_for_it_holds_all_the_same(tmp_path):
    lock = tmp_path / ".files-01234567.lock"
    waiting = (
        "import sys; from pathlib import Path; from featpipe.storage import lock_file\n"
        "with lock_file(Path(sys.argv[1])): print('held', Path(sys.argv[1]).exists())"
    )
    with lock_file(lock):
        process = subprocess.Popen([sys.executable, "-c", waiting, lock], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        lock.unlink()
    assert process.communicate(timeout=30)[0] == "held True\n"


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(CacheError, match="nothing: No such file or directory; pass the folder"):
        clean(tmp_path / "nothing")


# ----------------------------------------------------------------------------------------------------------- why
def aged(folder):
    past = time.time() - 3600
    for path in folder.rglob("*"):
        os.utime(path, (past, past))


def test_equal_facts_are_equal_and_images_are_told_apart_without_being_read(make_folder, tiny, tmp_path, monkeypatch):
    folder = make_folder()
    aged(folder)
    settings = ExtractionConfig(backbone=tiny, cache=tmp_path / "cache")
    cache = extract_index(data.index(folder), tiny, settings)
    monkeypatch.setattr(data.SampleReader, "read", None)
    found = diff_with_request(cache, settings, [str(folder)])
    assert (found.differences, found.usable) == ([], True)
    assert vars(found.samples) == {
        "images": 18, "unchanged": 18, "changed": 0, "new": 0, "gone": 0, "same_table": True
    }  # fmt: skip
    (folder / "ape" / "00.jpg").unlink()
    (folder / "ape" / "01.jpg").rename(folder / "bee" / "moved.jpg")
    (folder / "ape" / "02.jpg").write_bytes(jpeg(77))
    (folder / "cow" / "new.jpg").write_bytes(jpeg(78))
    found = diff_with_request(cache, settings, [str(folder)])
    assert vars(found.samples) == {
        "images": 18, "unchanged": 15, "changed": 1, "new": 2, "gone": 2, "same_table": False
    }  # fmt: skip


def test_each_fact_of_a_request_that_differs_has_its_line(make_folder, tiny, tmp_path):
    settings = ExtractionConfig(backbone=tiny, cache=tmp_path / "cache")
    cache = extract_index(data.index(make_folder()), tiny, settings)
    found = diff_with_request(cache, replace(settings, precision="bf16", storage="float16"))
    assert found.differences == [
        "precision is 'fp32', asked for 'bf16'",
        "storage is 'float32', asked for 'float16'",
    ]
    assert (found.usable, found.samples) == (False, None)


def test_a_cache_with_more_outputs_than_asked_for_is_usable_as_extraction_uses_it(make_folder, tmp_path):
    folder, settings = make_folder(), {"backbone": "resnet18", "weights": "none", "cache": tmp_path / "cache"}
    cache = extract(folder, outputs=("pooled", "layer1:avg"), **settings)
    found = diff_with_request(cache, ExtractionConfig.from_settings(settings))
    assert found.usable
    assert len(found.differences) == 1
    assert found.differences[0].startswith("backbone.outputs.layer1:avg is {")
    assert extract(folder, **settings).manifest["embedded"] == 0
    assert not diff_with_request(cache, ExtractionConfig.from_settings(settings | {"seed": 1})).usable


def test_two_caches_are_compared_by_their_facts(tmp_path):
    a, b = make(tmp_path / "a.h5", many(1)), make(tmp_path / "b.h5", many(2), made_from=facts(precision="tf32"))
    found = diff_with_cache(a, b)
    assert found.differences == [f"precision is 'fp32', in {b.path} 'tf32'"]
    assert diff_with_cache(a, make(tmp_path / "c.h5", many(3))).differences == []


def test_a_status_that_is_to_be_tried_again_is_not_unchanged(make_folder, tiny, tmp_path):
    folder = make_folder()
    aged(folder)
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
