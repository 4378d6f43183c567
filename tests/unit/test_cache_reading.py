"""Reading a cache: some rows, batches, tables, and what in it is damaged."""

from __future__ import annotations

import pickle
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from featpipe import FeatureCache
from featpipe.cache import reader, write_cache
from featpipe.errors import CacheMismatchError, ConfigError
from tests.support.caches import SHAPES, Made

N = 40


@pytest.fixture(scope="module", params=["float32", "float16"])
def made(request) -> Made:
    return Made(N, storage=request.param)


@pytest.fixture(scope="module")
def cache(made, tmp_path_factory) -> FeatureCache:
    return made.write(tmp_path_factory.mktemp("cache") / "a.h5")


# ------------------------------------------------------------------------------------------------------ some rows
ROWS = {
    "all": None,
    "a slice": slice(3, 17),
    "a slice with steps": slice(35, 2, -4),
    "an empty slice": slice(5, 5),
    "a slice beyond the end": slice(30, 100),
    "a mask": np.arange(N) % 3 == 1,
    "an empty mask": np.zeros(N, bool),
    "a list": [5, 3, 3, 39, 0],
    "an empty list": [],
    "negative numbers": [-1, -40, 7],
    "small integers": np.array([0, 39, 2], np.int8),
    "unsigned integers": np.array([0, 39, 2], np.uint64),
    "every row twice": np.repeat(np.arange(N), 2),
}


def taken(values: np.ndarray, rows: object) -> np.ndarray:
    if rows is None:
        return values
    return values[np.array(rows, int) if isinstance(rows, list) else rows]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("output", [None, "layer2"])
def test_rows_are_those_that_numpy_takes_of_the_array(made, cache, monkeypatch, rows, output):
    wanted = taken(made.features[output or "pooled"], ROWS[rows])
    for block_bytes in (1, 100, 2**24):
        monkeypatch.setattr(reader, "READ_BLOCK_BYTES", block_bytes)
        for dtype in (np.float32, np.float16, np.float64, "<f4"):
            found = cache.read(ROWS[rows], output, dtype)
            assert (found.dtype, found.shape) == (dtype, wanted.shape)
            assert found.tobytes() == wanted.astype(dtype).tobytes()


def test_a_slice_of_what_is_stored_is_the_file_itself_and_everything_else_a_copy(cache):
    stored = cache.features().dtype
    same = cache.read(slice(3, 9), dtype=stored)
    assert np.shares_memory(same, cache.features())
    assert not same.flags.writeable
    for rows in ([3, 4], cache.split == 1):
        copy = cache.read(rows, dtype=stored)
        assert not np.shares_memory(copy, cache.features())
        assert copy.flags.writeable


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([0, 40], IndexError, "row 40 of a cache of 40 rows"),
        ([-41, 3], IndexError, "row -41 of a cache of 40 rows"),
        (np.array([2**64 - 1], np.uint64), IndexError, f"row {2**64 - 1} of"),
        (np.zeros(39, bool), ConfigError, r"mask of shape \(39,\) for 40 rows; expected \(40,\)"),
        (np.zeros((40, 1), bool), ConfigError, r"mask of shape \(40, 1\)"),
        (np.zeros((2, 2), int), ConfigError, r"rows of type int64 and shape \(2, 2\)"),
        (7, ConfigError, r"rows of type int64 and shape \(\)"),
        ([0.0, 1.0], ConfigError, "rows of type float64"),
        (["a"], ConfigError, "rows of type <U1"),
        ([None], ConfigError, "rows of type object"),
    ],
)
def test_rows_that_are_not_there_or_no_rows_are_refused(cache, rows, error, words):
    with pytest.raises(error, match=words):
        cache.read(rows)
    with pytest.raises(error, match=words):
        cache.batches(2, rows)


def test_an_unknown_output_is_answered_with_the_nearest(cache):
    for ask in (cache.read, lambda output: cache.batches(2, output=output)):
        with pytest.raises(ConfigError, match="did you mean 'pooled'"):
            ask(output="poled")


