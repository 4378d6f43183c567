"""The specification of the cache, ``cache/README.md``: what is written obeys it, what breaks it is refused."""

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
from featpipe.cache import format as layout
from featpipe.data import Labels
from featpipe.errors import CacheError, CacheFormatError
from featpipe.status import Status
from featpipe.storage import StringColumn
from tests.data import make_golden

ROOT = Path(__file__).parents[2]
README = (ROOT / "cache" / "README.md").read_text()
DATA = ROOT / "tests" / "data"
GOLDEN, SHARDED = DATA / "golden-1.1.h5", DATA / "golden-1.1-sharded.h5"
GOLDENS = (DATA / "golden-1.0.h5", GOLDEN, SHARDED)

Edit = Callable[[Any], object]


@pytest.fixture
def file(tmp_path) -> Path:
    """A cache as today's code writes it, in a folder of its own."""
    path = tmp_path / "cache" / "golden.h5"
    path.parent.mkdir()
    make_golden.make(path)
    return path


def changed(path: Path, edit: Edit) -> Path:
    """The file after an edit of its HDF5."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as hdf5:
        edit(hdf5)
    return path


def told(path: Path, edit: Edit) -> Path:
    """The file after an edit of its manifest; fingerprint and digest are made to fit, unless the edit touched them."""

    def rewrite(hdf5: h5py.File) -> None:
        manifest = json.loads(hdf5["manifest"][()])
        before = copy.deepcopy(manifest)
        edit(manifest)
        if isinstance(manifest.get("facts"), dict) and manifest.get("fingerprint") == before["fingerprint"]:
            manifest["fingerprint"] = by_hand(manifest["facts"])
        sealed(hdf5, json.dumps(manifest).encode())

    return changed(path, rewrite)


def sealed(hdf5: h5py.File, text: bytes) -> None:
    """Another manifest with the digest that belongs to it."""
    put(hdf5, "manifest", np.bytes_(text))
    stored = hdf5["manifest"][()].ljust(hdf5["manifest"].dtype.itemsize, b"\0")
    hdf5.attrs["manifest_sha256"] = np.bytes_(hashlib.sha256(stored).hexdigest())


def by_hand(facts: object) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def put(hdf5: h5py.File, name: str, data: object, **how: object) -> None:
    if name in hdf5:
        del hdf5[name]
    hdf5.create_dataset(name, data=data, **how)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CacheFormatError) as caught:
        FeatureCache(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    for word in words:
        assert word in text


def datasets(path: Path) -> dict[str, h5py.Dataset]:
    found = {}
    with h5py.File(path) as hdf5:
        hdf5.visititems(lambda name, entry: found.update({name: entry}) if isinstance(entry, h5py.Dataset) else None)
        return {name: (d.id.get_create_plist(), d.id.get_offset(), d.dtype, d.shape) for name, d in found.items()}


def test_every_numbered_rule_has_its_test():
    rules = {int(number) for number in re.findall(r"^(\d+)\. ", README, re.MULTILINE)}
    tests = {int(found[1]) for name in globals() if (found := re.match(r"test_must_(\d+)_", name))}
    assert rules == tests == set(range(1, len(rules) + 1))


# ---------------------------------------------------------------------------------------------- the rules
def test_must_1_what_is_written_says_its_format_in_short_texts(file):
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

    refused(changed(file, edit))


def test_must_1_the_oldest_hdf5_is_refused(file, tmp_path):
    old = tmp_path / "old.h5"
    with h5py.File(file) as new, h5py.File(old, "w", libver="earliest") as hdf5:
        hdf5.attrs.update(new.attrs)
        for name in new:
            new.copy(name, hdf5)
    refused(old, "oldest")


def test_must_1_a_higher_minor_version_is_read_and_what_it_adds_is_ignored(file):
    def edit(hdf5: h5py.File) -> None:
        hdf5.attrs["format_version"] = np.bytes_("1.17")
        hdf5["samples/weight"] = np.ones(6, "<f4")
        hdf5["nearest/neighbours"] = np.ones((6, 2), "<i8")
        hdf5["samples/status"][1] = 77

    before = FeatureCache(file)
    more = {"more": {"a": 1}, "format_version": "1.17"}
    cache = FeatureCache(told(changed(file, edit), lambda manifest: manifest.update(more)))
    assert cache.status.tolist() == ["ok", "status-77", "ok", "missing", "ok", "ok"]
    assert cache.bad_rows() == {"missing": 1, "status-77": 1}
    assert np.array_equal(cache.X, before.X)
    known = EmbeddingLookup()
    known.add(EmbeddingSource.from_cache(cache, cache.outputs))
    assert known.find_by_digest(cache.digests[1].tobytes()) is None


def test_must_2_what_is_written_lies_in_aligned_contiguous_pieces_of_the_file(file):
    written = datasets(file)
    assert len(written) == 12
    for plist, offset, dtype, shape in written.values():
        assert plist.get_layout() == h5py.h5d.CONTIGUOUS
        assert (plist.get_nfilters(), plist.get_external_count(), offset % ALIGNMENT_BYTES) == (0, 0, 0)
        assert offset + dtype.itemsize * int(np.prod(shape)) <= file.stat().st_size


def test_must_2_a_mapped_array_is_what_hdf5_reads(file):
    cache = FeatureCache(file)
    with h5py.File(file) as hdf5:
        for output in cache.outputs:
            features = cache.features(output)
            assert np.array_equal(features, hdf5[f"features/{output}"][()], equal_nan=True)
            assert features.flags.aligned
            assert not features.flags.writeable
        assert np.array_equal(cache.digests, hdf5["samples/digest"][()])


OTHER_STORAGE: dict[str, Edit] = {
    "chunked": lambda h: put(h, "samples/status", h["samples/status"][()], chunks=(2,)),
    "gzip": lambda h: put(h, "samples/status", h["samples/status"][()], compression="gzip"),
    "fletcher32": lambda h: put(h, "features/pooled", h["features/pooled"][()], fletcher32=True),
    "resizable": lambda h: put(h, "samples/status", h["samples/status"][()], maxshape=(None,)),
    "compact": lambda h: compact(h, "samples/split"),
    "soft link": lambda h: h["samples"].move("status", "s") or h.update({"samples/status": h5py.SoftLink("s")}),
    "extra soft link": lambda h: h.update({"a": h5py.SoftLink("/samples/status")}),
    "dangling soft link": lambda h: h.update({"samples/a": h5py.SoftLink("/nowhere")}),
    "named type": lambda h: h.update({"samples/a": np.dtype("<f4")}),
}


def compact(hdf5: h5py.File, name: str) -> None:
    data = hdf5[name][()]
    del hdf5[name]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    kind, space = h5py.h5t.py_create(data.dtype), h5py.h5s.create_simple(data.shape)
    h5py.h5d.create(hdf5.id, name.encode(), kind, space, plist).write(h5py.h5s.ALL, h5py.h5s.ALL, data)


@pytest.mark.parametrize("case", OTHER_STORAGE)
def test_must_2_other_storage_is_refused(file, case):
    refused(changed(file, OTHER_STORAGE[case]))


def test_must_2_groups_that_are_not_of_a_cache_are_not_looked_into(file):
    def edit(hdf5: h5py.File) -> None:
        hdf5["other/link"] = h5py.ExternalLink("elsewhere.h5", "/")
        hdf5["features/loop"] = hdf5["features"]

    assert FeatureCache(changed(file, edit)).outputs == ("pooled", "layer2")


def test_must_3_what_is_written_is_integers_floats_and_bytes(file):
    kinds = {name: dtype.str for name, (_, _, dtype, _) in datasets(file).items()}
    assert kinds.pop("manifest").startswith("|S")
    assert kinds == {
        "features/pooled": "<f4", "features/layer2": "<f4", "labels/values": "<i4", "samples/id_offsets": "<i8",
        "samples/id_bytes": "|u1", "samples/status": "|u1", "samples/digest": "|u1", "samples/stamp": "|u1",
        "samples/split": "|u1", "checks/pooled": "|u1", "checks/layer2": "|u1",
    }  # fmt: skip


def odd_integers(hdf5: h5py.File) -> None:
    """Integers of 20 bits in four bytes: numpy would take all 32."""
    kind = h5py.h5t.STD_I32LE.copy()
    kind.set_precision(20)
    h5py.h5d.create(hdf5.id, b"samples/odd", kind, h5py.h5s.create_simple((6,))).write(
        h5py.h5s.ALL, h5py.h5s.ALL, np.arange(6, dtype=np.int32)
    )


ODD_TYPES: dict[str, Edit] = {
    "texts of variable length": lambda h: put(h, "samples/more", ["a", "b"]),
    "compound": lambda h: put(h, "samples/more", np.zeros(6, [("a", "u1"), ("b", "<f4")])),
    "references": lambda h: put(h, "samples/more", h["samples"].ref, dtype=h5py.ref_dtype),
    "arrays of variable length": lambda h: h.create_dataset("more", (6,), h5py.vlen_dtype(np.uint8)),
    "booleans": lambda h: put(h, "samples/more", np.zeros(6, bool)),
    "opaque": lambda h: put(h, "samples/more", np.zeros(6, "V4")),
    "complex": lambda h: put(h, "samples/more", np.zeros(6, "c8")),
    "array elements": lambda h: h.create_dataset("more", (6,), np.dtype(("<f4", (3,)))),
    "integers of 20 bits": odd_integers,
    "no shape": lambda h: put(h, "samples/more", h5py.Empty("u1")),
    "status of floats": lambda h: put(h, "samples/status", np.zeros(6, "<f4")),
    "features of doubles": lambda h: put(h, "features/pooled", np.zeros((6, 4), "<f8")),
    "features of big-endian floats": lambda h: put(h, "features/pooled", np.zeros((6, 4), ">f4")),
    "a manifest of variable length": lambda h: put(h, "manifest", "{}"),
    "a manifest of integers": lambda h: put(h, "manifest", np.zeros(6, "u1")),
}


@pytest.mark.parametrize("case", ODD_TYPES)
def test_must_3_odd_types_are_refused(file, case):
    refused(changed(file, ODD_TYPES[case]))


def test_must_3_more_than_the_file_holds_is_refused(file):
    """A dataset that was never filled takes no space: the whole file is a few kilobytes."""
    huge = {"samples/huge": (10**15,), "features/huge": (2**31, 2**31)}
    for name, shape in huge.items():
        changed(file, lambda hdf5, name=name, shape=shape: hdf5.create_dataset(name, shape, "u1"))
        assert file.stat().st_size < 20_000
        refused(file, "more than the file holds")
        changed(file, lambda hdf5, name=name: hdf5.pop(name))


def test_must_3_groups_with_too_many_entries_and_long_manifests_are_refused(file, monkeypatch):
    monkeypatch.setattr(hdf5, "MAX_GROUP_ENTRIES", 5)
    refused(file, "samples/ has 6 entries, more than 5")
    monkeypatch.setattr(hdf5, "MAX_GROUP_ENTRIES", 6)
    FeatureCache(file)
    monkeypatch.setattr(layout, "MAX_MANIFEST_BYTES", 100)
    refused(file, "the manifest has", "more than 100")


def test_must_4_a_cache_is_whole_and_durable_before_it_has_its_name(file, monkeypatch):
    old, steps = file.read_bytes(), []
    replace, fsync = os.replace, os.fsync

    def replacing(source: Path, target: Path) -> None:
        assert target == file
        assert target.read_bytes() == old
        assert Path(source).suffix != ".h5"
        assert FeatureCache(source).fingerprint == FeatureCache(file).fingerprint
        steps.append(f"rename from {Path(source).stat().st_ino}")
        replace(source, target)

    def syncing(handle: int) -> None:
        steps.append(f"fsync of {os.fstat(handle).st_ino}")
        fsync(handle)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "fsync", syncing)
    make_golden.make(file)
    number, folder = file.stat().st_ino, file.parent.stat().st_ino
    assert steps == [f"fsync of {number}", f"rename from {number}", f"fsync of {folder}"]
    assert [path.name for path in file.parent.iterdir()] == ["golden.h5"]


SAMPLES = ("id_bytes", "id_offsets", "status", "digest", "stamp", "split")


@pytest.mark.parametrize("name", [f"samples/{name}" for name in SAMPLES] + ["labels/values", "manifest"])
def test_must_5_a_missing_dataset_is_named(file, name):
    refused(changed(file, lambda hdf5: hdf5.pop(name)), name, "missing")


@pytest.mark.parametrize("name", [f"samples/{name}" for name in SAMPLES] + ["labels/values"])
@pytest.mark.parametrize("change", ["shorter", "longer", "flatter", "wider type"])
def test_must_5_other_shapes_and_types_are_refused(file, name, change):
    def edit(hdf5: h5py.File) -> None:
        data = hdf5[name][()]
        wider = data.astype("<f8" if data.dtype.itemsize == 8 else "<i8")
        twice = np.concatenate([data, data])
        changes = {"shorter": data[:-1], "longer": twice, "flatter": data[..., None], "wider type": wider}
        put(hdf5, name, changes[change])

    refused(changed(file, edit), name.removesuffix("bytes"))


def test_must_5_the_number_of_samples_is_the_manifests(file):
    refused(told(file, lambda manifest: manifest.update(samples=7)), "expected")


@pytest.mark.parametrize(("first", "last"), [(1, 0), (-1, 0), (0, 1), (0, -1), (0, 2**62)])
def test_must_5_ids_that_do_not_fill_their_bytes_are_refused(file, first, last):
    def edit(hdf5: h5py.File) -> None:
        hdf5["samples/id_offsets"][0] += first
        hdf5["samples/id_offsets"][-1] += last

    refused(changed(file, edit), "id_offsets")


def test_must_5_what_takes_time_in_n_is_looked_at_when_it_is_used(file):
    descending = np.array([0, 40, 18, 30, 39, 48, len("".join(make_golden.IDS).encode())], "<i8")
    cache = FeatureCache(changed(file, lambda hdf5: put(hdf5, "samples/id_offsets", descending)))
    with pytest.raises(CacheFormatError, match="id_offsets"):
        _ = cache.ids
    cache = FeatureCache(changed(file, lambda hdf5: put(hdf5, "samples/split", np.full(6, 4, "u1"))))
    with pytest.raises(CacheFormatError, match="samples/split"):
        _ = cache.split
    for code in (-2, 3, 2**31 - 1):
        changed(file, lambda hdf5, code=code: put(hdf5, "labels/values", np.full(6, code, "<i4")))
        with pytest.raises(CacheFormatError, match="labels/values"):
            _ = FeatureCache(file).y


def test_must_6_every_output_has_its_dataset(file):
    cache = FeatureCache(file)
    assert cache.outputs == ("pooled", "layer2")
    assert [cache.features(output).shape for output in cache.outputs] == [(6, 4), (6, 2, 2, 1)]


@pytest.mark.parametrize("shape", [[], [5], [4, 1], "4", 4, None, ["4"], [4.5], [-4], {"4": 4}])
def test_must_6_an_output_of_another_shape_is_refused(file, shape):
    refused(told(file, lambda manifest: manifest["outputs"].update(pooled=shape)), "pooled")


def test_must_6_a_missing_output_is_refused(file):
    refused(changed(file, lambda hdf5: hdf5["features"].pop("layer2")), "features/layer2", "missing")


@pytest.mark.parametrize("outputs", [{}, {"pooled": [4]}, {"pooled": [4], "layer2": [2, 2, 1], "more": [4]}])
def test_must_6_outputs_other_than_those_of_the_facts_are_refused(file, outputs):
    refused(told(file, lambda manifest: manifest.update(outputs=outputs)), "output")


def test_must_6_no_output_at_all_is_refused(file):
    def edit(manifest: dict[str, Any]) -> None:
        manifest["outputs"] = manifest["facts"]["backbone"]["outputs"] = {}

    refused(told(file, edit), "are empty or differ")


@pytest.mark.parametrize("storage", ["float16", "float64", "bfloat16", ""])
def test_must_6_an_output_of_another_type_is_refused(file, storage):
    refused(told(file, lambda manifest: manifest["facts"].update(storage=storage)), "float")


def test_must_7_rows_that_are_not_ok_are_nan_and_the_others_are_not(file):
    cache = FeatureCache(file)
    for output in cache.outputs:
        flat = np.isnan(cache.features(output)).reshape(len(cache), -1)
        assert np.array_equal(flat.all(axis=1), ~cache.ok)
        assert np.array_equal(flat.any(axis=1), ~cache.ok)


def test_must_7_the_writer_refuses_to_write_others(file):
    table, old = FeatureCache(file).table(), file.read_bytes()
    manifest = {"facts": make_golden.FACTS}
    with pytest.raises(ValueError, match="must be NaN"):
        write_cache(file, table, manifest, make_golden.SHAPES, "float32",
                    lambda o, i, j: np.zeros((j - i, *make_golden.SHAPES[o]), "f4"))  # fmt: skip
    assert file.read_bytes() == old
    assert [path.name for path in file.parent.iterdir()] == ["golden.h5"]


def test_must_7_a_reader_goes_by_the_status(file):
    cache = FeatureCache(changed(file, lambda hdf5: put(hdf5, "features/pooled", np.ones((6, 4), "<f4"))))
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


def labelled(path: Path, labels: Labels) -> FeatureCache:
    """A cache of as many rows as there are labels."""
    n = len(labels)
    table = SampleTable(
        StringColumn.from_strings(map(str, range(n))), np.zeros(n, "u1"), np.ones((n, 32), "u1"),
        np.zeros((n, 16), "u1"), np.zeros(n, "u1"), labels,
    )  # fmt: skip
    shapes = make_golden.SHAPES
    write_cache(path, table, {"facts": make_golden.FACTS}, shapes, "float32",
                lambda o, i, j: np.ones((j - i, *shapes[o]), "f4"))  # fmt: skip
    return FeatureCache(path)


def test_must_9_classes_are_in_the_stated_order(tmp_path):
    words = labelled(tmp_path / "a.h5", Labels.from_class_names(["b", "é", "a", "B", "10", "9", None]))
    assert words.classes == ("10", "9", "B", "a", "b", "é")
    numbers = labelled(tmp_path / "b.h5", Labels.from_class_names(["10", "9", "0", None]))
    assert numbers.classes == ("0", "9", "10")
    several = labelled(tmp_path / "c.h5", Labels.from_label_sets([{"b", "a"}, set(), None]))
    assert several.classes == ("a", "b")


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
    refused(told(file, lambda manifest: manifest.update(classes=classes)), "classes")


def test_must_9_a_writer_does_not_publish_another_order(tmp_path):
    with pytest.raises(CacheError, match="are not sorted"):
        labelled(tmp_path / "a.h5", Labels.from_class_names(["a", "b"], classes=["b", "a"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [
    "facts.precision", "facts.storage", "facts.extraction", "facts.backbone", "facts.backbone.name",
    "facts.backbone.source", "facts.backbone.weights", "facts.backbone.transform", "facts.backbone.outputs",
    "facts", "fingerprint", "outputs", "task", "classes", "samples", "ok", "format", "format_version",
])  # fmt: skip
@pytest.mark.parametrize("value", ["missing", "other type"])
def test_must_10_a_manifest_without_its_facts_is_refused(file, key, value):
    *above, last = key.split(".")

    def edit(manifest: dict[str, Any]) -> None:
        for name in above:
            manifest = manifest[name]
        manifest.pop(last)
        if value == "other type":
            manifest[last] = None

    refused(told(file, edit), last)


def test_must_10_the_facts_are_those_that_were_given(file):
    assert FeatureCache(file).facts == make_golden.FACTS


def test_must_11_the_fingerprint_is_the_digest_of_the_facts(file):
    cache = FeatureCache(file)
    assert cache.fingerprint == by_hand(cache.facts)


@pytest.mark.parametrize("fingerprint", ["", "0" * 64, by_hand(make_golden.FACTS).upper()])
def test_must_11_another_fingerprint_is_refused(file, fingerprint):
    refused(told(file, lambda manifest: manifest.update(fingerprint=fingerprint)), "fingerprint")


def test_must_11_facts_that_were_changed_are_refused(file):
    def edit(manifest: dict[str, Any]) -> None:
        manifest["facts"]["precision"] = "bf16"
        manifest["fingerprint"] = by_hand(make_golden.FACTS)

    refused(changed(file, lambda hdf5: rewritten(hdf5, edit)), "fingerprint")


def rewritten(hdf5: h5py.File, edit: Edit) -> None:
    manifest = json.loads(hdf5["manifest"][()])
    edit(manifest)
    sealed(hdf5, json.dumps(manifest).encode())


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
def test_must_11_a_manifest_that_is_no_object_is_refused(file, text):
    refused(changed(file, lambda hdf5: sealed(hdf5, text)))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "1" * 4000])
def test_must_11_facts_of_odd_values_are_read_or_refused(file, value):
    def edit(hdf5: h5py.File) -> None:
        text = hdf5["manifest"][()].replace(b'"fp32"', value.encode())
        sealed(hdf5, text)

    refused(changed(file, edit))


def test_must_12_rows_are_known_by_their_images_bytes_alone_and_not_when_another_attempt_may_help(file):
    cache = FeatureCache(file)
    known = EmbeddingLookup()
    known.add(EmbeddingSource.from_cache(cache, cache.outputs))
    digests = [hashlib.sha256(name.encode()).digest() for name in make_golden.IDS]
    assert [known.find_by_digest(d) for d in digests] == [(0, 0), (0, 1), (0, 2), None, (0, 4), (0, 5)]
    lasting = [status for status in Status if not status.transient]
    assert sorted({1, 2, 8} ^ set(map(int, Status))) == [int(status) for status in lasting]


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
    whole = file.read_bytes()
    refused(changed(file, lambda hdf5: hdf5.pop(name)), name, "missing")
    for other in (np.zeros((6, 32), "u1"), np.zeros((7, 16), "u1"), np.zeros((6, 16), "i1"), np.zeros(96, "u1")):
        file.write_bytes(whole)
        refused(changed(file, lambda hdf5, other=other: put(hdf5, name, other)), name, "expected")


def test_must_13_files_of_the_version_before_have_none():
    cache = FeatureCache(DATA / "golden-1.0.h5")
    assert not cache.has_checks
    assert cache.whole_rows(np.arange(6)).all()
    assert cache.damaged_columns() == []


def test_must_14_every_column_but_the_features_has_its_digest_in_the_manifest(file):
    with h5py.File(file) as hdf5:
        manifest = json.loads(hdf5["manifest"][()])
        names = {*datasets(file)} - {"manifest", *(f"features/{output}" for output in manifest["outputs"])}
        assert manifest["columns"] == {name: hashlib.sha256(hdf5[name][()].tobytes()).hexdigest() for name in names}
        assert len(names) == 9
        stored = hashlib.sha256(hdf5["manifest"][()]).hexdigest()
        assert hdf5.attrs["manifest_sha256"] == stored.encode()


@pytest.mark.parametrize("value", [None, b"", b"0" * 64, "text", 1])
def test_must_14_a_manifest_of_another_digest_is_refused(file, value):
    def edit(hdf5: h5py.File) -> None:
        del hdf5.attrs["manifest_sha256"]
        if value is not None:
            hdf5.attrs["manifest_sha256"] = value

    refused(changed(file, edit), "digest", "damaged")


def test_must_14_a_column_without_its_digest_is_refused(file):
    whole = file.read_bytes()
    for name in FeatureCache(file).manifest["columns"]:
        refused(told(file, lambda manifest, name=name: manifest["columns"].pop(name)), "digest for each column")
        file.write_bytes(whole)
    refused(told(file, lambda manifest: manifest.update(columns=[1])), "digest for each column")


def test_must_14_digests_that_do_not_agree_name_their_columns(file):
    def edit(manifest: dict[str, Any]) -> None:
        manifest["columns"].update({"samples/stamp": "0" * 64, "labels/values": 3, "samples/later": "1" * 64})

    assert FeatureCache(told(file, edit)).damaged_columns() == ["samples/stamp", "labels/values", "samples/later"]


OF_ANOTHER_TYPE = [-1, 1.5, True, "x", [1], ["x"], [[]], {"a": 1}, {"a": "x"}, {"a": {}}, [{"a": 1}], [{"cache": 1}]]
FITTING = {  # positions in the list above
    "archives": {5}, "archive_kinds": {5}, "merged_from": set(), "repaired": {10, 11}, "created": {3}, "device": {3},
    "machine": {3}, "embedded": {0}, "batch": {0}, "images_per_second": {0, 1}, "seconds": {7}, "ignored": {7},
    "versions": {8}, "backbone": {7, 8, 9},
}  # fmt: skip


@pytest.mark.parametrize("key", FITTING)
def test_must_16_what_tells_of_the_run_is_of_its_type(file, key):
    def give(value: object) -> Edit:
        return lambda manifest: manifest.update({key: value})

    for number, value in enumerate(OF_ANOTHER_TYPE):
        if number in FITTING[key]:
            assert FeatureCache(told(file, give(value))).manifest[key] == value
        else:
            refused(told(file, give(value)), key)
    assert FeatureCache(told(file, give(None))).manifest[key] is None
    assert key not in FeatureCache(told(file, lambda manifest: manifest.pop(key))).manifest


@pytest.mark.parametrize("key", ["seconds", "of somebody's own"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_must_16_a_manifest_holds_no_number_that_json_does_not_have(file, key, value):
    refused(told(file, lambda manifest: manifest.update({key: {"total": value}})), "not valid JSON")


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A cache in two shards as today's code writes it, in a folder of its own."""
    path = tmp_path / "sharded" / "a.h5"
    path.parent.mkdir()
    make_golden.make_sharded(path)
    return path


