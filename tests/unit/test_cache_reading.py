"""Reading a cache: selected rows, batches, tables, views and damage reports."""

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
from tests.support.caches import SHAPES, CacheContent

N = 40


@pytest.fixture(scope="module", params=["float32", "float16"])
def content(request) -> CacheContent:
    return CacheContent(N, storage=request.param)


@pytest.fixture(scope="module")
def cache(content, tmp_path_factory) -> FeatureCache:
    return content.write(tmp_path_factory.mktemp("cache") / "a.h5")


# ------------------------------------------------------------------------------------------------------ some rows
ROW_SELECTORS = {
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


def take_rows(values: np.ndarray, rows: object) -> np.ndarray:
    if rows is None:
        return values
    return values[np.array(rows, int) if isinstance(rows, list) else rows]


@pytest.mark.parametrize("rows", ROW_SELECTORS)
@pytest.mark.parametrize("output", [None, "layer2"])
def test_reading_rows_equals_numpy_indexing(content, cache, monkeypatch, rows, output):
    expected = take_rows(content.features[output or "pooled"], ROW_SELECTORS[rows])
    for block_bytes in (1, 100, 2**24):
        monkeypatch.setattr(reader, "READ_BLOCK_BYTES", block_bytes)
        for dtype in (np.float32, np.float16, np.float64, "<f4"):
            features = cache.read(ROW_SELECTORS[rows], output, dtype)
            assert (features.dtype, features.shape) == (dtype, expected.shape)
            assert features.tobytes() == expected.astype(dtype).tobytes()


def test_a_slice_in_the_stored_dtype_is_mapped_and_other_rows_are_copied(cache):
    stored = cache.features().dtype
    mapped = cache.read(slice(3, 9), dtype=stored)
    assert np.shares_memory(mapped, cache.features())
    assert not mapped.flags.writeable
    for rows in ([3, 4], cache.split == 1):
        copy = cache.read(rows, dtype=stored)
        assert not np.shares_memory(copy, cache.features())
        assert copy.flags.writeable


@pytest.mark.parametrize(
    ("rows", "error", "message"),
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
def test_invalid_row_selectors_are_refused(cache, rows, error, message):
    with pytest.raises(error, match=message):
        cache.read(rows)
    with pytest.raises(error, match=message):
        cache.batches(2, rows)


def test_an_unknown_output_suggests_the_nearest_match(cache):
    for read in (cache.read, lambda output: cache.batches(2, output=output)):
        with pytest.raises(ConfigError, match="did you mean 'pooled'"):
            read(output="poled")


def test_every_float16_value_is_converted_to_float32_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "READ_BLOCK_BYTES", 1000)
    all_float16 = np.arange(2**16, dtype=np.uint16).view(np.float16)
    content = CacheContent(2**16 // 5, "none", "float16")
    content.status[:] = 0
    content.features["pooled"][:] = all_float16[: content.n * 5].reshape(-1, 5)
    cache = content.write(tmp_path / "a.h5")
    for features in (cache.read(), cache.X, cache.read(np.arange(content.n))):
        assert features.dtype == np.float32
        assert np.array_equal(features.view(np.uint32), content.features["pooled"].astype(np.float32).view(np.uint32))


def test_X_is_float32_for_both_storage_types(content, cache):
    assert cache.X.dtype == np.float32
    assert np.array_equal(cache.X, content.features["pooled"][cache.usable].astype(np.float32))


# -------------------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("size", [1, 7, 40, 1000])
@pytest.mark.parametrize("rows", [None, "a slice with steps", "a mask", "negative numbers", "an empty list"])
def test_batches_yield_every_row_once_with_its_row_number(content, cache, rows, size, seed):
    selector = cache.usable if rows is None else ROW_SELECTORS[rows]
    expected = take_rows(np.arange(N), selector).tolist()
    batches = list(cache.batches(size, None if rows is None else selector, seed=seed))
    batch_rows = [row for batch, _ in batches for row in batch.tolist()]
    assert (batch_rows if seed is None else sorted(batch_rows)) == (expected if seed is None else sorted(expected))
    assert [len(batch) for batch, _ in batches[:-1]] == [size] * (len(batches) - 1)
    for batch, features in batches:
        assert features.dtype == np.float32
        assert np.array_equal(features, content.features["pooled"][batch].astype(np.float32), equal_nan=True)


def test_the_seed_determines_the_order_of_batches(cache):
    def read_order(seed: int | None) -> list[int]:
        return [row for rows, _ in cache.batches(7, slice(None), seed=seed) for row in rows.tolist()]

    assert read_order(3) == read_order(3)
    assert len({tuple(read_order(seed)) for seed in (None, 0, 1, 2)}) == 4


def test_batches_have_the_requested_output_and_dtype(content, cache):
    for rows, features in cache.batches(8, output="layer2", dtype=np.float64):
        assert features.dtype == np.float64
        assert np.array_equal(features, content.features["layer2"][rows])


# --------------------------------------------------------------------------------------------------------- tables
@pytest.fixture(scope="module", params=["classification", "multilabel", "regression", "none"])
def content_and_cache(request, tmp_path_factory) -> tuple[CacheContent, FeatureCache]:
    content = CacheContent(N, request.param)
    return content, content.write(tmp_path_factory.mktemp("labelled") / "a.h5")


def list_label_columns(content: CacheContent) -> dict[str, list[object]]:
    """The label columns of a table."""
    if content.task == "classification":
        return {"label": content.raw_labels}
    if content.task == "multilabel":
        return {"labels": [None if names is None else sorted(names) for names in content.raw_labels]}
    if content.task == "regression":
        targets = [(None, None) if np.isnan(target).any() else tuple(target) for target in content.raw_labels]
        return {"height": [target[0] for target in targets], "width": [target[1] for target in targets]}
    return {}


SPLIT_NAMES = ("none", "train", "validation", "test")


def list_columns(content: CacheContent, cache: FeatureCache) -> dict[str, list[object]]:
    split = [SPLIT_NAMES[code] for code in content.split]
    return {"id": content.ids, "status": cache.status.tolist(), "split": split} | list_label_columns(content)


def test_a_data_frame_has_every_row(content_and_cache):
    content, cache = content_and_cache
    frame = cache.to_frame()
    expected = list_columns(content, cache)
    assert isinstance(frame, pd.DataFrame)
    assert list(frame) == list(expected)
    for name, column in expected.items():
        values = [None if np.isscalar(value) and pd.isna(value) else value for value in frame[name].tolist()]
        assert values == column
    assert [frame[name].dtype.name for name in ("status", "split")] == ["category"] * 2
    assert frame["split"].cat.categories.tolist() == list(SPLIT_NAMES)
    if content.task == "classification":
        assert frame["label"].cat.categories.tolist() == list(cache.classes)


def test_an_arrow_table_has_every_row(content_and_cache):
    content, cache = content_and_cache
    table = cache.to_frame("arrow")
    table.validate(full=True)
    assert isinstance(table, pa.Table)
    assert table.to_pydict() == list_columns(content, cache)


@pytest.mark.parametrize("output", [None, "layer2"])
def test_a_data_frame_has_a_column_for_each_feature(content, cache, output):
    frame = cache.to_frame(features=True, output=output)
    name = output or "pooled"
    flat = content.features[name].reshape(N, -1)
    numbers = frame[[f"{name}.{i}" for i in range(flat.shape[1])]]
    assert list(frame)[:4] == ["id", "status", "split", "label"]
    assert frame.shape[1] == 4 + flat.shape[1]
    assert set(numbers.dtypes) == {flat.dtype}
    assert numbers.to_numpy().tobytes() == flat.tobytes()


@pytest.mark.parametrize("output", [None, "layer2"])
def test_an_arrow_table_has_a_list_of_features_in_each_row(content, cache, output):
    name = output or "pooled"
    table = cache.to_frame("arrow", features=True, output=output)
    table.validate(full=True)
    flat = content.features[name].reshape(N, -1)
    assert table.column_names == ["id", "status", "split", "label", name]
    assert table.schema.field(name).type == pa.list_(pa.from_numpy_dtype(flat.dtype), flat.shape[1])
    assert table[name].combine_chunks().flatten().to_numpy().tobytes() == flat.tobytes()


@pytest.mark.parametrize("kind", ["pandas", "arrow"])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "none"])
def test_an_empty_cache_converts_to_an_empty_table(tmp_path, kind, task):
    table = CacheContent(0, task).write(tmp_path / "a.h5").to_frame(kind, features=True)
    assert len(table) == 0