def test_every_float16_becomes_the_float32_of_the_same_value(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "READ_BLOCK_BYTES", 1000)
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    made = Made(2**16 // 5, "none", "float16")
    made.status[:] = 0
    made.features["pooled"][:] = every[: made.n * 5].reshape(-1, 5)
    cache = made.write(tmp_path / "a.h5")
    for found in (cache.read(), cache.X, cache.read(np.arange(made.n))):
        assert found.dtype == np.float32
        assert np.array_equal(found.view(np.uint32), made.features["pooled"].astype(np.float32).view(np.uint32))


def test_X_of_either_storage_is_float32(made, cache):
    assert cache.X.dtype == np.float32
    assert np.array_equal(cache.X, made.features["pooled"][cache.usable].astype(np.float32))


# -------------------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("size", [1, 7, 40, 1000])
@pytest.mark.parametrize("rows", [None, "a slice with steps", "a mask", "negative numbers", "an empty list"])
def test_batches_are_all_rows_once_with_their_numbers(made, cache, rows, size, seed):
    chosen = cache.usable if rows is None else ROWS[rows]
    wanted = taken(np.arange(N), chosen).tolist()
    batches = list(cache.batches(size, None if rows is None else chosen, seed=seed))
    numbers = [row for batch, _ in batches for row in batch.tolist()]
    assert (numbers if seed is None else sorted(numbers)) == (wanted if seed is None else sorted(wanted))
    assert [len(batch) for batch, _ in batches[:-1]] == [size] * (len(batches) - 1)
    for batch, features in batches:
        assert features.dtype == np.float32
        assert np.array_equal(features, made.features["pooled"][batch].astype(np.float32), equal_nan=True)


def test_a_seed_decides_the_order(cache):
    def order(seed: int | None) -> list[int]:
        return [row for rows, _ in cache.batches(7, slice(None), seed=seed) for row in rows.tolist()]

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in (None, 0, 1, 2)}) == 4


def test_batches_are_of_the_output_and_type_that_is_asked_for(made, cache):
    for rows, features in cache.batches(8, output="layer2", dtype=np.float64):
        assert features.dtype == np.float64
        assert np.array_equal(features, made.features["layer2"][rows])


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_nothing_is_refused_when_it_is_asked_for(cache, size):
    with pytest.raises(ConfigError, match="at least 1"):
        cache.batches(size)


# --------------------------------------------------------------------------------------------------------- tables
@pytest.fixture(scope="module", params=["classification", "multilabel", "regression", "none"])
def labelled(request, tmp_path_factory) -> tuple[Made, FeatureCache]:
    made = Made(N, request.param)
    return made, made.write(tmp_path_factory.mktemp("labelled") / "a.h5")


def labels_of(made: Made) -> dict[str, list[object]]:
    """The columns that a table has for labels."""
    if made.task == "classification":
        return {"label": made.given}
    if made.task == "multilabel":
        return {"labels": [None if names is None else sorted(names) for names in made.given]}
    if made.task == "regression":
        both = [(None, None) if np.isnan(pair).any() else tuple(pair) for pair in made.given]
        return {"height": [pair[0] for pair in both], "width": [pair[1] for pair in both]}
    return {}


SPLIT_NAMES = ("none", "train", "validation", "test")


def table_of(made: Made, cache: FeatureCache) -> dict[str, list[object]]:
    split = [SPLIT_NAMES[code] for code in made.split]
    return {"id": made.ids, "status": cache.status.tolist(), "split": split} | labels_of(made)


def test_a_data_frame_has_every_row(labelled):
    made, cache = labelled
    frame = cache.to_frame()
    wanted = table_of(made, cache)
    assert isinstance(frame, pd.DataFrame)
    assert list(frame) == list(wanted)
    for name, column in wanted.items():
        found = [None if np.isscalar(value) and pd.isna(value) else value for value in frame[name].tolist()]
        assert found == column
    assert [frame[name].dtype.name for name in ("status", "split")] == ["category"] * 2
    assert frame["split"].cat.categories.tolist() == list(SPLIT_NAMES)
    if made.task == "classification":
        assert frame["label"].cat.categories.tolist() == list(cache.classes)


def test_an_arrow_table_has_every_row(labelled):
    made, cache = labelled
    table = cache.to_frame("arrow")
    table.validate(full=True)
    assert isinstance(table, pa.Table)
    assert table.to_pydict() == table_of(made, cache)


@pytest.mark.parametrize("output", [None, "layer2"])
def test_a_data_frame_has_a_column_for_each_number(made, cache, output):
    frame = cache.to_frame(features=True, output=output)
    name = output or "pooled"
    flat = made.features[name].reshape(N, -1)
    numbers = frame[[f"{name}.{i}" for i in range(flat.shape[1])]]
    assert list(frame)[:4] == ["id", "status", "split", "label"]
    assert frame.shape[1] == 4 + flat.shape[1]
    assert set(numbers.dtypes) == {flat.dtype}
    assert numbers.to_numpy().tobytes() == flat.tobytes()


