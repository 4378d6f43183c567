"""A cache in shards: the same rows, byte for byte, and nothing that a reader would notice."""

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
from featpipe.cache import open as opening
from featpipe.data import Labels
from featpipe.errors import CacheError, CacheFormatError
from featpipe.status import Status
from featpipe.storage import StringColumn

SMALLEST = 65536  # bytes of a shard: one page of the largest kind
WIDE = {"pooled": (1024,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "one output": WIDE,
    "two outputs": {"pooled": (1024,), "layer2": (8, 4, 4)},
    "an odd width": {"pooled": (24,)},
    "odd widths": {"pooled": (40,), "tokens": (3, 8)},
    "an output without numbers": {"pooled": (1024,), "nothing": (0,)},
}


def facts(shapes: dict[str, tuple[int, ...]], storage: str) -> dict[str, object]:
    outputs = {name: {"node": name, "pool": "none"} for name in shapes}
    backbone = {"name": "net", "source": "user", "weights": "0" * 64, "transform": {}, "outputs": outputs}
    return {"backbone": backbone, "precision": "fp32", "storage": storage, "extraction": 1}


class Content:
    """What goes into a cache."""

    def __init__(
        self, n: int = 70, shapes: dict[str, tuple[int, ...]] | None = None, storage: str = "float32", seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.shapes, self.storage = n, shapes or WIDE, storage
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

    def write(self, path: Path, shard_bytes: int | None = SMALLEST) -> FeatureCache:
        manifest = {"facts": facts(self.shapes, self.storage), "created": "today"}
        write_cache(path, self.table, manifest, self.shapes, self.storage, self.gather, shard_bytes)
        return FeatureCache(path)

    def is_in(self, path: Path) -> bool:
        cache = FeatureCache(path)
        return cache.table().same_as(self.table) and all(
            cache.features(name).tobytes() == values.tobytes() for name, values in self.features.items()
        )


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def of_cache(cache: FeatureCache) -> list[str]:
    """All that may lie in the folder of a cache."""
    folder = cache.path.parent
    files = [str(path.relative_to(folder)) for path in (cache.path, *cache.shard_files)]
    return sorted([*files, shards_directory(cache.path).name] if cache.shard_files else files)


# ------------------------------------------------------------------------------------------------ the same rows
@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("shard_bytes", [1, 200_000])
def test_shards_hold_byte_for_byte_what_one_file_holds(tmp_path, shapes, storage, shard_bytes):
    width = np.dtype(storage).itemsize * sum(math.prod(shape) for shape in shapes.values())
    content = Content(600_000 // width, shapes, storage)
    one = content.write(tmp_path / "one.h5", None)
    cache = content.write(tmp_path / "a.h5", shard_bytes)
    assert one.shard_files == ()
    assert len(cache.shard_files) >= 2
    assert content.is_in(one.path)
    assert content.is_in(cache.path)
    assert cache.damaged_columns() == []
    for output, shape in shapes.items():
        assert cache.features(output).shape == (content.n, *shape)
        assert cache.features(output).dtype == storage
        assert cache.whole_rows(np.arange(content.n), output).all()
        assert cache._columns[f"checks/{output}"].tobytes() == one._columns[f"checks/{output}"].tobytes()
    assert everything(tmp_path) == sorted(of_cache(cache) + of_cache(one))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
def test_h5py_alone_reads_the_same(tmp_path, monkeypatch, shapes):
    content = Content(600_000 // (4 * sum(math.prod(shape) for shape in shapes.values())), shapes)
    content.write(tmp_path / "a.h5")
    monkeypatch.chdir("/")
    with h5py.File(tmp_path / "a.h5") as file:
        for output, values in content.features.items():
            assert file[f"features/{output}"].is_virtual
            assert file[f"features/{output}"][()].tobytes() == values.tobytes()
        assert file["samples/status"][()].tolist() == content.table.status.tolist()


def test_the_last_shard_may_be_short_and_each_of_the_others_is_of_the_size_that_was_asked_for(tmp_path):
    cache = Content(70).write(tmp_path / "a.h5", 2 * SMALLEST + 5000)
    assert [shard["rows"] for shard in cache.manifest["shards"]] == [[0, 32], [32, 64], [64, 70]]
    assert cache.shard_bytes == 2 * SMALLEST
    sizes = [os.path.getsize(path) for path in cache.shard_files]
    assert cache.file_bytes == cache.path.stat().st_size + sum(sizes)
    again = Content(70, seed=1).write(tmp_path / "b.h5", cache.shard_bytes)
    assert [shard["rows"] for shard in again.manifest["shards"]] == [[0, 32], [32, 64], [64, 70]]


def test_the_rows_of_a_shard_fill_pages_in_every_output(tmp_path):
    cache = Content(20_000, {"pooled": (10,), "more": (6,)}).write(tmp_path / "a.h5")
    rows = [shard["rows"] for shard in cache.manifest["shards"]]
    assert rows == [[0, 8192], [8192, 16384], [16384, 20_000]]  # 8192 rows of 40 bytes are five pages, of 24 are three


def test_shards_of_some_megabytes_lie_in_memory_as_they_lie_in_their_files_within_huge_pages(tmp_path):
    """Else each page of 4 kB is mapped on its own, and reading shuffled rows takes a third longer."""
    cache = Content(6000).write(tmp_path / "a.h5", 11 * 2**20)
    assert [shard["rows"] for shard in cache.manifest["shards"]] == [[0, 2560], [2560, 5120], [5120, 6000]]
    for shard in cache.manifest["shards"]:
        for output, offset in shard["offsets"].items():
            address = cache.features(output)[shard["rows"][0] :].__array_interface__["data"][0]
            assert (address - offset) % 2**21 == 0


@pytest.mark.parametrize(("n", "shard_bytes"), [(70, 70 * 4096), (0, 1), (16, 1), (70, None)])
def test_what_fits_into_one_shard_is_one_file(tmp_path, n, shard_bytes):
    cache = Content(n).write(tmp_path / "a.h5", shard_bytes)
    assert (cache.shard_files, cache.shard_bytes) == ((), None)
    assert "shards" not in cache.manifest
    assert everything(tmp_path) == ["a.h5"]


def test_shards_of_the_same_rows_are_one_file(tmp_path):
    content = Content(48)
    for column in (content.table.status, content.table.digests, content.features["pooled"]):
        column[16:32] = column[:16]
    cache = content.write(tmp_path / "a.h5")
    assert len(cache.manifest["shards"]) == 3
    assert len(cache.shard_files) == 2
    assert content.is_in(cache.path)
    assert everything(tmp_path) == of_cache(cache)


def test_the_same_rows_are_the_same_bytes_whenever_they_are_written(tmp_path):
    content = Content()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        content.write(tmp_path / name / "one.h5", None)
        content.write(tmp_path / name / "a.h5")
        time.sleep(1.01)  # HDF5 keeps whole seconds, where it keeps them
    files = ["one.h5", *(f"a.h5.shards/{file.name}" for file in FeatureCache(tmp_path / "a" / "a.h5").shard_files)]
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_more_shards_than_a_process_may_have_files_open(tmp_path):
    content = Content(400 * 16)
    content.write(tmp_path / "a.h5")
    code = (
        "import resource, sys, hashlib; from featpipe import FeatureCache\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "print(hashlib.sha256(FeatureCache(sys.argv[1]).features().tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.h5")], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (hashlib.sha256(content.features["pooled"]).hexdigest(), "")


# ----------------------------------------------------------------------------------------------- none the wiser
@pytest.fixture(params=["float32", "float16"])
def pair(tmp_path, request) -> tuple[FeatureCache, FeatureCache]:
    """The same rows in one file and in shards of 16 rows."""
    content = Content(70, {"pooled": (1024,), "layer2": (8, 4, 8)}, request.param)
    return content.write(tmp_path / "one.h5", None), content.write(tmp_path / "a.h5")


ASKED: dict[str, Callable[[FeatureCache], object]] = {
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


@pytest.mark.parametrize("what", ASKED)
def test_what_is_read_of_shards_is_what_is_read_of_one_file(pair, what):
    one, several = (ASKED[what](cache) for cache in pair)
    assert type(one) is type(several) or isinstance(one, np.ndarray)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (several.dtype, several.shape)
        assert one.tobytes() == several.tobytes()
    else:
        assert one == several


READ_IN_A_CHILD = """
import pickle, sys
cache = pickle.loads(sys.stdin.buffer.read())
print(cache.read(slice(14, 18), "layer2").tobytes().hex())
"""


def test_a_child_process_reads_the_shards_of_a_pickled_cache(pair):
    cache = pair[1]
    done = subprocess.run([sys.executable, "-c", READ_IN_A_CHILD], input=pickle.dumps(cache), capture_output=True)
    assert bytes.fromhex(done.stdout.decode()) == cache.read(slice(14, 18), "layer2").tobytes(), done.stderr


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_reads_the_shards(pair):
    cache = pair[1]
    total = np.nansum(cache.features(), dtype=np.float64)
    child = os.fork()
    if not child:
        os._exit(0 if np.nansum(cache.features(), dtype=np.float64) == total else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.nansum(cache.features(), dtype=np.float64) == total


def test_arrays_outlive_their_cache_and_give_their_addresses_back(tmp_path):
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(".h5.shards/")

    if not Path("/proc/self/maps").exists():
        pytest.skip("counts what is mapped in /proc")
    content = Content()
    before = mapped()
    features = content.write(tmp_path / "a.h5").features()
    assert mapped() == before + 5
    assert features.tobytes() == content.features["pooled"].tobytes()
    with pytest.raises(ValueError, match="read-only"):
        features[0] = 0
    del features
    assert mapped() == before


# ------------------------------------------------------------------------------------------- replaced and renamed
def test_the_shards_of_a_cache_that_is_replaced_are_removed_and_who_has_them_open_reads_on(tmp_path):
    path, old, new = tmp_path / "a.h5", Content(seed=1), Content(100, seed=2)
    cache = old.write(path)
    before = set(cache.shard_files)
    assert new.write(path).path == path
    assert not any(file.exists() for file in before)
    assert cache.features().tobytes() == old.features["pooled"].tobytes()
    assert new.is_in(path)
    assert everything(tmp_path) == of_cache(FeatureCache(path))
    old.write(path, None)
    assert old.is_in(path)
    assert everything(tmp_path) == ["a.h5"]
    new.write(path)
    assert new.is_in(path)


def test_shards_that_a_new_cache_names_too_stay(tmp_path):
    path, old = tmp_path / "a.h5", Content(64)
    before = old.write(path).shard_files
    new = Content(64)
    new.features["pooled"][63] = 1.5
    new.table.status[63] = Status.OK
    after = new.write(path).shard_files
    assert before[:3] == after[:3]
    assert before[3] != after[3]
    assert new.is_in(path)
    assert everything(tmp_path) == of_cache(FeatureCache(path))


def test_a_reader_that_comes_while_the_cache_is_replaced_sees_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    """The shards are gone after the manifest that names them was read: it reads the new one."""
    path, old, new = tmp_path / "a.h5", Content(seed=1), Content(100, seed=2)
    old.write(path)
    joined, turns = opening._map_shards, iter([True])

    def late(*given: object) -> object:
        if next(turns, False):
            with monkeypatch.context() as patch:
                patch.setattr(opening, "_map_shards", joined)
                new.write(path)
        return joined(*given)

    monkeypatch.setattr(opening, "_map_shards", late)
    assert new.is_in(path)


@pytest.mark.parametrize("shards_too", [True, False])
def test_a_renamed_cache_opens_with_its_folder_renamed_or_as_it_was(tmp_path, shards_too):
    content = Content()
    before = content.write(tmp_path / "a.h5")
    before.path.rename(tmp_path / "b.h5")
    if shards_too:
        shards_directory(before.path).rename(tmp_path / "b.h5.shards")
    assert content.is_in(tmp_path / "b.h5")
    cache = FeatureCache(tmp_path / "b.h5")
    assert {file.parent.name for file in cache.shard_files} == {"b.h5.shards" if shards_too else "a.h5.shards"}
    assert cache.file_bytes == sum(file.stat().st_size for file in (cache.path, *cache.shard_files))
    new = Content(seed=5)
    new.write(tmp_path / "b.h5")
    assert new.is_in(tmp_path / "b.h5")
    if shards_too:
        assert everything(tmp_path) == of_cache(FeatureCache(tmp_path / "b.h5"))
    else:
        assert shards_directory(tmp_path / "a.h5").is_dir()  # they may be another's, so they are left


def test_a_cache_that_was_moved_with_its_folder_opens(tmp_path):
    content = Content()
    content.write(tmp_path / "a.h5")
    (tmp_path / "x").mkdir()
    for path in list(tmp_path.glob("a.h5*")):
        path.rename(tmp_path / "x" / path.name)
    assert content.is_in(tmp_path / "x" / "a.h5")


# ------------------------------------------------------------------------------------------------------ failures
def test_a_lost_shard_is_named_and_the_others_can_be_salvaged(tmp_path):
    content = Content()
    cache = content.write(tmp_path / "a.h5")
    lost = cache.shard_files[1]
    lost.unlink()
    with pytest.raises(CacheFormatError, match="1 of its 5 shards") as caught:
        FeatureCache(cache.path)
    assert str(lost.relative_to(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)
    salvaged = FeatureCache(cache.path, salvage=True)
    assert salvaged.lost_shards == (str(lost.relative_to(tmp_path)),)
    assert len(salvaged.shard_files) == 4
    assert np.flatnonzero(~salvaged.whole_rows(np.arange(70))).tolist() == list(range(16, 32))
    assert salvaged.read(slice(32, None)).tobytes() == content.features["pooled"][32:].tobytes()
    content.write(cache.path)
    assert content.is_in(cache.path)


@pytest.fixture
def old(tmp_path) -> Content:
    content = Content(40, seed=9)
    content.write(tmp_path / "a.h5")
    return content


def calls(monkeypatch, fail_at: int | None) -> Iterator[int]:
    """Counts the calls that a writer makes to the disk; the one of this number fails."""
    count = [0]

    def failing(function: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object, **named: object) -> object:
            count[0] += 1
            if count[0] - 1 == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*given, **named)

        return call

    for name in ("fsync", "replace", "mkdir"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    monkeypatch.setattr(writer, "compute_row_checksums", failing(writer.compute_row_checksums))
    monkeypatch.setattr(writer, "fsync_directory", failing(writer.fsync_directory))
    while True:
        yield count[0]


@pytest.mark.thorough
@pytest.mark.parametrize("before", ["shards", "one file", "nothing", "the same"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_write_that_fails_at_any_step_leaves_the_old_cache_with_its_shards_and_nothing_else(
    tmp_path, monkeypatch, before, parts
):
    path, new = tmp_path / "a.h5", Content(70, seed=2)
    old = new if before == "the same" else Content(40, seed=9)
    with monkeypatch.context() as patch:
        counted = calls(patch, None)
        next(counted)
        new.write(path)
        total = next(counted)
    assert total > 20
    for step in range(total):
        for file in sorted(tmp_path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        if before != "nothing":
            old.write(path, None if before == "one file" else SMALLEST)
        if parts:
            parts_directory(path).mkdir()
        held = everything(tmp_path)
        with monkeypatch.context() as patch:
            next(calls(patch, step))
            failed = caught(lambda: new.write(path))
        if failed is None or step >= total - 2:  # a folder that is there already; the folder after the rename
            assert new.is_in(path)
        else:
            assert "cannot be written" in str(failed)
            assert everything(tmp_path) == held, step
            assert before == "nothing" or old.is_in(path)


def caught(action: Callable[[], object]) -> CacheError | None:
    try:
        action()
    except CacheError as error:
        return error
    return None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("features")])
@pytest.mark.parametrize("block", [0, 2, 4])
def test_a_gather_that_fails_leaves_the_old_cache_with_its_shards_and_nothing_else(tmp_path, old, error, block):
    content, held = Content(70, seed=2), everything(tmp_path)
    gather, turns = content.gather, iter(range(10))

    def failing(*given) -> np.ndarray:
        if next(turns) == block:
            raise error
        return gather(*given)

    content.gather = failing
    with pytest.raises(type(error)):
        content.write(tmp_path / "a.h5")
    assert everything(tmp_path) == held
    assert old.is_in(tmp_path / "a.h5")


def test_an_interrupt_after_the_rename_leaves_the_new_cache_whole(tmp_path, old, monkeypatch):
    path, new, replace = tmp_path / "a.h5", Content(70, seed=2), os.replace

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        if target == path:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            new.write(path)
    assert new.is_in(path)


def test_a_shard_that_changes_before_the_cache_is_published_is_seen(tmp_path, old, monkeypatch):
    path, held, replace = tmp_path / "a.h5", everything(tmp_path), os.replace

    def shortened(source: Path, target: Path) -> None:
        os.truncate(source, 70_000)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", shortened)
        with pytest.raises(CacheError, match=r"cannot be opened.*differs from what was written"):
            Content(70, seed=2).write(path)
    assert everything(tmp_path) == held
    assert old.is_in(path)


def test_shards_are_durable_under_their_names_before_the_cache_names_them(tmp_path, monkeypatch):
    path, steps, replace, fsync = tmp_path / "a.h5", [], os.replace, os.fsync

    def replacing(source: Path, target: Path) -> None:
        steps.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    def syncing(handle: int) -> None:
        steps.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replacing)
        patch.setattr(os, "fsync", syncing)
        cache = Content(40).write(path)
    shards = [file.stat().st_ino for file in cache.shard_files]
    folders = [shards_directory(path).stat().st_ino, tmp_path.stat().st_ino]
    main = path.stat().st_ino
    assert steps == [
        *(("fsync", shard) for shard in shards),
        ("fsync", main),
        *(("rename", shard) for shard in shards),
        *(("fsync", folder) for folder in folders),
        ("rename", main),
        ("fsync", folders[1]),
    ]


@pytest.mark.parametrize("kind", ["pipe", "folder", "no cache"])
def test_what_has_the_name_already_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.h5"
    {"pipe": os.mkfifo, "folder": os.mkdir, "no cache": lambda path: path.write_text("text")}[kind](path)
    content = Content()
    if kind == "folder":
        with pytest.raises(CacheError, match="cannot be written"):
            content.write(path)
        assert everything(tmp_path) == ["a.h5"]
    else:
        content.write(path)
        assert content.is_in(path)


def test_a_folder_of_shards_that_is_a_link_is_not_written_into(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "a.h5.shards").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(CacheError, match=r"a\.h5\.shards is a link"):
        Content().write(tmp_path / "a.h5")
    assert everything(tmp_path) == ["a.h5.shards", "elsewhere"]
