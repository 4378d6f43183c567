"""The specification ``cache/README.md``: the writer follows it, and the reader refuses files that violate it."""

from __future__ import annotations

import copy
import doctest
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from featpipe import FeatureCache
from featpipe import data as archive
from featpipe.cache import ALIGNMENT_BYTES, EmbeddingLookup, EmbeddingSource, SampleTable, hdf5, write_cache
from featpipe.cache import format as format_module
from featpipe.data import Labels
from featpipe.errors import CacheError, CacheFormatError
from featpipe.status import Status
from featpipe.storage import StringColumn
from tests.data import make_golden

ROOT = Path(__file__).parents[2]
README = (ROOT / "cache" / "README.md").read_text()
DATA = ROOT / "tests" / "data"
GOLDEN, SHARDED = DATA / "golden-1.1.h5", DATA / "golden-1.1-sharded.h5"
GOLDEN_FILES = (DATA / "golden-1.0.h5", GOLDEN, SHARDED)

Edit = Callable[[Any], object]


@pytest.fixture
def file(tmp_path) -> Path:
    """A cache written by the current code, in a separate folder."""
    path = tmp_path / "cache" / "golden.h5"
    path.parent.mkdir()
    make_golden.make(path)
    return path


def edit_hdf5(path: Path, edit: Edit) -> Path:
    """Edit a file with h5py, and return its path."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as hdf5:
        edit(hdf5)
    return path


def edit_manifest(path: Path, edit: Edit) -> Path:
    """Edit the manifest of a file. Fingerprint and digest are updated unless the edit changes them."""

    def rewrite(hdf5: h5py.File) -> None:
        manifest = json.loads(hdf5["manifest"][()])
        old_manifest = copy.deepcopy(manifest)
        edit(manifest)
        if isinstance(manifest.get("facts"), dict) and manifest.get("fingerprint") == old_manifest["fingerprint"]:
            manifest["fingerprint"] = compute_fingerprint(manifest["facts"])
        write_manifest(hdf5, json.dumps(manifest).encode())

    return edit_hdf5(path, rewrite)


def write_manifest(hdf5: h5py.File, text: bytes) -> None:
    """Replace the manifest and its digest."""
    replace_dataset(hdf5, "manifest", np.bytes_(text))
    stored = hdf5["manifest"][()].ljust(hdf5["manifest"].dtype.itemsize, b"\0")
    hdf5.attrs["manifest_sha256"] = np.bytes_(hashlib.sha256(stored).hexdigest())


def compute_fingerprint(facts: object) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def replace_dataset(hdf5: h5py.File, name: str, data: object, **options: object) -> None:
    if name in hdf5:
        del hdf5[name]
    hdf5.create_dataset(name, data=data, **options)


def assert_refused(path: Path, *expected_words: str) -> None:
    with pytest.raises(CacheFormatError) as error_info:
        FeatureCache(path)
    text = str(error_info.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    for expected in expected_words:
        assert expected in text


def read_datasets(path: Path) -> dict[str, h5py.Dataset]:
    found_datasets = {}
    with h5py.File(path) as hdf5:
        hdf5.visititems(
            lambda name, entry: found_datasets.update({name: entry}) if isinstance(entry, h5py.Dataset) else None
        )
        return {
            name: (d.id.get_create_plist(), d.id.get_offset(), d.dtype, d.shape) for name, d in found_datasets.items()
        }


def test_every_numbered_rule_has_its_test():
    rules = {int(number) for number in re.findall(r"^(\d+)\. ", README, re.MULTILINE)}
    tests = {int(match[1]) for name in globals() if (match := re.match(r"test_must_(\d+)_", name))}
    assert rules == tests == set(range(1, len(rules) + 1))


# ---------------------------------------------------------------------------------------------- the rules
def test_must_1_a_written_file_states_its_format_in_short_attributes(file):
    assert file.read_bytes()[:9] in (b"\x89HDF\r\n\x1a\n\x02", b"\x89HDF\r\n\x1a\n\x03")
    with h5py.File(file) as hdf5:
        assert (hdf5.attrs["format"], hdf5.attrs["format_version"]) == (b"featpipe-cache", b"1.1")
        assert set(hdf5.attrs) == {"format", "format_version", "manifest_sha256"}
        assert {hdf5.attrs.get_id(name).dtype.kind for name in hdf5.attrs} == {"S"}


@pytest.mark.parametrize("name", ["format", "format_version"])
@pytest.mark.parametrize("value", [
    None, "featpipe-cache", "1.0", b"", b"2.0", b"0.9", b"1", b"1.x", b"11.0", b"1.0\n", b"\xff", 1, 1.0, [b"1.0"],
    b"x" * 60_000, h5py.Empty("S3"),
])  # fmt: skip
def test_must_1_other_formats_are_refused(file, name, value):
    def edit(hdf5: h5py.File) -> None:
        del hdf5.attrs[name]
        if value is not None:
            hdf5.attrs[name] = np.bytes_(value) if isinstance(value, bytes) else value

    assert_refused(edit_hdf5(file, edit))


def test_must_1_an_old_superblock_is_refused(file, tmp_path):
    old_path = tmp_path / "old.h5"
    with h5py.File(file) as source, h5py.File(old_path, "w", libver="earliest") as hdf5:
        hdf5.attrs.update(source.attrs)
        for name in source:
            source.copy(name, hdf5)
    assert_refused(old_path, "superblock")


def test_must_1_a_higher_minor_version_is_read_and_its_additions_are_ignored(file):
    def edit(hdf5: h5py.File) -> None:
        hdf5.attrs["format_version"] = np.bytes_("1.17")
        hdf5["samples/weight"] = np.ones(6, "<f4")
        hdf5["nearest/neighbours"] = np.ones((6, 2), "<i8")
        hdf5["samples/status"][1] = 77

    original = FeatureCache(file)
    additions = {"more": {"a": 1}, "format_version": "1.17"}
    cache = FeatureCache(edit_manifest(edit_hdf5(file, edit), lambda manifest: manifest.update(additions)))
    assert cache.status.tolist() == ["ok", "status-77", "ok", "missing", "ok", "ok"]
    assert cache.bad_rows() == {"missing": 1, "status-77": 1}
    assert np.array_equal(cache.X, original.X)
    lookup = EmbeddingLookup()
    lookup.add(EmbeddingSource.from_cache(cache, cache.outputs))
    assert lookup.find_by_digest(cache.digests[1].tobytes()) is None


def test_must_2_written_datasets_are_contiguous_and_aligned(file):
    written_datasets = read_datasets(file)
    assert len(written_datasets) == 12
    for plist, offset, dtype, shape in written_datasets.values():
        assert plist.get_layout() == h5py.h5d.CONTIGUOUS
        assert (plist.get_nfilters(), plist.get_external_count(), offset % ALIGNMENT_BYTES) == (0, 0, 0)
        assert offset + dtype.itemsize * int(np.prod(shape)) <= file.stat().st_size


def test_must_2_mapped_arrays_equal_what_hdf5_reads(file):
    cache = FeatureCache(file)
    with h5py.File(file) as hdf5:
        for output in cache.outputs:
            features = cache.features(output)
            assert np.array_equal(features, hdf5[f"features/{output}"][()], equal_nan=True)
            assert features.flags.aligned
            assert not features.flags.writeable
        assert np.array_equal(cache.digests, hdf5["samples/digest"][()])


INVALID_STORAGE: dict[str, Edit] = {
    "chunked": lambda h: replace_dataset(h, "samples/status", h["samples/status"][()], chunks=(2,)),
    "gzip": lambda h: replace_dataset(h, "samples/status", h["samples/status"][()], compression="gzip"),
    "fletcher32": lambda h: replace_dataset(h, "features/pooled", h["features/pooled"][()], fletcher32=True),
    "resizable": lambda h: replace_dataset(h, "samples/status", h["samples/status"][()], maxshape=(None,)),
    "compact": lambda h: store_compactly(h, "samples/split"),
    "soft link": lambda h: h["samples"].move("status", "s") or h.update({"samples/status": h5py.SoftLink("s")}),
    "extra soft link": lambda h: h.update({"a": h5py.SoftLink("/samples/status")}),
    "dangling soft link": lambda h: h.update({"samples/a": h5py.SoftLink("/nowhere")}),
    "named type": lambda h: h.update({"samples/a": np.dtype("<f4")}),
}


def store_compactly(hdf5: h5py.File, name: str) -> None:
    data = hdf5[name][()]
    del hdf5[name]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    kind, space = h5py.h5t.py_create(data.dtype), h5py.h5s.create_simple(data.shape)
    h5py.h5d.create(hdf5.id, name.encode(), kind, space, plist).write(h5py.h5s.ALL, h5py.h5s.ALL, data)


@pytest.mark.parametrize("case", INVALID_STORAGE)
def test_must_2_other_storage_is_refused(file, case):
    assert_refused(edit_hdf5(file, INVALID_STORAGE[case]))


def test_must_2_other_groups_are_ignored(file):
    def edit(hdf5: h5py.File) -> None:
        hdf5["other/link"] = h5py.ExternalLink("elsewhere.h5", "/")
        hdf5["features/loop"] = hdf5["features"]

    assert FeatureCache(edit_hdf5(file, edit)).outputs == ("pooled", "layer2")


def test_must_3_written_datasets_have_the_specified_types(file):
    kinds = {name: dtype.str for name, (_, _, dtype, _) in read_datasets(file).items()}
    assert kinds.pop("manifest").startswith("|S")
    assert kinds == {
        "features/pooled": "<f4", "features/layer2": "<f4", "labels/values": "<i4", "samples/id_offsets": "<i8",
        "samples/id_bytes": "|u1", "samples/status": "|u1", "samples/digest": "|u1", "samples/stamp": "|u1",
        "samples/split": "|u1", "checks/pooled": "|u1", "checks/layer2": "|u1",
    }  # fmt: skip


def add_20_bit_integers(hdf5: h5py.File) -> None:
    """Add integers of 20 bits stored in four bytes; numpy would read all 32 bits."""
    kind = h5py.h5t.STD_I32LE.copy()
    kind.set_precision(20)
    h5py.h5d.create(hdf5.id, b"samples/odd", kind, h5py.h5s.create_simple((6,))).write(
        h5py.h5s.ALL, h5py.h5s.ALL, np.arange(6, dtype=np.int32)
    )


INVALID_TYPES: dict[str, Edit] = {
    "texts of variable length": lambda h: replace_dataset(h, "samples/more", ["a", "b"]),
    "compound": lambda h: replace_dataset(h, "samples/more", np.zeros(6, [("a", "u1"), ("b", "<f4")])),
    "references": lambda h: replace_dataset(h, "samples/more", h["samples"].ref, dtype=h5py.ref_dtype),
    "arrays of variable length": lambda h: h.create_dataset("more", (6,), h5py.vlen_dtype(np.uint8)),
    "booleans": lambda h: replace_dataset(h, "samples/more", np.zeros(6, bool)),
    "opaque": lambda h: replace_dataset(h, "samples/more", np.zeros(6, "V4")),
    "complex": lambda h: replace_dataset(h, "samples/more", np.zeros(6, "c8")),
    "array elements": lambda h: h.create_dataset("more", (6,), np.dtype(("<f4", (3,)))),
    "integers of 20 bits": add_20_bit_integers,
    "no shape": lambda h: replace_dataset(h, "samples/more", h5py.Empty("u1")),
    "status of floats": lambda h: replace_dataset(h, "samples/status", np.zeros(6, "<f4")),
    "features of doubles": lambda h: replace_dataset(h, "features/pooled", np.zeros((6, 4), "<f8")),
    "features of big-endian floats": lambda h: replace_dataset(h, "features/pooled", np.zeros((6, 4), ">f4")),
    "a manifest of variable length": lambda h: replace_dataset(h, "manifest", "{}"),
    "a manifest of integers": lambda h: replace_dataset(h, "manifest", np.zeros(6, "u1")),
}


@pytest.mark.parametrize("case", INVALID_TYPES)
def test_must_3_other_types_are_refused(file, case):
    assert_refused(edit_hdf5(file, INVALID_TYPES[case]))


def test_must_3_a_dataset_larger_than_the_file_is_refused(file):
    """A dataset without data takes no space: the whole file has a few kilobytes."""
    huge = {"samples/huge": (10**15,), "features/huge": (2**31, 2**31)}
    for name, shape in huge.items():
        edit_hdf5(file, lambda hdf5, name=name, shape=shape: hdf5.create_dataset(name, shape, "u1"))
        assert file.stat().st_size < 20_000
        assert_refused(file, "more than the file holds")
        edit_hdf5(file, lambda hdf5, name=name: hdf5.pop(name))


def test_must_3_groups_with_too_many_entries_and_long_manifests_are_refused(file, monkeypatch):
    monkeypatch.setattr(hdf5, "MAX_GROUP_ENTRIES", 5)
    assert_refused(file, "samples/ has 6 entries, more than 5")
    monkeypatch.setattr(hdf5, "MAX_GROUP_ENTRIES", 6)
    FeatureCache(file)
    monkeypatch.setattr(format_module, "MAX_MANIFEST_BYTES", 100)
    assert_refused(file, "the manifest has", "more than 100")


def test_must_4_a_cache_is_complete_and_durable_before_it_gets_its_name(file, monkeypatch):
    old_bytes, steps = file.read_bytes(), []
    replace, fsync = os.replace, os.fsync

    def record_replace(source: Path, target: Path) -> None:
        assert target == file
        assert target.read_bytes() == old_bytes
        assert Path(source).suffix != ".h5"
        assert FeatureCache(source).fingerprint == FeatureCache(file).fingerprint
        steps.append(f"rename from {Path(source).stat().st_ino}")
        replace(source, target)

    def record_fsync(handle: int) -> None:
        steps.append(f"fsync of {os.fstat(handle).st_ino}")
        fsync(handle)

    monkeypatch.setattr(os, "replace", record_replace)
    monkeypatch.setattr(os, "fsync", record_fsync)
    make_golden.make(file)
    inode, folder_inode = file.stat().st_ino, file.parent.stat().st_ino
    assert steps == [f"fsync of {inode}", f"rename from {inode}", f"fsync of {folder_inode}"]
    assert [path.name for path in file.parent.iterdir()] == ["golden.h5"]


SAMPLE_DATASETS = ("id_bytes", "id_offsets", "status", "digest", "stamp", "split")


@pytest.mark.parametrize("name", [f"samples/{name}" for name in SAMPLE_DATASETS] + ["labels/values", "manifest"])
def test_must_5_a_missing_dataset_is_named(file, name):
    assert_refused(edit_hdf5(file, lambda hdf5: hdf5.pop(name)), name, "missing")


@pytest.mark.parametrize("name", [f"samples/{name}" for name in SAMPLE_DATASETS] + ["labels/values"])
@pytest.mark.parametrize("change", ["shorter", "longer", "flatter", "wider type"])
def test_must_5_other_shapes_and_types_are_refused(file, name, change):
    def edit(hdf5: h5py.File) -> None:
        data = hdf5[name][()]
        wider = data.astype("<f8" if data.dtype.itemsize == 8 else "<i8")
        twice = np.concatenate([data, data])
        changes = {"shorter": data[:-1], "longer": twice, "flatter": data[..., None], "wider type": wider}
        replace_dataset(hdf5, name, changes[change])

    assert_refused(edit_hdf5(file, edit), name.removesuffix("bytes"))


def test_must_5_a_number_of_samples_other_than_that_of_the_manifest_is_refused(file):
    assert_refused(edit_manifest(file, lambda manifest: manifest.update(samples=7)), "expected")


@pytest.mark.parametrize(("first_change", "last_change"), [(1, 0), (-1, 0), (0, 1), (0, -1), (0, 2**62)])
def test_must_5_id_offsets_that_do_not_match_the_id_bytes_are_refused(file, first_change, last_change):
    def edit(hdf5: h5py.File) -> None:
        hdf5["samples/id_offsets"][0] += first_change
        hdf5["samples/id_offsets"][-1] += last_change

    assert_refused(edit_hdf5(file, edit), "id_offsets")


def test_must_5_checks_that_take_time_in_n_run_on_first_use(file):
    descending = np.array([0, 40, 18, 30, 39, 48, len("".join(make_golden.IDS).encode())], "<i8")
    cache = FeatureCache(edit_hdf5(file, lambda hdf5: replace_dataset(hdf5, "samples/id_offsets", descending)))
    with pytest.raises(CacheFormatError, match="id_offsets"):
        _ = cache.ids
    cache = FeatureCache(edit_hdf5(file, lambda hdf5: replace_dataset(hdf5, "samples/split", np.full(6, 4, "u1"))))
    with pytest.raises(CacheFormatError, match="samples/split"):
        _ = cache.split
    for code in (-2, 3, 2**31 - 1):
        edit_hdf5(file, lambda hdf5, code=code: replace_dataset(hdf5, "labels/values", np.full(6, code, "<i4")))
        with pytest.raises(CacheFormatError, match="labels/values"):
            _ = FeatureCache(file).y


def test_must_6_every_output_has_its_dataset(file):
    cache = FeatureCache(file)
    assert cache.outputs == ("pooled", "layer2")
    assert [cache.features(output).shape for output in cache.outputs] == [(6, 4), (6, 2, 2, 1)]


@pytest.mark.parametrize("shape", [[], [5], [4, 1], "4", 4, None, ["4"], [4.5], [-4], {"4": 4}])
def test_must_6_an_output_of_another_shape_is_refused(file, shape):
    assert_refused(edit_manifest(file, lambda manifest: manifest["outputs"].update(pooled=shape)), "pooled")


def test_must_6_a_missing_output_is_refused(file):
    assert_refused(edit_hdf5(file, lambda hdf5: hdf5["features"].pop("layer2")), "features/layer2", "missing")


@pytest.mark.parametrize("outputs", [{}, {"pooled": [4]}, {"pooled": [4], "layer2": [2, 2, 1], "more": [4]}])
def test_must_6_outputs_other_than_those_of_the_facts_are_refused(file, outputs):
    assert_refused(edit_manifest(file, lambda manifest: manifest.update(outputs=outputs)), "output")


def test_must_6_no_output_at_all_is_refused(file):
    def edit(manifest: dict[str, Any]) -> None:
        manifest["outputs"] = manifest["facts"]["backbone"]["outputs"] = {}

    assert_refused(edit_manifest(file, edit), "are empty or differ")


@pytest.mark.parametrize("storage", ["float16", "float64", "bfloat16", ""])
def test_must_6_an_output_of_another_type_is_refused(file, storage):
    assert_refused(edit_manifest(file, lambda manifest: manifest["facts"].update(storage=storage)), "float")


def test_must_7_rows_that_are_not_ok_are_nan_and_the_others_are_not(file):
    cache = FeatureCache(file)
    for output in cache.outputs:
        flat = np.isnan(cache.features(output)).reshape(len(cache), -1)
        assert np.array_equal(flat.all(axis=1), ~cache.ok)
        assert np.array_equal(flat.any(axis=1), ~cache.ok)


def test_must_7_the_writer_refuses_features_in_rows_that_are_not_ok(file):
    table, old_bytes = FeatureCache(file).table(), file.read_bytes()
    manifest = {"facts": make_golden.FACTS}
    with pytest.raises(ValueError, match="must be NaN"):
        write_cache(file, table, manifest, make_golden.SHAPES, "float32",
                    lambda o, i, j: np.zeros((j - i, *make_golden.SHAPES[o]), "f4"))  # fmt: skip
    assert file.read_bytes() == old_bytes
    assert [path.name for path in file.parent.iterdir()] == ["golden.h5"]


def test_must_7_a_reader_relies_on_the_status(file):
    cache = FeatureCache(edit_hdf5(file, lambda hdf5: replace_dataset(hdf5, "features/pooled", np.ones((6, 4), "<f4"))))
    assert cache.usable.tolist() == [0, 2, 4]
    assert cache.X.shape == (3, 4)


def test_must_8_the_index_makes_ids_unique(tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        for data in (b"one", b"two", b"three"):
            info = tarfile.TarInfo("cat/1.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    ids = list(archive.index(path).ids)
    assert len(ids) == len(set(ids)) == 3


def write_labelled_cache(path: Path, labels: Labels) -> FeatureCache:
    """Write a cache with one row for each label."""
    n = len(labels)
    table = SampleTable(
        StringColumn.from_strings(map(str, range(n))), np.zeros(n, "u1"), np.ones((n, 32), "u1"),
        np.zeros((n, 16), "u1"), np.zeros(n, "u1"), labels,
    )  # fmt: skip
    shapes = make_golden.SHAPES
    write_cache(path, table, {"facts": make_golden.FACTS}, shapes, "float32",
                lambda o, i, j: np.ones((j - i, *shapes[o]), "f4"))  # fmt: skip
    return FeatureCache(path)


def test_must_9_classes_are_in_the_specified_order(tmp_path):
    word_classes = write_labelled_cache(
        tmp_path / "a.h5", Labels.from_class_names(["b", "é", "a", "B", "10", "9", None])
    )
    assert word_classes.classes == ("10", "9", "B", "a", "b", "é")
    number_classes = write_labelled_cache(tmp_path / "b.h5", Labels.from_class_names(["10", "9", "0", None]))
    assert number_classes.classes == ("0", "9", "10")
    multilabel_classes = write_labelled_cache(tmp_path / "c.h5", Labels.from_label_sets([{"b", "a"}, set(), None]))
    assert multilabel_classes.classes == ("a", "b")


@pytest.mark.parametrize(
    "classes",
    [
        ["dog", "cow", "cat"],
        ["cat", "cat", "dog"],
        ["cat", "cow", 3],
        ["cat", "cow", None],
        ["10", "11", "9"],
    ],
)
def test_must_9_classes_in_another_order_are_refused(file, classes):
    assert_refused(edit_manifest(file, lambda manifest: manifest.update(classes=classes)), "classes")


def test_must_9_a_writer_does_not_publish_classes_in_another_order(tmp_path):
    with pytest.raises(CacheError, match="are not sorted"):
        write_labelled_cache(tmp_path / "a.h5", Labels.from_class_names(["a", "b"], classes=["b", "a"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [
    "facts.precision", "facts.storage", "facts.extraction", "facts.backbone", "facts.backbone.name",
    "facts.backbone.source", "facts.backbone.weights", "facts.backbone.transform", "facts.backbone.outputs",
    "facts", "fingerprint", "outputs", "task", "classes", "samples", "ok", "format", "format_version",
])  # fmt: skip
@pytest.mark.parametrize("value", ["missing", "other type"])
def test_must_10_a_manifest_without_its_facts_is_refused(file, key, value):
    *parent_keys, last_key = key.split(".")

    def edit(manifest: dict[str, Any]) -> None:
        for name in parent_keys:
            manifest = manifest[name]
        manifest.pop(last_key)
        if value == "other type":
            manifest[last_key] = None

    assert_refused(edit_manifest(file, edit), last_key)


def test_must_10_the_facts_are_stored_unchanged(file):
    assert FeatureCache(file).facts == make_golden.FACTS


def test_must_11_the_fingerprint_is_the_digest_of_the_facts(file):
    cache = FeatureCache(file)
    assert cache.fingerprint == compute_fingerprint(cache.facts)


@pytest.mark.parametrize("fingerprint", ["", "0" * 64, compute_fingerprint(make_golden.FACTS).upper()])
def test_must_11_another_fingerprint_is_refused(file, fingerprint):
    assert_refused(edit_manifest(file, lambda manifest: manifest.update(fingerprint=fingerprint)), "fingerprint")


def test_must_11_changed_facts_are_refused(file):
    def edit(manifest: dict[str, Any]) -> None:
        manifest["facts"]["precision"] = "bf16"
        manifest["fingerprint"] = compute_fingerprint(make_golden.FACTS)

    assert_refused(edit_hdf5(file, lambda hdf5: rewrite_manifest(hdf5, edit)), "fingerprint")


def rewrite_manifest(hdf5: h5py.File, edit: Edit) -> None:
    manifest = json.loads(hdf5["manifest"][()])
    edit(manifest)
    write_manifest(hdf5, json.dumps(manifest).encode())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
        b'{"facts": NaN}',
        b"{}" + b" " * 999,
    ],
)
def test_must_11_a_manifest_that_is_not_a_json_object_is_refused(file, text):
    assert_refused(edit_hdf5(file, lambda hdf5: write_manifest(hdf5, text)))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "1" * 4000])
def test_must_11_facts_with_invalid_values_are_refused(file, value):
    def edit(hdf5: h5py.File) -> None:
        text = hdf5["manifest"][()].replace(b'"fp32"', value.encode())
        write_manifest(hdf5, text)

    assert_refused(edit_hdf5(file, edit))


def test_must_12_rows_are_found_by_the_digest_of_the_image_unless_their_status_is_transient(file):
    cache = FeatureCache(file)
    lookup = EmbeddingLookup()
    lookup.add(EmbeddingSource.from_cache(cache, cache.outputs))
    digests = [hashlib.sha256(name.encode()).digest() for name in make_golden.IDS]
    assert [lookup.find_by_digest(d) for d in digests] == [(0, 0), (0, 1), (0, 2), None, (0, 4), (0, 5)]
    final_statuses = [status for status in Status if not status.transient]
    assert sorted({1, 2, 8} ^ set(map(int, Status))) == [int(status) for status in final_statuses]


def test_must_13_every_row_of_every_output_has_its_check(file):
    with h5py.File(file) as hdf5:
        digests, status = hdf5["samples/digest"][()], hdf5["samples/status"][()]
        for output in make_golden.SHAPES:
            features, checks = hdf5[f"features/{output}"][()], hdf5[f"checks/{output}"][()]
            assert (checks.dtype, checks.shape) == (np.uint8, (6, 16))
            for row in range(6):
                text = digests[row].tobytes() + bytes([status[row]]) + features[row].tobytes()
                assert checks[row].tobytes() == hashlib.sha256(text).digest()[:16]


@pytest.mark.parametrize("output", make_golden.SHAPES)
def test_must_13_checks_that_are_missing_or_of_another_shape_are_refused(file, output):
    name = f"checks/{output}"
    cache_bytes = file.read_bytes()
    assert_refused(edit_hdf5(file, lambda hdf5: hdf5.pop(name)), name, "missing")
    for checks in (np.zeros((6, 32), "u1"), np.zeros((7, 16), "u1"), np.zeros((6, 16), "i1"), np.zeros(96, "u1")):
        file.write_bytes(cache_bytes)
        assert_refused(
            edit_hdf5(file, lambda hdf5, checks=checks: replace_dataset(hdf5, name, checks)), name, "expected"
        )


def test_must_13_files_of_version_1_0_have_no_checks():
    cache = FeatureCache(DATA / "golden-1.0.h5")
    assert not cache.has_checks
    assert cache.whole_rows(np.arange(6)).all()
    assert cache.damaged_columns() == []


def test_must_14_every_column_except_features_has_its_digest_in_the_manifest(file):
    with h5py.File(file) as hdf5:
        manifest = json.loads(hdf5["manifest"][()])
        names = {*read_datasets(file)} - {"manifest", *(f"features/{output}" for output in manifest["outputs"])}
        assert manifest["columns"] == {name: hashlib.sha256(hdf5[name][()].tobytes()).hexdigest() for name in names}
        assert len(names) == 9
        stored = hashlib.sha256(hdf5["manifest"][()]).hexdigest()
        assert hdf5.attrs["manifest_sha256"] == stored.encode()


@pytest.mark.parametrize("value", [None, b"", b"0" * 64, "text", 1])
def test_must_14_a_manifest_with_a_wrong_digest_is_refused(file, value):
    def edit(hdf5: h5py.File) -> None:
        del hdf5.attrs["manifest_sha256"]
        if value is not None:
            hdf5.attrs["manifest_sha256"] = value

    assert_refused(edit_hdf5(file, edit), "digest", "damaged")


def test_must_14_a_column_without_its_digest_is_refused(file):
    cache_bytes = file.read_bytes()
    for name in FeatureCache(file).manifest["columns"]:
        assert_refused(
            edit_manifest(file, lambda manifest, name=name: manifest["columns"].pop(name)), "digest for each column"
        )
        file.write_bytes(cache_bytes)
    assert_refused(edit_manifest(file, lambda manifest: manifest.update(columns=[1])), "digest for each column")


def test_must_14_columns_with_wrong_digests_are_reported(file):
    def edit(manifest: dict[str, Any]) -> None:
        manifest["columns"].update({"samples/stamp": "0" * 64, "labels/values": 3, "samples/later": "1" * 64})

    assert FeatureCache(edit_manifest(file, edit)).damaged_columns() == [
        "samples/stamp",
        "labels/values",
        "samples/later",
    ]


JSON_VALUES = [-1, 1.5, True, "x", [1], ["x"], [[]], {"a": 1}, {"a": "x"}, {"a": {}}, [{"a": 1}], [{"cache": 1}]]
VALID_VALUE_INDICES = {  # indices into the list above
    "archives": {5}, "archive_kinds": {5}, "merged_from": set(), "repaired": {10, 11}, "created": {3}, "device": {3},
    "machine": {3}, "embedded": {0}, "batch": {0}, "images_per_second": {0, 1}, "seconds": {7}, "ignored": {7},
    "versions": {8}, "backbone": {7, 8, 9},
}  # fmt: skip


@pytest.mark.parametrize("key", VALID_VALUE_INDICES)
def test_must_16_keys_that_describe_the_run_have_their_types(file, key):
    def set_key(value: object) -> Edit:
        return lambda manifest: manifest.update({key: value})

    for number, value in enumerate(JSON_VALUES):
        if number in VALID_VALUE_INDICES[key]:
            assert FeatureCache(edit_manifest(file, set_key(value))).manifest[key] == value
        else:
            assert_refused(edit_manifest(file, set_key(value)), key)
    assert FeatureCache(edit_manifest(file, set_key(None))).manifest[key] is None
    assert key not in FeatureCache(edit_manifest(file, lambda manifest: manifest.pop(key))).manifest


@pytest.mark.parametrize("key", ["seconds", "of somebody's own"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_must_16_a_manifest_with_nan_or_infinity_is_refused(file, key, value):
    assert_refused(edit_manifest(file, lambda manifest: manifest.update({key: {"total": value}})), "not valid JSON")


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A cache in two shards written by the current code, in a separate folder."""
    path = tmp_path / "sharded" / "a.h5"
    path.parent.mkdir()
    make_golden.make_sharded(path)
    return path


