"""Archives are built here byte by byte and compared with what was put in."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from featpipe import data
from featpipe.data import ArchiveLimits, Index, Labels, LabelTable, expand_paths, index, index_files
from featpipe.data.sources import tar as tars
from featpipe.data.sources.listing import Listing
from featpipe.errors import ArchiveError, ConfigError, SampleError
from featpipe.status import Status

indexing = import_module("featpipe.data.index")

Files = Sequence[tuple[str, bytes]]

ANIMALS: Files = [("cat/1.jpg", b"cat one"), ("cat/2.png", b"cat two"), ("dog/1.jpg", b"dog one")]
COMPRESSIONS = {".tar": "w", ".tar.gz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}
on_posix = pytest.mark.skipif(os.name != "posix", reason="needs links and permissions of POSIX")


def folder(path: Path, files: Files = ANIMALS) -> Path:
    for name, content in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def member(name: str, **facts: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in facts.items():
        setattr(info, key, value)
    return info


def tar(path: Path, files: Iterable[tuple[str, bytes] | tarfile.TarInfo] = ANIMALS) -> Path:
    suffix = next((suffix for suffix in COMPRESSIONS if path.name.endswith(suffix)), ".tar")
    with tarfile.open(path, COMPRESSIONS[suffix], format=tarfile.PAX_FORMAT) as out:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                out.addfile(file)
            else:
                out.addfile(member(file[0], size=len(file[1])), io.BytesIO(file[1]))
    return path


def zipped(path: Path, files: Files = ANIMALS, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in files:
            out.writestr(zipfile.ZipInfo(name), content, method)
    return path


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def contents(samples: Index) -> list[bytes]:
    with samples.open() as reader:
        return [reader.read(row) for row in range(len(samples))]


def status_of(samples: Index, row: int = 0) -> Status:
    with samples.open() as reader, pytest.raises(SampleError) as caught:
        reader.read(row)
    assert caught.value.sample_id == samples.ids[row]
    assert caught.value.archive == str(samples.sources[samples.source[row]].path)
    assert "\n" not in str(caught.value)
    return caught.value.status


def refused(*archives: Path | str, **options: object) -> str:
    with pytest.raises(ArchiveError) as caught:
        index(archives, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def classes(samples: Index) -> list[str | None]:
    return samples.labels.y.tolist() if samples.labels.task != "none" else [None] * len(samples)


BUILDERS = {
    "folder": lambda path, files: folder(path / "a", files),
    "tar": lambda path, files: tar(path / "a.tar", files),
    "tar.gz": lambda path, files: tar(path / "a.tar.gz", files),
    "tar.bz2": lambda path, files: tar(path / "a.tar.bz2", files),
    "tar.xz": lambda path, files: tar(path / "a.tar.xz", files),
    "zip": lambda path, files: zipped(path / "a.zip", files),
}
every_kind = pytest.mark.parametrize("kind", BUILDERS)


# Order and ids


@every_kind
def test_every_kind_of_archive_gives_the_same_ids_labels_and_bytes(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, ANIMALS))
    assert list(samples.ids) == [name for name, _ in ANIMALS]
    assert contents(samples) == [data for _, data in ANIMALS]
    assert samples.size.tolist() == [len(data) for _, data in ANIMALS]
    assert classes(samples) == ["cat", "cat", "dog"]
    assert samples.sequential == kind.startswith("tar.")


def test_a_folder_is_ordered_by_path_components_whatever_the_order_of_creation(tmp_path: Path) -> None:
    names = [
        "a/x.jpg",
        "a.b/x.jpg",
        "a-b/x.jpg",
        "B/x.jpg",
        "a/y/z.jpg",
        "é/x.jpg",
        "Z.jpg",
        "a0.jpg",
        "10.jpg",
        "9.jpg",
    ]
    expected = sorted(names, key=lambda name: tuple(name.split("/")))
    for seed in range(3):
        shuffled = random.Random(seed).sample(names, len(names))
        made = folder(tmp_path / str(seed), [(name, name.encode()) for name in shuffled])
        assert list(index(made).ids) == expected


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_tar_and_zip_keep_their_own_order(kind: str, tmp_path: Path) -> None:
    files = [("b.jpg", b"b"), ("c.jpg", b"c"), ("a.jpg", b"a")]
    assert list(index(BUILDERS[kind](tmp_path, files)).ids) == ["b.jpg", "c.jpg", "a.jpg"]


def test_several_archives_stay_in_the_order_given_and_name_their_samples(tmp_path: Path) -> None:
    samples = index([tar(tmp_path / "z.tar"), folder(tmp_path / "a"), zipped(tmp_path / "m.zip")])
    assert list(samples.ids) == [f"{at}/{name}" for at in ("z.tar", "a", "m.zip") for name, _ in ANIMALS]
    assert samples.source.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert contents(samples) == [data for _, data in ANIMALS] * 3
    assert classes(samples) == ["cat", "cat", "dog"] * 3


def test_archives_of_one_name_are_told_apart_by_the_folders_above(tmp_path: Path) -> None:
    for part in ("one", "two"):
        folder(tmp_path / part / "photos", [("x.jpg", part.encode())])
    samples = index([tmp_path / "one" / "photos", tmp_path / "two" / "photos"])
    assert list(samples.ids) == ["one/photos/x.jpg", "two/photos/x.jpg"]


def test_the_current_folder_is_an_archive_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder(tmp_path / "here"))
    assert list(index(".").ids) == [name for name, _ in ANIMALS]
    samples = index([".", zipped(tmp_path / "a.zip"), "cat/1.jpg"])
    assert list(samples.ids) == [f"{at}/{name}" for at in ("here", "a.zip") for name, _ in ANIMALS] + ["cat/1.jpg"]


def test_an_archive_without_images_beside_others_adds_nothing(tmp_path: Path) -> None:
    samples = index([folder(tmp_path / "a", [("x.txt", b"")]), folder(tmp_path / "b")])
    assert contents(samples) == [data for _, data in ANIMALS]


def test_no_files_at_all_are_an_index_of_none() -> None:
    assert len(index_files([])) == 0
    assert index_files([]).compute_stamps().shape == (0, 16)


def test_an_archive_given_twice_is_an_error(tmp_path: Path) -> None:
    made = folder(tmp_path / "a")
    assert "given twice" in refused(made, made / ".." / "a")


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_was_there_before_gets_a_number_and_its_own_bytes(kind: str, tmp_path: Path) -> None:
    names = ["x.jpg", "x.jpg", "x.jpg#2", "x.jpg", "./x.jpg"]
    files = [(name + (".jpg" if "#" in name else ""), str(i).encode()) for i, name in enumerate(names)]
    samples = index(BUILDERS[kind](tmp_path, files))
    assert list(samples.ids) == ["x.jpg", "x.jpg#2", "x.jpg#2.jpg", "x.jpg#3", "x.jpg#4"]
    assert contents(samples) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_number_never_meets_a_name_that_looks_numbered(tmp_path: Path) -> None:
    files = [(name, name.encode()) for name in ("a.jpg", "a.jpg", "a.jpg#2/b.jpg", "a.jpg#2/b.jpg")]
    ids = list(index(tar(tmp_path / "a.tar", files)).ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize(
    ("name", "sample_id"),
    [
        ("../../etc/x.jpg", "../../etc/x.jpg"),
        ("/etc/x.jpg", "etc/x.jpg"),
        (".//./a//x.jpg", "a/x.jpg"),
        ("a\nb/x\x1b[31m.jpg", "a\nb/x\x1b[31m.jpg"),
        ("<script>alert(1)</script>/x.jpg", "<script>alert(1)</script>/x.jpg"),
        ("d/" * 5000 + "x.jpg", "d/" * 5000 + "x.jpg"),
        ("C:\\photos\\x.jpg", "C:\\photos\\x.jpg"),
        ("été/犬.jpg", "été/犬.jpg"),
    ],
)
def test_a_hostile_name_is_text_and_nothing_more(kind: str, name: str, sample_id: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, [(name, b"bytes")]))
    assert list(samples.ids) == [sample_id]
    assert contents(samples) == [b"bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{kind}"]


def test_an_undecodable_name_is_escaped_in_the_id_and_read_by_its_bytes(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as out:
        out.addfile(member(name, size=1), io.BytesIO(b"x"))
    samples = index(tmp_path / "a.tar")
    assert list(samples.ids) == ["caf\\udce9.jpg"]
    assert samples.raw_name(0) == b"caf\xe9.jpg"
    assert contents(samples) == [b"x"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_with_an_undecodable_name_is_read(tmp_path: Path) -> None:
    folder(tmp_path / "a")
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.jpg")).write_bytes(b"odd")
    samples = index(tmp_path / "a")
    assert list(samples.ids)[-1] == "\\udcff.jpg"
    assert contents(samples)[-1] == b"odd"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_an_escaped_name_that_is_there_as_text_too_leaves_both_their_own_ids_and_bytes(tmp_path: Path) -> None:
    folder(tmp_path / "a", [("\\udcff.jpg", b"text")])
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.jpg")).write_bytes(b"odd")
    samples = index(tmp_path / "a")
    assert list(samples.ids) == ["\\udcff.jpg", "\\udcff.jpg#2"]
    assert contents(samples) == [b"text", b"odd"]


# Globs, braces, arguments


def test_braces_count_with_the_width_of_their_bounds_and_lists_keep_their_order(tmp_path: Path) -> None:
    for name in ("s-008.tar", "s-009.tar", "s-010.tar", "b.tar", "a.tar"):
        tar(tmp_path / name)
    found = expand_paths([tmp_path / "s-{008..010}.tar", str(tmp_path / "{b,a}.tar"), tmp_path / "s-*.tar"])
    assert [[path.name for path in paths] for paths in found] == [
        ["s-008.tar", "s-009.tar", "s-010.tar"],
        ["b.tar", "a.tar"],
        ["s-008.tar", "s-009.tar", "s-010.tar"],
    ]


def test_a_name_that_exists_is_taken_as_it_stands(tmp_path: Path) -> None:
    made = folder(tmp_path / "photos[1]{a,b}")
    assert expand_paths([made]) == [[made]]


def test_missing_shards_are_counted_and_named(tmp_path: Path) -> None:
    tar(tmp_path / "s-1.tar")
    assert "2 of its paths do not exist" in refused(str(tmp_path / "s-{0..2}.tar"))


@pytest.mark.parametrize(("argument", "said"), [("nowhere", "does not exist"), ("*.tar", "nothing matches")])
def test_a_path_that_leads_nowhere_is_an_error(argument: str, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path / argument)


def test_a_brace_that_expands_to_too_many_paths_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featpipe.data.sources.glob._MAX_PATHS", 100)
    assert "more than 100 paths" in refused("x{0..9999999}.tar")


def test_images_can_be_named_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder(tmp_path))
    samples = index(["dog/1.jpg", Path("cat/2.png"), "dog/1.jpg"])
    assert list(samples.ids) == ["dog/1.jpg", "cat/2.png", "dog/1.jpg#2"]
    assert samples.labels.task == "none"
    assert contents(samples) == [b"dog one", b"cat two", b"dog one"]


def test_a_file_that_is_no_archive_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"nothing of the kind")
    assert "expected a folder, a .tar" in refused(tmp_path / "a.bin")


def test_no_image_at_all_is_an_error_that_says_what_was_found(tmp_path: Path) -> None:
    made = folder(tmp_path / "a", [("a.txt", b""), ("b.txt", b""), (".c.jpg", b"")])
    message = refused(made)
    assert "2 .txt, 1 hidden" in message
    assert ".jpg" in message


@pytest.mark.parametrize("build", [lambda path: tar(path / "a.tar", []), lambda path: zipped(path / "a.zip", [])])
def test_an_empty_archive_is_an_error(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "nothing at all" in refused(build(tmp_path))


# What is a sample


@every_kind
def test_hidden_files_other_suffixes_and_resource_forks_are_counted_and_left_out(kind: str, tmp_path: Path) -> None:
    others = [".x/a.jpg", "__MACOSX/a.jpg", "cat/.a.jpg", "notes.txt", "Makefile"]
    samples = index(BUILDERS[kind](tmp_path, [*ANIMALS, *((name, b"x") for name in others)]))
    assert len(samples) == 3
    assert samples.ignored == {"hidden": 2, "__MACOSX": 1, ".txt": 1, "no suffix": 1}


def test_what_is_a_sample_is_told_by_its_parts_however_they_are_put_together() -> None:
    parts = [
        "a",
        "b.jpg",
        ".c.jpg",
        "..",
        ".",
        "__MACOSX",
        "d.",
        "e.JPG",
        "__MACOSX.png",
        "f.g/h",
        "",
        "...jpg",
        "i.txt",
    ]
    for name in map("/".join, (*itertools.product(parts, repeat=2), *itertools.product(parts, repeat=3))):
        listing = Listing(
            data.ArchiveSource(Path("x"), "tar", "/x"), ArchiveLimits(), data.MODALITIES["image"].suffixes
        )
        stem, dot, suffix = name.split("/")[-1].rpartition(".")
        hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
        wanted = bool(stem) and dot + suffix.lower() in data.MODALITIES["image"].suffixes
        expected = wanted and not hidden and "__MACOSX" not in name.split("/")
        assert (listing.accepts(name), listing.ignored.total()) == (expected, not expected), name


def test_images_of_formats_that_are_not_decoded_get_a_row(tmp_path: Path) -> None:
    files = [(f"x{suffix}", b"x") for suffix in sorted(data.MODALITIES["image"].suffixes)] + [("y.JPG", b"y")]
    assert len(index(folder(tmp_path / "a", files))) == len(data.MODALITIES["image"].suffixes) + 1


@every_kind
def test_an_empty_image_keeps_its_row(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, [("a.jpg", b""), ("b.jpg", b"b")]))
    assert samples.fault.tolist() == [Status.EMPTY, Status.OK]
    assert status_of(samples) is Status.EMPTY


@every_kind
def test_an_image_over_the_limit_keeps_its_row(kind: str, tmp_path: Path) -> None:
    made = BUILDERS[kind](tmp_path, [("a.jpg", bytes(11)), ("b.jpg", bytes(10))])
    samples = index(made, limits=ArchiveLimits(max_member_bytes=10))
    assert samples.fault.tolist() == [Status.TOO_LARGE, Status.OK]
    assert status_of(samples) is Status.TOO_LARGE


@every_kind
def test_too_many_members_are_an_error(kind: str, tmp_path: Path) -> None:
    assert "more than 2 members" in refused(BUILDERS[kind](tmp_path, ANIMALS), limits=ArchiveLimits(max_members=2))


@on_posix
def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    made = folder(tmp_path / "a")
    (made / "bird").symlink_to(made / "cat")
    (made / "cat" / "up").symlink_to(made)
    (made / "dog" / "2.jpg").symlink_to(made / "dog" / "1.jpg")
    (made / "dog" / "3.jpg").symlink_to(made / "nowhere")
    (made / "dog" / "4.jpg").symlink_to("4.jpg")
    samples = index(made)
    assert list(samples.ids) == [
        *("bird/1.jpg", "bird/2.png", "cat/1.jpg", "cat/2.png"),
        *("dog/1.jpg", "dog/2.jpg", "dog/3.jpg", "dog/4.jpg"),
    ]
    assert samples.ignored == {"link to a parent folder": 2}
    assert status_of(samples, 6) is Status.MISSING
    assert status_of(samples, 7) is Status.UNREADABLE


@on_posix
def test_a_pipe_with_the_name_of_an_image_keeps_its_row_and_hangs_nobody(tmp_path: Path) -> None:
    made = folder(tmp_path / "a")
    os.mkfifo(made / "pipe.jpg")
    samples = index(made)
    assert status_of(samples, 3) is Status.NOT_A_FILE
    (made / "cat" / "1.jpg").unlink()
    os.mkfifo(made / "cat" / "1.jpg")
    assert status_of(samples, 0) is Status.NOT_A_FILE


@on_posix
def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folder(tmp_path / "a")
    listdir = os.listdir

    def guarded(path: str) -> object:
        if path.rstrip("/").endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", guarded)
    assert "Permission denied" in refused(made)


@on_posix
def test_a_folder_whose_files_may_not_be_looked_at_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not path.rstrip("/").endswith("dog"))
    assert "Permission denied" in refused(folder(tmp_path / "a"))


def test_a_hard_link_in_a_tar_has_the_bytes_of_the_member_it_names(tmp_path: Path) -> None:
    for suffix in COMPRESSIONS:
        links = [
            ("blob", b"first"),
            member("a.jpg", type=tarfile.LNKTYPE, linkname="blob"),
            member("b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"),
            ("blob", b"second"),
            member("c.jpg", type=tarfile.LNKTYPE, linkname="blob"),
            member("d.jpg", type=tarfile.LNKTYPE, linkname="later"),
            ("later", b"too late"),
        ]
        samples = index(tar(tmp_path / f"a{suffix}", links))
        with samples.open() as reader:
            assert [reader.read(row) for row in range(3)] == [b"first", b"first", b"second"]
        assert status_of(samples, 3) is Status.NOT_A_FILE


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_other_links_devices_and_sparse_members_keep_their_row(kind: bytes, tmp_path: Path) -> None:
    odd = member("odd.jpg", type=kind, linkname="/etc/passwd")
    samples = index(tar(tmp_path / "a.tar", [("a.jpg", b"a"), odd, ("b.jpg", b"b")]))
    assert samples.fault.tolist() == [Status.OK, Status.NOT_A_FILE, Status.OK]
    assert status_of(samples, 1) is Status.NOT_A_FILE


# Labels from folders


@every_kind
def test_the_first_folder_level_is_the_class_and_deeper_ones_are_not_merged(kind: str, tmp_path: Path) -> None:
    names = ["cat/a/x.jpg", "cat/b/x.jpg", "dog/a/x.jpg", "top.jpg"]
    samples = index(BUILDERS[kind](tmp_path, [(name, b"x") for name in names]))
    assert classes(samples) == ["cat", "cat", "dog", None]
    assert samples.labels.classes == ("cat", "dog")


@every_kind
def test_without_folders_nothing_is_labelled(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, [("a.jpg", b"a"), ("b.jpg", b"b")]))
    assert samples.labels.same_as(Labels.unlabeled(2))
    assert samples.split.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_one_top_folder_of_a_tar_or_zip_is_its_root(kind: str, tmp_path: Path) -> None:
    files = [(f"photos/{name}", b"x") for name in ("cat/1.jpg", "dog/1.jpg", "loose.jpg")]
    samples = index(BUILDERS[kind](tmp_path, files))
    assert classes(samples) == ["cat", "dog", None]
    assert list(samples.ids) == [name for name, _ in files]


def test_a_top_folder_is_the_same_however_its_names_are_spelled(tmp_path: Path) -> None:
    made = tar(tmp_path / "a.tar", [("./p/cat/1.jpg", b"x"), ("p//cat/2.jpg", b"x"), ("/p/dog/1.jpg", b"x")])
    assert classes(index(made)) == ["cat", "cat", "dog"]


def test_two_top_folders_are_two_classes(tmp_path: Path) -> None:
    assert classes(index(tar(tmp_path / "a.tar", [("p/a/1.jpg", b"x"), ("pp/a/1.jpg", b"x")]))) == ["p", "pp"]


def test_one_top_folder_that_holds_images_only_is_a_class(tmp_path: Path) -> None:
    assert classes(index(tar(tmp_path / "a.tar", [("cat/1.jpg", b"x")]))) == ["cat"]


def test_shards_of_one_argument_share_their_root(tmp_path: Path) -> None:
    tar(tmp_path / "s0.tar", [("cat/a/1.jpg", b"x")])
    tar(tmp_path / "s1.tar", [("dog/a/1.jpg", b"x")])
    assert classes(index(tmp_path / "s{0..1}.tar")) == ["cat", "dog"]


def test_a_folder_in_which_all_lies_in_one_folder_has_that_class(tmp_path: Path) -> None:
    assert classes(index(folder(tmp_path / "a", [("photos/cat/1.jpg", b"x")]))) == ["photos"]


# Sidecar files


@every_kind
def test_sidecar_classes_go_before_folders(kind: str, tmp_path: Path) -> None:
    files = [
        ("cat/0.a.jpg", b"x"),
        ("cat/0.cls", b" tiger\n"),
        ("cat/0.txt", b"a caption"),
        ("cat/1.json", b'{"class": "lion"}'),
        ("cat/1.jpg", b"x"),
        ("cat/2.jpg", b"x"),
        ("stray.cls", b"nobody's"),
    ]
    samples = index(BUILDERS[kind](tmp_path, files))
    assert dict(zip(samples.ids, classes(samples), strict=True)) == {
        "cat/0.a.jpg": "tiger",
        "cat/1.jpg": "lion",
        "cat/2.jpg": None,
    }
    assert samples.ignored == {".txt": 1, ".cls": 1}


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        (['{"label": 3}', '{"label": 10}'], Labels.from_class_names(["3", "10"])),
        (['{"label": "b", "class": "c"}', '{"cls": "a"}'], Labels.from_class_names(["b", "a"])),
        (['{"target": 3}', '{"target": 4}'], Labels.from_targets([3, 4], ["target"])),
        (['{"label": 3}', '{"label": 4.5}'], Labels.from_targets([3, 4.5], ["label"])),
        (['{"target": "warm"}', '{"target": "cold"}'], Labels.from_class_names(["warm", "cold"])),
        (['{"labels": ["a", "b"]}', '{"labels": []}'], Labels.from_label_sets([["a", "b"], []])),
        (['{"labels": ["a", "b"]}', '{"caption": 1}'], Labels.from_label_sets([["a", "b"], None])),
        (['{"label": null}', '{"label": "a"}'], Labels.from_class_names([None, "a"])),
        (['{"caption": "x"}', "[1, 2]"], Labels.unlabeled(2)),
    ],
)
def test_json_sidecars_say_what_is_meant(notes: list[str], expected: Labels, tmp_path: Path) -> None:
    files = [
        (f"{i}.{suffix}", data)
        for i, note in enumerate(notes)
        for suffix, data in (("jpg", b"x"), ("json", note.encode()))
    ]
    assert index(tar(tmp_path / "a.tar", files)).labels.same_as(expected)


@every_kind
@pytest.mark.parametrize(
    "note",
    [
        *(b"{", b'{"label": {}}', b'{"label": [[]]}', b'{"target": NaN}', b'{"target": 1e999}', b"\xff\xfe{}"),
        *(b'{"label": ' + b"[" * 100_000, b'{"target": ' + b"9" * 5000 + b"}", b'"' + bytes(2**20)),
    ],
)
def test_a_hostile_sidecar_is_an_error_that_names_it(kind: str, note: bytes, tmp_path: Path) -> None:
    assert "'7.json'" in refused(BUILDERS[kind](tmp_path, [("7.jpg", b"x"), ("7.json", note)]))


@every_kind
def test_a_json_that_belongs_to_no_sample_is_ignored_whatever_is_in_it(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, [*ANIMALS, ("annotations.json", bytes(2**20 + 1))]))
    assert classes(samples) == ["cat", "cat", "dog"]
    assert samples.ignored == {".json": 1}


def test_a_class_file_goes_before_json_and_two_that_differ_are_an_error(tmp_path: Path) -> None:
    files = [("a.jpg", b"x"), ("a.json", b'{"label": "from json"}'), ("a.cls", b"from cls")]
    assert classes(index(tar(tmp_path / "a.tar", files))) == ["from cls"]
    assert "second label" in refused(tar(tmp_path / "b.tar", [*files, ("a.cls", b"another")]))


def test_equal_keys_in_two_shards_are_two_samples(tmp_path: Path) -> None:
    for shard in "01":
        tar(tmp_path / f"s{shard}.tar", [("k.jpg", shard.encode()), ("k.cls", b"class " + shard.encode())])
    samples = index(tmp_path / "s{0..1}.tar")
    assert classes(samples) == ["class 0", "class 1"]
    assert contents(samples) == [b"0", b"1"]


# Tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_labels_samples_in_place_of_folders(delimiter: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "a")
    text = '\ufeffPath,other,Label\r\ndog/1.jpg,1,wolf\r\n\r\n./cat/1.jpg,2,"big cat"\r\n'.replace(",", delimiter)
    samples = index(made, labels=table(tmp_path / "t.csv", text))
    assert classes(samples) == ["big cat", None, "wolf"]


@pytest.mark.parametrize("style", ["id", "archive", "table", "absolute"])
@pytest.mark.parametrize("several", [False, True])
def test_a_table_names_samples_in_any_of_four_ways(style: str, several: bool, tmp_path: Path) -> None:
    made = folder(tmp_path / "data" / "a")
    given = [made, folder(tmp_path / "data" / "b", [("z.jpg", b"z")])] if several else [made]
    before = {"id": "a/" if several else "", "archive": "", "table": "data/a/", "absolute": f"{made}/"}[style]
    text = "file,label\n" + "".join(f"{before}{name},l{i}\n" for i, (name, _) in enumerate(ANIMALS))
    samples = index(given, labels=table(tmp_path / "t.csv", text))
    assert classes(samples)[:3] == ["l0", "l1", "l2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,label\na.jpg,3\nb.jpg,10\n", Labels.from_class_names(["3", "10"])),
        ("path,label\na.jpg,3\nb.jpg,1.5\n", Labels.from_targets([3, 1.5], ["label"])),
        ("path,target\na.jpg,3\nb.jpg,\n", Labels.from_targets([3, np.nan], ["target"])),
        ("path,target\na.jpg,warm\nb.jpg,cold\n", Labels.from_class_names(["warm", "cold"])),
        ("path,label\na.jpg,3\nb.jpg,x\n", Labels.from_class_names(["3", "x"])),
        ("path,labels\na.jpg,x;y\nb.jpg,\n", Labels.from_label_sets([["x", "y"], None])),
        ("path,labels\na.jpg,x | y\nb.jpg,y\n", Labels.from_label_sets([["x", "y"], ["y"]])),
        ("image,class\na.jpg,nan\nb.jpg,1\n", Labels.from_class_names(["nan", "1"])),
    ],
)
def test_what_a_column_means_follows_from_its_name_and_values(text: str, expected: Labels, tmp_path: Path) -> None:
    made = folder(tmp_path / "a", [("a.jpg", b"a"), ("b.jpg", b"b")])
    assert index(made, labels=table(tmp_path / "t.csv", text)).labels.same_as(expected)


def test_numbers_and_words_among_targets_are_refused(tmp_path: Path) -> None:
    made = folder(tmp_path / "a", [("a.jpg", b"a"), ("b.jpg", b"b")])
    text = "path,target\na.jpg,3\nb.jpg,n/a?\n"
    with pytest.raises(ArchiveError, match="'target' has 1 numbers and also 'n/a\\?'; leave the cells empty"):
        index(made, labels=table(tmp_path / "t.csv", text))
    stated = index(made, labels=LabelTable(tmp_path / "t.csv", task="classification")).labels
    assert stated.same_as(Labels.from_class_names(["3", "n/a?"]))


def test_columns_and_task_can_be_stated(tmp_path: Path) -> None:
    made = folder(tmp_path / "a", [("a.jpg", b"a"), ("b.jpg", b"b")])
    path = table(tmp_path / "t.csv", "who,where,age,height\nann,a.jpg,30,1.7\nbob,b.jpg,40,\n")
    one = index(made, labels=LabelTable(path, "where", "who")).labels
    assert one.same_as(Labels.from_class_names(["ann", "bob"]))
    as_classes = index(made, labels=LabelTable(path, "where", "age", "classification")).labels
    assert as_classes.same_as(Labels.from_class_names(["30", "40"]))
    as_number = index(made, labels=LabelTable(path, "where", "age", "regression")).labels
    assert as_number.same_as(Labels.from_targets([30, 40], ["age"]))
    both = index(made, labels=LabelTable(path, "where", "age, height")).labels
    assert both.same_as(Labels.from_targets([[30, 1.7], [np.nan, np.nan]], ["age", "height"]))


def test_text_where_numbers_are_asked_for_is_an_error(tmp_path: Path) -> None:
    made = folder(tmp_path / "a", [("a.jpg", b"a")])
    path = table(tmp_path / "t.csv", "path,label,age\na.jpg,old,3\n")
    assert "'old', expected numbers" in refused(made, labels=LabelTable(path, task="regression"))
    assert "'old', expected numbers" in refused(made, labels=LabelTable(path, label_column="age,label"))


def test_a_split_column_is_read_and_a_word_it_does_not_know_is_answered(tmp_path: Path) -> None:
    made = folder(tmp_path / "a", [(f"{i}.jpg", b"x") for i in range(6)])
    words = ["train", "val", "valid", "dev", "Test"]
    path = table(tmp_path / "t.csv", "path,label,split\n" + "".join(f"{i}.jpg,a,{w}\n" for i, w in enumerate(words)))
    assert index(made, labels=path).split.tolist() == [1, 2, 2, 2, 3, 0]
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        index(made, labels=table(tmp_path / "u.csv", "path,label,split\n0.jpg,a,trian\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\nnope.jpg,a\nx/y.jpg,b\ncat/1.jpg,c\n", "2 of its paths name no sample: 'nope.jpg', 'x/y.jpg'"),
        ("where,label\ncat/1.jpg,a\n", "no column of paths; found 'where', 'label', expected one of path, file"),
        ("path,colour\ncat/1.jpg,a\n", "no column of labels; found 'path', 'colour'"),
        ("path,label\ncat/1.jpg,a\n./cat/1.jpg,b\n", "two labels"),
        ("path,label\ncat/1.jpg\n", "line 2 has 1 cells, expected 2"),
        ("path,label,label\ncat/1.jpg,a,b\n", "two columns are named 'label'"),
        ("path,label\n,a\n", "row 1 has no 'path'"),
        ("", "no column of paths"),
        ('path,label\n"cat/1.jpg,a\n', "not a CSV"),
        ("path,label\ncat/1.jpg,\udcff\n", "not a CSV in UTF-8"),
    ],
)
def test_a_table_that_does_not_fit_is_an_error(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert said in refused(folder(tmp_path / "a"), labels=path)


def test_a_name_that_fits_several_samples_is_an_error(tmp_path: Path) -> None:
    for shard in "01":
        tar(tmp_path / f"s{shard}.tar", [("k.jpg", b"x")])
    path = table(tmp_path / "t.csv", "path,label\nk.jpg,a\n")
    assert "fits several samples" in refused(tmp_path / "s{0..1}.tar", labels=path)


def test_an_id_goes_before_a_path_that_reads_the_same(tmp_path: Path) -> None:
    made = tar(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.jpg", b"2")])
    assert classes(index(made, labels=table(tmp_path / "t.csv", "path,label\nx.jpg,a\n"))) == ["a", None]


def test_a_parquet_table_is_read_like_a_csv(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    made = folder(tmp_path / "a", [("a.jpg", b"a"), ("b.jpg", b"b")])

    def labels(column: str, values: list[object]) -> Labels:
        parquet.write_table(pyarrow.table({"path": ["a.jpg", "b.jpg"], column: values}), tmp_path / "t.parquet")
        return index(made, labels=tmp_path / "t.parquet").labels

    assert labels("label", ["x", None]).same_as(Labels.from_class_names(["x", None]))
    assert labels("label", [3, 10]).same_as(Labels.from_class_names(["3", "10"]))
    assert labels("label", [3.0, float("nan")]).same_as(Labels.from_class_names(["3", None]))
    assert labels("label", [["x"], []]).same_as(Labels.from_label_sets([["x"], []]))
    assert labels("y", [1, 2]).same_as(Labels.from_targets([1, 2], ["y"]))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    assert "Parquet" in refused(made, labels=tmp_path / "t.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert "featpipe[parquet]" in refused(folder(tmp_path / "a"), labels=tmp_path / "t.parquet")


def test_a_table_given_as_archive_is_exactly_its_rows(tmp_path: Path) -> None:
    folder(tmp_path / "data")
    absolute = tmp_path / "data" / "cat" / "2.png"
    path = table(
        tmp_path / "t.csv", f"path,label,split\ndata/dog/1.jpg,d,test\n./data/cat/1.jpg,c,\n{absolute},c,val\n"
    )
    samples = index(path)
    assert list(samples.ids)[:2] == ["data/dog/1.jpg", "data/cat/1.jpg"]
    assert contents(samples) == [b"dog one", b"cat one", b"cat two"]
    assert classes(samples) == ["d", "c", "c"]
    assert samples.split.tolist() == [3, 0, 2]


def test_a_table_without_labels_is_an_archive_without_labels(tmp_path: Path) -> None:
    folder(tmp_path)
    assert index(table(tmp_path / "t.csv", "file\ncat/1.jpg\n")).labels.task == "none"


def test_files_that_a_table_names_in_vain_are_counted_and_named(tmp_path: Path) -> None:
    folder(tmp_path)
    path = table(tmp_path / "t.csv", "path,label\ncat/1.jpg,a\ncat/8.jpg,a\ncat/9.jpg,a\n")
    assert "2 of its files do not exist: 'cat/8.jpg', 'cat/9.jpg'" in refused(path)


def test_labels_of_different_kinds_cannot_be_joined(tmp_path: Path) -> None:
    made = folder(tmp_path / "a")
    path = table(tmp_path / "t.csv", "path,target\na/cat/1.jpg,1.5\n")
    assert "labels of different kinds" in refused(made, path)


# Single files


def test_files_keep_their_order_and_a_missing_one_its_row(tmp_path: Path) -> None:
    made = folder(tmp_path / "a")
    paths = [made / "dog" / "1.jpg", made / "gone.jpg", made / "dog" / "1.jpg", made / "cat", "bad\0name.jpg"]
    labels = Labels.from_class_names(["d", "g", "d", "c", "n"])
    samples = index_files(paths, labels)
    assert samples.ids[0] == (made / "dog" / "1.jpg").as_posix()
    assert samples.ids[2] == samples.ids[0] + "#2"
    assert samples.labels.same_as(labels)
    assert [Status(int(fault)).word for fault in samples.fault] == ["ok", "missing", "ok", "not-a-file", "missing"]
    with samples.open() as reader:
        assert reader.read(2) == b"dog one"
    assert status_of(samples, 1) is Status.MISSING


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 labels for 1 paths"):
        index_files([tmp_path], Labels.unlabeled(2))


# Stamps


@every_kind
def test_stamps_stay_while_nothing_changes_and_tell_samples_apart(kind: str, tmp_path: Path) -> None:
    made = BUILDERS[kind](tmp_path, [*ANIMALS, ("e.jpg", b"")])
    stamps = index(made).compute_stamps()
    assert stamps.shape == (4, 16)
    assert stamps.dtype == np.uint8
    np.testing.assert_array_equal(stamps, index(made).compute_stamps())
    assert len({bytes(stamp) for stamp in stamps}) == 4
    assert not stamps[index(made).fault != 0].any()


@every_kind
def test_a_touched_archive_or_file_has_another_stamp(kind: str, tmp_path: Path) -> None:
    made = BUILDERS[kind](tmp_path, ANIMALS)
    before = index(made).compute_stamps()
    touched = made / "cat" / "1.jpg" if kind == "folder" else made
    os.utime(touched, ns=(1, 1))
    after = index(made).compute_stamps()
    assert (before != after).any(axis=1).tolist() == ([True, False, False] if kind == "folder" else [True] * 3)


@every_kind
def test_a_stamp_is_the_digest_of_path_name_offset_size_and_time(kind: str, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(indexing, "_STAMP_BLOCK_ROWS", 2)
    samples = index(BUILDERS[kind](tmp_path, [*ANIMALS, ("e.jpg", b""), ("z/é.jpg", b"accent")]))
    for row, stamp in enumerate(samples.compute_stamps()):
        path, name = os.fsencode(samples.sources[0].real_path), samples.raw_name(row)
        if kind == "folder":
            path, name = path + b"/" + name, b""
        numbers = (samples.offset[row], samples.size[row], samples.mtime_ns[row])
        digest = hashlib.sha256(struct.pack("<4q", len(path), *numbers) + path + name).digest()
        assert stamp.tobytes() == (bytes(16) if samples.fault[row] else digest[:16])


def test_a_file_has_one_stamp_by_whatever_way_it_is_reached(tmp_path: Path) -> None:
    made = folder(tmp_path / "a")
    ways = [index(made), index(tmp_path), index_files([made / name for name, _ in ANIMALS])]
    for way in ways:
        np.testing.assert_array_equal(way.compute_stamps(), ways[0].compute_stamps())


# Reading


@every_kind
def test_an_index_survives_pickling(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, ANIMALS))
    copy = pickle.loads(pickle.dumps(samples))
    assert copy.ids == samples.ids
    assert contents(copy) == contents(samples)
    np.testing.assert_array_equal(copy.compute_stamps(), samples.compute_stamps())


@every_kind
def test_threads_that_share_a_reader_get_the_right_bytes(kind: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    files = [(f"{i:03}.jpg", rng.randbytes(rng.randint(1, 5000))) for i in range(60)]
    samples = index(BUILDERS[kind](tmp_path, files))
    wrong: list[int] = []

    def work(rows: list[int]) -> None:
        wrong.extend(row for row in rows if reader.read(row) != files[row][1])

    with samples.open() as reader:
        orders = [random.Random(seed).sample(range(60), 20 if kind.startswith("tar.") else 60) for seed in range(4)]
        threads = [threading.Thread(target=work, args=(order,)) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_compressed_tar_read_in_order_is_decompressed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = index(tar(tmp_path / "a.tar.gz"))
    opened: list[str] = []
    open_raw = tars.open_decompressed
    monkeypatch.setattr(tars, "open_decompressed", lambda source: opened.append(source.real_path) or open_raw(source))
    with samples.open() as reader:
        assert [reader.read(row) for row in (0, 1, 2)] == [data for _, data in ANIMALS]
        assert len(opened) == 1
        assert reader.read(0) == b"cat one"
        assert len(opened) == 2


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_that_changed_since_it_was_listed_is_an_error(kind: str, tmp_path: Path) -> None:
    made = BUILDERS[kind](tmp_path, ANIMALS)
    samples = index(made)
    os.utime(made, ns=(1, 1))
    with samples.open() as reader, pytest.raises(ArchiveError, match="changed since it was listed"):
        reader.read(0)
    made.unlink()
    with samples.open() as reader, pytest.raises(ArchiveError, match="cannot be opened"):
        reader.read(0)


def test_a_file_that_went_away_or_grew_says_so(tmp_path: Path) -> None:
    made = folder(tmp_path / "a")
    samples = index(made, limits=ArchiveLimits(max_member_bytes=100))
    (made / "cat" / "1.jpg").unlink()
    (made / "cat" / "2.png").write_bytes(bytes(101))
    assert status_of(samples, 0) is Status.MISSING
    assert status_of(samples, 1) is Status.TOO_LARGE


@on_posix
def test_a_file_without_permission_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = index(folder(tmp_path / "a"))

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        assert status_of(samples, 0) is Status.UNREADABLE


# Damaged and hostile tars


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_truncated_tar_is_an_error_and_not_fewer_samples(suffix: str, tmp_path: Path) -> None:
    files = [(f"{i}.jpg", random.Random(i).randbytes(900)) for i in range(5)]
    whole = tar(tmp_path / f"a{suffix}", files).read_bytes()
    last = 5 * 1536 if suffix == ".tar" else len(whole)
    for length in range(40, last + 1 if suffix == ".tar" else last, 97):
        (tmp_path / f"b{suffix}").write_bytes(whole[:length])
        refused(tmp_path / f"b{suffix}")


def test_a_tar_without_an_end_marker_is_truncated(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: 3 * 1024])
    assert "no end-of-archive marker" in refused(tmp_path / "b.tar")


def test_a_damaged_header_in_the_middle_is_an_error(tmp_path: Path) -> None:
    data = bytearray(tar(tmp_path / "a.tar").read_bytes())
    data[1024 + 148] ^= 0x55
    (tmp_path / "a.tar").write_bytes(data)
    assert "damaged header at byte 1024" in refused(tmp_path / "a.tar")


def test_tars_joined_end_to_end_are_an_error(tmp_path: Path) -> None:
    data = tar(tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data + data)
    assert "after the end-of-archive marker" in refused(tmp_path / "a.tar")


def test_a_corrupt_gzip_is_an_error(tmp_path: Path) -> None:
    data = bytearray(tar(tmp_path / "a.tar.gz", [("a.jpg", random.Random(0).randbytes(9000))]).read_bytes())
    data[-6] ^= 1
    (tmp_path / "a.tar.gz").write_bytes(data)
    assert "damaged or truncated" in refused(tmp_path / "a.tar.gz")


def test_a_tar_is_known_by_its_bytes_and_not_by_its_name(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar.gz").rename(tmp_path / "photos")
    assert len(index(tmp_path / "photos")) == 3


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with any size field, with a right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = size.ljust(12, b"\0")
    block[136:148], block[148:156], block[156:157], block[257:265] = b"0" * 11 + b"\0", b" " * 8, kind, b"ustar\00000"
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize(
    "hostile",
    [
        header(b"a.jpg", b"\x80" + b"\xff" * 11),
        header(b"a.jpg", b"\xff" * 11 + b"\x00"),
        header(b"a.jpg", b"77777777777"),
        header(b"././@LongLink", b"77777777777", b"L"),
        header(b"././@LongLink", b"\xff" * 11 + b"\x00", b"L"),
        header(b"pax", b"77777777777", b"x"),
        header(b"././@LongLink", b"00000000005", b"L") * 3000,
        (header(b"././@LongLink", b"0" * 11, b"L")) * 3000,
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_hostile_headers_are_errors(hostile: bytes, compress, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.tar").write_bytes(compress(header(b"b.jpg", b"0" * 11) + hostile + bytes(10240)))
    refused(tmp_path / "a.tar")


def test_a_compressed_tar_that_unfolds_without_measure_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(header(b"a.jpg", f"{2**29:011o}".encode()))
        for _ in range(300):
            out.write(bytes(2**20))
    assert "may be malicious" in refused(path, limits=ArchiveLimits(max_ratio=1))


# Damaged and hostile zips


def test_overlapping_zip_entries_are_an_error(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", [("a.jpg", bytes(5000)), ("b.jpg", b"b")])
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", directory + 4)
    data[second + 42 : second + 46] = struct.pack("<I", 0)
    path.write_bytes(data)
    assert "overlaps" in refused(path)


def test_a_zip_that_unfolds_without_measure_is_an_error(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", [("a.jpg", b"x")])
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    assert "unfold" in refused(path)


@pytest.mark.parametrize(("field", "value"), [(8, 1), (10, 99)])
def test_an_encrypted_or_strangely_compressed_entry_keeps_its_row(field: int, value: int, tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + field : at + field + 2] = struct.pack("<H", value)
    path.write_bytes(data)
    samples = index(path)
    assert samples.fault.tolist() == [Status.UNREADABLE, Status.OK, Status.OK]
    assert status_of(samples) is Status.UNREADABLE


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_entry_whose_bytes_were_damaged_is_damaged_and_its_neighbours_are_not(method: int, tmp_path: Path) -> None:
    files = [(f"{i}.jpg", random.Random(i).randbytes(2000)) for i in range(3)]
    path = zipped(tmp_path / "a.zip", files, method)
    assert contents(index(path)) == [data for _, data in files]
    with zipfile.ZipFile(path) as opened:
        at = opened.infolist()[1].header_offset
    data = bytearray(path.read_bytes())
    data[at + 1000] ^= 0xFF
    path.write_bytes(data)
    samples = index(path)
    assert status_of(samples, 1) is Status.DAMAGED
    with samples.open() as reader:
        assert (reader.read(0), reader.read(2)) == (files[0][1], files[2][1])


def test_a_link_in_a_zip_keeps_its_row(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        out.writestr(link, "/etc/passwd")
    assert status_of(index(tmp_path / "a.zip")) is Status.NOT_A_FILE


def test_a_truncated_zip_is_an_error(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "a.zip").read_bytes()
    for length in range(30, len(whole), 7):
        (tmp_path / "b.zip").write_bytes(whole[:length])
        refused(tmp_path / "b.zip")


def test_whatever_the_bytes_are_only_our_errors_leave(tmp_path: Path) -> None:
    rng = random.Random(0)
    note = json.dumps({"label": "cat"}).encode()
    for kind in ("tar", "tar.gz", "zip"):
        made = BUILDERS[kind](tmp_path, [("a.jpg", b"a" * 700), ("a.json", note), ("b.jpg", b"b")])
        whole = made.read_bytes()
        for _ in range(80):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            made.write_bytes(data)
            try:
                contents(index(made))
            except ArchiveError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_a_sample_costs_less_than_a_hundred_bytes_beside_its_label() -> None:
    samples = index_files([f"folder/with/some/name/{i:06}.jpg" for i in range(20_000)])
    assert samples.names is samples.ids
    held = [samples.ids.data, samples.ids.offsets, samples.source, samples.offset, samples.size, samples.mtime_ns]
    assert sum(column.nbytes for column in [*held, samples.fault, samples.split]) / len(samples) < 100
