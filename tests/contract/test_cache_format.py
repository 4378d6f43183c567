"""The specification of the cache, ``cache/README.md``: what is written obeys it, what breaks it is refused."""

from __future__ import annotations

import copy
import doctest
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from featpipe import FeatureCache, archive
from featpipe import cache as cache_room
from featpipe.cache import ALIGNMENT_BYTES, Table, write_cache
from featpipe.errors import CacheError, CacheFormatError
from featpipe.known import Known, Source
from featpipe.labels import Labels
from featpipe.status import Status
from featpipe.strings import Strings
from tests.data import make_golden

ROOT = Path(__file__).parents[2]
README = (ROOT / "cache" / "README.md").read_text()
GOLDEN = ROOT / "tests" / "data" / "golden-1.0.h5"

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
    """The file after an edit of its manifest; the fingerprint is made to fit, unless the edit touched it."""

    def rewrite(hdf5: h5py.File) -> None:
        manifest = json.loads(hdf5["manifest"][()])
        before = copy.deepcopy(manifest)
        edit(manifest)
        if isinstance(manifest.get("facts"), dict) and manifest.get("fingerprint") == before["fingerprint"]:
            manifest["fingerprint"] = by_hand(manifest["facts"])
        put(hdf5, "manifest", np.bytes_(json.dumps(manifest)))

    return changed(path, rewrite)


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
        assert dict(hdf5.attrs) == {"format": b"featpipe-cache", "format_version": b"1.0"}
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
    cache = FeatureCache(told(changed(file, edit), lambda manifest: manifest.update(more={"a": 1})))
    assert cache.status.tolist() == ["ok", "status-77", "ok", "missing", "ok", "ok"]
    assert cache.bad_rows() == {"missing": 1, "status-77": 1}
    assert np.array_equal(cache.X, before.X)
    known = Known()
    known.add(Source.of_cache(cache))
    assert known.by_digest(cache.digests[1].tobytes()) is None


def test_must_2_what_is_written_lies_in_aligned_contiguous_pieces_of_the_file(file):
    written = datasets(file)
    assert len(written) == 10
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
        "samples/split": "|u1",
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
    monkeypatch.setattr(cache_room, "ENTRIES_MAX", 5)
    refused(file, "samples/ has 6 entries, more than 5")
    monkeypatch.setattr(cache_room, "ENTRIES_MAX", 6)
    FeatureCache(file)
    monkeypatch.setattr(cache_room, "MANIFEST_BYTES_MAX", 100)
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

    refused(told(file, edit), "names no output")


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
    table = Table(
        Strings.of(map(str, range(n))), np.zeros(n, "u1"), np.ones((n, 32), "u1"), np.zeros((n, 16), "u1"),
        np.zeros(n, "u1"), labels,
    )  # fmt: skip
    shapes = make_golden.SHAPES
    write_cache(path, table, {"facts": make_golden.FACTS}, shapes, "float32",
                lambda o, i, j: np.ones((j - i, *shapes[o]), "f4"))  # fmt: skip
    return FeatureCache(path)


def test_must_9_classes_are_in_the_stated_order(tmp_path):
    words = labelled(tmp_path / "a.h5", Labels.of_classes(["b", "é", "a", "B", "10", "9", None]))
    assert words.classes == ("10", "9", "B", "a", "b", "é")
    numbers = labelled(tmp_path / "b.h5", Labels.of_classes(["10", "9", "0", None]))
    assert numbers.classes == ("0", "9", "10")
    several = labelled(tmp_path / "c.h5", Labels.of_sets([{"b", "a"}, set(), None]))
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
    with pytest.raises(CacheError, match="not in their order"):
        labelled(tmp_path / "a.h5", Labels.of_classes(["a", "b"], classes=["b", "a"]))
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
    put(hdf5, "manifest", np.bytes_(json.dumps(manifest)))


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
    refused(changed(file, lambda hdf5: put(hdf5, "manifest", np.bytes_(text))))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "1" * 4000])
def test_must_11_facts_of_odd_values_are_read_or_refused(file, value):
    def edit(hdf5: h5py.File) -> None:
        text = hdf5["manifest"][()].replace(b'"fp32"', value.encode())
        put(hdf5, "manifest", np.bytes_(text))

    refused(changed(file, edit))


def test_must_12_rows_are_known_by_their_images_bytes_alone_and_not_when_another_attempt_may_help(file):
    cache = FeatureCache(file)
    known = Known()
    known.add(Source.of_cache(cache))
    digests = [hashlib.sha256(name.encode()).digest() for name in make_golden.IDS]
    assert [known.by_digest(d) for d in digests] == [(0, 0), (0, 1), (0, 2), None, (0, 4), (0, 5)]
    lasting = [status for status in Status if not status.transient]
    assert sorted({1, 2, 8} ^ set(map(int, Status))) == [int(status) for status in lasting]


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


@pytest.fixture(params=["golden", "written today"])
def golden(request, file) -> FeatureCache:
    return FeatureCache(GOLDEN if request.param == "golden" else file)


def test_the_golden_file_holds_what_it_held_when_it_was_made(golden):
    assert GOLDEN.stat().st_size < 20_000
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
    folder.mkdir()
    paths = []
    for number, data in enumerate(contents):
        paths.append(folder / f"{number}.h5")
        paths[-1].write_bytes(data)
    return paths


def test_a_truncated_file_is_no_cache(tmp_path):
    data = GOLDEN.read_bytes()
    lengths = [*range(10), *np.linspace(10, len(data) - 1, 50).astype(int).tolist()]
    assert set(read_all(copies(tmp_path / "cut", (data[:length] for length in lengths)))) == {"CacheFormatError"}


def test_flipped_bytes_are_refused_or_read_and_nothing_else(tmp_path):
    data, rng = np.frombuffer(GOLDEN.read_bytes(), np.uint8), np.random.default_rng(0)

    def flipped() -> bytes:
        copy = data.copy()
        copy[rng.integers(len(copy), size=rng.integers(1, 6))] ^= rng.integers(1, 256, dtype=np.uint8)
        return copy.tobytes()

    outcomes = read_all(copies(tmp_path / "flipped", [flipped() for _ in range(400)]))
    assert len(outcomes) == 400
    assert set(outcomes) == {"CacheFormatError", "opened"}


def test_a_flipped_byte_in_the_superblock_or_in_the_facts_is_found(file):
    """The arrays have no checksum: a flip in them is for ``featpipe verify`` to find."""
    data = bytearray(file.read_bytes())
    facts = range(data.index(b'"facts"'), data.index(b'"created"'), 5)
    assert len(facts) > 80
    for place in (*range(48), *facts):
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
