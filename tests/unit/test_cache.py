"""Writing and opening caches: rows stay aligned, and a file is complete or absent."""

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
from featpipe.cache import format as format_module
from featpipe.cache import (
    hdf5,
    parts_directory,
    restrict_facts_to_output,
    write_cache,
    writer,
)
from featpipe.cache import open as open_module
from featpipe.errors import CacheError, CacheFormatError, CacheIncompleteError, ConfigError
from featpipe.status import Status
from featpipe.storage import fsync_directory
from tests.faults.disks import files_of_at_most, small_disk
from tests.support.caches import SHAPES, CacheContent, has_content, make_facts

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- what is in it
@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "none"])
@pytest.mark.parametrize("n", [0, 1, 40, 1000])
def test_a_written_cache_is_read_back(tmp_path, task, storage, n):
    content = CacheContent(n, task, storage)
    cache = content.write(tmp_path / "a.h5")
    assert has_content(cache.path, content)
    assert cache.features().dtype == storage
    assert (len(cache), cache.task, cache.outputs) == (n, task, ("pooled", "layer2"))
    assert (cache.manifest["samples"], cache.manifest["ok"]) == (n, np.count_nonzero(content.status == 0))
    assert cache.manifest["created"] == "today"
    assert cache.facts == make_facts(storage)
    assert list_names(tmp_path) == ["a.h5"]


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "none"])
def test_X_y_and_ids_are_aligned_despite_bad_and_unlabelled_rows(tmp_path, task):
    content = CacheContent(200, task)
    cache = content.write(tmp_path / "a.h5")
    usable_rows = [i for i in range(200) if content.status[i] == 0 and content.is_labeled[i]]
    assert 30 < len(usable_rows) < 180
    assert cache.usable.tolist() == usable_rows
    assert np.array_equal(cache.X, content.features["pooled"][usable_rows])
    assert [cache.ids[row] for row in cache.usable] == [content.ids[i] for i in usable_rows]
    if task == "none":
        assert cache.y is None
        assert cache.labels is None
        return
    expected_labels = [content.raw_labels[i] for i in usable_rows]
    if task == "multilabel":
        assert [
            {c for c, is_set in zip(cache.classes, row, strict=True) if is_set} for row in cache.y
        ] == expected_labels
    else:
        assert cache.y.tolist() == expected_labels
    for row, label in zip(cache.usable, cache.y, strict=True):
        assert np.array_equal(cache.labels[row], label)


def test_labels_of_all_rows_mark_unlabelled_rows(tmp_path):
    classes = CacheContent(50, "classification")
    assert classes.write(tmp_path / "a.h5").labels.tolist() == classes.raw_labels
    targets = CacheContent(50, "regression")
    assert np.array_equal(targets.write(tmp_path / "b.h5").labels, np.array(targets.raw_labels), equal_nan=True)
    sets = CacheContent(50, "multilabel")
    matrix = sets.write(tmp_path / "c.h5").labels
    assert [bool((row == -1).all()) for row in matrix] == [raw_labels is None for raw_labels in sets.raw_labels]


def test_statuses_are_words_and_bad_rows_are_counted(tmp_path):
    content = CacheContent(300)
    cache = content.write(tmp_path / "a.h5")
    words = [Status(int(code)).word for code in content.status]
    assert cache.status.tolist() == words
    assert cache.ok.tolist() == [word == "ok" for word in words]
    assert cache.bad_rows() == {word: words.count(word) for word in set(words) - {"ok"}}


def test_X_is_memory_mapped_if_every_row_is_usable(tmp_path):
    content = CacheContent(30, "none")
    content.status[:] = 0
    content.features["pooled"][:] = 1.5
    content.features["layer2"][:] = 2.5
    cache = content.write(tmp_path / "a.h5")
    assert np.shares_memory(cache.X, cache.features())
    assert isinstance(cache.X, np.memmap)