def read_shard_entries(path: Path) -> list[dict[str, Any]]:
    return FeatureCache(path).manifest["shards"]


def test_must_15_shards_hold_consecutive_rows_in_the_shard_folder(sharded):
    first_shard, second_shard = read_shard_entries(sharded)
    assert [first_shard["rows"], second_shard["rows"]] == [[0, 4], [4, 6]]
    expected = make_golden._values(make_golden.WIDE).astype("<f2")
    for shard in (first_shard, second_shard):
        start, stop = shard["rows"]
        file = sharded.parent / shard["file"]
        assert file.parent == sharded.with_name("a.h5.shards")
        assert shard["bytes"] == file.stat().st_size
        assert shard["offsets"]["pooled"] % 65536 == 0
        features = np.fromfile(file, "<f2", (stop - start) * make_golden.WIDE, offset=shard["offsets"]["pooled"])
        assert np.array_equal(features.reshape(stop - start, -1), expected[start:stop], equal_nan=True)
        with h5py.File(file) as hdf5:
            assert (hdf5.attrs["format"], hdf5.attrs["format_version"]) == (b"featpipe-cache-shard", b"1.1")
            assert np.array_equal(hdf5["features/pooled"][()], expected[start:stop], equal_nan=True)
        checks = FeatureCache(sharded)._columns["checks/pooled"][start:stop].tobytes()
        shapes = repr([("pooled", (make_golden.WIDE,))]).encode()
        assert shard["check"] == hashlib.sha256(shapes + checks).hexdigest()
        assert file.name == f"{shard['check'][:24]}.h5"


