"""A column of a table is found for the images of a cache, or it is said for which it is not."""

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


def cache_of(*ids: str, archives: list[str] | None = None, kinds: list[str] | None = None) -> Any:
    """What `featpipe.splits.groups` looks at in a cache, without its features."""

    class Stub(SimpleNamespace):
        def __len__(self) -> int:
            return len(ids)

    return Stub(
        path=Path("made.h5"),
        ids=StringColumn.from_strings(ids),
        manifest={"archives": archives, "archive_kinds": kinds},
        status_codes=np.zeros(len(ids), np.uint8),
    )


ANIMALS = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg")


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def visits(tmp_path: Path, names: Any = ANIMALS, values: Any = ("p7", "p8", "p7")) -> str:
    rows = "".join(f"{name},{value}\n" for name, value in zip(names, values, strict=True))
    return f"{table(tmp_path / 'visits.csv', 'path,patient' + chr(10) + rows)}:patient"


def said(where: str, cache: Any, of: Any = load_groups, **others: Any) -> str:
    with pytest.raises(FeatpipeError) as caught:
        of(cache, where, **others)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_groups_come_in_the_order_of_the_samples_whatever_the_order_of_the_table(tmp_path: Path) -> None:
    where = visits(tmp_path, reversed(ANIMALS), ("x", "y", "z"))
    assert load_groups(cache_of(*ANIMALS), where).tolist() == ["z", "y", "x"]
    assert load_groups(cache_of(*ANIMALS), where, rows=[2, 0]).tolist() == ["x", "z"]


@pytest.mark.parametrize("text", ["patient", "visits.csv", "visits.csv:", ":patient", "visits.csv: "])
def test_what_is_no_table_and_column_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not TABLE:COLUMN; write it as in visits.csv:patient"):
        parse_table_column(text)


def test_a_table_whose_path_has_a_colon_is_found() -> None:
    assert parse_table_column("C:/data/visits.csv:patient") == (Path("C:/data/visits.csv"), "patient")


@pytest.mark.parametrize(
    ("kind", "style"),  # what lies in a tar has no path of its own
    [("tar", "id"), ("tar", "archive"), *(("folder", style) for style in ("id", "archive", "table", "absolute"))],
)
@pytest.mark.parametrize("several", [False, True])
def test_images_are_found_in_all_ways_in_which_labels_are(
    style: str, kind: str, several: bool, tmp_path: Path, make_folder: Any
) -> None:
    made = [make_folder(("ape", "bee"), 2, "data/first")]
    if several:
        made.append(make_folder(("cow",), 2, "data/second"))
    if kind == "tar":
        made = [packed(folder) for folder in made]
    samples = index(made)
    cache = cache_of(
        *samples.ids,
        archives=[str(source.path) for source in samples.sources],
        kinds=[source.kind for source in samples.sources],
    )
    wanted = [f"g{i}" for i in range(len(samples))]
    before = {"id": "", "archive": "", "table": "data/", "absolute": f"{tmp_path}/data/"}[style]
    names = list(samples.ids) if style == "id" else list(samples.names)
    if style in ("table", "absolute"):
        names = [f"{samples.sources[i].path.name}/{name}" for i, name in zip(samples.source, names, strict=True)]
    where = visits(tmp_path, [before + name for name in names], wanted)
    assert load_groups(cache, where).tolist() == wanted
    # The oracle: the same table as one of labels.
    labels = index(made, labels=relabelled(tmp_path, where)).labels
    assert [labels.classes[code] for code in labels.values] == wanted


