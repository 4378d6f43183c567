"""The staging area: a committed part survives whatever happens later; an incomplete part is ignored."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from featpipe.errors import CacheError
from featpipe.storage import Part, StagingArea, lock_file, staging
from tests.faults.disks import files_of_at_most, small_disk
from tests.support.parts import FINGERPRINT, has_arrays, make_arrays

OTHER_FINGERPRINT = "2" * 64


@pytest.fixture
def area(tmp_path) -> StagingArea:
    area = StagingArea(tmp_path / "a.h5.parts", FINGERPRINT)
    area.directory.mkdir()
    return area


def get_record_path(part: Part) -> Path:
    return part.path.with_suffix(".record")


def make_record(fields: dict[str, object]) -> bytes:
    """Make a record with a valid checksum, independently of the code under test."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({**fields, "check": hashlib.sha256(text.encode()).hexdigest()}).encode()


# ------------------------------------------------------------------------------------------------ committed parts
def test_committed_parts_are_loaded_with_all_their_arrays(area):
    committed_arrays = {
        part.path: make_arrays(seed) for seed in range(5) for part in [area.commit(make_arrays(seed, 3))]
    }
    loaded_parts = StagingArea(area.directory, FINGERPRINT).load_committed()
    assert [part.path for part in loaded_parts] == sorted(committed_arrays)
    assert all(has_arrays(part, committed_arrays[part.path]) for part in loaded_parts)


def test_a_part_and_its_record_follow_the_specification(area):
    part = area.commit(make_arrays())
    data = part.path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert part.path.name == f"{digest[:24]}.part"
    assert get_record_path(part).read_bytes() == make_record({
        "file": part.path.name, "bytes": len(data), "sha256": digest, "fingerprint": FINGERPRINT, "rows": 3,
    })  # fmt: skip
    assert sorted(path.name for path in area.directory.iterdir()) == [
        part.path.name,
        get_record_path(part).name,
    ]


def test_arrays_of_any_memory_layout_are_committed(area):
    part_arrays = make_arrays(rows=4)
    other_layouts = {name: np.asfortranarray(value) for name, value in part_arrays.items()}
    other_layouts["status"] = np.repeat(part_arrays["status"], 2)[::2]
    assert has_arrays(area.commit(other_layouts), part_arrays)


def test_committing_the_same_content_twice_gives_one_part(area):
    part, same_part = area.commit(make_arrays()), area.commit(make_arrays())
    assert part == same_part
    assert area.load_committed() == [part]
    assert len(list(area.directory.iterdir())) == 2


def test_equal_arrays_with_another_fingerprint_are_another_part(area):
    """If all images failed, the arrays are equal under every fingerprint; neither record may replace the other."""
    other_area = StagingArea(area.directory, OTHER_FINGERPRINT)
    part, other_part = area.commit(make_arrays()), other_area.commit(make_arrays())
    assert area.load_committed() == [part]
    assert other_area.load_committed() == [other_part]
    assert part.path != other_part.path


def test_committing_a_damaged_part_again_repairs_it(area):
    part = area.commit(make_arrays())
    for path in (part.path, get_record_path(part)):
        path.write_bytes(b"torn")
        assert area.load_committed() == []
        area.commit(make_arrays())
        assert [has_arrays(loaded, make_arrays()) for loaded in area.load_committed()] == [True]


def test_a_part_is_durable_before_its_record_and_the_record_before_commit_returns(area, monkeypatch):
    steps = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def describe_path(path: str | Path) -> str:
        path = Path(path)
        return "folder" if path.is_dir() else "record" if path.read_bytes()[:1] == b"{" else "part"

    def record_step(verb: str, function, describe=describe_path):
        return lambda *args: (steps.append(f"{verb} {describe(args[0])}"), function(*args))[1]

    monkeypatch.setattr(
        os, "fsync", record_step("fsync", fsync, lambda fd: describe_path(os.readlink(f"/proc/self/fd/{fd}")))
    )
    monkeypatch.setattr(os, "replace", record_step("rename", replace))
    monkeypatch.setattr(os, "link", record_step("link", link))
    area.commit(make_arrays())
    assert steps == ["fsync part", "rename part", "fsync folder", "fsync record", "link record", "fsync folder"]


def test_the_parent_of_a_new_staging_folder_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(staging, "fsync_directory", synced.append)
    with StagingArea(tmp_path / "a.h5.parts", FINGERPRINT).lock_for_writing():
        assert synced == [tmp_path]


# ----------------------------------------------------------------------------------------------- incomplete parts
def test_a_missing_or_empty_folder_has_no_parts(tmp_path, area):
    assert area.load_committed() == []
    assert StagingArea(tmp_path / "nowhere", FINGERPRINT).load_committed() == []