def test_must_15_hdf5_reads_the_shards_as_one_dataset(sharded, monkeypatch):
    monkeypatch.chdir("/")
    with h5py.File(sharded) as hdf5:
        features = hdf5["features/pooled"]
        assert features.is_virtual
        assert np.array_equal(features[()], FeatureCache(sharded).features(), equal_nan=True)


SHARD_DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda shard, hanging_pipe: shard.unlink(),
    "truncated": lambda shard, hanging_pipe: os.truncate(shard, shard.stat().st_size - 1),
    "empty": lambda shard, hanging_pipe: os.truncate(shard, 0),
    "longer": lambda shard, hanging_pipe: os.truncate(shard, shard.stat().st_size + 1),
    "a folder": lambda shard, hanging_pipe: (shard.unlink(), shard.mkdir()),
    "a link": lambda shard, hanging_pipe: (
        shard.rename(shard.with_suffix(".b")),
        shard.symlink_to(shard.with_suffix(".b")),
    ),
    "a link to a pipe": lambda shard, hanging_pipe: (shard.unlink(), shard.symlink_to(hanging_pipe)),
    "a pipe": lambda shard, hanging_pipe: (shard.unlink(), os.mkfifo(shard)),
    "a link to itself": lambda shard, hanging_pipe: (shard.unlink(), shard.symlink_to(shard)),
}


