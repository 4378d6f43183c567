"""Indexes of archives that the tests write, compared with the files in them."""

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
from featpipe.data.sources import tar as tar_module
from featpipe.data.sources.listing import Listing
from featpipe.errors import ArchiveError, ConfigError, SampleError
from featpipe.status import Status

index_module = import_module("featpipe.data.index")

Files = Sequence[tuple[str, bytes]]

ANIMALS: Files = [("cat/1.jpg", b"cat one"), ("cat/2.png", b"cat two"), ("dog/1.jpg", b"dog one")]
COMPRESSIONS = {".tar": "w", ".tar.gz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}
on_posix = pytest.mark.skipif(os.name != "posix", reason="needs links and permissions of POSIX")


def write_folder(path: Path, files: Files = ANIMALS) -> Path:
    for name, content in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def make_member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def write_tar(path: Path, files: Iterable[tuple[str, bytes] | tarfile.TarInfo] = ANIMALS) -> Path:
    suffix = next((suffix for suffix in COMPRESSIONS if path.name.endswith(suffix)), ".tar")
    with tarfile.open(path, COMPRESSIONS[suffix], format=tarfile.PAX_FORMAT) as out:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                out.addfile(file)
            else:
                out.addfile(make_member(file[0], size=len(file[1])), io.BytesIO(file[1]))
    return path


def write_zip(path: Path, files: Files = ANIMALS, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in files:
            out.writestr(zipfile.ZipInfo(name), content, method)
    return path


def write_table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read_contents(samples: Index) -> list[bytes]:
    with samples.open() as reader:
        return [reader.read(row) for row in range(len(samples))]


def read_fault(samples: Index, row: int = 0) -> Status:
    with samples.open() as reader, pytest.raises(SampleError) as error_info:
        reader.read(row)
    assert error_info.value.sample_id == samples.ids[row]
    assert error_info.value.archive == str(samples.sources[samples.source[row]].path)
    assert "\n" not in str(error_info.value)
    return error_info.value.status


def indexing_error(*archives: Path | str, **options: object) -> str:
    with pytest.raises(ArchiveError) as error_info:
        index(archives, **options)  # type: ignore[arg-type]
    message = str(error_info.value)
    assert "\n" not in message
    return message


def class_names(samples: Index) -> list[str | None]:
    return samples.labels.y.tolist() if samples.labels.task != "none" else [None] * len(samples)


BUILDERS = {
    "folder": lambda path, files: write_folder(path / "a", files),
    "tar": lambda path, files: write_tar(path / "a.tar", files),
    "tar.gz": lambda path, files: write_tar(path / "a.tar.gz", files),
    "tar.bz2": lambda path, files: write_tar(path / "a.tar.bz2", files),
    "tar.xz": lambda path, files: write_tar(path / "a.tar.xz", files),
    "zip": lambda path, files: write_zip(path / "a.zip", files),
}
every_kind = pytest.mark.parametrize("kind", BUILDERS)


# Order and ids


@every_kind
def test_every_kind_of_archive_gives_the_same_ids_labels_and_bytes(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, ANIMALS))
    assert list(samples.ids) == [name for name, _ in ANIMALS]
    assert read_contents(samples) == [data for _, data in ANIMALS]
    assert samples.size.tolist() == [len(data) for _, data in ANIMALS]
    assert class_names(samples) == ["cat", "cat", "dog"]
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
        archive = write_folder(tmp_path / str(seed), [(name, name.encode()) for name in shuffled])
        assert list(index(archive).ids) == expected


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_tar_and_zip_keep_their_own_order(kind: str, tmp_path: Path) -> None:
    files = [("b.jpg", b"b"), ("c.jpg", b"c"), ("a.jpg", b"a")]
    assert list(index(BUILDERS[kind](tmp_path, files)).ids) == ["b.jpg", "c.jpg", "a.jpg"]


def test_several_archives_keep_the_given_order_and_prefix_their_ids(tmp_path: Path) -> None:
    samples = index([write_tar(tmp_path / "z.tar"), write_folder(tmp_path / "a"), write_zip(tmp_path / "m.zip")])
    assert list(samples.ids) == [f"{archive}/{name}" for archive in ("z.tar", "a", "m.zip") for name, _ in ANIMALS]
    assert samples.source.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert read_contents(samples) == [data for _, data in ANIMALS] * 3
    assert class_names(samples) == ["cat", "cat", "dog"] * 3


def test_archives_of_the_same_name_are_distinguished_by_their_parent_folders(tmp_path: Path) -> None:
    for part in ("one", "two"):
        write_folder(tmp_path / part / "photos", [("x.jpg", part.encode())])
    samples = index([tmp_path / "one" / "photos", tmp_path / "two" / "photos"])
    assert list(samples.ids) == ["one/photos/x.jpg", "two/photos/x.jpg"]


def test_the_current_folder_is_an_archive_with_its_real_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path / "here"))
    assert list(index(".").ids) == [name for name, _ in ANIMALS]
    samples = index([".", write_zip(tmp_path / "a.zip"), "cat/1.jpg"])
    assert list(samples.ids) == [f"{archive}/{name}" for archive in ("here", "a.zip") for name, _ in ANIMALS] + [
        "cat/1.jpg"
    ]