def packed(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as out:
        for file in sorted(folder.rglob("*.jpg")):
            out.add(file, file.relative_to(folder).as_posix())
    return folder.with_suffix(".tar")


def relabelled(tmp_path: Path, where: str) -> Path:
    text = Path(where.removesuffix(":patient")).read_text().replace("path,patient", "path,label")
    return table(tmp_path / "labels.csv", text)


def test_the_images_of_a_table_are_found_as_the_table_names_them(tmp_path: Path, make_folder: Any) -> None:
    make_folder(("ape",), 2)
    listed = table(tmp_path / "list.csv", "path,label,Burst\nphotos/ape/01.jpg,x,b1\nphotos/ape/00.jpg,y,b2\n")
    samples = index(listed)
    cache = cache_of(*samples.ids, archives=[str(listed)], kinds=["files"])
    assert load_groups(cache, f"{listed}:burst").tolist() == ["b1", "b2"]
    absolute = f"{tmp_path}/photos/ape"
    where = visits(tmp_path, [f"{absolute}/00.jpg", f"{absolute}/01.jpg"], ["p", "q"])
    assert load_groups(cache, where).tolist() == ["q", "p"]


def test_a_merged_cache_is_matched_by_id(tmp_path: Path) -> None:
    cache = cache_of("a.jpg", "a.jpg#2", archives=["/x/a", "/x/b"], kinds=None)
    assert load_groups(cache, visits(tmp_path, ["a.jpg#2", "./a.jpg"], ["p", "q"])).tolist() == ["q", "p"]


def test_a_name_that_fits_images_of_two_archives_is_an_error(tmp_path: Path) -> None:
    cache = cache_of("s0.tar/k.jpg", "s1.tar/k.jpg", archives=["/x/s0.tar", "/x/s1.tar"], kinds=["tar", "tar"])
    assert "'k.jpg' fits several samples, 's0.tar/k.jpg' and 's1.tar/k.jpg'; write their ids" in said(
        visits(tmp_path, ["k.jpg"], ["p"]), cache
    )


def test_a_table_may_name_other_images_too(tmp_path: Path) -> None:
    where = visits(tmp_path, (*ANIMALS, "elsewhere/9.jpg"), ("x", "y", "z", "w"))
    assert load_groups(cache_of(*ANIMALS), where).tolist() == ["x", "y", "z"]


def test_images_that_are_not_in_the_table_are_counted_and_named(tmp_path: Path) -> None:
    cache = cache_of(*ANIMALS, "eel/1.jpg", "eel/2.jpg", "eel/3.jpg", "eel/4.jpg")
    where = visits(tmp_path)
    assert said(where, cache) == (
        f"{tmp_path}/visits.csv: 4 of 7 images of made.h5 ('eel/1.jpg', 'eel/2.jpg', 'eel/3.jpg', …) are not in it, "
        "whose first path is 'cat/1.jpg'; give each a row with its 'patient', under its id, or its path within the "
        "archive or from the table"
    )
    assert load_groups(cache, where, rows=[0, 2]).tolist() == ["p7", "p7"]  # those without need none
    assert "1 of 3 images of made.h5 ('eel/4.jpg') are not in it" in said(where, cache, rows=[0, 1, 6])
    assert "has no rows" in said(f"{table(tmp_path / 'empty.csv', 'path,patient' + chr(10))}:patient", cache)


def test_images_with_an_empty_value_are_counted_and_named(tmp_path: Path) -> None:
    where = visits(tmp_path, values=("p7", "", "  "))
    message = "2 of 3 images of made.h5 ('cat/2.jpg', 'dog/1.jpg') have an empty 'patient'; fill it in"
    assert message in said(where, cache_of(*ANIMALS))
    assert load_groups(cache_of(*ANIMALS), where, rows=[0]).tolist() == ["p7"]


def test_an_image_with_two_values_is_refused_and_one_with_the_same_twice_is_not(tmp_path: Path) -> None:
    twice = (*ANIMALS, "./cat/1.jpg")
    assert "'./cat/1.jpg' has two values of 'patient', 'a' and 'd'; keep one" in said(
        visits(tmp_path, twice, "abcd"), cache_of(*ANIMALS)
    )
    assert load_groups(cache_of(*ANIMALS), visits(tmp_path, twice, "abca")).tolist() == ["a", "b", "c"]


def test_a_column_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    where = visits(tmp_path).replace(":patient", ":patiant")
    assert "unknown column 'patiant'; did you mean 'patient'" in said(where, cache_of(*ANIMALS))
    assert "no column of paths" in said(f"{table(tmp_path / 't.csv', 'who,patient')}:patient", cache_of(*ANIMALS))
    assert "cannot be read" in said(f"{tmp_path}/absent.csv:patient", cache_of(*ANIMALS))


def test_braces_in_a_path_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "{0}").mkdir()
    assert "{0}/visits.csv: 1 of 1" in said(visits(tmp_path / "{0}"), cache_of("x.jpg"))


def test_a_group_has_the_same_name_in_csv_and_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for column in ([7, 8, 7], [7.0, 8.0, 7.0], ["7", "8", "7"]):
        parquet.write_table(pyarrow.table({"path": ANIMALS, "patient": column}), tmp_path / "visits.parquet")
        found = load_groups(cache_of(*ANIMALS), f"{tmp_path}/visits.parquet:patient")
        assert found.tolist() == load_groups(cache_of(*ANIMALS), visits(tmp_path, values=(7, 8, 7))).tolist()
    parquet.write_table(pyarrow.table({"path": ANIMALS, "patient": [["a"], ["b"], []]}), tmp_path / "visits.parquet")
    assert "holds lists (['a'])" in said(f"{tmp_path}/visits.parquet:patient", cache_of(*ANIMALS))


# -- times -----------------------------------------------------------------------------------------------------------