def shards(path: Path) -> list[dict[str, Any]]:
    return FeatureCache(path).manifest["shards"]


def test_must_15_shards_are_the_rows_one_after_the_other_in_the_folder_beside_the_cache(sharded):
    first, second = shards(sharded)
    assert [first["rows"], second["rows"]] == [[0, 4], [4, 6]]
    wanted = make_golden._values(make_golden.WIDE).astype("<f2")
    for shard in (first, second):
        start, stop = shard["rows"]
        file = sharded.parent / shard["file"]
        assert file.parent == sharded.with_name("a.h5.shards")
        assert shard["bytes"] == file.stat().st_size
        assert shard["offsets"]["pooled"] % 65536 == 0
        found = np.fromfile(file, "<f2", (stop - start) * make_golden.WIDE, offset=shard["offsets"]["pooled"])
        assert np.array_equal(found.reshape(stop - start, -1), wanted[start:stop], equal_nan=True)
        with h5py.File(file) as hdf5:
            assert (hdf5.attrs["format"], hdf5.attrs["format_version"]) == (b"featpipe-cache-shard", b"1.1")
            assert np.array_equal(hdf5["features/pooled"][()], wanted[start:stop], equal_nan=True)
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


LOSSES: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda shard, pipe: shard.unlink(),
    "truncated": lambda shard, pipe: os.truncate(shard, shard.stat().st_size - 1),
    "empty": lambda shard, pipe: os.truncate(shard, 0),
    "longer": lambda shard, pipe: os.truncate(shard, shard.stat().st_size + 1),
    "a folder": lambda shard, pipe: (shard.unlink(), shard.mkdir()),
    "a link": lambda shard, pipe: (shard.rename(shard.with_suffix(".b")), shard.symlink_to(shard.with_suffix(".b"))),
    "a link to a pipe": lambda shard, pipe: (shard.unlink(), shard.symlink_to(pipe)),
    "a pipe": lambda shard, pipe: (shard.unlink(), os.mkfifo(shard)),
    "a link to itself": lambda shard, pipe: (shard.unlink(), shard.symlink_to(shard)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("number", [0, 1])
def test_must_15_a_shard_that_is_not_a_whole_regular_file_is_named(sharded, pipe, loss, number):
    stated = shards(sharded)[number]
    LOSSES[loss](sharded.parent / stated["file"], pipe)
    refused(sharded, "1 of its 2 shards", stated["file"])
    lost = slice(*stated["rows"])
    cache = FeatureCache(sharded, salvage=True)
    assert cache.lost_shards == (stated["file"],)
    whole = cache.whole_rows(np.arange(6))
    assert not whole[lost].any()
    assert np.count_nonzero(whole) == 6 - (lost.stop - lost.start)
    assert not cache.features()[lost].any()


def test_must_15_a_folder_of_shards_that_is_a_link_is_not_followed(sharded):
    folder = sharded.with_name("a.h5.shards")
    folder.rename(sharded.with_name("elsewhere.shards"))
    folder.symlink_to("elsewhere.shards", target_is_directory=True)
    refused(sharded, "2 of its 2 shards")


def test_must_15_a_shard_of_other_rows_and_the_same_size_is_seen_by_its_rows(sharded):
    """To open it is not to read it."""
    shard = sharded.parent / shards(sharded)[0]["file"]
    data = np.fromfile(shard, "<f2")
    data[-4 * make_golden.WIDE :] += 1
    data.tofile(shard)
    cache = FeatureCache(sharded)
    assert cache.whole_rows(np.arange(6)).tolist() == [False, True, False, True, True, True]  # NaN + 1 is NaN
    known = EmbeddingLookup()
    known.add(EmbeddingSource.from_cache(cache, cache.outputs))
    assert [known.find_by_digest(digest.tobytes()) for digest in cache.digests[[0, 2, 4]]] == [None, None, (0, 4)]


SHARD = "0123456789abcdef01234567.h5"
BAD_SHARDS: dict[str, Edit] = {
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


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_must_15_shards_that_cannot_be_are_refused(sharded, case):
    refused(told(sharded, BAD_SHARDS[case]))


def test_must_15_features_are_not_in_shards_and_in_the_file_too(sharded):
    refused(changed(sharded, lambda hdf5: put(hdf5, "features/pooled", np.zeros((6, 8192), "<f2"))), "and in shards")


def test_must_15_the_virtual_dataset_is_not_opened_and_decides_nothing(sharded, pipe):
    """Its source is a pipe: to open that is to hang."""
    before = FeatureCache(sharded).features().copy()
    layout = h5py.VirtualLayout((6, 8192), "<f2")
    layout[:] = h5py.VirtualSource(str(pipe), "a", (6, 8192))

    def edit(hdf5: h5py.File) -> None:
        del hdf5["features/pooled"]
        hdf5.create_virtual_dataset("features/pooled", layout)

    changed(sharded, edit)
    assert read_all([sharded]) == ["opened"]
    assert np.array_equal(FeatureCache(sharded).features(), before, equal_nan=True)


# ------------------------------------------------------------------------------------ the page and the golden file
def test_the_sessions_of_the_specification_are_true(monkeypatch):
    monkeypatch.chdir(ROOT)
    sessions = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(sessions, {}, "cache/README.md", None, 0)
    said = io.StringIO()
    results = doctest.DocTestRunner().run(test, out=said.write, clear_globs=False)
    test.globs["file"].close()
    assert results.failed == 0, said.getvalue()
    assert results.attempted >= 9


def test_the_statuses_of_the_specification_are_those_of_the_code():
    text = README.split("### Status")[1].split("### Stamp")[0]
    assert re.findall(r"(\d+) `([a-z-]+)`", text) == [(str(int(status)), status.word) for status in Status]


def golden_values() -> np.ndarray:
    nan = [np.nan] * 4
    return np.array([
        [0, 0.25, 0.5, 0.75], nan, [20, 20.25, 20.5, 20.75], nan, [40, 40.25, 40.5, 40.75], [50, 50.25, 50.5, 50.75],
    ], np.float32)  # fmt: skip


@pytest.fixture(params=["1.0", "1.1", "written today"])
def golden(request, file) -> FeatureCache:
    return FeatureCache(file if request.param == "written today" else DATA / f"golden-{request.param}.h5")


def test_there_is_a_golden_file_of_each_version():
    assert {path.name for path in GOLDENS} == {path.name for path in DATA.glob("*.h5")}
    assert [FeatureCache(path).manifest["format_version"] for path in GOLDENS] == ["1.0", "1.1", "1.1"]


def test_the_sharded_golden_file_holds_what_it_held_when_it_was_made(sharded):
    for cache in (FeatureCache(SHARDED), FeatureCache(sharded)):
        assert cache.fingerprint == "7996e894fbe21e4239195e8da5312b304cb0d9f7b4d242910ad4dc991ac2681c"
        assert np.array_equal(cache.features(), np.tile(golden_values(), 2048), equal_nan=True)
        assert cache.features().dtype == np.float16
        assert cache.X.dtype == np.float32
        assert list(cache.ids) == list(make_golden.IDS)
        assert cache.labels.tolist() == ["cat", "cat", "dog", "dog", "cow", None]
        assert cache.damaged_columns() == []
        assert cache.whole_rows(np.arange(6)).all()


def test_the_golden_file_holds_what_it_held_when_it_was_made(golden):
    assert golden.file_bytes < 20_000
    assert list(golden.ids) == ["cat/1.jpg", "cat/2.jpg", "dog/é 3.jpg", "dog/4.jpg", "cow/5.jpg", "6.jpg"]
    assert golden.status.tolist() == ["ok", "damaged", "ok", "missing", "ok", "ok"]
    assert golden.bad_rows() == {"missing": 1, "damaged": 1}
    assert golden.split.tolist() == [1, 1, 3, 3, 2, 0]
    assert (golden.task, golden.classes) == ("classification", ("cat", "cow", "dog"))
    assert golden.labels.tolist() == ["cat", "cat", "dog", "dog", "cow", None]
    assert golden.y.tolist() == ["cat", "dog", "cow"]
    assert np.array_equal(golden.X, golden_values()[[0, 2, 4]])
    assert np.array_equal(golden.features("pooled"), golden_values(), equal_nan=True)
    assert np.array_equal(golden.features("layer2"), golden_values().reshape(6, 2, 2, 1), equal_nan=True)
    assert golden.digests[2].tobytes() == hashlib.sha256("dog/é 3.jpg".encode()).digest()
    assert golden.stamps[2].tobytes() == golden.digests[2].tobytes()[:16]
    assert not golden.digests[3].any()
    assert not golden.stamps[3].any()


def test_the_golden_manifest_is_what_it_was(golden):
    assert golden.fingerprint == "f3d535ec5c7617f79231f169808aa19ca05104ab4e881111df0a172124d8e6a0"
    assert (golden.manifest["samples"], golden.manifest["ok"]) == (6, 4)
    assert golden.manifest["created"] == "2026-01-01T00:00:00+00:00"
    assert golden.manifest["outputs"] == {"pooled": [4], "layer2": [2, 2, 1]}


# ---------------------------------------------------------------------------------------------- files of strangers
READ_ALL = """
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
    """What comes of reading everything of some files, in a process that may not take memory, crash or hang."""
    listed = "\n".join(map(str, paths))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ_ALL], input=listed, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    outcomes = done.stdout.split()
    assert done.returncode == 0, f"after {len(outcomes)} files: {done.stderr[-2000:]}"
    return outcomes


def copies(folder: Path, contents: Iterable[bytes]) -> list[Path]:
    """Files of these contents in a new folder, where the shards of the golden file are too."""
    shutil.copytree(f"{SHARDED}.shards", folder / f"{SHARDED.name}.shards")
    paths = []
    for number, data in enumerate(contents):
        paths.append(folder / f"{number}.h5")
        paths[-1].write_bytes(data)
    return paths


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_a_truncated_file_is_no_cache(tmp_path, path):
    data = path.read_bytes()
    lengths = [*range(10), *np.linspace(10, len(data) - 1, 50).astype(int).tolist()]
    assert set(read_all(copies(tmp_path / "cut", (data[:length] for length in lengths)))) == {"CacheFormatError"}


def flipped(data: bytes, seed: int, count: int, within: slice = slice(None)) -> list[bytes]:
    """Copies of a file with one to five bytes changed."""
    rng = np.random.default_rng(seed)
    places = np.arange(len(data))[within]
    changed = []
    for _ in range(count):
        copy = np.frombuffer(data, np.uint8).copy()
        copy[rng.choice(places, rng.integers(1, 6))] ^= rng.integers(1, 256, dtype=np.uint8)
        changed.append(copy.tobytes())
    return changed


@pytest.mark.thorough
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_flipped_bytes_are_refused_or_read_and_nothing_else(tmp_path, path):
    outcomes = read_all(copies(tmp_path / "flipped", flipped(path.read_bytes(), 0, 400)))
    assert len(outcomes) == 400
    assert set(outcomes) == {"CacheFormatError", "opened"}


def test_the_heap_of_a_virtual_dataset_may_hold_anything(tmp_path):
    """HDF5 crashes and hangs on some of these files, because the heap that names the sources has no checksum."""
    data = SHARDED.read_bytes()
    heap = data.index(b"GCOL")
    paths = copies(tmp_path / "heap", flipped(data, 1, 400, slice(heap, heap + 400)))
    assert set(read_all(paths)) == {"opened"}


@pytest.mark.thorough
@pytest.mark.parametrize("path", [GOLDEN, SHARDED], ids=lambda path: path.stem)
def test_flipped_bytes_are_refused_or_reported_or_change_nothing_that_is_read(tmp_path, path):
    before = FeatureCache(path)
    found = {"refused": 0, "reported": 0, "unchanged": 0}
    for damaged in copies(tmp_path / "flipped", flipped(path.read_bytes(), 2, 400)):
        try:
            cache = FeatureCache(damaged)
        except CacheFormatError:
            found["refused"] += 1
            continue
        whole = all(cache.whole_rows(np.arange(6), output).all() for output in cache.outputs)
        if cache.damaged_columns() or not whole:
            found["reported"] += 1
            continue
        assert cache.manifest == before.manifest
        assert cache.table().same_as(before.table())
        for output in before.outputs:
            assert np.array_equal(cache.features(output), before.features(output), equal_nan=True)
        found["unchanged"] += 1
    assert min(found.values()) > 8, found


def test_a_flipped_byte_in_the_superblock_or_in_the_manifest_is_found(file):
    data = bytearray(file.read_bytes())
    with h5py.File(file) as hdf5:
        begin, size = hdf5["manifest"].id.get_offset(), hdf5["manifest"].dtype.itemsize
    assert size > 1500
    for place in (*range(48), *range(begin, begin + size, 5)):
        data[place] ^= 0x01
        file.write_bytes(data)
        refused(file)
        data[place] ^= 0x01


@pytest.fixture
def pipe(tmp_path) -> Path:
    """A named pipe: whoever opens it for reading hangs."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_no_other_file_is_opened(tmp_path, pipe):
    """Links, external storage and virtual sources that lead to a pipe: to follow one of them is to hang."""
    layout = h5py.VirtualLayout((6,), "u1")
    layout[:] = h5py.VirtualSource(str(pipe), "a", (6,))
    open_ended = h5py.VirtualLayout((6, 4), "<f4", maxshape=(None, 4))
    open_ended[:] = h5py.VirtualSource(str(pipe), "a", (6, 4), maxshape=(None, 4))[:]
    store = [(str(pipe), 0, h5py.h5f.UNLIMITED)]

    def external(name: str) -> Edit:
        def edit(hdf5: h5py.File) -> None:
            hdf5.pop(name, None)
            hdf5[name] = h5py.ExternalLink(str(pipe), "/a")

        return edit

    def stored(name: str, shape: tuple[int, ...], dtype: str) -> Edit:
        def edit(hdf5: h5py.File) -> None:
            hdf5.pop(name, None)
            hdf5.create_dataset(name, shape, dtype, external=store)

        return edit

    def virtual(name: str, layout: h5py.VirtualLayout) -> Edit:
        def edit(hdf5: h5py.File) -> None:
            hdf5.pop(name, None)
            hdf5.create_virtual_dataset(name, layout)

        return edit

    names = ("samples", "features", "samples/status", "samples/extra", "features/pooled", "manifest", "extra")
    edits = [
        *map(external, names),
        stored("features/pooled", (6, 4), "<f4"),
        stored("samples/status", (6,), "u1"),
        stored("manifest", (), "S900"),
        virtual("samples/status", layout),
        virtual("features/pooled", open_ended),
    ]
    paths = copies(tmp_path / "hostile", [GOLDEN.read_bytes()] * len(edits))
    for path, edit in zip(paths, edits, strict=True):
        changed(path, edit)
    assert read_all(paths) == ["CacheFormatError"] * len(edits)


@pytest.mark.parametrize("spoil", [slice(16, 200), slice(24, 32)])
def test_a_damaged_heap_of_texts_cannot_make_a_reader_loop(file, spoil):
    def edit(hdf5: h5py.File) -> None:
        for name, value in (("format", "featpipe-cache"), ("format_version", "1.0")):
            del hdf5.attrs[name]
            hdf5.attrs[name] = value  # of variable length, and so in the heap

    data = bytearray(changed(file, edit).read_bytes())
    heap = data.index(b"GCOL")
    length = spoil.stop - spoil.start
    data[heap + spoil.start : heap + spoil.stop] = bytes(length) if length > 8 else b"\xf0" + b"\xff" * 7
    file.write_bytes(data)
    assert read_all([file]) == ["CacheFormatError"]


def test_what_is_not_a_file_is_not_opened(tmp_path, pipe):
    folder = tmp_path / "folder.h5"
    folder.mkdir()
    dangling = tmp_path / "dangling.h5"
    dangling.symlink_to(tmp_path / "nothing")
    assert read_all([pipe, folder, dangling]) == ["CacheError", "CacheFormatError", "CacheError"]


@pytest.mark.parametrize("data", [b"", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04" + bytes(100), bytes(4096), b"a" * 9])
def test_other_files_are_not_caches(tmp_path, data):
    path = tmp_path / "a.h5"
    path.write_bytes(data)
    refused(path)
