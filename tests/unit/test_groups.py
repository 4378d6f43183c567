"""Columns of tables are matched to the images of a cache; errors name the images without a value."""

from __future__ import annotations

import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from featpipe import extract
from featpipe.data import index
from featpipe.errors import ArchiveError, ConfigError, FeatpipeError
from featpipe.splits import load_column, load_groups, load_times, parse_table_column, splits
from featpipe.storage import StringColumn


def make_cache_stub(*ids: str, archives: list[str] | None = None, kinds: list[str] | None = None) -> Any:
    """The attributes of a cache that `featpipe.splits.groups` uses, without features."""

    class Stub(SimpleNamespace):
        def __len__(self) -> int:
            return len(ids)

    return Stub(
        path=Path("photos.h5"),
        ids=StringColumn.from_strings(ids),
        manifest={"archives": archives, "archive_kinds": kinds},
        status_codes=np.zeros(len(ids), np.uint8),
    )


ANIMALS = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg")


def write_table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_visits(tmp_path: Path, names: Any = ANIMALS, values: Any = ("p7", "p8", "p7")) -> str:
    rows = "".join(f"{name},{value}\n" for name, value in zip(names, values, strict=True))
    return f"{write_table(tmp_path / 'visits.csv', 'path,patient' + chr(10) + rows)}:patient"