@pytest.mark.parametrize("kind", ["part", "record"])
def test_every_flipped_byte_is_detected(area, kind):
    part = area.commit(make_arrays())
    path = part.path if kind == "part" else get_record_path(part)
    data = bytearray(path.read_bytes())
    for offset in range(len(data)):
        data[offset] ^= 0x01
        path.write_bytes(data)
        assert area.load_committed() == [], f"byte {offset} of the {kind}"
        data[offset] ^= 0x01
    path.write_bytes(data)
    assert area.load_committed() == [part]


@pytest.mark.parametrize("kind", ["part", "record"])
def test_a_torn_or_missing_file_is_ignored_and_the_other_parts_are_loaded(area, kind):
    part, other_part = area.commit(make_arrays(1)), area.commit(make_arrays(2))
    path = part.path if kind == "part" else get_record_path(part)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert area.load_committed() == [other_part]
    path.write_bytes(data + b"\0")
    assert area.load_committed() == [other_part]
    path.unlink()
    assert area.load_committed() == [other_part]


def test_a_part_with_another_name_is_ignored(area):
    part = area.commit(make_arrays())
    for path in (part.path, get_record_path(part)):
        path.rename(path.with_name("0" * 24 + path.suffix))
    assert area.load_committed() == []


@pytest.mark.parametrize("text", [
    b"", b"{}", b"[]", b"null", b"3", b'"a"', b"\xff", b"[" * 60_000, b'{"check":' * 6000, b"{" + b" " * 70_000 + b"}",
    make_record({}), make_record({"fingerprint": FINGERPRINT}), b'{"check": NaN, "a": NaN}',
    b'{"check": "", "a": 1e999}',
])  # fmt: skip
def test_an_invalid_record_is_ignored(area, text):
    part = area.commit(make_arrays())
    (area.directory / f"{'0' * 24}.record").write_bytes(text)
    get_record_path(part).rename(area.directory / "kept")
    get_record_path(part).write_bytes(text)
    assert area.load_committed() == []
    (area.directory / "kept").replace(get_record_path(part))
    assert area.load_committed() == [part]


def plant_part(area: StagingArea, data: bytes, **changes: object) -> None:
    """Write a part of these bytes with a matching record, as an attacker could."""
    digest = hashlib.sha256(data).hexdigest()
    path = area.directory / f"{digest[:24]}.part"
    path.write_bytes(data)
    fields = {"file": path.name, "bytes": len(data), "sha256": digest, "fingerprint": FINGERPRINT, "rows": 3, **changes}
    path.with_suffix(".record").write_bytes(make_record(fields))


def test_a_planted_part_with_a_valid_record_is_loaded(area):
    """Control for the next tests: they fail only for the reason under test."""
    plant_part(area, safetensors.numpy.save(make_arrays()))
    assert [has_arrays(part, make_arrays()) for part in area.load_committed()] == [True]


INVALID_ARRAYS = {
    "digest": np.zeros((4, 32), "u1"),
    "stamp": np.zeros((3, 32), "u1"),
    "status": np.zeros(3, "i8"),
    "features/pooled": np.zeros((2, 5), "f4"),
    "features/layer2": np.zeros((3, 5), "i4"),
    "more": np.zeros(3, "f4"),
}


ALWAYS_REQUIRED = ("digest", "stamp", "status")


def make_header(nbytes: int, text: bytes) -> bytes:
    return nbytes.to_bytes(8, "little") + text


@pytest.mark.parametrize("data", [
    b"", b"not safetensors", b"\xff" * 64, make_header(2**40, b"{}"), make_header(10**5, b"[" * 10**5),
    make_header(2, b"{}"),
    *(safetensors.numpy.save({k: v for k, v in make_arrays().items() if k != name}) for name in ALWAYS_REQUIRED),
    *(safetensors.numpy.save({**make_arrays(), name: value}) for name, value in INVALID_ARRAYS.items()),
])  # fmt: skip
def test_a_planted_part_with_an_invalid_layout_is_ignored(area, data):
    plant_part(area, data)
    assert area.load_committed() == []


@pytest.mark.parametrize("changes", [
    {"rows": 2}, {"rows": "3"}, {"rows": None}, {"rows": -3}, {"rows": [3]}, {"rows": 1e300}, {"bytes": 0},
    {"bytes": None}, {"file": None}, {"file": "../../etc/passwd"}, {"sha256": None}, {"sha256": "0" * 64},
    {"fingerprint": OTHER_FINGERPRINT}, {"fingerprint": None},
])  # fmt: skip
def test_a_planted_record_that_does_not_match_its_part_is_ignored(area, changes):
    plant_part(area, safetensors.numpy.save(make_arrays()), **changes)
    assert area.load_committed() == []