@pytest.mark.parametrize("loss", SHARD_DAMAGE)
@pytest.mark.parametrize("number", [0, 1])
def test_must_15_a_shard_that_is_missing_incomplete_or_not_a_regular_file_is_refused(
    sharded, hanging_pipe, loss, number
):
    entry = read_shard_entries(sharded)[number]
    SHARD_DAMAGE[loss](sharded.parent / entry["file"], hanging_pipe)
    assert_refused(sharded, "1 of its 2 shards", entry["file"])
    lost_rows = slice(*entry["rows"])
    cache = FeatureCache(sharded, salvage=True)
    assert cache.lost_shards == (entry["file"],)
    is_intact = cache.whole_rows(np.arange(6))
    assert not is_intact[lost_rows].any()
    assert np.count_nonzero(is_intact) == 6 - (lost_rows.stop - lost_rows.start)
    assert not cache.features()[lost_rows].any()


def test_must_15_a_shard_folder_that_is_a_link_is_not_followed(sharded):
    folder = sharded.with_name("a.h5.shards")
    folder.rename(sharded.with_name("elsewhere.shards"))
    folder.symlink_to("elsewhere.shards", target_is_directory=True)
    assert_refused(sharded, "2 of its 2 shards")


def test_must_15_a_shard_with_other_rows_is_detected_by_the_row_checks(sharded):
    """Opening does not read the rows."""
    shard = sharded.parent / read_shard_entries(sharded)[0]["file"]
    data = np.fromfile(shard, "<f2")
    data[-4 * make_golden.WIDE :] += 1
    data.tofile(shard)
    cache = FeatureCache(sharded)
    assert cache.whole_rows(np.arange(6)).tolist() == [False, True, False, True, True, True]  # NaN + 1 is NaN
    lookup = EmbeddingLookup()
    lookup.add(EmbeddingSource.from_cache(cache, cache.outputs))
    assert [lookup.find_by_digest(digest.tobytes()) for digest in cache.digests[[0, 2, 4]]] == [None, None, (0, 4)]