def test_arrays_of_a_cache_are_read_only(tmp_path):
    cache = CacheContent().write(tmp_path / "a.h5")
    for array in (cache.features(), cache.features("layer2"), cache.status_codes, cache.digests, cache.split):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_an_unknown_output_suggests_the_nearest_match(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'pooled'"):
        CacheContent().write(tmp_path / "a.h5").features("poled")


def test_facts_restricted_to_an_output_ignore_the_other_outputs():
    pooled_facts, all_facts = make_facts(shapes={"pooled": (5,)}), make_facts()
    assert pooled_facts != all_facts
    assert (
        restrict_facts_to_output(pooled_facts, "pooled")
        == restrict_facts_to_output(all_facts, "pooled")
        == pooled_facts
    )
    assert restrict_facts_to_output(all_facts, "pooled") != restrict_facts_to_output(all_facts, "layer2")


# ----------------------------------------------------------------------------------------------------- who reads it
def test_opening_and_reading_imports_no_torch(tmp_path):
    path = CacheContent().write(tmp_path / "a.h5").path
    code = (
        "import sys; from featpipe import FeatureCache\n"
        "cache = FeatureCache(sys.argv[1]); cache.X.sum(); cache.y; list(cache.ids); cache.bad_rows()\n"
        "sys.exit(', '.join({'torch', 'torchvision', 'timm', 'sklearn', 'PIL'} & set(sys.modules)) or 0)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (0, "")


def test_a_pickled_cache_stores_its_absolute_path(tmp_path, monkeypatch):
    content = CacheContent()
    content.write(tmp_path / "a.h5")
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(FeatureCache("a.h5"))
    assert len(data) < 500
    monkeypatch.chdir("/")
    unpickled = pickle.loads(data)
    assert unpickled.path == tmp_path / "a.h5"
    assert np.array_equal(unpickled.X, FeatureCache(tmp_path / "a.h5").X)


def test_a_cache_opened_by_a_relative_path_is_read_from_another_working_directory(tmp_path, monkeypatch):
    content = CacheContent()
    content.write(tmp_path / "a.h5")
    monkeypatch.chdir(tmp_path)
    cache = FeatureCache("a.h5")
    monkeypatch.chdir("/")
    assert list(cache.ids) == content.ids
    assert np.array_equal(cache.features(), content.features["pooled"], equal_nan=True)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_several_processes_can_read_one_cache(tmp_path, method):
    content = CacheContent()
    cache = content.write(tmp_path / "a.h5")
    _ = cache.X, cache.ids
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        for X in pool.map(attrgetter("X"), [cache] * 4):
            assert np.array_equal(X, cache.X)
        assert list(pool.map(methodcaller("bad_rows"), [cache] * 4)) == [cache.bad_rows()] * 4


def test_several_threads_can_read_one_cache(tmp_path):
    content, results = CacheContent(500), []
    cache = content.write(tmp_path / "a.h5")

    def read() -> None:
        results.append((list(cache.ids), cache.X.copy(), cache.y.tolist()))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(ids == content.ids and np.array_equal(X, cache.X) and y == cache.y.tolist() for ids, X, y in results)


def test_an_open_cache_still_shows_the_old_file_after_it_is_replaced(tmp_path):
    old_content, new_content = CacheContent(40, seed=1), CacheContent(70, "regression", "float16", seed=2)
    path = tmp_path / "a.h5"
    cache = old_content.write(path)
    features = cache.features()
    new_content.write(path)
    assert np.array_equal(features, old_content.features["pooled"], equal_nan=True)
    assert np.array_equal(cache.features("layer2"), old_content.features["layer2"], equal_nan=True)
    assert list(cache.ids) == old_content.ids
    assert cache.labels.tolist() == old_content.raw_labels
    assert has_content(path, new_content)
    path.unlink()
    assert np.array_equal(cache.digests, old_content.digests)


def test_a_concurrent_reader_sees_the_old_or_the_new_cache(tmp_path):
    contents = [CacheContent(30 + 10 * i, seed=i) for i in range(2)]
    path = tmp_path / "a.h5"
    contents[0].write(path)
    is_finished = threading.Event()

    def replace() -> None:
        for turn in range(40):
            contents[turn % 2].write(path)
        is_finished.set()

    writer = threading.Thread(target=replace)
    writer.start()
    n_reads = 0
    while not is_finished.is_set():
        cache = FeatureCache(path)
        expected = contents[0] if len(cache) == contents[0].n else contents[1]
        assert list(cache.ids) == expected.ids
        assert np.array_equal(cache.features(), expected.features["pooled"], equal_nan=True)
        n_reads += 1
    writer.join()
    assert n_reads > 3


@needs_proc
def test_an_open_cache_holds_at_most_one_file_handle_and_releases_it(tmp_path):
    path = CacheContent().write(tmp_path / "a.h5").path
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    caches = [FeatureCache(path) for _ in range(20)]
    arrays = [(cache.features(), cache.ids, cache.split, cache.digests) for cache in caches]
    assert len(os.listdir("/proc/self/fd")) - before <= 20
    del caches, arrays
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_reads_the_same_number_of_bytes_whatever_the_number_of_rows(tmp_path, monkeypatch):
    read_sizes = []

    class Counting(io.FileIO):
        def readinto(self, buffer) -> int:
            read_sizes.append(len(buffer))
            return super().readinto(buffer)

        def read(self, size: int = -1) -> bytes:
            read_sizes.append(size)
            return super().read(size)

    monkeypatch.setattr(open_module, "open", Counting, raising=False)
    total_bytes = {}
    for n in (10, 50_000):
        path = tmp_path / f"{n}.h5"
        with monkeypatch.context() as patch:
            patch.delattr(open_module, "open")
            CacheContent(n, "none").write(path)
        read_sizes.clear()
        assert len(FeatureCache(path)) == n
        assert min(read_sizes) >= 0
        total_bytes[n] = sum(read_sizes)
    assert total_bytes[10] < 30_000
    assert abs(total_bytes[50_000] - total_bytes[10]) < 1000
    assert path.stat().st_size > 5_000_000


# ------------------------------------------------------------------------------------------------- how it is written
def test_features_are_gathered_in_small_blocks_that_cover_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "WRITE_BLOCK_BYTES", 1000)
    content, gathered = CacheContent(333), []

    def gather(output: str, start: int, stop: int) -> np.ndarray:
        gathered.append((output, start, stop))
        return content.gather(output, start, stop)

    assert has_content(content.write(tmp_path / "a.h5", gather).path, content)
    for output, shape in SHAPES.items():
        blocks = [(start, stop) for name, start, stop in gathered if name == output]
        assert [row for start, stop in blocks for row in range(start, stop)] == list(range(333))
        assert len(blocks) > 3
        assert max(stop - start for start, stop in blocks) * 4 * int(np.prod(shape)) <= 1000


def test_a_row_larger_than_a_block_is_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "WRITE_BLOCK_BYTES", 1)
    content = CacheContent(7)
    assert has_content(content.write(tmp_path / "a.h5").path, content)