@pytest.mark.parametrize("kind", ["part", "record"])
def test_links_and_pipes_in_place_of_a_file_are_not_followed(area, tmp_path, kind):
    part = area.commit(make_arrays())
    path = part.path if kind == "part" else get_record_path(part)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert area.load_committed() == []
    path.unlink()
    os.mkfifo(path)
    assert area.load_committed() == []
    path.unlink()
    path.mkdir()
    assert area.load_committed() == []


def test_reading_a_part_that_was_removed_or_changed_is_an_error_in_one_line(area):
    part = area.commit(make_arrays())
    for damage in (lambda: part.path.write_bytes(b"torn"), part.path.unlink):
        damage()
        with pytest.raises(CacheError, match="can no longer be read") as error_info:
            part.read("status")
        assert "\n" not in str(error_info.value)
    with pytest.raises(CacheError, match="features/none"):
        area.commit(make_arrays()).read("features/none")


# ----------------------------------------------------------------------------------------------------- full disks
def list_names(area: StagingArea) -> set[str]:
    return {path.name for path in area.directory.iterdir()}


@pytest.mark.parametrize("max_bytes", [0, 1, 100, 300, 600])
def test_an_interrupted_write_leaves_nothing_and_is_an_error(area, max_bytes):
    committed_part = area.commit(make_arrays(1))
    names_before = list_names(area)
    with files_of_at_most(max_bytes), pytest.raises(CacheError, match="what was committed is kept") as error_info:
        area.commit(make_arrays(2))
    assert "\n" not in str(error_info.value)
    assert str(area.directory) in str(error_info.value)
    assert list_names(area) == names_before
    assert area.load_committed() == [committed_part]
    assert has_arrays(area.commit(make_arrays(2)), make_arrays(2))


def fail_at_call(function, failing_call: int, error_number: int):
    calls = iter(range(1000))

    def call(*args):
        if next(calls) == failing_call:
            raise OSError(error_number, os.strerror(error_number))
        return function(*args)

    return call


DISK_CALLS = [("fsync", 0), ("replace", 0), ("fsync", 1), ("fsync", 2), ("link", 0), ("fsync", 3)]