SHARD = "0123456789abcdef01234567.h5"
INVALID_SHARD_ENTRIES: dict[str, Edit] = {
    **{f"file {name!r}": lambda m, name=name: m["shards"][0].update(file=name) for name in (
        f"../x.shards/{SHARD}", f"/x.shards/{SHARD}", f"a/../x.shards/{SHARD}", f".shards/{SHARD}", f"x/{SHARD}", SHARD,
        f"a.h5.shards/../{SHARD}", "a.h5.shards/a.h5", f"a.h5.shards/{SHARD}\n", f"a\0.shards/{SHARD}",
        f"a.shards//{SHARD}", f"a.h5.shards/{SHARD.upper()}", "", "/dev/zero", f"..shards/{SHARD}", 3, None,
    )},
    **{f"rows {rows}": lambda m, rows=rows: m["shards"][0].update(rows=rows) for rows in (
        [0, 3], [0, 5], [1, 4], [-4, 4], [0], [], [0, 4, 4], [0, 0], [4, 0], ["0", "4"], [0, 10**30], [0, 4.0], None,
    )},
    **{f"offset {offset}": lambda m, offset=offset: m["shards"][0]["offsets"].update(pooled=offset) for offset in (
        1, 4096, -65536, 2**62, 65536 * 4 + 65536, 10**30, "0", None, 65536.0,
    )},
    **{f"bytes {size}": lambda m, size=size: m["shards"][0].update(bytes=size) for size in (0, -1, 65535, "9", None)},
    **{f"shards {some}": lambda m, some=some: m.update(shards=some) for some in ([], {}, 3, "a", [[]], [None])},
    "no offsets": lambda m: m["shards"][1]["offsets"].clear(),
    "an output too many": lambda m: m["shards"][1]["offsets"].update(more=0),
    "one of two": lambda m: m["shards"].pop(),
    "twice the same": lambda m: m["shards"].append(m["shards"][0]),
    "in another order": lambda m: m["shards"].reverse(),
    "none": lambda m: m.pop("shards"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID_SHARD_ENTRIES)
def test_must_15_invalid_shard_entries_are_refused(sharded, case):
    assert_refused(edit_manifest(sharded, INVALID_SHARD_ENTRIES[case]))


def test_must_15_features_in_shards_and_in_the_file_are_refused(sharded):
    assert_refused(
        edit_hdf5(sharded, lambda hdf5: replace_dataset(hdf5, "features/pooled", np.zeros((6, 8192), "<f2"))),
        "and in shards",
    )


def test_must_15_the_virtual_dataset_is_not_opened(sharded, hanging_pipe):
    """Its source is a pipe, and opening the pipe would block forever."""
    features_before = FeatureCache(sharded).features().copy()
    format_module = h5py.VirtualLayout((6, 8192), "<f2")
    format_module[:] = h5py.VirtualSource(str(hanging_pipe), "a", (6, 8192))

    def edit(hdf5: h5py.File) -> None:
        del hdf5["features/pooled"]
        hdf5.create_virtual_dataset("features/pooled", format_module)

    edit_hdf5(sharded, edit)
    assert read_all([sharded]) == ["opened"]
    assert np.array_equal(FeatureCache(sharded).features(), features_before, equal_nan=True)


# ------------------------------------------------------------------------------------ the page and the golden file
def test_the_examples_of_the_specification_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    sessions = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(sessions, {}, "cache/README.md", None, 0)
    output = io.StringIO()
    results = doctest.DocTestRunner().run(test, out=output.write, clear_globs=False)
    test.globs["file"].close()
    assert results.failed == 0, output.getvalue()
    assert results.attempted >= 9


def test_the_statuses_of_the_specification_equal_those_of_the_code():
    text = README.split("### Status")[1].split("### Stamp")[0]
    assert re.findall(r"(\d+) `([a-z-]+)`", text) == [(str(int(status)), status.word) for status in Status]


def make_golden_values() -> np.ndarray:
    nan = [np.nan] * 4
    return np.array([
        [0, 0.25, 0.5, 0.75], nan, [20, 20.25, 20.5, 20.75], nan, [40, 40.25, 40.5, 40.75], [50, 50.25, 50.5, 50.75],
    ], np.float32)  # fmt: skip


@pytest.fixture(params=["1.0", "1.1", "written today"])
def golden(request, file) -> FeatureCache:
    return FeatureCache(file if request.param == "written today" else DATA / f"golden-{request.param}.h5")


def test_there_is_a_golden_file_of_each_version():
    assert {path.name for path in GOLDEN_FILES} == {path.name for path in DATA.glob("*.h5")}
    assert [FeatureCache(path).manifest["format_version"] for path in GOLDEN_FILES] == ["1.0", "1.1", "1.1"]


def test_the_sharded_golden_file_has_its_original_content(sharded):
    for cache in (FeatureCache(SHARDED), FeatureCache(sharded)):
        assert cache.fingerprint == "7996e894fbe21e4239195e8da5312b304cb0d9f7b4d242910ad4dc991ac2681c"
        assert np.array_equal(cache.features(), np.tile(make_golden_values(), 2048), equal_nan=True)
        assert cache.features().dtype == np.float16
        assert cache.X.dtype == np.float32
        assert list(cache.ids) == list(make_golden.IDS)
        assert cache.labels.tolist() == ["cat", "cat", "dog", "dog", "cow", None]
        assert cache.damaged_columns() == []
        assert cache.whole_rows(np.arange(6)).all()


def test_the_golden_file_has_its_original_content(golden):
    assert golden.file_bytes < 20_000
    assert list(golden.ids) == ["cat/1.jpg", "cat/2.jpg", "dog/é 3.jpg", "dog/4.jpg", "cow/5.jpg", "6.jpg"]
    assert golden.status.tolist() == ["ok", "damaged", "ok", "missing", "ok", "ok"]
    assert golden.bad_rows() == {"missing": 1, "damaged": 1}
    assert golden.split.tolist() == [1, 1, 3, 3, 2, 0]
    assert (golden.task, golden.classes) == ("classification", ("cat", "cow", "dog"))
    assert golden.labels.tolist() == ["cat", "cat", "dog", "dog", "cow", None]
    assert golden.y.tolist() == ["cat", "dog", "cow"]
    assert np.array_equal(golden.X, make_golden_values()[[0, 2, 4]])
    assert np.array_equal(golden.features("pooled"), make_golden_values(), equal_nan=True)
    assert np.array_equal(golden.features("layer2"), make_golden_values().reshape(6, 2, 2, 1), equal_nan=True)
    assert golden.digests[2].tobytes() == hashlib.sha256("dog/é 3.jpg".encode()).digest()
    assert golden.stamps[2].tobytes() == golden.digests[2].tobytes()[:16]
    assert not golden.digests[3].any()
    assert not golden.stamps[3].any()


def test_the_manifest_of_the_golden_file_is_unchanged(golden):
    assert golden.fingerprint == "f3d535ec5c7617f79231f169808aa19ca05104ab4e881111df0a172124d8e6a0"
    assert (golden.manifest["samples"], golden.manifest["ok"]) == (6, 4)
    assert golden.manifest["created"] == "2026-01-01T00:00:00+00:00"
    assert golden.manifest["outputs"] == {"pooled": [4], "layer2": [2, 2, 1]}


# ------------------------------------------------------------------------------------------------ untrusted files
READ_ALL_CODE = """
import resource, sys
from featpipe import FeatureCache
from featpipe.errors import CacheError

now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 300 * 2**20,) * 2)
for path in sys.stdin.read().split("\\n"):
    try:
        cache = FeatureCache(path)
        list(cache.ids), cache.status, cache.bad_rows(), cache.X, cache.y, cache.labels, cache.split, cache.table()
        [cache.features(output).sum() for output in cache.outputs], cache.digests.sum(), cache.stamps.sum()
        cache.damaged_columns(), [cache.whole_rows(range(len(cache)), output) for output in cache.outputs]
        print("opened", flush=True)
    except CacheError as error:
        assert str(error).startswith(path) and "\\n" not in str(error), error
        print(type(error).__name__, flush=True)
"""


def read_all(paths: Iterable[Path]) -> list[str]:
    """Read everything in some files in a process with limited memory; return the outcome for each file."""
    path_list = "\n".join(map(str, paths))
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ_ALL_CODE], input=path_list, timeout=120,
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    outcomes = process.stdout.split()
    assert process.returncode == 0, f"after {len(outcomes)} files: {process.stderr[-2000:]}"
    return outcomes