@pytest.mark.parametrize("n", [1, 40])
def test_the_temporary_file_is_in_the_parts_folder_if_there_is_one(tmp_path, n):
    """If the writer is killed, it is removed together with the parts."""
    content, path, listings = CacheContent(n), tmp_path / "a.h5", []
    parts_directory(path).mkdir()

    def gather(output: str, start: int, stop: int) -> np.ndarray:
        listings.append((list_names(tmp_path), list_names(parts_directory(path))))
        return content.gather(output, start, stop)

    assert has_content(content.write(path, gather).path, content)
    for folder_names, (temporary_name,) in listings:
        assert folder_names == ["a.h5.parts"]
        assert temporary_name.startswith(".")
        assert temporary_name.endswith(".tmp")
    assert list_names(parts_directory(path)) == []


def test_an_output_name_that_is_invalid_in_hdf5_publishes_nothing(tmp_path):
    for name in ("a/b", "", ".", "a\0b"):
        shapes = {name: (5,)}
        content = CacheContent(3, "none")
        with pytest.raises((CacheError, ValueError)):
            write_cache(
                tmp_path / "a.h5", content.table, {"facts": make_facts(shapes=shapes)}, shapes, "float32",
                lambda _, i, j, content=content: content.features["pooled"][i:j],
            )  # fmt: skip
        assert list_names(tmp_path) == []