def times(tmp_path: Path, *values: str) -> np.ndarray:
    return load_times(cache_of(*ANIMALS), visits(tmp_path, values=values))


def test_numbers_are_times(tmp_path: Path) -> None:
    found = times(tmp_path, "2019", "2020.5", "1e3")
    assert found.dtype == np.float64
    assert found.tolist() == [2019, 2020.5, 1000]


def test_dates_and_times_of_iso_8601_are_times(tmp_path: Path) -> None:
    found = times(tmp_path, "2021-03", "2021-03-04", "2021-03-04 15:00:59.25")
    expected = ["2021-03-01", "2021-03-04", "2021-03-04T15:00:59.25"]
    np.testing.assert_array_equal(found, np.array(expected, "datetime64[us]"))


def test_times_with_zones_are_compared_in_utc(tmp_path: Path) -> None:
    found = times(tmp_path, "2021-03-04T00:30+01:00", "2021-03-03T23:30Z", "2021-03-03T18:30:00-05:00")
    np.testing.assert_array_equal(found, np.array(["2021-03-03T23:30"] * 3, "datetime64[us]"))
    assert "times with a zone (2021-03-04T01:00Z) and without (2021-03-04); give all a zone or none" in said(
        visits(tmp_path, values=("2021-03-04", "2021-03-04T01:00Z", "2021-03-04")), cache_of(*ANIMALS), load_times
    )


def test_a_date_of_parquet_is_the_same_as_its_text(tmp_path: Path) -> None:
    from datetime import date, datetime

    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for values in ([date(2021, 3, i) for i in (3, 4, 5)], [datetime(2021, 3, i, 12, 30) for i in (3, 4, 5)]):
        parquet.write_table(pyarrow.table({"path": ANIMALS, "taken": values}), tmp_path / "t.parquet")
        found = load_times(cache_of(*ANIMALS), f"{tmp_path}/t.parquet:taken")
        np.testing.assert_array_equal(found, np.array(values, "datetime64[us]"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            ("2021-03-04", "04/03/2021", "soon"),
            "2 of 3 images of made.h5 have a 'patient' that is no date, such as '04/03",
        ),
        (
            ("2021-03-04", "2021-02-30", "2021-03-05"),
            "1 of 3 images of made.h5 have a 'patient' that is no date, such as",
        ),
        (("1", "2", "2021-03-04"), "no number, such as '2021-03-04' of 'dog/1.jpg'; give all of them dates as in ISO"),
        (("soon", "later", "never"), "3 of 3 images of made.h5 have a 'patient' that is no date, such as 'soon'"),
        (
            ("nan", "1", "2"),
            "1 of 3 images of made.h5 have a 'patient' that is no number, such as 'nan' of 'cat/1.jpg'",
        ),
    ],
)
def test_what_is_no_time_is_counted_and_the_first_is_named(values: Any, expected: str, tmp_path: Path) -> None:
    assert expected in said(visits(tmp_path, values=values), cache_of(*ANIMALS), load_times)


# -- with a real cache -----------------------------------------------------------------------------------------------


def test_a_table_divides_a_cache_by_group_and_by_time(tmp_path: Path, make_folder: Any, tiny: Any) -> None:
    folder = make_folder()
    cache = extract(folder, backbone=tiny, out=tmp_path / "photos.h5", cache=tmp_path / "cache")
    burst = [f"b{i // 2}" for i in range(len(cache))]
    days = [f"2021-01-{i % 6 + 1:02}" for i in range(len(cache))]
    rows = "".join(f"{name};{b};{day}\n" for name, b, day in zip(cache.ids, burst, days, strict=True))
    meta = table(tmp_path / "meta.csv", f"id;burst;day\n{rows}")
    rows_of = cache.usable
    groups = load_groups(cache, f"{meta}:burst", rows_of)
    y = cache.label_table.take(rows_of).values
    for train, test in splits.make_folds(cache.digests[rows_of], y, k=3, groups=groups):
        assert not set(groups[train]) & set(groups[test])
        assert set(y[train]) == set(y[test]) == {0, 1, 2}
    when = load_times(cache, f"{meta}:day", rows_of)
    train, test = splits.make_holdout(cache.digests[rows_of], y, times=when, since="2021-01-05")
    assert [cache.ids[row] for row in rows_of[test]] == [
        n for n, d in zip(cache.ids, days, strict=True) if d[-1] in "56"
    ]
    assert len(train) + len(test) == len(cache)
    with pytest.raises(ArchiveError, match=r"18 of 18 images of photos.h5"):
        load_column(cache, table(tmp_path / "other.csv", "path,burst\nnope.jpg,b\n"), "burst")