def get_error(table_column: str, cache: Any, load: Any = load_groups, **options: Any) -> str:
    with pytest.raises(FeatpipeError) as error:
        load(cache, table_column, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_groups_are_in_the_order_of_the_samples(tmp_path: Path) -> None:
    table_column = write_visits(tmp_path, reversed(ANIMALS), ("x", "y", "z"))
    assert load_groups(make_cache_stub(*ANIMALS), table_column).tolist() == ["z", "y", "x"]
    assert load_groups(make_cache_stub(*ANIMALS), table_column, rows=[2, 0]).tolist() == ["x", "z"]


@pytest.mark.parametrize("text", ["patient", "visits.csv", "visits.csv:", ":patient", "visits.csv: "])
def test_text_that_is_not_table_and_column_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not TABLE:COLUMN; write it as in visits.csv:patient"):
        parse_table_column(text)


def test_the_path_of_a_table_may_contain_a_colon() -> None:
    assert parse_table_column("C:/data/visits.csv:patient") == (Path("C:/data/visits.csv"), "patient")


@pytest.mark.parametrize(
    ("kind", "style"),  # a member of a tar file has no path of its own
    [("tar", "id"), ("tar", "archive"), *(("folder", style) for style in ("id", "archive", "table", "absolute"))],
)
@pytest.mark.parametrize("several_archives", [False, True])
def test_images_are_matched_in_the_same_ways_as_labels(
    style: str, kind: str, several_archives: bool, tmp_path: Path, make_folder: Any
) -> None:
    folders = [make_folder(("ape", "bee"), 2, "data/first")]
    if several_archives:
        folders.append(make_folder(("cow",), 2, "data/second"))
    if kind == "tar":
        folders = [pack_tar(folder) for folder in folders]
    samples = index(folders)
    cache = make_cache_stub(
        *samples.ids,
        archives=[str(source.path) for source in samples.sources],
        kinds=[source.kind for source in samples.sources],
    )
    groups = [f"g{i}" for i in range(len(samples))]
    path_prefix = {"id": "", "archive": "", "table": "data/", "absolute": f"{tmp_path}/data/"}[style]
    names = list(samples.ids) if style == "id" else list(samples.names)
    if style in ("table", "absolute"):
        names = [f"{samples.sources[i].path.name}/{name}" for i, name in zip(samples.source, names, strict=True)]
    table_column = write_visits(tmp_path, [path_prefix + name for name in names], groups)
    assert load_groups(cache, table_column).tolist() == groups
    # The oracle: the same table, read as labels.
    labels = index(folders, labels=write_label_table(tmp_path, table_column)).labels
    assert [labels.classes[code] for code in labels.values] == groups


def pack_tar(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as out:
        for file in sorted(folder.rglob("*.jpg")):
            out.add(file, file.relative_to(folder).as_posix())
    return folder.with_suffix(".tar")


def write_label_table(tmp_path: Path, table_column: str) -> Path:
    text = Path(table_column.removesuffix(":patient")).read_text().replace("path,patient", "path,label")
    return write_table(tmp_path / "labels.csv", text)


def test_images_of_a_table_are_matched_by_the_paths_in_it(tmp_path: Path, make_folder: Any) -> None:
    make_folder(("ape",), 2)
    list_table = write_table(
        tmp_path / "list.csv", "path,label,Burst\nphotos/ape/01.jpg,x,b1\nphotos/ape/00.jpg,y,b2\n"
    )
    samples = index(list_table)
    cache = make_cache_stub(*samples.ids, archives=[str(list_table)], kinds=["files"])
    assert load_groups(cache, f"{list_table}:burst").tolist() == ["b1", "b2"]
    absolute = f"{tmp_path}/photos/ape"
    table_column = write_visits(tmp_path, [f"{absolute}/00.jpg", f"{absolute}/01.jpg"], ["p", "q"])
    assert load_groups(cache, table_column).tolist() == ["q", "p"]


def test_a_merged_cache_is_matched_by_id(tmp_path: Path) -> None:
    cache = make_cache_stub("a.jpg", "a.jpg#2", archives=["/x/a", "/x/b"], kinds=None)
    assert load_groups(cache, write_visits(tmp_path, ["a.jpg#2", "./a.jpg"], ["p", "q"])).tolist() == ["q", "p"]


def test_a_name_that_matches_images_of_two_archives_is_refused(tmp_path: Path) -> None:
    cache = make_cache_stub("s0.tar/k.jpg", "s1.tar/k.jpg", archives=["/x/s0.tar", "/x/s1.tar"], kinds=["tar", "tar"])
    assert "'k.jpg' matches several samples, 's0.tar/k.jpg' and 's1.tar/k.jpg'; use their ids" in get_error(
        write_visits(tmp_path, ["k.jpg"], ["p"]), cache
    )


def test_a_table_may_list_other_images(tmp_path: Path) -> None:
    table_column = write_visits(tmp_path, (*ANIMALS, "elsewhere/9.jpg"), ("x", "y", "z", "w"))
    assert load_groups(make_cache_stub(*ANIMALS), table_column).tolist() == ["x", "y", "z"]


def test_images_without_a_row_are_an_error_that_counts_and_names_them(tmp_path: Path) -> None:
    cache = make_cache_stub(*ANIMALS, "eel/1.jpg", "eel/2.jpg", "eel/3.jpg", "eel/4.jpg")
    table_column = write_visits(tmp_path)
    assert get_error(table_column, cache) == (
        f"{tmp_path}/visits.csv: no row for 4 of 7 images of photos.h5 ('eel/1.jpg', 'eel/2.jpg', 'eel/3.jpg', …); the "
        "first path of the table is 'cat/1.jpg'. Add a row with 'patient' for each image, under its id, its path "
        "within the archive, or its path relative to the table"
    )
    assert load_groups(cache, table_column, rows=[0, 2]).tolist() == ["p7", "p7"]
    assert "no row for 1 of 3 images of photos.h5 ('eel/4.jpg');" in get_error(table_column, cache, rows=[0, 1, 6])
    empty_table = write_table(tmp_path / "empty.csv", "path,patient\n")
    assert "the table has no rows" in get_error(f"{empty_table}:patient", cache)


def test_images_with_an_empty_value_are_an_error_that_counts_and_names_them(tmp_path: Path) -> None:
    table_column = write_visits(tmp_path, values=("p7", "", "  "))
    message = "'patient' is empty for 2 of 3 images of photos.h5 ('cat/2.jpg', 'dog/1.jpg'); fill it in"
    assert message in get_error(table_column, make_cache_stub(*ANIMALS))
    assert load_groups(make_cache_stub(*ANIMALS), table_column, rows=[0]).tolist() == ["p7"]


def test_an_image_with_two_different_values_is_refused(tmp_path: Path) -> None:
    names = (*ANIMALS, "./cat/1.jpg")
    assert "'./cat/1.jpg' has two values of 'patient', 'a' and 'd'; keep one" in get_error(
        write_visits(tmp_path, names, "abcd"), make_cache_stub(*ANIMALS)
    )
    assert load_groups(make_cache_stub(*ANIMALS), write_visits(tmp_path, names, "abca")).tolist() == ["a", "b", "c"]


def test_an_unknown_column_is_an_error_that_suggests_the_nearest_name(tmp_path: Path) -> None:
    table_column = write_visits(tmp_path).replace(":patient", ":patiant")
    assert "unknown column 'patiant'; did you mean 'patient'" in get_error(table_column, make_cache_stub(*ANIMALS))
    assert "no column of paths" in get_error(
        f"{write_table(tmp_path / 't.csv', 'who,patient')}:patient", make_cache_stub(*ANIMALS)
    )
    assert "cannot be read" in get_error(f"{tmp_path}/absent.csv:patient", make_cache_stub(*ANIMALS))


def test_braces_in_a_path_do_not_break_messages(tmp_path: Path) -> None:
    (tmp_path / "{0}").mkdir()
    assert "{0}/visits.csv: no row for 1 of 1" in get_error(write_visits(tmp_path / "{0}"), make_cache_stub("x.jpg"))


def test_a_group_has_the_same_name_in_csv_and_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for column in ([7, 8, 7], [7.0, 8.0, 7.0], ["7", "8", "7"]):
        parquet.write_table(pyarrow.table({"path": ANIMALS, "patient": column}), tmp_path / "visits.parquet")
        groups = load_groups(make_cache_stub(*ANIMALS), f"{tmp_path}/visits.parquet:patient")
        assert (
            groups.tolist() == load_groups(make_cache_stub(*ANIMALS), write_visits(tmp_path, values=(7, 8, 7))).tolist()
        )
    parquet.write_table(pyarrow.table({"path": ANIMALS, "patient": [["a"], ["b"], []]}), tmp_path / "visits.parquet")
    assert "holds lists (['a'])" in get_error(f"{tmp_path}/visits.parquet:patient", make_cache_stub(*ANIMALS))


def load_csv_times(tmp_path: Path, *values: str) -> np.ndarray:
    return load_times(make_cache_stub(*ANIMALS), write_visits(tmp_path, values=values))


def test_numbers_are_parsed_as_times(tmp_path: Path) -> None:
    times = load_csv_times(tmp_path, "2019", "2020.5", "1e3")
    assert times.dtype == np.float64
    assert times.tolist() == [2019, 2020.5, 1000]


def test_iso_8601_dates_are_parsed_as_times(tmp_path: Path) -> None:
    times = load_csv_times(tmp_path, "2021-03", "2021-03-04", "2021-03-04 15:00:59.25")
    expected = ["2021-03-01", "2021-03-04", "2021-03-04T15:00:59.25"]
    np.testing.assert_array_equal(times, np.array(expected, "datetime64[us]"))


def test_times_with_zones_are_compared_in_utc(tmp_path: Path) -> None:
    times = load_csv_times(tmp_path, "2021-03-04T00:30+01:00", "2021-03-03T23:30Z", "2021-03-03T18:30:00-05:00")
    np.testing.assert_array_equal(times, np.array(["2021-03-03T23:30"] * 3, "datetime64[us]"))
    mixed = write_visits(tmp_path, values=("2021-03-04", "2021-03-04T01:00Z", "2021-03-04"))
    message = "times with a time zone (2021-03-04T01:00Z) and without one (2021-03-04); give a time zone for all"
    assert message in get_error(mixed, make_cache_stub(*ANIMALS), load_times)


def test_a_parquet_date_equals_the_same_date_as_text(tmp_path: Path) -> None:
    from datetime import date, datetime

    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for values in ([date(2021, 3, i) for i in (3, 4, 5)], [datetime(2021, 3, i, 12, 30) for i in (3, 4, 5)]):
        parquet.write_table(pyarrow.table({"path": ANIMALS, "taken": values}), tmp_path / "t.parquet")
        times = load_times(make_cache_stub(*ANIMALS), f"{tmp_path}/t.parquet:taken")
        np.testing.assert_array_equal(times, np.array(values, "datetime64[us]"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("2021-03-04", "04/03/2021", "soon"), "is not a date for 2 of 3 images of photos.h5, the first is '04/03"),
        (("2021-03-04", "2021-02-30", "2021-03-05"), "is not a date for 1 of 3 images of photos.h5, the first is"),
        (("1", "2", "2021-03-04"), "is not a number for 1 of 3 images of photos.h5, the first is '2021-03-04' of 'dog"),
        (("soon", "later", "never"), "is not a date for 3 of 3 images of photos.h5, the first is 'soon'"),
        (("nan", "1", "2"), "is not a number for 1 of 3 images of photos.h5, the first is 'nan' of 'cat/1.jpg'"),
    ],
)
def test_invalid_times_are_counted_and_the_first_is_named(values: Any, expected: str, tmp_path: Path) -> None:
    assert expected in get_error(write_visits(tmp_path, values=values), make_cache_stub(*ANIMALS), load_times)


def test_a_cache_is_split_by_groups_and_times_of_a_table(tmp_path: Path, make_folder: Any, tiny: Any) -> None:
    folder = make_folder()
    cache = extract(folder, backbone=tiny, out=tmp_path / "photos.h5", cache=tmp_path / "cache")
    burst_names = [f"b{i // 2}" for i in range(len(cache))]
    days = [f"2021-01-{i % 6 + 1:02}" for i in range(len(cache))]
    lines = "".join(
        f"{name};{burst_name};{day}\n" for name, burst_name, day in zip(cache.ids, burst_names, days, strict=True)
    )
    metadata_table = write_table(tmp_path / "meta.csv", f"id;burst;day\n{lines}")
    rows = cache.usable
    groups = load_groups(cache, f"{metadata_table}:burst", rows)
    y = cache.label_table.take(rows).values
    for train, test in splits.make_folds(cache.digests[rows], y, k=3, groups=groups):
        assert not set(groups[train]) & set(groups[test])
        assert set(y[train]) == set(y[test]) == {0, 1, 2}
    times = load_times(cache, f"{metadata_table}:day", rows)
    train, test = splits.make_holdout(cache.digests[rows], y, times=times, since="2021-01-05")
    assert [cache.ids[row] for row in rows[test]] == [n for n, d in zip(cache.ids, days, strict=True) if d[-1] in "56"]
    assert len(train) + len(test) == len(cache)
    with pytest.raises(ArchiveError, match=r"18 of 18 images of photos.h5"):
        load_column(cache, write_table(tmp_path / "other.csv", "path,burst\nnope.jpg,b\n"), "burst")