def test_a_manifest_that_is_not_valid_json_publishes_nothing(tmp_path):
    content = CacheContent(3)
    with pytest.raises(ValueError, match="JSON"):
        write_cache(
            tmp_path / "a.h5", content.table, {"facts": make_facts(), "x": np.nan}, SHAPES, "float32", content.gather
        )
    assert list_names(tmp_path) == []


def test_a_manifest_that_no_reader_would_accept_publishes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(format_module, "MAX_MANIFEST_BYTES", 2000)
    content = CacheContent(3)
    with pytest.raises(CacheError, match=r"cannot be opened.*more than 2000"):
        write_cache(
            tmp_path / "a.h5",
            content.table,
            {"facts": make_facts(), "x": "x" * 2000},
            SHAPES,
            "float32",
            content.gather,
        )
    assert list_names(tmp_path) == []


def test_names_that_are_not_valid_unicode_survive_in_the_manifest(tmp_path):
    content = CacheContent(3)
    manifest = {"facts": make_facts(), "archives": ["/data/caf\udce9", "/ünï/\N{GRINNING FACE}\n\x1b[31m"]}
    write_cache(tmp_path / "a.h5", content.table, manifest, SHAPES, "float32", content.gather)
    assert FeatureCache(tmp_path / "a.h5").manifest["archives"] == manifest["archives"]


# ----------------------------------------------------------------------------------------------- kills and full disks
@pytest.fixture
def old_content(tmp_path) -> CacheContent:
    content = CacheContent(20, seed=9)
    content.write(tmp_path / "a.h5")
    return content


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("full"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("failing_block", [0, 1, 5])
def test_a_failed_gather_leaves_only_the_old_cache(tmp_path, old_content, monkeypatch, error, failing_block):
    monkeypatch.setattr(writer, "WRITE_BLOCK_BYTES", 200)
    content, calls = CacheContent(50), iter(range(100))

    def gather(output: str, start: int, stop: int) -> np.ndarray:
        if next(calls) == failing_block:
            raise error
        return content.gather(output, start, stop)

    with pytest.raises(CacheError if isinstance(error, (OSError, RuntimeError)) else type(error)):
        content.write(tmp_path / "a.h5", gather)
    assert list_names(tmp_path) == ["a.h5"]
    assert has_content(tmp_path / "a.h5", old_content)


@pytest.mark.parametrize(("call", "at"), [("fsync", 0), ("replace", 0)])
def test_a_disk_failure_while_publishing_leaves_only_the_old_cache(tmp_path, old_content, monkeypatch, call, at):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CacheError, match="cannot be written") as error_info:
            CacheContent(50).write(tmp_path / "a.h5")
    assert "\n" not in str(error_info.value)
    assert list_names(tmp_path) == ["a.h5"]
    assert has_content(tmp_path / "a.h5", old_content)