def write_copies(folder: Path, contents: Iterable[bytes]) -> list[Path]:
    """Write files with these contents to a new folder that also holds the shards of the golden file."""
    shutil.copytree(f"{SHARDED}.shards", folder / f"{SHARDED.name}.shards")
    paths = []
    for number, data in enumerate(contents):
        paths.append(folder / f"{number}.h5")
        paths[-1].write_bytes(data)
    return paths


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_a_truncated_file_is_refused(tmp_path, path):
    data = path.read_bytes()
    lengths = [*range(10), *np.linspace(10, len(data) - 1, 50).astype(int).tolist()]
    assert set(read_all(write_copies(tmp_path / "cut", (data[:length] for length in lengths)))) == {"CacheFormatError"}


def make_damaged_copies(data: bytes, seed: int, count: int, region: slice = slice(None)) -> list[bytes]:
    """Make copies of a file, each with one to five changed bytes."""
    rng = np.random.default_rng(seed)
    offsets = np.arange(len(data))[region]
    damaged_copies = []
    for _ in range(count):
        damaged_copy = np.frombuffer(data, np.uint8).copy()
        damaged_copy[rng.choice(offsets, rng.integers(1, 6))] ^= rng.integers(1, 256, dtype=np.uint8)
        damaged_copies.append(damaged_copy.tobytes())
    return damaged_copies