@pytest.mark.parametrize(("function_name", "failing_call"), DISK_CALLS)
@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_at_any_step_leaves_no_incomplete_part(
    area, monkeypatch, function_name, failing_call, error_number
):
    committed_part = area.commit(make_arrays(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, function_name, fail_at_call(getattr(os, function_name), failing_call, error_number))
        with pytest.raises(CacheError, match=os.strerror(error_number)):
            area.commit(make_arrays(2))
    loaded_parts = area.load_committed()
    assert committed_part in loaded_parts
    assert all(has_arrays(part, make_arrays(1 if part == committed_part else 2)) for part in loaded_parts)
    assert not [name for name in list_names(area) if name.endswith(".tmp")]
    assert has_arrays(area.commit(make_arrays(2)), make_arrays(2))
    assert len(area.load_committed()) == 2


def test_parts_are_committed_on_a_file_system_without_hard_links(area, monkeypatch):
    monkeypatch.setattr(os, "link", fail_at_call(os.link, 0, errno.EPERM))
    part = area.commit(make_arrays())
    assert area.load_committed() == [part]
    assert not [name for name in list_names(area) if name.endswith(".tmp")]


def test_after_a_full_disk_committed_parts_remain_and_work_resumes_when_space_is_free(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        area, committed = StagingArea(disk / "a.h5.parts", FINGERPRINT), {}
        area.directory.mkdir()

        def fill() -> None:
            for seed in range(100):
                committed[area.commit(make_arrays(seed, 100)).path] = make_arrays(seed, 100)

        with pytest.raises(CacheError, match="No space left"):
            fill()
        assert len(committed) >= 2
        loaded_parts = area.load_committed()
        assert [part.path for part in loaded_parts] == sorted(committed)
        assert all(has_arrays(part, committed[part.path]) for part in loaded_parts)
        loaded_parts[0].path.unlink()
        assert has_arrays(area.commit(make_arrays(5000, 50)), make_arrays(5000, 50))


@pytest.mark.parametrize(
    "enter",
    [
        StagingArea.lock_for_writing,
        lambda area: contextlib.nullcontext(area.commit(make_arrays())),
    ],
)
@pytest.mark.parametrize("obstacle", ["file above", "file", "pipe", "dangling link"])
def test_a_folder_that_cannot_be_written_is_an_error_in_one_line(tmp_path, enter, obstacle):
    path = tmp_path / "a.parts"
    if obstacle == "file above":
        path.write_text("in the way")
        path = path / "a.parts"
    elif obstacle == "file":
        path.write_text("in the way")
    elif obstacle == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CacheError, match="choose another --cache"), enter(StagingArea(path, FINGERPRINT)):
        pass


# ---------------------------------------------------------------------------------------------------------- locks
HOLD_LOCK_CODE = """
import sys, time
from pathlib import Path
from featpipe.storage import StagingArea, lock_file
path = Path(sys.argv[2])
with StagingArea(path, "1" * 64).lock_for_writing() if sys.argv[1] == "parts" else lock_file(path):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def start_lock_holder(tmp_path) -> Iterator[object]:
    """Start another process that holds a lock, and wait until it has the lock."""
    processes = []

    def hold(kind: str, path: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD_LOCK_CODE, kind, str(path)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["parts", "exclusive"])
def test_a_second_writer_waits_until_the_first_ends_or_is_killed(tmp_path, start_lock_holder, kind):
    path = tmp_path / "a.h5.parts"
    holder_process, has_entered = start_lock_holder(kind, path), threading.Event()

    def enter() -> None:
        with StagingArea(path, FINGERPRINT).lock_for_writing() if kind == "parts" else lock_file(path):
            has_entered.set()

    waiting_thread = threading.Thread(target=enter, daemon=True)
    waiting_thread.start()
    assert not has_entered.wait(0.3)
    holder_process.send_signal(signal.SIGKILL)
    holder_process.wait()
    assert has_entered.wait(10)
    waiting_thread.join()


def test_is_locked_reports_whether_any_process_holds_the_lock(tmp_path, start_lock_holder):
    area = StagingArea(tmp_path / "a.h5.parts", FINGERPRINT)
    assert not area.is_locked()
    process = start_lock_holder("parts", area.directory)
    assert area.is_locked()
    process.kill()
    process.wait()
    assert not area.is_locked()
    with area.lock_for_writing():
        assert area.is_locked()
    assert not area.is_locked()


def test_the_lock_is_free_after_an_error(area):
    with pytest.raises(KeyError), area.lock_for_writing():
        raise KeyError
    with area.lock_for_writing():
        pass


RACE_CODE = """
import os, sys, time
from pathlib import Path
from featpipe.storage import StagingArea
folder, token = Path(sys.argv[1]), Path(sys.argv[2])
children = []
for number in range(4):
    children.append(os.fork())
    if not children[-1]:
        for turn in range(60):
            parts = StagingArea(folder, "1" * 64)
            parts.is_locked()
            with parts.lock_for_writing():
                os.close(os.open(token, os.O_CREAT | os.O_EXCL))
                if turn % 3:
                    time.sleep(0.0005)
                os.unlink(token)
                if turn % 2:
                    parts.remove()
        os._exit(0)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_two_writers_never_hold_the_lock_at_once(tmp_path):
    """Each writer removes the folder while the others wait for its lock."""
    process = subprocess.run(
        [sys.executable, "-c", RACE_CODE, str(tmp_path / "a.h5.parts"), str(tmp_path / "token")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (process.stdout, process.stderr) == ("[0, 0, 0, 0]\n", "")


def test_a_lock_file_that_cannot_be_created_is_an_error_in_one_line(tmp_path):
    with pytest.raises(CacheError, match="cannot be locked"), lock_file(tmp_path / "nowhere" / "lock"):
        pass


# -------------------------------------------------------------------------------------------------------- removing
def test_remove_deletes_all_parts_and_the_folder(area):
    with area.lock_for_writing():
        area.commit(make_arrays(1))
        StagingArea(area.directory, OTHER_FINGERPRINT).commit(make_arrays(1))
        (area.directory / ".123.0123456789ab.tmp").write_bytes(b"of a writer that was killed")
        area.remove()
        assert not area.directory.exists()
    assert not area.directory.exists()
    area.remove()


def test_remove_keeps_files_that_are_not_parts(area):
    foreign_names = {
        "notes.txt",
        "film.part",
        "a.record",
        ".x.tmp",
        ".123.tmp",
        f"{'0' * 23}.part",
        "lock.old",
        "A" * 24 + ".part",
    }
    for name in foreign_names:
        (area.directory / name).write_text("mine")
    (area.directory / f"{'0' * 24}.part").mkdir()
    with area.lock_for_writing():
        area.commit(make_arrays())
        area.remove()
    assert list_names(area) == foreign_names | {f"{'0' * 24}.part"}
    assert {(area.directory / name).read_text() for name in foreign_names} == {"mine"}


def test_a_new_writer_removes_only_the_temporary_files_of_killed_writers(area):
    part = area.commit(make_arrays())
    (area.directory / ".123.0123456789ab.tmp").write_bytes(b"torn")
    (area.directory / ".mine.tmp").write_bytes(b"mine")
    with area.lock_for_writing():
        assert list_names(area) == {part.path.name, get_record_path(part).name, "lock", ".mine.tmp"}