def test_an_unknown_kind_of_table_suggests_the_nearest_match(cache):
    with pytest.raises(ConfigError, match="did you mean 'pandas'"):
        cache.to_frame("panda")


@pytest.mark.parametrize(("kind", "package"), [("pandas", "pandas"), ("arrow", "pyarrow")])
def test_the_error_for_a_missing_package_names_it(cache, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}, which is not installed; `pip install {package}`"):
        cache.to_frame(kind)


# --------------------------------------------------------------------------------------------------------- damage
def get_columns(cache: FeatureCache) -> dict[str, np.memmap]:
    return {name: column for name, column in cache._columns.items() if name != "manifest"}


COLUMN_NAMES = [
    "samples/id_bytes", "samples/id_offsets", "samples/status", "samples/digest", "samples/stamp", "samples/split",
    "labels/values", "checks/pooled", "checks/layer2", "features/pooled", "features/layer2",
]  # fmt: skip


@pytest.mark.parametrize("name", COLUMN_NAMES)
@pytest.mark.parametrize("row", [0, 17, N - 1])
def test_a_flipped_bit_is_reported_with_its_column_and_rows(tmp_path, name, row):
    content = CacheContent(N)
    intact = content.write(tmp_path / "a.h5")
    assert sorted(get_columns(intact)) == sorted(COLUMN_NAMES)
    data = bytearray(intact.path.read_bytes())
    column = get_columns(intact)[name]
    start = (
        column.__array_interface__["data"][0] - intact._columns["samples/status"].base.__array_interface__["data"][0]
    )
    offset = start + row * column[:1].nbytes
    if name == "samples/id_offsets":
        offset += 8  # the first offset is checked on opening
        row += 1
    data[offset] ^= 0x40
    flipped_path = intact.path.with_name("b.h5")
    flipped_path.write_bytes(data)
    if name == "samples/id_offsets" and row == N:
        return  # the last offset is checked on opening too
    cache = FeatureCache(flipped_path)
    assert cache.damaged_columns() == ([] if name.startswith("features/") else [name])
    for output in SHAPES:
        is_affected = name in (f"features/{output}", f"checks/{output}", "samples/status", "samples/digest")
        assert np.flatnonzero(~cache.whole_rows(np.arange(N), output)).tolist() == [row] * is_affected