@pytest.mark.parametrize("output", [None, "layer2"])
def test_an_arrow_table_has_a_list_of_numbers_in_each_row(made, cache, output):
    name = output or "pooled"
    table = cache.to_frame("arrow", features=True, output=output)
    table.validate(full=True)
    flat = made.features[name].reshape(N, -1)
    assert table.column_names == ["id", "status", "split", "label", name]
    assert table.schema.field(name).type == pa.list_(pa.from_numpy_dtype(flat.dtype), flat.shape[1])
    assert table[name].combine_chunks().flatten().to_numpy().tobytes() == flat.tobytes()


@pytest.mark.parametrize("kind", ["pandas", "arrow"])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "none"])
def test_a_table_of_no_rows_is_a_table(tmp_path, kind, task):
    table = Made(0, task).write(tmp_path / "a.h5").to_frame(kind, features=True)
    assert len(table) == 0


def test_tables_of_another_kind_are_unknown(cache):
    with pytest.raises(ConfigError, match="did you mean 'pandas'"):
        cache.to_frame("panda")


@pytest.mark.parametrize(("kind", "package"), [("pandas", "pandas"), ("arrow", "pyarrow")])
def test_a_package_that_is_not_installed_is_named(cache, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}, which is not installed; `pip install {package}`"):
        cache.to_frame(kind)


# --------------------------------------------------------------------------------------------------------- damage
def places(cache: FeatureCache) -> dict[str, np.memmap]:
    return {name: column for name, column in cache._columns.items() if name != "manifest"}


NAMES = [
    "samples/id_bytes", "samples/id_offsets", "samples/status", "samples/digest", "samples/stamp", "samples/split",
    "labels/values", "checks/pooled", "checks/layer2", "features/pooled", "features/layer2",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", [0, 17, N - 1])
def test_a_flipped_bit_in_a_column_names_it_and_its_rows(tmp_path, name, row):
    made = Made(N)
    before = made.write(tmp_path / "a.h5")
    assert sorted(places(before)) == sorted(NAMES)
    data = bytearray(before.path.read_bytes())
    column = places(before)[name]
    start = (
        column.__array_interface__["data"][0] - before._columns["samples/status"].base.__array_interface__["data"][0]
    )
    at = start + row * column[:1].nbytes
    if name == "samples/id_offsets":
        at += 8  # the first offset is looked at on opening
        row += 1
    data[at] ^= 0x40
    flipped = before.path.with_name("b.h5")
    flipped.write_bytes(data)
    if name == "samples/id_offsets" and row == N:
        return  # and so is the last
    cache = FeatureCache(flipped)
    assert cache.damaged_columns() == ([] if name.startswith("features/") else [name])
    for output in SHAPES:
        touched = name in (f"features/{output}", f"checks/{output}", "samples/status", "samples/digest")
        assert np.flatnonzero(~cache.whole_rows(np.arange(N), output)).tolist() == [row] * touched


def test_whole_rows_are_asked_for_in_any_order_and_in_blocks(tmp_path, monkeypatch):
    made = Made(N)
    path = made.write(tmp_path / "a.h5").path
    data = bytearray(path.read_bytes())
    at = data.index(made.features["pooled"].tobytes())
    bad = [3, 4, 21]
    for row in bad:
        data[at + row * 20 + 19] ^= 1
    path.write_bytes(data)
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(N), 2))
    for block_bytes in (1, 100, 2**24):
        monkeypatch.setattr(reader, "READ_BLOCK_BYTES", block_bytes)
        assert FeatureCache(path).whole_rows(rows).tolist() == [row not in bad for row in rows]
    assert FeatureCache(path).whole_rows(rows, "layer2").all()
    assert FeatureCache(path).whole_rows(np.zeros(0, int)).tolist() == []


# --------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("rows", ["a batch", "a slice", "all"])
def test_to_read_rows_takes_the_memory_of_these_rows_and_of_a_block(tmp_path, monkeypatch, storage, rows):
    monkeypatch.setattr(reader, "READ_BLOCK_BYTES", 2**16)
    cache = Made(50_000, "none", storage).write(tmp_path / "a.h5")
    chosen = {"a batch": np.random.default_rng(0).permutation(50_000)[:5000], "a slice": slice(7, 20_000), "all": None}
    _ = cache.read([0], "layer2")
    tracemalloc.start()
    try:
        found = cache.read(chosen[rows], "layer2")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    mapped = storage == "float32" and rows != "a batch"
    assert peak < (0 if mapped else found.nbytes) + 2**18
    assert len(found) == {"a batch": 5000, "a slice": 19_993, "all": 50_000}[rows]


