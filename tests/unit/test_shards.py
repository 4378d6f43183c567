"""Sharded caches: the same rows as in a single file, byte for byte, by every way to read them."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from featpipe import FeatureCache
from featpipe.cache import SampleTable, parts_directory, shards_directory, write_cache, writer
from featpipe.cache import open as open_module
from featpipe.data import Labels
from featpipe.errors import CacheError, CacheFormatError
from featpipe.status import Status
from featpipe.storage import StringColumn
from tests.support.caches import make_facts

MIN_SHARD_BYTES = 65536  # bytes of a shard: one page of the largest kind
WIDE_SHAPES = {"pooled": (1024,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "one output": WIDE_SHAPES,
    "two outputs": {"pooled": (1024,), "layer2": (8, 4, 4)},
    "an odd width": {"pooled": (24,)},
    "odd widths": {"pooled": (40,), "tokens": (3, 8)},
    "an output without numbers": {"pooled": (1024,), "nothing": (0,)},
}


class Content:
    """The content of a cache."""

    def __init__(
        self, n: int = 70, shapes: dict[str, tuple[int, ...]] | None = None, storage: str = "float32", seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.shapes, self.storage = n, shapes or WIDE_SHAPES, storage
        status = np.where(rng.random(n) < 0.2, rng.integers(1, 10, n), 0).astype(np.uint8)
        self.features = {name: rng.normal(size=(n, *shape)).astype(storage) for name, shape in self.shapes.items()}
        for values in self.features.values():
            values[status != Status.OK] = np.nan
        self.table = SampleTable(
            ids=StringColumn.from_strings(f"é/{i}.jpg" for i in range(n)),
            status=status,
            digests=rng.integers(0, 256, (n, 32), np.uint8),
            stamps=rng.integers(0, 256, (n, 16), np.uint8),
            split=rng.integers(0, 4, n, np.uint8),
            labels=Labels.from_class_names(rng.choice(["cow", "ape"], n).tolist()),
        )

    def gather(self, output: str, start: int, stop: int) -> np.ndarray:
        return self.features[output][start:stop]

    def write(self, path: Path, shard_bytes: int | None = MIN_SHARD_BYTES) -> FeatureCache:
        manifest = {"facts": make_facts(self.storage, self.shapes), "created": "today"}
        write_cache(path, self.table, manifest, self.shapes, self.storage, self.gather, shard_bytes)
        return FeatureCache(path)

    def is_stored_in(self, path: Path) -> bool:
        cache = FeatureCache(path)
        return cache.table().same_as(self.table) and all(
            cache.features(name).tobytes() == values.tobytes() for name, values in self.features.items()
        )


def list_all_paths(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def list_cache_paths(cache: FeatureCache) -> list[str]:
    """List the paths that may exist in the folder of a cache."""
    folder = cache.path.parent
    files = [str(path.relative_to(folder)) for path in (cache.path, *cache.shard_files)]
    return sorted([*files, shards_directory(cache.path).name] if cache.shard_files else files)


# ------------------------------------------------------------------------------------------------ the same rows
@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("shard_bytes", [1, 200_000])
def test_shards_hold_the_same_bytes_as_a_single_file(tmp_path, shapes, storage, shard_bytes):
    width = np.dtype(storage).itemsize * sum(math.prod(shape) for shape in shapes.values())
    content = Content(600_000 // width, shapes, storage)
    single_file = content.write(tmp_path / "one.h5", None)
    cache = content.write(tmp_path / "a.h5", shard_bytes)
    assert single_file.shard_files == ()
    assert len(cache.shard_files) >= 2
    assert content.is_stored_in(single_file.path)
    assert content.is_stored_in(cache.path)
    assert cache.damaged_columns() == []
    for output, shape in shapes.items():
        assert cache.features(output).shape == (content.n, *shape)
        assert cache.features(output).dtype == storage
        assert cache.whole_rows(np.arange(content.n), output).all()
        assert cache._columns[f"checks/{output}"].tobytes() == single_file._columns[f"checks/{output}"].tobytes()
    assert list_all_paths(tmp_path) == sorted(list_cache_paths(cache) + list_cache_paths(single_file))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
def test_h5py_reads_the_same_features_through_the_virtual_dataset(tmp_path, monkeypatch, shapes):
    content = Content(600_000 // (4 * sum(math.prod(shape) for shape in shapes.values())), shapes)
    content.write(tmp_path / "a.h5")
    monkeypatch.chdir("/")
    with h5py.File(tmp_path / "a.h5") as file:
        for output, values in content.features.items():
            assert file[f"features/{output}"].is_virtual
            assert file[f"features/{output}"][()].tobytes() == values.tobytes()
        assert file["samples/status"][()].tolist() == content.table.status.tolist()


def test_all_shards_but_the_last_have_the_requested_size(tmp_path):
    cache = Content(70).write(tmp_path / "a.h5", 2 * MIN_SHARD_BYTES + 5000)
    assert [shard["rows"] for shard in cache.manifest["shards"]] == [[0, 32], [32, 64], [64, 70]]
    assert cache.shard_bytes == 2 * MIN_SHARD_BYTES
    sizes = [os.path.getsize(path) for path in cache.shard_files]
    assert cache.file_bytes == cache.path.stat().st_size + sum(sizes)
    other_cache = Content(70, seed=1).write(tmp_path / "b.h5", cache.shard_bytes)
    assert [shard["rows"] for shard in other_cache.manifest["shards"]] == [[0, 32], [32, 64], [64, 70]]


def test_the_rows_of_a_shard_fill_whole_pages_in_every_output(tmp_path):
    cache = Content(20_000, {"pooled": (10,), "more": (6,)}).write(tmp_path / "a.h5")
    rows = [shard["rows"] for shard in cache.manifest["shards"]]
    assert rows == [[0, 8192], [8192, 16384], [16384, 20_000]]  # 8192 rows of 40 bytes are five pages, of 24 are three


def test_large_shards_have_the_same_alignment_in_memory_and_in_the_file(tmp_path):
    """Otherwise each page of 4 kB is mapped separately, and reading shuffled rows takes a third longer."""
    cache = Content(6000).write(tmp_path / "a.h5", 11 * 2**20)
    assert [shard["rows"] for shard in cache.manifest["shards"]] == [[0, 2560], [2560, 5120], [5120, 6000]]
    for shard in cache.manifest["shards"]:
        for output, offset in shard["offsets"].items():
            address = cache.features(output)[shard["rows"][0] :].__array_interface__["data"][0]
            assert (address - offset) % 2**21 == 0


@pytest.mark.parametrize(("n", "shard_bytes"), [(70, 70 * 4096), (0, 1), (16, 1), (70, None)])
def test_features_that_fit_into_one_shard_stay_in_one_file(tmp_path, n, shard_bytes):
    cache = Content(n).write(tmp_path / "a.h5", shard_bytes)
    assert (cache.shard_files, cache.shard_bytes) == ((), None)
    assert "shards" not in cache.manifest
    assert list_all_paths(tmp_path) == ["a.h5"]


def test_shards_with_equal_rows_share_a_file(tmp_path):
    content = Content(48)
    for column in (content.table.status, content.table.digests, content.features["pooled"]):
        column[16:32] = column[:16]
    cache = content.write(tmp_path / "a.h5")
    assert len(cache.manifest["shards"]) == 3
    assert len(cache.shard_files) == 2
    assert content.is_stored_in(cache.path)
    assert list_all_paths(tmp_path) == list_cache_paths(cache)


def test_writing_the_same_rows_again_gives_the_same_bytes(tmp_path):
    content = Content()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        content.write(tmp_path / name / "one.h5", None)
        content.write(tmp_path / name / "a.h5")
        time.sleep(1.01)  # HDF5 would store times in whole seconds
    files = ["one.h5", *(f"a.h5.shards/{file.name}" for file in FeatureCache(tmp_path / "a" / "a.h5").shard_files)]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_cache_may_have_more_shards_than_a_process_may_have_open_files(tmp_path):
    content = Content(400 * 16)
    content.write(tmp_path / "a.h5")
    code = (
        "import resource, sys, hashlib; from featpipe import FeatureCache\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "print(hashlib.sha256(FeatureCache(sys.argv[1]).features().tobytes()).hexdigest())"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.h5")], capture_output=True, text=True)
    assert (process.stdout.strip(), process.stderr) == (hashlib.sha256(content.features["pooled"]).hexdigest(), "")


# ----------------------------------------------------------------------------------------- all ways to read
@pytest.fixture(params=["float32", "float16"])
def pair(tmp_path, request) -> tuple[FeatureCache, FeatureCache]:
    """The same rows in one file and in shards of 16 rows."""
    content = Content(70, {"pooled": (1024,), "layer2": (8, 4, 8)}, request.param)
    return content.write(tmp_path / "one.h5", None), content.write(tmp_path / "a.h5")


READ_OPERATIONS: dict[str, Callable[[FeatureCache], object]] = {
    "X": lambda cache: cache.X,
    "y": lambda cache: cache.y.tolist(),
    "a slice over two shards": lambda cache: cache.read(slice(10, 40)),
    "every third row backwards": lambda cache: cache.read(slice(None, None, -3), "layer2"),
    "a mask": lambda cache: cache.read(cache.split == 1),
    "rows in any order": lambda cache: cache.read([69, 0, 15, 16, -1, 31, 32]),
    "float16": lambda cache: cache.read(slice(0, 40), dtype=np.float16),
    "batches": lambda cache: np.concatenate([features for _, features in cache.batches(17, seed=3)]),
    "arrow": lambda cache: cache.to_frame("arrow", features=True)["pooled"].combine_chunks().flatten().to_numpy(),
    "pandas": lambda cache: cache.to_frame(features=True, output="layer2").filter(like="layer2.").to_numpy(),
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)).features("layer2"),
    "bad rows": lambda cache: cache.bad_rows(),
    "whole rows": lambda cache: cache.whole_rows(np.array([0, 20, 69]), "layer2"),
    "flags": lambda cache: (cache.features().flags.aligned, cache.features().flags.writeable),
}


@pytest.mark.parametrize("operation", READ_OPERATIONS)
def test_every_way_to_read_gives_the_same_for_shards_and_a_single_file(pair, operation):
    from_single_file, from_shards = (READ_OPERATIONS[operation](cache) for cache in pair)
    assert type(from_single_file) is type(from_shards) or isinstance(from_single_file, np.ndarray)
    if isinstance(from_single_file, np.ndarray):
        assert (from_single_file.dtype, from_single_file.shape) == (from_shards.dtype, from_shards.shape)
        assert from_single_file.tobytes() == from_shards.tobytes()
    else:
        assert from_single_file == from_shards


READ_IN_A_CHILD = """
import pickle, sys
cache = pickle.loads(sys.stdin.buffer.read())
print(cache.read(slice(14, 18), "layer2").tobytes().hex())
"""


def test_a_child_process_reads_the_shards_of_a_pickled_cache(pair):
    cache = pair[1]
    process = subprocess.run([sys.executable, "-c", READ_IN_A_CHILD], input=pickle.dumps(cache), capture_output=True)
    assert bytes.fromhex(process.stdout.decode()) == cache.read(slice(14, 18), "layer2").tobytes(), process.stderr


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_reads_the_shards(pair):
    cache = pair[1]
    total = np.nansum(cache.features(), dtype=np.float64)
    child = os.fork()
    if not child:
        os._exit(0 if np.nansum(cache.features(), dtype=np.float64) == total else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.nansum(cache.features(), dtype=np.float64) == total


def test_arrays_outlive_their_cache_and_are_unmapped_when_freed(tmp_path):
    def count_mapped_shards() -> int:
        return Path("/proc/self/maps").read_text().count(".h5.shards/")

    if not Path("/proc/self/maps").exists():
        pytest.skip("counts what is mapped in /proc")
    content = Content()
    count_before = count_mapped_shards()
    features = content.write(tmp_path / "a.h5").features()
    assert count_mapped_shards() == count_before + 5
    assert features.tobytes() == content.features["pooled"].tobytes()
    with pytest.raises(ValueError, match="read-only"):
        features[0] = 0
    del features
    assert count_mapped_shards() == count_before


# ------------------------------------------------------------------------------------------- replaced and renamed
def test_replacing_a_cache_removes_its_shards_and_open_arrays_stay_readable(tmp_path):
    path, old_content, new_content = tmp_path / "a.h5", Content(seed=1), Content(100, seed=2)
    cache = old_content.write(path)
    old_shards = set(cache.shard_files)
    assert new_content.write(path).path == path
    assert not any(file.exists() for file in old_shards)
    assert cache.features().tobytes() == old_content.features["pooled"].tobytes()
    assert new_content.is_stored_in(path)
    assert list_all_paths(tmp_path) == list_cache_paths(FeatureCache(path))
    old_content.write(path, None)
    assert old_content.is_stored_in(path)
    assert list_all_paths(tmp_path) == ["a.h5"]
    new_content.write(path)
    assert new_content.is_stored_in(path)


def test_shards_that_the_new_cache_shares_with_the_old_are_kept(tmp_path):
    path, old_content = tmp_path / "a.h5", Content(64)
    old_shards = old_content.write(path).shard_files
    new_content = Content(64)
    new_content.features["pooled"][63] = 1.5
    new_content.table.status[63] = Status.OK
    new_shards = new_content.write(path).shard_files
    assert old_shards[:3] == new_shards[:3]
    assert old_shards[3] != new_shards[3]
    assert new_content.is_stored_in(path)
    assert list_all_paths(tmp_path) == list_cache_paths(FeatureCache(path))


def test_a_reader_during_a_replacement_retries_and_sees_the_new_cache(tmp_path, monkeypatch):
    """The old shards are removed after the reader has read the old manifest; it retries with the new file."""
    path, old_content, new_content = tmp_path / "a.h5", Content(seed=1), Content(100, seed=2)
    old_content.write(path)
    map_shards, is_first = open_module._map_shards, iter([True])

    def replace_then_map(*args: object) -> object:
        if next(is_first, False):
            with monkeypatch.context() as patch:
                patch.setattr(open_module, "_map_shards", map_shards)
                new_content.write(path)
        return map_shards(*args)

    monkeypatch.setattr(open_module, "_map_shards", replace_then_map)
    assert new_content.is_stored_in(path)


@pytest.mark.parametrize("rename_shards", [True, False])
def test_a_renamed_cache_opens_whether_its_shard_folder_was_renamed_or_not(tmp_path, rename_shards):
    content = Content()
    original = content.write(tmp_path / "a.h5")
    original.path.rename(tmp_path / "b.h5")
    if rename_shards:
        shards_directory(original.path).rename(tmp_path / "b.h5.shards")
    assert content.is_stored_in(tmp_path / "b.h5")
    cache = FeatureCache(tmp_path / "b.h5")
    assert {file.parent.name for file in cache.shard_files} == {"b.h5.shards" if rename_shards else "a.h5.shards"}
    assert cache.file_bytes == sum(file.stat().st_size for file in (cache.path, *cache.shard_files))
    new_content = Content(seed=5)
    new_content.write(tmp_path / "b.h5")
    assert new_content.is_stored_in(tmp_path / "b.h5")
    if rename_shards:
        assert list_all_paths(tmp_path) == list_cache_paths(FeatureCache(tmp_path / "b.h5"))
    else:
        assert shards_directory(tmp_path / "a.h5").is_dir()  # kept, because they may belong to another cache


def test_a_cache_that_was_moved_with_its_shard_folder_opens(tmp_path):
    content = Content()
    content.write(tmp_path / "a.h5")
    (tmp_path / "x").mkdir()
    for path in list(tmp_path.glob("a.h5*")):
        path.rename(tmp_path / "x" / path.name)
    assert content.is_stored_in(tmp_path / "x" / "a.h5")


# ------------------------------------------------------------------------------------------------------ failures
def test_the_error_for_a_lost_shard_names_it_and_the_others_can_be_salvaged(tmp_path):
    content = Content()
    cache = content.write(tmp_path / "a.h5")
    lost_shard = cache.shard_files[1]
    lost_shard.unlink()
    with pytest.raises(CacheFormatError, match="1 of its 5 shards") as error_info:
        FeatureCache(cache.path)
    assert str(lost_shard.relative_to(tmp_path)) in str(error_info.value)
    assert "\n" not in str(error_info.value)
    salvaged = FeatureCache(cache.path, salvage=True)
    assert salvaged.lost_shards == (str(lost_shard.relative_to(tmp_path)),)
    assert len(salvaged.shard_files) == 4
    assert np.flatnonzero(~salvaged.whole_rows(np.arange(70))).tolist() == list(range(16, 32))
    assert salvaged.read(slice(32, None)).tobytes() == content.features["pooled"][32:].tobytes()
    content.write(cache.path)
    assert content.is_stored_in(cache.path)


@pytest.fixture
def old_content(tmp_path) -> Content:
    content = Content(40, seed=9)
    content.write(tmp_path / "a.h5")
    return content


def count_disk_calls(monkeypatch, fail_at: int | None) -> Iterator[int]:
    """Count the disk calls of a writer; the call with the number ``fail_at`` fails."""
    n_calls = [0]

    def make_failing(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            n_calls[0] += 1
            if n_calls[0] - 1 == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "mkdir"):
        monkeypatch.setattr(os, name, make_failing(getattr(os, name)))
    monkeypatch.setattr(writer, "compute_row_checksums", make_failing(writer.compute_row_checksums))
    monkeypatch.setattr(writer, "fsync_directory", make_failing(writer.fsync_directory))
    while True:
        yield n_calls[0]


@pytest.mark.thorough
@pytest.mark.parametrize("previous", ["shards", "one file", "nothing", "the same"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_write_that_fails_at_any_step_leaves_only_the_old_cache_and_its_shards(
    tmp_path, monkeypatch, previous, parts
):
    path, new_content = tmp_path / "a.h5", Content(70, seed=2)
    old_content = new_content if previous == "the same" else Content(40, seed=9)
    with monkeypatch.context() as patch:
        call_counts = count_disk_calls(patch, None)
        next(call_counts)
        new_content.write(path)
        total = next(call_counts)
    assert total > 20
    for step in range(total):
        for file in sorted(tmp_path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        if previous != "nothing":
            old_content.write(path, None if previous == "one file" else MIN_SHARD_BYTES)
        if parts:
            parts_directory(path).mkdir()
        paths_before = list_all_paths(tmp_path)
        with monkeypatch.context() as patch:
            next(count_disk_calls(patch, step))
            failed = catch_cache_error(lambda: new_content.write(path))
        if failed is None or step >= total - 2:  # an existing folder; the fsync after the rename
            assert new_content.is_stored_in(path)
        else:
            assert "cannot be written" in str(failed)
            assert list_all_paths(tmp_path) == paths_before, step
            assert previous == "nothing" or old_content.is_stored_in(path)


def catch_cache_error(action: Callable[[], object]) -> CacheError | None:
    try:
        action()
    except CacheError as error:
        return error
    return None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("features")])
@pytest.mark.parametrize("failing_block", [0, 2, 4])
def test_a_failed_gather_leaves_only_the_old_cache_and_its_shards(tmp_path, old_content, error, failing_block):
    content, paths_before = Content(70, seed=2), list_all_paths(tmp_path)
    gather, calls = content.gather, iter(range(10))

    def gather_or_fail(*args) -> np.ndarray:
        if next(calls) == failing_block:
            raise error
        return gather(*args)

    content.gather = gather_or_fail
    with pytest.raises(type(error)):
        content.write(tmp_path / "a.h5")
    assert list_all_paths(tmp_path) == paths_before
    assert old_content.is_stored_in(tmp_path / "a.h5")


def test_an_interrupt_after_the_rename_leaves_the_new_cache_intact(tmp_path, old_content, monkeypatch):
    path, new_content, replace = tmp_path / "a.h5", Content(70, seed=2), os.replace

    def replace_and_interrupt(source: Path, target: Path) -> None:
        replace(source, target)
        if target == path:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            new_content.write(path)
    assert new_content.is_stored_in(path)


def test_a_shard_that_changes_before_publication_is_detected(tmp_path, old_content, monkeypatch):
    path, paths_before, replace = tmp_path / "a.h5", list_all_paths(tmp_path), os.replace

    def truncate_and_replace(source: Path, target: Path) -> None:
        os.truncate(source, 70_000)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", truncate_and_replace)
        with pytest.raises(CacheError, match=r"cannot be opened.*differs from what was written"):
            Content(70, seed=2).write(path)
    assert list_all_paths(tmp_path) == paths_before
    assert old_content.is_stored_in(path)


def test_shards_are_durable_under_their_final_names_before_the_cache_is_published(tmp_path, monkeypatch):
    path, steps, replace, fsync = tmp_path / "a.h5", [], os.replace, os.fsync

    def record_replace(source: Path, target: Path) -> None:
        steps.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    def record_fsync(handle: int) -> None:
        steps.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", record_replace)
        patch.setattr(os, "fsync", record_fsync)
        cache = Content(40).write(path)
    shard_inodes = [file.stat().st_ino for file in cache.shard_files]
    folder_inodes = [shards_directory(path).stat().st_ino, tmp_path.stat().st_ino]
    cache_inode = path.stat().st_ino
    assert steps == [
        *(("fsync", inode) for inode in shard_inodes),
        ("fsync", cache_inode),
        *(("rename", inode) for inode in shard_inodes),
        *(("fsync", folder) for folder in folder_inodes),
        ("rename", cache_inode),
        ("fsync", folder_inodes[1]),
    ]


@pytest.mark.parametrize("kind", ["pipe", "folder", "no cache"])
def test_an_existing_pipe_folder_or_file_at_the_path_does_not_block_the_writer(tmp_path, kind):
    path = tmp_path / "a.h5"
    {"pipe": os.mkfifo, "folder": os.mkdir, "no cache": lambda path: path.write_text("text")}[kind](path)
    content = Content()
    if kind == "folder":
        with pytest.raises(CacheError, match="cannot be written"):
            content.write(path)
        assert list_all_paths(tmp_path) == ["a.h5"]
    else:
        content.write(path)
        assert content.is_stored_in(path)


def test_a_shard_folder_that_is_a_link_is_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "a.h5.shards").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(CacheError, match=r"a\.h5\.shards is a link"):
        Content().write(tmp_path / "a.h5")
    assert list_all_paths(tmp_path) == ["a.h5.shards", "elsewhere"]