def test_whole_rows_accepts_rows_in_any_order_and_checks_them_in_blocks(tmp_path, monkeypatch):
    content = CacheContent(N)
    path = content.write(tmp_path / "a.h5").path
    data = bytearray(path.read_bytes())
    start = data.index(content.features["pooled"].tobytes())
    damaged_rows = [3, 4, 21]
    for row in damaged_rows:
        data[start + row * 20 + 19] ^= 1
    path.write_bytes(data)
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(N), 2))
    for block_bytes in (1, 100, 2**24):
        monkeypatch.setattr(reader, "READ_BLOCK_BYTES", block_bytes)
        assert FeatureCache(path).whole_rows(rows).tolist() == [row not in damaged_rows for row in rows]
    assert FeatureCache(path).whole_rows(rows, "layer2").all()
    assert FeatureCache(path).whole_rows(np.zeros(0, int)).tolist() == []


# --------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("rows", ["a batch", "a slice", "all"])
def test_reading_rows_takes_the_memory_of_the_result_and_one_block(tmp_path, monkeypatch, storage, rows):
    monkeypatch.setattr(reader, "READ_BLOCK_BYTES", 2**16)
    cache = CacheContent(50_000, "none", storage).write(tmp_path / "a.h5")
    selectors = {
        "a batch": np.random.default_rng(0).permutation(50_000)[:5000],
        "a slice": slice(7, 20_000),
        "all": None,
    }
    _ = cache.read([0], "layer2")
    tracemalloc.start()
    try:
        features = cache.read(selectors[rows], "layer2")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    is_mapped = storage == "float32" and rows != "a batch"
    assert peak < (0 if is_mapped else features.nbytes) + 2**18
    assert len(features) == {"a batch": 5000, "a slice": 19_993, "all": 50_000}[rows]


@pytest.mark.parametrize("dtype", [int, "bool", "no type", object, "datetime64[s]"])
def test_dtypes_that_are_not_floating_point_are_refused(cache, dtype):
    for read in (cache.read, lambda **options: cache.batches(4, **options)):
        with pytest.raises(ConfigError, match="floating-point"):
            read(dtype=dtype)


@pytest.mark.parametrize("size", [0, -1, 2.5, "4"])
def test_a_batch_size_that_is_not_a_positive_integer_is_refused_before_the_first_batch(cache, size):
    with pytest.raises(ConfigError, match=r"size of a batch is .*; it must be a whole number of at least 1"):
        cache.batches(size)