@pytest.mark.thorough
@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_flipped_bytes_are_refused_or_read_without_a_crash(tmp_path, path):
    outcomes = read_all(write_copies(tmp_path / "flipped", make_damaged_copies(path.read_bytes(), 0, 400)))
    assert len(outcomes) == 400
    assert set(outcomes) == {"CacheFormatError", "opened"}


def test_damage_in_the_heap_of_a_virtual_dataset_is_harmless(tmp_path):
    """HDF5 crashes or hangs on some of these files: the heap that names the sources has no checksum."""
    data = SHARDED.read_bytes()
    heap = data.index(b"GCOL")
    paths = write_copies(tmp_path / "heap", make_damaged_copies(data, 1, 400, slice(heap, heap + 400)))
    assert set(read_all(paths)) == {"opened"}


@pytest.mark.thorough
@pytest.mark.parametrize("path", [GOLDEN, SHARDED], ids=lambda path: path.stem)
def test_flipped_bytes_are_refused_reported_or_harmless(tmp_path, path):
    original = FeatureCache(path)
    outcomes = {"refused": 0, "reported": 0, "unchanged": 0}
    for damaged in write_copies(tmp_path / "flipped", make_damaged_copies(path.read_bytes(), 2, 400)):
        try:
            cache = FeatureCache(damaged)
        except CacheFormatError:
            outcomes["refused"] += 1
            continue
        is_intact = all(cache.whole_rows(np.arange(6), output).all() for output in cache.outputs)
        if cache.damaged_columns() or not is_intact:
            outcomes["reported"] += 1
            continue
        assert cache.manifest == original.manifest
        assert cache.table().same_as(original.table())
        for output in original.outputs:
            assert np.array_equal(cache.features(output), original.features(output), equal_nan=True)
        outcomes["unchanged"] += 1
    assert min(outcomes.values()) > 8, outcomes