def test_a_failed_folder_fsync_after_the_rename_leaves_the_new_cache(tmp_path, old_content, monkeypatch):
    content = CacheContent(50)

    def fail(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(writer, "fsync_directory", fail)
    with pytest.raises(CacheError, match="cannot be written"):
        content.write(tmp_path / "a.h5")
    assert list_names(tmp_path) == ["a.h5"]
    assert has_content(tmp_path / "a.h5", content)


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_fsync_folders_is_not_an_error(tmp_path, monkeypatch, number, passes):
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with contextlib.nullcontext() if passes else pytest.raises(OSError, match=os.strerror(number)):
        fsync_directory(tmp_path)


def test_an_hdf5_write_that_fails_at_any_byte_leaves_only_the_old_cache(tmp_path, old_content):
    content, path = CacheContent(2000), tmp_path / "a.h5"
    size = content.write(tmp_path / "b.h5").path.stat().st_size
    (tmp_path / "b.h5").unlink()
    for max_bytes in np.linspace(0, size - 1, 25).astype(int).tolist():
        with files_of_at_most(max_bytes), pytest.raises(CacheError, match="cannot be written"):
            content.write(path)
        assert list_names(tmp_path) == ["a.h5"], max_bytes
        assert has_content(path, old_content)
    with files_of_at_most(size):
        content.write(path)
    assert has_content(path, content)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")], ids=repr)
def test_a_failure_in_any_file_call_of_hdf5_leaves_only_the_old_cache(tmp_path, old_content, monkeypatch, error):
    """An interrupt is raised in the first Python code that runs, which is often a file call of HDF5."""
    content, path = CacheContent(30), tmp_path / "a.h5"
    n_calls, failing_call = [0], [-1]

    class Failing(hdf5._GuardedFile):
        def _attempt(self, action, *args):
            n_calls[0] += 1

            def failing(*args):
                if n_calls[0] - 1 == failing_call[0]:
                    raise error
                return action(*args)

            return super()._attempt(failing, *args)

    monkeypatch.setattr(hdf5, "_GuardedFile", Failing)
    content.write(tmp_path / "b.h5")
    total = n_calls[0]
    (tmp_path / "b.h5").unlink()
    assert total > 40
    for failing_call[0] in range(0, total, 3):
        n_calls[0] = 0
        with pytest.raises(CacheError if isinstance(error, OSError) else KeyboardInterrupt):
            content.write(path)
        assert list_names(tmp_path) == ["a.h5"]
        assert has_content(path, old_content)


def test_a_full_disk_leaves_only_the_old_cache(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        old_content = CacheContent(20)
        old_content.write(disk / "a.h5")
        for n in (2500, 4000, 8000):
            with pytest.raises(CacheError, match="free some space"):
                CacheContent(n).write(disk / "a.h5")
            assert list_names(disk) == ["a.h5"]
            assert has_content(disk / "a.h5", old_content)


# ----------------------------------------------------------------------------------------------------------- messages
def test_the_error_for_a_missing_cache_says_how_to_make_one(tmp_path):
    with pytest.raises(CacheError, match="there is no such file; `featpipe extract` writes caches") as error_info:
        FeatureCache(tmp_path / "a.h5")
    assert type(error_info.value) is CacheError


def test_a_cache_of_which_only_parts_exist_is_incomplete(tmp_path):
    parts_directory(tmp_path / "a.h5").mkdir()
    with pytest.raises(CacheIncompleteError, match="run the same command again"):
        FeatureCache(tmp_path / "a.h5")


def test_a_finished_cache_beside_parts_is_readable(tmp_path, old_content):
    parts_directory(tmp_path / "a.h5").mkdir()
    assert has_content(tmp_path / "a.h5", old_content)


def test_a_folder_is_not_a_cache(tmp_path):
    with pytest.raises(CacheFormatError, match="is a folder"):
        FeatureCache(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser can read every file")
def test_a_file_without_read_permission_is_a_cache_error(tmp_path, old_content):
    (tmp_path / "a.h5").chmod(0)
    with pytest.raises(CacheError, match="Permission denied"):
        FeatureCache(tmp_path / "a.h5")


def test_every_message_is_one_line_that_begins_with_the_path(tmp_path, old_content):
    path = tmp_path / "a.h5"
    cache_bytes = path.read_bytes()
    for data in (
        b"",
        b"text",
        cache_bytes[:100],
        cache_bytes[:-1],
        cache_bytes[:3000] + bytes(100) + cache_bytes[3100:],
    ):
        path.write_bytes(data)
        with pytest.raises(CacheFormatError) as error_info:
            FeatureCache(path)
        assert str(error_info.value).startswith(f"{path}: ")
        assert "\n" not in str(error_info.value)


def test_the_repr_names_path_rows_and_outputs(tmp_path, old_content):
    cache = FeatureCache(tmp_path / "a.h5")
    assert repr(cache) == f"FeatureCache({str(cache.path)!r}, n=20, outputs=['pooled', 'layer2'])"


def test_a_process_that_keeps_the_exception_exits_without_a_crash(tmp_path):
    """HDF5 would free handles of the Python file after the interpreter has shut down, and crash."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from featpipe.cache import hdf5
from featpipe.errors import CacheError
from tests.support.caches import CacheContent
class Failing(hdf5._GuardedFile):
    def _attempt(self, action, *args):
        def fail(*args):
            raise OSError(28, "full")
        return super()._attempt(fail, *args)
hdf5._GuardedFile = Failing
try:
    CacheContent(30).write(Path({str(tmp_path)!r}) / "a.h5")
except CacheError as error:
    sys.kept = error
sys.exit(7)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 7, process.stderr