def test_an_archive_without_images_adds_no_rows_to_the_others(tmp_path: Path) -> None:
    samples = index([write_folder(tmp_path / "a", [("x.txt", b"")]), write_folder(tmp_path / "b")])
    assert read_contents(samples) == [data for _, data in ANIMALS]


def test_an_index_of_no_files_is_empty() -> None:
    assert len(index_files([])) == 0
    assert index_files([]).compute_stamps().shape == (0, 16)


def test_an_archive_given_twice_is_an_error(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a")
    assert "given twice" in indexing_error(archive, archive / ".." / "a")


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_name_gets_a_number_and_keeps_its_own_bytes(kind: str, tmp_path: Path) -> None:
    names = ["x.jpg", "x.jpg", "x.jpg#2", "x.jpg", "./x.jpg"]
    files = [(name + (".jpg" if "#" in name else ""), str(i).encode()) for i, name in enumerate(names)]
    samples = index(BUILDERS[kind](tmp_path, files))
    assert list(samples.ids) == ["x.jpg", "x.jpg#2", "x.jpg#2.jpg", "x.jpg#3", "x.jpg#4"]
    assert read_contents(samples) == [b"0", b"1", b"2", b"3", b"4"]


def test_numbered_ids_never_collide_with_names_that_look_numbered(tmp_path: Path) -> None:
    files = [(name, name.encode()) for name in ("a.jpg", "a.jpg", "a.jpg#2/b.jpg", "a.jpg#2/b.jpg")]
    ids = list(index(write_tar(tmp_path / "a.tar", files)).ids)
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
def test_a_hostile_name_is_plain_text_and_writes_no_file(kind: str, name: str, sample_id: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, [(name, b"bytes")]))
    assert list(samples.ids) == [sample_id]
    assert read_contents(samples) == [b"bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{kind}"]


def test_an_undecodable_name_is_escaped_in_the_id_and_read_by_its_bytes(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as out:
        out.addfile(make_member(name, size=1), io.BytesIO(b"x"))
    samples = index(tmp_path / "a.tar")
    assert list(samples.ids) == ["caf\\udce9.jpg"]
    assert samples.raw_name(0) == b"caf\xe9.jpg"
    assert read_contents(samples) == [b"x"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_with_an_undecodable_name_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.jpg")).write_bytes(b"odd")
    samples = index(tmp_path / "a")
    assert list(samples.ids)[-1] == "\\udcff.jpg"
    assert read_contents(samples)[-1] == b"odd"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_an_undecodable_name_and_a_name_that_spells_its_escape_are_two_samples(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [("\\udcff.jpg", b"text")])
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.jpg")).write_bytes(b"odd")
    samples = index(tmp_path / "a")
    assert list(samples.ids) == ["\\udcff.jpg", "\\udcff.jpg#2"]
    assert read_contents(samples) == [b"text", b"odd"]


# Globs, braces, arguments


def test_brace_ranges_are_zero_padded_and_brace_lists_keep_their_order(tmp_path: Path) -> None:
    for name in ("s-008.tar", "s-009.tar", "s-010.tar", "b.tar", "a.tar"):
        write_tar(tmp_path / name)
    expanded = expand_paths([tmp_path / "s-{008..010}.tar", str(tmp_path / "{b,a}.tar"), tmp_path / "s-*.tar"])
    assert [[path.name for path in paths] for paths in expanded] == [
        ["s-008.tar", "s-009.tar", "s-010.tar"],
        ["b.tar", "a.tar"],
        ["s-008.tar", "s-009.tar", "s-010.tar"],
    ]


def test_an_existing_path_is_not_expanded(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "photos[1]{a,b}")
    assert expand_paths([archive]) == [[archive]]


def test_missing_shards_are_counted_and_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-1.tar")
    assert "2 of its paths do not exist" in indexing_error(str(tmp_path / "s-{0..2}.tar"))


@pytest.mark.parametrize(("argument", "expected"), [("nowhere", "does not exist"), ("*.tar", "nothing matches")])
def test_a_missing_path_is_an_error(argument: str, expected: str, tmp_path: Path) -> None:
    assert expected in indexing_error(tmp_path / argument)


def test_a_brace_that_expands_to_too_many_paths_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featpipe.data.sources.glob._MAX_PATHS", 100)
    assert "more than 100 paths" in indexing_error("x{0..9999999}.tar")


def test_single_images_can_be_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path))
    samples = index(["dog/1.jpg", Path("cat/2.png"), "dog/1.jpg"])
    assert list(samples.ids) == ["dog/1.jpg", "cat/2.png", "dog/1.jpg#2"]
    assert samples.labels.task == "none"
    assert read_contents(samples) == [b"dog one", b"cat two", b"dog one"]


def test_the_error_for_a_file_that_is_not_an_archive_lists_the_expected_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"nothing of the kind")
    assert "expected a folder, a .tar" in indexing_error(tmp_path / "a.bin")