@pytest.mark.parametrize("dtype", [int, "bool", "no type", object, "datetime64[s]"])
def test_features_are_not_read_as_what_is_no_floating_point_number(cache, dtype):
    for read in (cache.read, lambda **how: cache.batches(4, **how)):
        with pytest.raises(ConfigError, match="floating-point"):
            read(dtype=dtype)


@pytest.mark.parametrize("size", [0, -1, 2.5, "4"])
def test_a_batch_is_a_whole_number_of_rows(cache, size):
    with pytest.raises(ConfigError, match="size of a batch"):
        cache.batches(size)


def test_a_pickled_cache_is_the_one_that_was_pickled_or_an_error(tmp_path):
    Made(5).write(tmp_path / "a.h5")
    pickled = pickle.dumps(FeatureCache(tmp_path / "a.h5"))
    assert len(pickle.loads(pickled)) == 5
    Made(7).write(tmp_path / "a.h5")
    with pytest.raises(CacheMismatchError, match="since this cache was pickled"):
        pickle.loads(pickled)


def test_features_of_width_zero_are_empty_lists_in_arrow(tmp_path):
    made, facts = Made(3), Made(3).write(tmp_path / "a.h5").facts
    facts["backbone"]["outputs"] = {"pooled": {}}
    nothing = np.zeros((3, 0), np.float32)
    write_cache(tmp_path / "b.h5", made.table, {"facts": facts}, {"pooled": (0,)}, "float32", lambda *_: nothing)
    assert FeatureCache(tmp_path / "b.h5").to_frame("arrow", features=True)["pooled"].to_pylist() == [[], [], []]


def test_a_number_of_good_rows_that_is_not_theirs_is_damage(tmp_path):
    cache = Made(5).write(tmp_path / "a.h5")
    assert cache.damaged_columns() == []
    cache.manifest["ok"] -= 1
    assert cache.damaged_columns() == ["samples/status"]


@pytest.mark.parametrize("rows", ROWS)
def test_a_view_is_the_rows_that_it_is_of_wherever_it_is_sliced(made, cache, rows):
    wanted = taken(made.features["pooled"], ROWS[rows])
    view = cache.view(ROWS[rows])
    assert (view.shape, view.dtype, len(view)) == (wanted.shape, wanted.dtype, len(wanted))
    for some in (slice(None), slice(2, 5), slice(0, 0), np.arange(len(wanted))[::2], np.arange(len(wanted)) % 2 == 0):
        for _ in range(2):  # what was given back to the system is read again
            assert view[some].tobytes() == wanted[some].tobytes()
    place = np.zeros((7, *wanted.shape[1:]), wanted.dtype)
    view.expect(slice(2, 5))
    view.read_into(place[1 : 1 + len(wanted[2:5])], slice(2, 5))
    assert place[1 : 1 + len(wanted[2:5])].tobytes() == wanted[2:5].tobytes()
    assert not place[4:].any()
    assert view.take(np.arange(len(wanted))[1::2])[:].tobytes() == wanted[1::2].tobytes()


def test_the_system_reads_ahead_for_rows_in_order_and_for_others_what_it_is_told(tmp_path, monkeypatch):
    """For blocks in random order it would read nine times as much as is asked for."""
    cache = Made(900, task="none").write(tmp_path / "a.h5")
    view, whole = cache.view(), cache.features()
    told = []

    def note(array):
        first = (array.ctypes.data - whole.ctypes.data) // whole.strides[0]
        told.append((first, first + len(array)))

    monkeypatch.setattr(reader, "prefetch", note)
    for start in (0, 10, 30, 20, 40):  # by two threads, say
        _ = view[start : start + 10]
    assert told == [(start, start + 90) for start in (0, 10, 30, 20, 40)]
    told.clear()
    for start in (500, 100, 300):
        _ = view[start : start + 10]
    assert told == []
    view.expect(slice(700, 710))
    assert told == [(700, 710)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_view_leaves_nothing_in_memory(tmp_path):
    n, d = 20_000, 500
    rng = np.random.default_rng(0)
    made = Made(n, task="none")
    made.status[:] = 0
    block = rng.normal(size=(n, d)).astype(np.float32)
    outputs = {"pooled": (d,)}
    facts = made.write(tmp_path / "a.h5").facts | {}
    facts["backbone"]["outputs"] = {"pooled": {}}
    write_cache(
        tmp_path / "b.h5", made.table, {"facts": facts}, outputs, "float32", lambda _, start, stop: block[start:stop]
    )
    view = FeatureCache(tmp_path / "b.h5").view()

    def resident() -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssFile")) * 1024

    before = resident()
    for start in range(0, n, 1000):
        assert np.array_equal(view[start : start + 1000], block[start : start + 1000])
        assert resident() - before < 8e6