def test_a_flipped_byte_in_the_superblock_or_the_manifest_is_refused(file):
    data = bytearray(file.read_bytes())
    with h5py.File(file) as hdf5:
        begin, size = hdf5["manifest"].id.get_offset(), hdf5["manifest"].dtype.itemsize
    assert size > 1500
    for offset in (*range(48), *range(begin, begin + size, 5)):
        data[offset] ^= 0x01
        file.write_bytes(data)
        assert_refused(file)
        data[offset] ^= 0x01


@pytest.fixture
def hanging_pipe(tmp_path) -> Path:
    """A named pipe; opening it for reading blocks forever."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_no_other_file_is_opened(tmp_path, hanging_pipe):
    """Links, external storage and virtual sources that lead to a pipe; following one would block forever."""
    format_module = h5py.VirtualLayout((6,), "u1")
    format_module[:] = h5py.VirtualSource(str(hanging_pipe), "a", (6,))
    open_ended = h5py.VirtualLayout((6, 4), "<f4", maxshape=(None, 4))
    open_ended[:] = h5py.VirtualSource(str(hanging_pipe), "a", (6, 4), maxshape=(None, 4))[:]
    store = [(str(hanging_pipe), 0, h5py.h5f.UNLIMITED)]

    def external(name: str) -> Edit:
        def edit(hdf5: h5py.File) -> None:
            hdf5.pop(name, None)
            hdf5[name] = h5py.ExternalLink(str(hanging_pipe), "/a")

        return edit

    def stored(name: str, shape: tuple[int, ...], dtype: str) -> Edit:
        def edit(hdf5: h5py.File) -> None:
            hdf5.pop(name, None)
            hdf5.create_dataset(name, shape, dtype, external=store)

        return edit

    def virtual(name: str, format_module: h5py.VirtualLayout) -> Edit:
        def edit(hdf5: h5py.File) -> None:
            hdf5.pop(name, None)
            hdf5.create_virtual_dataset(name, format_module)

        return edit

    names = ("samples", "features", "samples/status", "samples/extra", "features/pooled", "manifest", "extra")
    edits = [
        *map(external, names),
        stored("features/pooled", (6, 4), "<f4"),
        stored("samples/status", (6,), "u1"),
        stored("manifest", (), "S900"),
        virtual("samples/status", format_module),
        virtual("features/pooled", open_ended),
    ]
    paths = write_copies(tmp_path / "hostile", [GOLDEN.read_bytes()] * len(edits))
    for path, edit in zip(paths, edits, strict=True):
        edit_hdf5(path, edit)
    assert read_all(paths) == ["CacheFormatError"] * len(edits)


@pytest.mark.parametrize("damaged_range", [slice(16, 200), slice(24, 32)])
def test_a_damaged_heap_of_variable_length_texts_cannot_make_a_reader_loop(file, damaged_range):
    def edit(hdf5: h5py.File) -> None:
        for name, value in (("format", "featpipe-cache"), ("format_version", "1.0")):
            del hdf5.attrs[name]
            hdf5.attrs[name] = value  # of variable length, so it is stored in the heap

    data = bytearray(edit_hdf5(file, edit).read_bytes())
    heap = data.index(b"GCOL")
    length = damaged_range.stop - damaged_range.start
    data[heap + damaged_range.start : heap + damaged_range.stop] = (
        bytes(length) if length > 8 else b"\xf0" + b"\xff" * 7
    )
    file.write_bytes(data)
    assert read_all([file]) == ["CacheFormatError"]


def test_pipes_folders_and_dangling_links_are_not_opened(tmp_path, hanging_pipe):
    folder = tmp_path / "folder.h5"
    folder.mkdir()
    dangling = tmp_path / "dangling.h5"
    dangling.symlink_to(tmp_path / "nothing")
    assert read_all([hanging_pipe, folder, dangling]) == ["CacheError", "CacheFormatError", "CacheError"]


@pytest.mark.parametrize("data", [b"", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04" + bytes(100), bytes(4096), b"a" * 9])
def test_other_files_are_not_caches(tmp_path, data):
    path = tmp_path / "a.h5"
    path.write_bytes(data)
    assert_refused(path)
