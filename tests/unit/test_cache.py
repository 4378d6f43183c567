"""The one writer and reader of caches: rows that stay aligned, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from operator import attrgetter, methodcaller
from pathlib import Path

import numpy as np
import pytest

from featpipe import FeatureCache
from featpipe.cache import format as layout
from featpipe.cache import (
    hdf5,
    parts_directory,
    restrict_facts_to_output,
    write_cache,
    writer,
)
from featpipe.cache import open as opening
from featpipe.errors import CacheError, CacheFormatError, CacheIncompleteError, ConfigError
from featpipe.status import Status
from featpipe.storage import fsync_directory
from tests.faults.disks import files_of_at_most, small_disk
from tests.support.caches import SHAPES, Made, facts, is_whole

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- what is in it
@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "none"])
@pytest.mark.parametrize("n", [0, 1, 40, 1000])
def test_what_is_written_is_read(tmp_path, task, storage, n):
    made = Made(n, task, storage)
    cache = made.write(tmp_path / "a.h5")
    assert is_whole(cache.path, made)
    assert cache.features().dtype == storage
    assert (len(cache), cache.task, cache.outputs) == (n, task, ("pooled", "layer2"))
    assert (cache.manifest["samples"], cache.manifest["ok"]) == (n, np.count_nonzero(made.status == 0))
    assert cache.manifest["created"] == "today"
    assert cache.facts == facts(storage)
    assert only(tmp_path) == ["a.h5"]


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "none"])
def test_X_y_and_ids_are_of_the_same_rows_with_bad_and_unlabelled_ones_among_them(tmp_path, task):
    made = Made(200, task)
    cache = made.write(tmp_path / "a.h5")
    wanted = [i for i in range(200) if made.status[i] == 0 and made.known[i]]
    assert 30 < len(wanted) < 180
    assert cache.usable.tolist() == wanted
    assert np.array_equal(cache.X, made.features["pooled"][wanted])
    assert [cache.ids[row] for row in cache.usable] == [made.ids[i] for i in wanted]
    if task == "none":
        assert cache.y is None
        assert cache.labels is None
        return
    given = [made.given[i] for i in wanted]
    if task == "multilabel":
        assert [{c for c, on in zip(cache.classes, row, strict=True) if on} for row in cache.y] == given
    else:
        assert cache.y.tolist() == given
    for row, answer in zip(cache.usable, cache.y, strict=True):
        assert np.array_equal(cache.labels[row], answer)


def test_labels_of_all_rows_say_where_there_is_none(tmp_path):
    classes = Made(50, "classification")
    assert classes.write(tmp_path / "a.h5").labels.tolist() == classes.given
    targets = Made(50, "regression")
    assert np.array_equal(targets.write(tmp_path / "b.h5").labels, np.array(targets.given), equal_nan=True)
    sets = Made(50, "multilabel")
    matrix = sets.write(tmp_path / "c.h5").labels
    assert [bool((row == -1).all()) for row in matrix] == [given is None for given in sets.given]


def test_statuses_are_words_and_are_counted(tmp_path):
    made = Made(300)
    cache = made.write(tmp_path / "a.h5")
    words = [Status(int(code)).word for code in made.status]
    assert cache.status.tolist() == words
    assert cache.ok.tolist() == [word == "ok" for word in words]
    assert cache.bad_rows() == {word: words.count(word) for word in set(words) - {"ok"}}


def test_where_every_row_is_usable_X_is_the_file_itself(tmp_path):
    made = Made(30, "none")
    made.status[:] = 0
    made.features["pooled"][:] = 1.5
    made.features["layer2"][:] = 2.5
    cache = made.write(tmp_path / "a.h5")
    assert np.shares_memory(cache.X, cache.features())
    assert isinstance(cache.X, np.memmap)


def test_features_cannot_be_written_to(tmp_path):
    cache = Made().write(tmp_path / "a.h5")
    for array in (cache.features(), cache.features("layer2"), cache.status_codes, cache.digests, cache.split):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_an_unknown_output_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'pooled'"):
        Made().write(tmp_path / "a.h5").features("poled")


def test_narrowed_facts_are_equal_when_only_other_outputs_differ():
    one, both = facts(shapes={"pooled": (5,)}), facts()
    assert one != both
    assert restrict_facts_to_output(one, "pooled") == restrict_facts_to_output(both, "pooled") == one
    assert restrict_facts_to_output(both, "pooled") != restrict_facts_to_output(both, "layer2")


# ----------------------------------------------------------------------------------------------------- who reads it
def test_opening_and_reading_imports_no_torch(tmp_path):
    path = Made().write(tmp_path / "a.h5").path
    code = (
        "import sys; from featpipe import FeatureCache\n"
        "cache = FeatureCache(sys.argv[1]); cache.X.sum(); cache.y; list(cache.ids); cache.bad_rows()\n"
        "sys.exit(', '.join({'torch', 'torchvision', 'timm', 'sklearn', 'PIL'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pickled_cache_is_its_path_wherever_it_is_opened(tmp_path, monkeypatch):
    made = Made()
    made.write(tmp_path / "a.h5")
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(FeatureCache("a.h5"))
    assert len(data) < 500
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert again.path == tmp_path / "a.h5"
    assert np.array_equal(again.X, FeatureCache(tmp_path / "a.h5").X)


def test_a_cache_of_a_relative_path_is_read_after_the_folder_was_left(tmp_path, monkeypatch):
    made = Made()
    made.write(tmp_path / "a.h5")
    monkeypatch.chdir(tmp_path)
    cache = FeatureCache("a.h5")
    monkeypatch.chdir("/")
    assert list(cache.ids) == made.ids
    assert np.array_equal(cache.features(), made.features["pooled"], equal_nan=True)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_several_processes_read_one_cache(tmp_path, method):
    made = Made()
    cache = made.write(tmp_path / "a.h5")
    _ = cache.X, cache.ids
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        for found in pool.map(attrgetter("X"), [cache] * 4):
            assert np.array_equal(found, cache.X)
        assert list(pool.map(methodcaller("bad_rows"), [cache] * 4)) == [cache.bad_rows()] * 4


def test_several_threads_read_one_cache(tmp_path):
    made, found = Made(500), []
    cache = made.write(tmp_path / "a.h5")

    def read() -> None:
        found.append((list(cache.ids), cache.X.copy(), cache.y.tolist()))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(ids == made.ids and np.array_equal(X, cache.X) and y == cache.y.tolist() for ids, X, y in found)


def test_who_has_the_old_file_open_goes_on_reading_it_when_it_is_replaced(tmp_path):
    old, new = Made(40, seed=1), Made(70, "regression", "float16", seed=2)
    path = tmp_path / "a.h5"
    cache = old.write(path)
    early = cache.features()
    new.write(path)
    assert np.array_equal(early, old.features["pooled"], equal_nan=True)
    assert np.array_equal(cache.features("layer2"), old.features["layer2"], equal_nan=True)
    assert list(cache.ids) == old.ids
    assert cache.labels.tolist() == old.given
    assert is_whole(path, new)
    path.unlink()
    assert np.array_equal(cache.digests, old.digests)


def test_a_reader_among_replacements_sees_one_or_the_other(tmp_path):
    made = [Made(30 + 10 * i, seed=i) for i in range(2)]
    path = tmp_path / "a.h5"
    made[0].write(path)
    done = threading.Event()

    def replace() -> None:
        for turn in range(40):
            made[turn % 2].write(path)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = 0
    while not done.is_set():
        cache = FeatureCache(path)
        mine = made[0] if len(cache) == made[0].n else made[1]
        assert list(cache.ids) == mine.ids
        assert np.array_equal(cache.features(), mine.features["pooled"], equal_nan=True)
        seen += 1
    writer.join()
    assert seen > 3


@needs_proc
def test_a_cache_takes_one_file_handle_and_gives_it_back(tmp_path):
    path = Made().write(tmp_path / "a.h5").path
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    caches = [FeatureCache(path) for _ in range(20)]
    arrays = [(cache.features(), cache.ids, cache.split, cache.digests) for cache in caches]
    assert len(os.listdir("/proc/self/fd")) - before <= 20
    del caches, arrays
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_reads_as_many_bytes_of_a_long_file_as_of_a_short_one(tmp_path, monkeypatch):
    read = []

    class Counting(io.FileIO):
        def readinto(self, buffer) -> int:
            read.append(len(buffer))
            return super().readinto(buffer)

        def read(self, size: int = -1) -> bytes:
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(opening, "open", Counting, raising=False)
    total = {}
    for n in (10, 50_000):
        path = tmp_path / f"{n}.h5"
        with monkeypatch.context() as patch:
            patch.delattr(opening, "open")
            Made(n, "none").write(path)
        read.clear()
        assert len(FeatureCache(path)) == n
        assert min(read) >= 0
        total[n] = sum(read)
    assert total[10] < 30_000
    assert abs(total[50_000] - total[10]) < 1000
    assert path.stat().st_size > 5_000_000


# ------------------------------------------------------------------------------------------------- how it is written
def test_features_are_asked_for_in_blocks_that_are_small_and_cover_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "WRITE_BLOCK_BYTES", 1000)
    made, asked = Made(333), []

    def gather(output: str, start: int, stop: int) -> np.ndarray:
        asked.append((output, start, stop))
        return made.gather(output, start, stop)

    assert is_whole(made.write(tmp_path / "a.h5", gather).path, made)
    for output, shape in SHAPES.items():
        blocks = [(start, stop) for name, start, stop in asked if name == output]
        assert [row for start, stop in blocks for row in range(start, stop)] == list(range(333))
        assert len(blocks) > 3
        assert max(stop - start for start, stop in blocks) * 4 * int(np.prod(shape)) <= 1000


def test_a_row_larger_than_a_block_is_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "WRITE_BLOCK_BYTES", 1)
    made = Made(7)
    assert is_whole(made.write(tmp_path / "a.h5").path, made)


@pytest.mark.parametrize("n", [1, 40])
def test_the_temporary_file_lies_among_the_parts_where_there_are_any(tmp_path, n):
    """There it is removed with them when its writer was killed."""
    made, path, seen = Made(n), tmp_path / "a.h5", []
    parts_directory(path).mkdir()

    def gather(output: str, start: int, stop: int) -> np.ndarray:
        seen.append((only(tmp_path), only(parts_directory(path))))
        return made.gather(output, start, stop)

    assert is_whole(made.write(path, gather).path, made)
    for beside, (within,) in seen:
        assert beside == ["a.h5.parts"]
        assert within.startswith(".")
        assert within.endswith(".tmp")
    assert only(parts_directory(path)) == []


def test_an_output_that_hdf5_cannot_name_is_not_published(tmp_path):
    for name in ("a/b", "", ".", "a\0b"):
        shapes = {name: (5,)}
        made = Made(3, "none")
        with pytest.raises((CacheError, ValueError)):
            write_cache(
                tmp_path / "a.h5", made.table, {"facts": facts(shapes=shapes)}, shapes, "float32",
                lambda _, i, j, made=made: made.features["pooled"][i:j],
            )  # fmt: skip
        assert only(tmp_path) == []


def test_a_manifest_that_json_cannot_hold_is_not_published(tmp_path):
    made = Made(3)
    with pytest.raises(ValueError, match="JSON"):
        write_cache(tmp_path / "a.h5", made.table, {"facts": facts(), "x": np.nan}, SHAPES, "float32", made.gather)
    assert only(tmp_path) == []


def test_a_manifest_that_no_reader_would_take_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "MAX_MANIFEST_BYTES", 2000)
    made = Made(3)
    with pytest.raises(CacheError, match=r"cannot be opened.*more than 2000"):
        write_cache(tmp_path / "a.h5", made.table, {"facts": facts(), "x": "x" * 2000}, SHAPES, "float32", made.gather)
    assert only(tmp_path) == []


def test_names_that_are_not_unicode_are_kept_in_the_manifest(tmp_path):
    made = Made(3)
    manifest = {"facts": facts(), "archives": ["/data/caf\udce9", "/ünï/\N{GRINNING FACE}\n\x1b[31m"]}
    write_cache(tmp_path / "a.h5", made.table, manifest, SHAPES, "float32", made.gather)
    assert FeatureCache(tmp_path / "a.h5").manifest["archives"] == manifest["archives"]


# ----------------------------------------------------------------------------------------------- kills and full disks
@pytest.fixture
def old(tmp_path) -> Made:
    made = Made(20, seed=9)
    made.write(tmp_path / "a.h5")
    return made


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("full"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("block", [0, 1, 5])
def test_a_gather_that_fails_leaves_the_old_cache_and_nothing_else(tmp_path, old, monkeypatch, error, block):
    monkeypatch.setattr(writer, "WRITE_BLOCK_BYTES", 200)
    made, calls = Made(50), iter(range(100))

    def gather(output: str, start: int, stop: int) -> np.ndarray:
        if next(calls) == block:
            raise error
        return made.gather(output, start, stop)

    with pytest.raises(CacheError if isinstance(error, (OSError, RuntimeError)) else type(error)):
        made.write(tmp_path / "a.h5", gather)
    assert only(tmp_path) == ["a.h5"]
    assert is_whole(tmp_path / "a.h5", old)


@pytest.mark.parametrize(("call", "at"), [("fsync", 0), ("replace", 0)])
def test_a_disk_that_fails_at_publishing_leaves_the_old_cache_and_nothing_else(tmp_path, old, monkeypatch, call, at):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CacheError, match="cannot be written") as caught:
            Made(50).write(tmp_path / "a.h5")
    assert "\n" not in str(caught.value)
    assert only(tmp_path) == ["a.h5"]
    assert is_whole(tmp_path / "a.h5", old)


def test_a_folder_that_cannot_be_synced_after_the_rename_leaves_the_new_cache(tmp_path, old, monkeypatch):
    made = Made(50)

    def fail(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(writer, "fsync_directory", fail)
    with pytest.raises(CacheError, match="cannot be written"):
        made.write(tmp_path / "a.h5")
    assert only(tmp_path) == ["a.h5"]
    assert is_whole(tmp_path / "a.h5", made)


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_syncs_no_folders_is_no_error(tmp_path, monkeypatch, number, passes):
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with contextlib.nullcontext() if passes else pytest.raises(OSError, match=os.strerror(number)):
        fsync_directory(tmp_path)


def test_writes_of_hdf5_that_fail_anywhere_leave_the_old_cache_and_nothing_else(tmp_path, old):
    made, path = Made(2000), tmp_path / "a.h5"
    size = made.write(tmp_path / "b.h5").path.stat().st_size
    (tmp_path / "b.h5").unlink()
    for nbytes in np.linspace(0, size - 1, 25).astype(int).tolist():
        with files_of_at_most(nbytes), pytest.raises(CacheError, match="cannot be written"):
            made.write(path)
        assert only(tmp_path) == ["a.h5"], nbytes
        assert is_whole(path, old)
    with files_of_at_most(size):
        made.write(path)
    assert is_whole(path, made)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")], ids=repr)
def test_a_call_of_hdf5_to_its_file_that_fails_leaves_the_old_cache_and_nothing_else(tmp_path, old, monkeypatch, error):
    """At every call: an interrupt is raised in the first Python code that runs, which is often such a call."""
    made, path = Made(30), tmp_path / "a.h5"
    calls, at = [0], [-1]

    class Failing(hdf5._GuardedFile):
        def _attempt(self, action, *given):
            calls[0] += 1

            def failing(*given):
                if calls[0] - 1 == at[0]:
                    raise error
                return action(*given)

            return super()._attempt(failing, *given)

    monkeypatch.setattr(hdf5, "_GuardedFile", Failing)
    made.write(tmp_path / "b.h5")
    total = calls[0]
    (tmp_path / "b.h5").unlink()
    assert total > 40
    for at[0] in range(0, total, 3):
        calls[0] = 0
        with pytest.raises(CacheError if isinstance(error, OSError) else KeyboardInterrupt):
            made.write(path)
        assert only(tmp_path) == ["a.h5"]
        assert is_whole(path, old)


def test_a_really_full_disk_leaves_the_old_cache_and_nothing_else(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        old = Made(20)
        old.write(disk / "a.h5")
        for n in (2500, 4000, 8000):
            with pytest.raises(CacheError, match="free some space"):
                Made(n).write(disk / "a.h5")
            assert only(disk) == ["a.h5"]
            assert is_whole(disk / "a.h5", old)


# ----------------------------------------------------------------------------------------------------------- messages
def test_a_cache_that_is_not_there_says_how_caches_are_made(tmp_path):
    with pytest.raises(CacheError, match="there is no such file; `featpipe extract` writes caches") as caught:
        FeatureCache(tmp_path / "a.h5")
    assert type(caught.value) is CacheError


def test_a_cache_whose_parts_alone_are_there_is_incomplete(tmp_path):
    parts_directory(tmp_path / "a.h5").mkdir()
    with pytest.raises(CacheIncompleteError, match="run the same command again"):
        FeatureCache(tmp_path / "a.h5")


def test_a_finished_cache_beside_which_there_are_parts_is_read(tmp_path, old):
    parts_directory(tmp_path / "a.h5").mkdir()
    assert is_whole(tmp_path / "a.h5", old)


def test_a_folder_is_not_a_cache(tmp_path):
    with pytest.raises(CacheFormatError, match="is a folder"):
        FeatureCache(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path, old):
    (tmp_path / "a.h5").chmod(0)
    with pytest.raises(CacheError, match="Permission denied"):
        FeatureCache(tmp_path / "a.h5")


def test_every_message_is_one_line_that_begins_with_the_path(tmp_path, old):
    path = tmp_path / "a.h5"
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:100], whole[:-1], whole[:3000] + bytes(100) + whole[3100:]):
        path.write_bytes(data)
        with pytest.raises(CacheFormatError) as caught:
            FeatureCache(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_it_shows_what_it_is(tmp_path, old):
    cache = FeatureCache(tmp_path / "a.h5")
    assert repr(cache) == f"FeatureCache({str(cache.path)!r}, n=20, outputs=['pooled', 'layer2'])"


def test_a_process_that_keeps_the_failure_ends_well(tmp_path):
    """HDF5 frees what is open of a Python file after Python itself, and crashes."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from featpipe.cache import hdf5
from featpipe.errors import CacheError
from tests.support.caches import Made
class Failing(hdf5._GuardedFile):
    def _attempt(self, action, *given):
        def fail(*given):
            raise OSError(28, "full")
        return super()._attempt(fail, *given)
hdf5._GuardedFile = Failing
try:
    Made(30).write(Path({str(tmp_path)!r}) / "a.h5")
except CacheError as error:
    kept = error
    sys.kept = error
sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