def test_the_error_for_an_archive_without_images_counts_its_other_files(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a", [("a.txt", b""), ("b.txt", b""), (".c.jpg", b"")])
    message = indexing_error(archive)
    assert "2 .txt, 1 hidden" in message
    assert ".jpg" in message


@pytest.mark.parametrize(
    "build", [lambda path: write_tar(path / "a.tar", []), lambda path: write_zip(path / "a.zip", [])]
)
def test_an_empty_archive_is_an_error(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "nothing at all" in indexing_error(build(tmp_path))


# What is a sample


@every_kind
def test_hidden_files_other_suffixes_and_resource_forks_are_ignored_and_counted(kind: str, tmp_path: Path) -> None:
    ignored_names = [".x/a.jpg", "__MACOSX/a.jpg", "cat/.a.jpg", "notes.txt", "Makefile"]
    samples = index(BUILDERS[kind](tmp_path, [*ANIMALS, *((name, b"x") for name in ignored_names)]))
    assert len(samples) == 3
    assert samples.ignored == {"hidden": 2, "__MACOSX": 1, ".txt": 1, "no suffix": 1}


def test_the_rule_for_sample_names_holds_for_all_combinations_of_components() -> None:
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
        is_hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
        has_suffix = bool(stem) and dot + suffix.lower() in data.MODALITIES["image"].suffixes
        expected = has_suffix and not is_hidden and "__MACOSX" not in name.split("/")
        assert (listing.accepts(name), listing.ignored.total()) == (expected, not expected), name


def test_images_of_formats_that_are_not_decoded_get_a_row(tmp_path: Path) -> None:
    files = [(f"x{suffix}", b"x") for suffix in sorted(data.MODALITIES["image"].suffixes)] + [("y.JPG", b"y")]
    assert len(index(write_folder(tmp_path / "a", files))) == len(data.MODALITIES["image"].suffixes) + 1


@every_kind
def test_an_empty_image_keeps_its_row(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, [("a.jpg", b""), ("b.jpg", b"b")]))
    assert samples.fault.tolist() == [Status.EMPTY, Status.OK]
    assert read_fault(samples) is Status.EMPTY


@every_kind
def test_an_image_over_the_limit_keeps_its_row(kind: str, tmp_path: Path) -> None:
    archive = BUILDERS[kind](tmp_path, [("a.jpg", bytes(11)), ("b.jpg", bytes(10))])
    samples = index(archive, limits=ArchiveLimits(max_member_bytes=10))
    assert samples.fault.tolist() == [Status.TOO_LARGE, Status.OK]
    assert read_fault(samples) is Status.TOO_LARGE


@every_kind
def test_too_many_members_are_an_error(kind: str, tmp_path: Path) -> None:
    assert "more than 2 members" in indexing_error(
        BUILDERS[kind](tmp_path, ANIMALS), limits=ArchiveLimits(max_members=2)
    )


@on_posix
def test_links_are_followed_except_into_cycles(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a")
    (archive / "bird").symlink_to(archive / "cat")
    (archive / "cat" / "up").symlink_to(archive)
    (archive / "dog" / "2.jpg").symlink_to(archive / "dog" / "1.jpg")
    (archive / "dog" / "3.jpg").symlink_to(archive / "nowhere")
    (archive / "dog" / "4.jpg").symlink_to("4.jpg")
    samples = index(archive)
    assert list(samples.ids) == [
        *("bird/1.jpg", "bird/2.png", "cat/1.jpg", "cat/2.png"),
        *("dog/1.jpg", "dog/2.jpg", "dog/3.jpg", "dog/4.jpg"),
    ]
    assert samples.ignored == {"link to a parent folder": 2}
    assert read_fault(samples, 6) is Status.MISSING
    assert read_fault(samples, 7) is Status.UNREADABLE


@on_posix
def test_a_pipe_with_the_name_of_an_image_keeps_its_row_and_does_not_block(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a")
    os.mkfifo(archive / "pipe.jpg")
    samples = index(archive)
    assert read_fault(samples, 3) is Status.NOT_A_FILE
    (archive / "cat" / "1.jpg").unlink()
    os.mkfifo(archive / "cat" / "1.jpg")
    assert read_fault(samples, 0) is Status.NOT_A_FILE


@on_posix
def test_a_folder_without_read_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_folder(tmp_path / "a")
    listdir = os.listdir

    def guarded(path: str) -> object:
        if path.rstrip("/").endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", guarded)
    assert "Permission denied" in indexing_error(archive)


@on_posix
def test_a_folder_without_search_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not path.rstrip("/").endswith("dog"))
    assert "Permission denied" in indexing_error(write_folder(tmp_path / "a"))


def test_a_hard_link_in_a_tar_has_the_bytes_of_the_member_it_names(tmp_path: Path) -> None:
    for suffix in COMPRESSIONS:
        links = [
            ("blob", b"first"),
            make_member("a.jpg", type=tarfile.LNKTYPE, linkname="blob"),
            make_member("b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"),
            ("blob", b"second"),
            make_member("c.jpg", type=tarfile.LNKTYPE, linkname="blob"),
            make_member("d.jpg", type=tarfile.LNKTYPE, linkname="later"),
            ("later", b"too late"),
        ]
        samples = index(write_tar(tmp_path / f"a{suffix}", links))
        with samples.open() as reader:
            assert [reader.read(row) for row in range(3)] == [b"first", b"first", b"second"]
        assert read_fault(samples, 3) is Status.NOT_A_FILE


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_other_links_devices_and_sparse_members_keep_their_row(kind: bytes, tmp_path: Path) -> None:
    odd = make_member("odd.jpg", type=kind, linkname="/etc/passwd")
    samples = index(write_tar(tmp_path / "a.tar", [("a.jpg", b"a"), odd, ("b.jpg", b"b")]))
    assert samples.fault.tolist() == [Status.OK, Status.NOT_A_FILE, Status.OK]
    assert read_fault(samples, 1) is Status.NOT_A_FILE


# Labels from folders


@every_kind
def test_the_first_folder_level_is_the_class_and_deeper_ones_are_not_merged(kind: str, tmp_path: Path) -> None:
    names = ["cat/a/x.jpg", "cat/b/x.jpg", "dog/a/x.jpg", "top.jpg"]
    samples = index(BUILDERS[kind](tmp_path, [(name, b"x") for name in names]))
    assert class_names(samples) == ["cat", "cat", "dog", None]
    assert samples.labels.classes == ("cat", "dog")


@every_kind
def test_images_outside_folders_are_unlabelled(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, [("a.jpg", b"a"), ("b.jpg", b"b")]))
    assert samples.labels.same_as(Labels.unlabeled(2))
    assert samples.split.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_single_top_folder_of_a_tar_or_zip_is_its_root(kind: str, tmp_path: Path) -> None:
    files = [(f"photos/{name}", b"x") for name in ("cat/1.jpg", "dog/1.jpg", "loose.jpg")]
    samples = index(BUILDERS[kind](tmp_path, files))
    assert class_names(samples) == ["cat", "dog", None]
    assert list(samples.ids) == [name for name, _ in files]


def test_different_spellings_of_a_top_folder_are_one_folder(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", [("./p/cat/1.jpg", b"x"), ("p//cat/2.jpg", b"x"), ("/p/dog/1.jpg", b"x")])
    assert class_names(index(archive)) == ["cat", "cat", "dog"]


def test_two_top_folders_are_two_classes(tmp_path: Path) -> None:
    assert class_names(index(write_tar(tmp_path / "a.tar", [("p/a/1.jpg", b"x"), ("pp/a/1.jpg", b"x")]))) == ["p", "pp"]


def test_a_single_top_folder_without_subfolders_is_a_class(tmp_path: Path) -> None:
    assert class_names(index(write_tar(tmp_path / "a.tar", [("cat/1.jpg", b"x")]))) == ["cat"]


def test_shards_of_one_argument_share_their_root(tmp_path: Path) -> None:
    write_tar(tmp_path / "s0.tar", [("cat/a/1.jpg", b"x")])
    write_tar(tmp_path / "s1.tar", [("dog/a/1.jpg", b"x")])
    assert class_names(index(tmp_path / "s{0..1}.tar")) == ["cat", "dog"]


def test_a_single_subfolder_of_a_folder_is_a_class(tmp_path: Path) -> None:
    assert class_names(index(write_folder(tmp_path / "a", [("photos/cat/1.jpg", b"x")]))) == ["photos"]


# Sidecar files


@every_kind
def test_sidecar_labels_take_precedence_over_folders(kind: str, tmp_path: Path) -> None:
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
    assert dict(zip(samples.ids, class_names(samples), strict=True)) == {
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
def test_the_task_is_inferred_from_json_sidecars(notes: list[str], expected: Labels, tmp_path: Path) -> None:
    files = [
        (f"{i}.{suffix}", data)
        for i, note in enumerate(notes)
        for suffix, data in (("jpg", b"x"), ("json", note.encode()))
    ]
    assert index(write_tar(tmp_path / "a.tar", files)).labels.same_as(expected)


@every_kind
@pytest.mark.parametrize(
    "note",
    [
        *(b"{", b'{"label": {}}', b'{"label": [[]]}', b'{"target": NaN}', b'{"target": 1e999}', b"\xff\xfe{}"),
        *(b'{"label": ' + b"[" * 100_000, b'{"target": ' + b"9" * 5000 + b"}", b'"' + bytes(2**20)),
    ],
)
def test_a_hostile_sidecar_is_an_error_that_names_it(kind: str, note: bytes, tmp_path: Path) -> None:
    assert "'7.json'" in indexing_error(BUILDERS[kind](tmp_path, [("7.jpg", b"x"), ("7.json", note)]))


@every_kind
def test_a_json_file_that_belongs_to_no_sample_is_ignored(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, [*ANIMALS, ("annotations.json", bytes(2**20 + 1))]))
    assert class_names(samples) == ["cat", "cat", "dog"]
    assert samples.ignored == {".json": 1}


def test_a_cls_file_takes_precedence_over_json_and_two_different_cls_files_are_an_error(tmp_path: Path) -> None:
    files = [("a.jpg", b"x"), ("a.json", b'{"label": "from json"}'), ("a.cls", b"from cls")]
    assert class_names(index(write_tar(tmp_path / "a.tar", files))) == ["from cls"]
    assert "second label" in indexing_error(write_tar(tmp_path / "b.tar", [*files, ("a.cls", b"another")]))


def test_equal_keys_in_two_shards_are_two_samples(tmp_path: Path) -> None:
    for shard in "01":
        write_tar(tmp_path / f"s{shard}.tar", [("k.jpg", shard.encode()), ("k.cls", b"class " + shard.encode())])
    samples = index(tmp_path / "s{0..1}.tar")
    assert class_names(samples) == ["class 0", "class 1"]
    assert read_contents(samples) == [b"0", b"1"]


# Tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_labels_replaces_folder_labels(delimiter: str, tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a")
    text = '\ufeffPath,other,Label\r\ndog/1.jpg,1,wolf\r\n\r\n./cat/1.jpg,2,"big cat"\r\n'.replace(",", delimiter)
    samples = index(archive, labels=write_table(tmp_path / "t.csv", text))
    assert class_names(samples) == ["big cat", None, "wolf"]


@pytest.mark.parametrize("style", ["id", "archive", "table", "absolute"])
@pytest.mark.parametrize("several", [False, True])
def test_a_table_names_samples_by_id_or_by_three_kinds_of_path(style: str, several: bool, tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "data" / "a")
    archives = [archive, write_folder(tmp_path / "data" / "b", [("z.jpg", b"z")])] if several else [archive]
    prefix = {"id": "a/" if several else "", "archive": "", "table": "data/a/", "absolute": f"{archive}/"}[style]
    text = "file,label\n" + "".join(f"{prefix}{name},l{i}\n" for i, (name, _) in enumerate(ANIMALS))
    samples = index(archives, labels=write_table(tmp_path / "t.csv", text))
    assert class_names(samples)[:3] == ["l0", "l1", "l2"]


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
def test_the_task_is_inferred_from_the_name_and_values_of_a_column(text: str, expected: Labels, tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a", [("a.jpg", b"a"), ("b.jpg", b"b")])
    assert index(archive, labels=write_table(tmp_path / "t.csv", text)).labels.same_as(expected)


def test_numbers_and_words_among_targets_are_refused(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a", [("a.jpg", b"a"), ("b.jpg", b"b")])
    text = "path,target\na.jpg,3\nb.jpg,n/a?\n"
    with pytest.raises(ArchiveError, match="'target' has 1 numbers and also 'n/a\\?'; leave the cells empty"):
        index(archive, labels=write_table(tmp_path / "t.csv", text))
    class_labels = index(archive, labels=LabelTable(tmp_path / "t.csv", task="classification")).labels
    assert class_labels.same_as(Labels.from_class_names(["3", "n/a?"]))


def test_columns_and_task_can_be_given(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a", [("a.jpg", b"a"), ("b.jpg", b"b")])
    path = write_table(tmp_path / "t.csv", "who,where,age,height\nann,a.jpg,30,1.7\nbob,b.jpg,40,\n")
    names = index(archive, labels=LabelTable(path, "where", "who")).labels
    assert names.same_as(Labels.from_class_names(["ann", "bob"]))
    age_classes = index(archive, labels=LabelTable(path, "where", "age", "classification")).labels
    assert age_classes.same_as(Labels.from_class_names(["30", "40"]))
    ages = index(archive, labels=LabelTable(path, "where", "age", "regression")).labels
    assert ages.same_as(Labels.from_targets([30, 40], ["age"]))
    targets = index(archive, labels=LabelTable(path, "where", "age, height")).labels
    assert targets.same_as(Labels.from_targets([[30, 1.7], [np.nan, np.nan]], ["age", "height"]))


def test_text_in_a_regression_target_is_an_error(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a", [("a.jpg", b"a")])
    path = write_table(tmp_path / "t.csv", "path,label,age\na.jpg,old,3\n")
    assert "'old', expected numbers" in indexing_error(archive, labels=LabelTable(path, task="regression"))
    assert "'old', expected numbers" in indexing_error(archive, labels=LabelTable(path, label_column="age,label"))


def test_a_split_column_is_read_and_an_unknown_split_suggests_the_nearest(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a", [(f"{i}.jpg", b"x") for i in range(6)])
    splits = ["train", "val", "valid", "dev", "Test"]
    path = write_table(
        tmp_path / "t.csv", "path,label,split\n" + "".join(f"{i}.jpg,a,{split}\n" for i, split in enumerate(splits))
    )
    assert index(archive, labels=path).split.tolist() == [1, 2, 2, 2, 3, 0]
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        index(archive, labels=write_table(tmp_path / "u.csv", "path,label,split\n0.jpg,a,trian\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_an_invalid_table_is_an_error(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert expected in indexing_error(write_folder(tmp_path / "a"), labels=path)


def test_a_table_name_that_matches_several_samples_is_an_error(tmp_path: Path) -> None:
    for shard in "01":
        write_tar(tmp_path / f"s{shard}.tar", [("k.jpg", b"x")])
    path = write_table(tmp_path / "t.csv", "path,label\nk.jpg,a\n")
    assert "matches several samples" in indexing_error(tmp_path / "s{0..1}.tar", labels=path)


def test_an_id_takes_precedence_over_an_equal_path(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.jpg", b"2")])
    assert class_names(index(archive, labels=write_table(tmp_path / "t.csv", "path,label\nx.jpg,a\n"))) == ["a", None]


def test_a_parquet_table_is_read_like_a_csv(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    archive = write_folder(tmp_path / "a", [("a.jpg", b"a"), ("b.jpg", b"b")])

    def read_labels(column: str, values: list[object]) -> Labels:
        parquet.write_table(pyarrow.table({"path": ["a.jpg", "b.jpg"], column: values}), tmp_path / "t.parquet")
        return index(archive, labels=tmp_path / "t.parquet").labels

    assert read_labels("label", ["x", None]).same_as(Labels.from_class_names(["x", None]))
    assert read_labels("label", [3, 10]).same_as(Labels.from_class_names(["3", "10"]))
    assert read_labels("label", [3.0, float("nan")]).same_as(Labels.from_class_names(["3", None]))
    assert read_labels("label", [["x"], []]).same_as(Labels.from_label_sets([["x"], []]))
    assert read_labels("y", [1, 2]).same_as(Labels.from_targets([1, 2], ["y"]))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    assert "Parquet" in indexing_error(archive, labels=tmp_path / "t.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert "featpipe[parquet]" in indexing_error(write_folder(tmp_path / "a"), labels=tmp_path / "t.parquet")


def test_the_samples_of_a_table_are_its_rows_in_order(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    absolute = tmp_path / "data" / "cat" / "2.png"
    path = write_table(
        tmp_path / "t.csv", f"path,label,split\ndata/dog/1.jpg,d,test\n./data/cat/1.jpg,c,\n{absolute},c,val\n"
    )
    samples = index(path)
    assert list(samples.ids)[:2] == ["data/dog/1.jpg", "data/cat/1.jpg"]
    assert read_contents(samples) == [b"dog one", b"cat one", b"cat two"]
    assert class_names(samples) == ["d", "c", "c"]
    assert samples.split.tolist() == [3, 0, 2]


def test_a_table_without_labels_is_an_archive_without_labels(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert index(write_table(tmp_path / "t.csv", "file\ncat/1.jpg\n")).labels.task == "none"


def test_missing_files_of_a_table_are_counted_and_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = write_table(tmp_path / "t.csv", "path,label\ncat/1.jpg,a\ncat/8.jpg,a\ncat/9.jpg,a\n")
    assert "2 of its files do not exist: 'cat/8.jpg', 'cat/9.jpg'" in indexing_error(path)


def test_labels_of_different_tasks_cannot_be_combined(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a")
    path = write_table(tmp_path / "t.csv", "path,target\na/cat/1.jpg,1.5\n")
    assert "labels of different kinds" in indexing_error(archive, path)


# Single files


def test_single_files_keep_their_order_and_a_missing_file_keeps_its_row(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a")
    paths = [
        archive / "dog" / "1.jpg",
        archive / "gone.jpg",
        archive / "dog" / "1.jpg",
        archive / "cat",
        "bad\0name.jpg",
    ]
    labels = Labels.from_class_names(["d", "g", "d", "c", "n"])
    samples = index_files(paths, labels)
    assert samples.ids[0] == (archive / "dog" / "1.jpg").as_posix()
    assert samples.ids[2] == samples.ids[0] + "#2"
    assert samples.labels.same_as(labels)
    assert [Status(int(fault)).word for fault in samples.fault] == ["ok", "missing", "ok", "not-a-file", "missing"]
    with samples.open() as reader:
        assert reader.read(2) == b"dog one"
    assert read_fault(samples, 1) is Status.MISSING


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 labels for 1 paths"):
        index_files([tmp_path], Labels.unlabeled(2))


# Stamps


@every_kind
def test_stamps_are_stable_and_differ_between_samples(kind: str, tmp_path: Path) -> None:
    archive = BUILDERS[kind](tmp_path, [*ANIMALS, ("e.jpg", b"")])
    stamps = index(archive).compute_stamps()
    assert stamps.shape == (4, 16)
    assert stamps.dtype == np.uint8
    np.testing.assert_array_equal(stamps, index(archive).compute_stamps())
    assert len({bytes(stamp) for stamp in stamps}) == 4
    assert not stamps[index(archive).fault != 0].any()


@every_kind
def test_a_new_modification_time_changes_the_stamp(kind: str, tmp_path: Path) -> None:
    archive = BUILDERS[kind](tmp_path, ANIMALS)
    stamps_before = index(archive).compute_stamps()
    touched_path = archive / "cat" / "1.jpg" if kind == "folder" else archive
    os.utime(touched_path, ns=(1, 1))
    stamps_after = index(archive).compute_stamps()
    assert (stamps_before != stamps_after).any(axis=1).tolist() == (
        [True, False, False] if kind == "folder" else [True] * 3
    )


@every_kind
def test_a_stamp_is_the_digest_of_path_name_offset_size_and_time(kind: str, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(index_module, "_STAMP_BLOCK_ROWS", 2)
    samples = index(BUILDERS[kind](tmp_path, [*ANIMALS, ("e.jpg", b""), ("z/é.jpg", b"accent")]))
    for row, stamp in enumerate(samples.compute_stamps()):
        path, name = os.fsencode(samples.sources[0].real_path), samples.raw_name(row)
        if kind == "folder":
            path, name = path + b"/" + name, b""
        numbers = (samples.offset[row], samples.size[row], samples.mtime_ns[row])
        digest = hashlib.sha256(struct.pack("<4q", len(path), *numbers) + path + name).digest()
        assert stamp.tobytes() == (bytes(16) if samples.fault[row] else digest[:16])


def test_the_stamp_of_a_file_does_not_depend_on_the_archive_it_is_listed_in(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a")
    indexes = [index(archive), index(tmp_path), index_files([archive / name for name, _ in ANIMALS])]
    for samples in indexes:
        np.testing.assert_array_equal(samples.compute_stamps(), indexes[0].compute_stamps())


# Reading


@every_kind
def test_an_index_survives_pickling(kind: str, tmp_path: Path) -> None:
    samples = index(BUILDERS[kind](tmp_path, ANIMALS))
    copy = pickle.loads(pickle.dumps(samples))
    assert copy.ids == samples.ids
    assert read_contents(copy) == read_contents(samples)
    np.testing.assert_array_equal(copy.compute_stamps(), samples.compute_stamps())


@every_kind
def test_threads_that_share_a_reader_get_the_right_bytes(kind: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    files = [(f"{i:03}.jpg", rng.randbytes(rng.randint(1, 5000))) for i in range(60)]
    samples = index(BUILDERS[kind](tmp_path, files))
    wrong_rows: list[int] = []

    def read_rows(rows: list[int]) -> None:
        wrong_rows.extend(row for row in rows if reader.read(row) != files[row][1])

    with samples.open() as reader:
        orders = [random.Random(seed).sample(range(60), 20 if kind.startswith("tar.") else 60) for seed in range(4)]
        threads = [threading.Thread(target=read_rows, args=(order,)) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong_rows == []


def test_a_compressed_tar_read_in_order_is_decompressed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = index(write_tar(tmp_path / "a.tar.gz"))
    opened_paths: list[str] = []
    open_raw = tar_module.open_decompressed
    monkeypatch.setattr(
        tar_module, "open_decompressed", lambda source: opened_paths.append(source.real_path) or open_raw(source)
    )
    with samples.open() as reader:
        assert [reader.read(row) for row in (0, 1, 2)] == [data for _, data in ANIMALS]
        assert len(opened_paths) == 1
        assert reader.read(0) == b"cat one"
        assert len(opened_paths) == 2


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_that_changed_since_it_was_listed_is_an_error(kind: str, tmp_path: Path) -> None:
    archive = BUILDERS[kind](tmp_path, ANIMALS)
    samples = index(archive)
    os.utime(archive, ns=(1, 1))
    with samples.open() as reader, pytest.raises(ArchiveError, match="changed since it was listed"):
        reader.read(0)
    archive.unlink()
    with samples.open() as reader, pytest.raises(ArchiveError, match="cannot be opened"):
        reader.read(0)


def test_a_file_that_was_removed_or_grew_after_listing_gets_a_status(tmp_path: Path) -> None:
    archive = write_folder(tmp_path / "a")
    samples = index(archive, limits=ArchiveLimits(max_member_bytes=100))
    (archive / "cat" / "1.jpg").unlink()
    (archive / "cat" / "2.png").write_bytes(bytes(101))
    assert read_fault(samples, 0) is Status.MISSING
    assert read_fault(samples, 1) is Status.TOO_LARGE


@on_posix
def test_a_file_without_permission_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = index(write_folder(tmp_path / "a"))

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        assert read_fault(samples, 0) is Status.UNREADABLE


# Damaged and hostile tars


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_truncated_tar_is_an_error(suffix: str, tmp_path: Path) -> None:
    files = [(f"{i}.jpg", random.Random(i).randbytes(900)) for i in range(5)]
    tar_bytes = write_tar(tmp_path / f"a{suffix}", files).read_bytes()
    end = 5 * 1536 if suffix == ".tar" else len(tar_bytes)
    for length in range(40, end + 1 if suffix == ".tar" else end, 97):
        (tmp_path / f"b{suffix}").write_bytes(tar_bytes[:length])
        indexing_error(tmp_path / f"b{suffix}")


def test_a_tar_without_an_end_marker_is_truncated(tmp_path: Path) -> None:
    tar_bytes = write_tar(tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(tar_bytes[: 3 * 1024])
    assert "no end-of-archive marker" in indexing_error(tmp_path / "b.tar")


def test_a_damaged_header_in_the_middle_is_an_error(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar").read_bytes())
    data[1024 + 148] ^= 0x55
    (tmp_path / "a.tar").write_bytes(data)
    assert "damaged header at byte 1024" in indexing_error(tmp_path / "a.tar")


def test_concatenated_tars_are_an_error(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data + data)
    assert "after the end-of-archive marker" in indexing_error(tmp_path / "a.tar")


def test_a_corrupt_gzip_is_an_error(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar.gz", [("a.jpg", random.Random(0).randbytes(9000))]).read_bytes())
    data[-6] ^= 1
    (tmp_path / "a.tar.gz").write_bytes(data)
    assert "damaged or truncated" in indexing_error(tmp_path / "a.tar.gz")


def test_a_tar_is_recognized_by_its_bytes_and_not_by_its_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar.gz").rename(tmp_path / "photos")
    assert len(index(tmp_path / "photos")) == 3


def make_tar_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """Make a tar header with any size field and a valid checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = size.ljust(12, b"\0")
    block[136:148], block[148:156], block[156:157], block[257:265] = b"0" * 11 + b"\0", b" " * 8, kind, b"ustar\00000"
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize(
    "headers",
    [
        make_tar_header(b"a.jpg", b"\x80" + b"\xff" * 11),
        make_tar_header(b"a.jpg", b"\xff" * 11 + b"\x00"),
        make_tar_header(b"a.jpg", b"77777777777"),
        make_tar_header(b"././@LongLink", b"77777777777", b"L"),
        make_tar_header(b"././@LongLink", b"\xff" * 11 + b"\x00", b"L"),
        make_tar_header(b"pax", b"77777777777", b"x"),
        make_tar_header(b"././@LongLink", b"00000000005", b"L") * 3000,
        (make_tar_header(b"././@LongLink", b"0" * 11, b"L")) * 3000,
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_hostile_headers_are_errors(headers: bytes, compress, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.tar").write_bytes(compress(make_tar_header(b"b.jpg", b"0" * 11) + headers + bytes(10240)))
    indexing_error(tmp_path / "a.tar")


def test_a_decompression_bomb_in_a_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(make_tar_header(b"a.jpg", f"{2**29:011o}".encode()))
        for _ in range(300):
            out.write(bytes(2**20))
    assert "may be malicious" in indexing_error(path, limits=ArchiveLimits(max_ratio=1))


# Damaged and hostile zips


def test_overlapping_zip_entries_are_an_error(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", [("a.jpg", bytes(5000)), ("b.jpg", b"b")])
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    second_entry = data.index(b"PK\1\2", directory + 4)
    data[second_entry + 42 : second_entry + 46] = struct.pack("<I", 0)
    path.write_bytes(data)
    assert "overlaps" in indexing_error(path)


def test_a_decompression_bomb_in_a_zip_is_an_error(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", [("a.jpg", b"x")])
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 24 : entry + 28] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    assert "at most 268435456 are allowed" in indexing_error(path)


@pytest.mark.parametrize(("field", "value"), [(8, 1), (10, 99)])
def test_an_encrypted_entry_or_unknown_compression_keeps_its_row(field: int, value: int, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + field : entry + field + 2] = struct.pack("<H", value)
    path.write_bytes(data)
    samples = index(path)
    assert samples.fault.tolist() == [Status.UNREADABLE, Status.OK, Status.OK]
    assert read_fault(samples) is Status.UNREADABLE


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_entry_leaves_its_neighbours_readable(method: int, tmp_path: Path) -> None:
    files = [(f"{i}.jpg", random.Random(i).randbytes(2000)) for i in range(3)]
    path = write_zip(tmp_path / "a.zip", files, method)
    assert read_contents(index(path)) == [data for _, data in files]
    with zipfile.ZipFile(path) as archive:
        entry_offset = archive.infolist()[1].header_offset
    data = bytearray(path.read_bytes())
    data[entry_offset + 1000] ^= 0xFF
    path.write_bytes(data)
    samples = index(path)
    assert read_fault(samples, 1) is Status.DAMAGED
    with samples.open() as reader:
        assert (reader.read(0), reader.read(2)) == (files[0][1], files[2][1])


def test_a_link_in_a_zip_keeps_its_row(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        out.writestr(link, "/etc/passwd")
    assert read_fault(index(tmp_path / "a.zip")) is Status.NOT_A_FILE


def test_a_truncated_zip_is_an_error(tmp_path: Path) -> None:
    zip_bytes = write_zip(tmp_path / "a.zip").read_bytes()
    for length in range(30, len(zip_bytes), 7):
        (tmp_path / "b.zip").write_bytes(zip_bytes[:length])
        indexing_error(tmp_path / "b.zip")


def test_random_damage_raises_archive_errors_only(tmp_path: Path) -> None:
    rng = random.Random(0)
    note = json.dumps({"label": "cat"}).encode()
    for kind in ("tar", "tar.gz", "zip"):
        archive = BUILDERS[kind](tmp_path, [("a.jpg", b"a" * 700), ("a.json", note), ("b.jpg", b"b")])
        archive_bytes = archive.read_bytes()
        for _ in range(80):
            data = bytearray(archive_bytes)
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            archive.write_bytes(data)
            try:
                read_contents(index(archive))
            except ArchiveError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_an_index_takes_less_than_a_hundred_bytes_per_sample_besides_labels() -> None:
    samples = index_files([f"folder/with/some/name/{i:06}.jpg" for i in range(20_000)])
    assert samples.names is samples.ids
    columns = [samples.ids.data, samples.ids.offsets, samples.source, samples.offset, samples.size, samples.mtime_ns]
    assert sum(column.nbytes for column in [*columns, samples.fault, samples.split]) / len(samples) < 100