def test_unpickling_a_cache_that_was_replaced_is_an_error(tmp_path):
    CacheContent(5).write(tmp_path / "a.h5")
    pickled = pickle.dumps(FeatureCache(tmp_path / "a.h5"))
    assert len(pickle.loads(pickled)) == 5
    CacheContent(7).write(tmp_path / "a.h5")
    with pytest.raises(CacheMismatchError, match="since this cache was pickled"):
        pickle.loads(pickled)


def test_features_of_width_zero_are_empty_lists_in_arrow(tmp_path):
    content, facts = CacheContent(3), CacheContent(3).write(tmp_path / "a.h5").facts
    facts["backbone"]["outputs"] = {"pooled": {}}
    empty = np.zeros((3, 0), np.float32)
    write_cache(tmp_path / "b.h5", content.table, {"facts": facts}, {"pooled": (0,)}, "float32", lambda *_: empty)
    assert FeatureCache(tmp_path / "b.h5").to_frame("arrow", features=True)["pooled"].to_pylist() == [[], [], []]


def test_a_wrong_count_of_ok_rows_is_reported_as_damage(tmp_path):
    cache = CacheContent(5).write(tmp_path / "a.h5")
    assert cache.damaged_columns() == []
    cache.manifest["ok"] -= 1
    assert cache.damaged_columns() == ["samples/status"]


@pytest.mark.parametrize("rows", ROW_SELECTORS)
def test_slicing_a_view_equals_slicing_the_selected_rows(content, cache, rows):
    expected = take_rows(content.features["pooled"], ROW_SELECTORS[rows])
    view = cache.view(ROW_SELECTORS[rows])
    assert (view.shape, view.dtype, len(view)) == (expected.shape, expected.dtype, len(expected))
    for selector in (
        slice(None),
        slice(2, 5),
        slice(0, 0),
        np.arange(len(expected))[::2],
        np.arange(len(expected)) % 2 == 0,
    ):
        for _ in range(2):  # released pages are read again
            assert view[selector].tobytes() == expected[selector].tobytes()
    buffer = np.zeros((7, *expected.shape[1:]), expected.dtype)
    view.expect(slice(2, 5))
    view.read_into(buffer[1 : 1 + len(expected[2:5])], slice(2, 5))
    assert buffer[1 : 1 + len(expected[2:5])].tobytes() == expected[2:5].tobytes()
    assert not buffer[4:].any()
    assert view.take(np.arange(len(expected))[1::2])[:].tobytes() == expected[1::2].tobytes()


def test_a_view_prefetches_sequential_rows_and_announced_rows_only(tmp_path, monkeypatch):
    """Prefetching blocks in random order would read nine times as much as is needed."""
    cache = CacheContent(900, task="none").write(tmp_path / "a.h5")
    view, features = cache.view(), cache.features()
    prefetched = []

    def record_rows(array):
        first = (array.ctypes.data - features.ctypes.data) // features.strides[0]
        prefetched.append((first, first + len(array)))

    monkeypatch.setattr(reader, "prefetch", record_rows)
    for start in (0, 10, 30, 20, 40):  # as two threads would
        _ = view[start : start + 10]
    assert prefetched == [(start, start + 90) for start in (0, 10, 30, 20, 40)]
    prefetched.clear()
    for start in (500, 100, 300):
        _ = view[start : start + 10]
    assert prefetched == []
    view.expect(slice(700, 710))
    assert prefetched == [(700, 710)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_view_releases_the_pages_that_it_read(tmp_path):
    n, d = 20_000, 500
    rng = np.random.default_rng(0)
    content = CacheContent(n, task="none")
    content.status[:] = 0
    features = rng.normal(size=(n, d)).astype(np.float32)
    outputs = {"pooled": (d,)}
    facts = content.write(tmp_path / "a.h5").facts | {}
    facts["backbone"]["outputs"] = {"pooled": {}}
    write_cache(
        tmp_path / "b.h5",
        content.table,
        {"facts": facts},
        outputs,
        "float32",
        lambda _, start, stop: features[start:stop],
    )
    view = FeatureCache(tmp_path / "b.h5").view()

    def count_resident_bytes() -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssFile")) * 1024

    bytes_before = count_resident_bytes()
    for start in range(0, n, 1000):
        assert np.array_equal(view[start : start + 1000], features[start : start + 1000])
        assert count_resident_bytes() - bytes_before < 8e6
