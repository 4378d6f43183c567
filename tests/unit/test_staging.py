"""What commit() acknowledged is found, whole, whatever happens after; what is not whole is not there."""

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
from tests.support.parts import MINE, arrays, holds

OTHERS = "2" * 64


@pytest.fixture
def parts(tmp_path) -> StagingArea:
    found = StagingArea(tmp_path / "a.h5.parts", MINE)
    found.directory.mkdir()
    return found


def record_of(part: Part) -> Path:
    return part.path.with_suffix(".record")


def sealed(facts: dict[str, object]) -> bytes:
    """A record whose checksum fits, by hand."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({**facts, "check": hashlib.sha256(text.encode()).hexdigest()}).encode()


# ------------------------------------------------------------------------------------------- what is acknowledged
def test_what_was_committed_is_found_with_all_its_arrays(parts):
    given = {part.path: arrays(seed) for seed in range(5) for part in [parts.commit(arrays(seed, 3))]}
    found = StagingArea(parts.directory, MINE).load_committed()
    assert [part.path for part in found] == sorted(given)
    assert all(holds(part, given[part.path]) for part in found)


def test_a_part_and_its_record_are_what_the_specification_says(parts):
    part = parts.commit(arrays())
    data = part.path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert part.path.name == f"{digest[:24]}.part"
    assert record_of(part).read_bytes() == sealed({
        "file": part.path.name, "bytes": len(data), "sha256": digest, "fingerprint": MINE, "rows": 3,
    })  # fmt: skip
    assert sorted(path.name for path in parts.directory.iterdir()) == [part.path.name, record_of(part).name]


def test_arrays_that_lie_otherwise_in_memory_are_committed_as_they_are(parts):
    given = arrays(rows=4)
    turned = {name: np.asfortranarray(value) for name, value in given.items()}
    turned["status"] = np.repeat(given["status"], 2)[::2]
    assert holds(parts.commit(turned), given)


def test_the_same_content_twice_is_one_part(parts):
    first, second = parts.commit(arrays()), parts.commit(arrays())
    assert first == second
    assert parts.load_committed() == [first]
    assert len(list(parts.directory.iterdir())) == 2


def test_the_same_arrays_made_from_other_facts_are_another_part(parts):
    """Images that all failed are the same arrays under every fingerprint; neither record may replace the other."""
    others = StagingArea(parts.directory, OTHERS)
    mine, theirs = parts.commit(arrays()), others.commit(arrays())
    assert parts.load_committed() == [mine]
    assert others.load_committed() == [theirs]
    assert mine.path != theirs.path


def test_a_damaged_part_is_mended_by_committing_it_again(parts):
    part = parts.commit(arrays())
    for path in (part.path, record_of(part)):
        path.write_bytes(b"torn")
        assert parts.load_committed() == []
        parts.commit(arrays())
        assert [holds(found, arrays()) for found in parts.load_committed()] == [True]


def test_a_part_is_durable_before_its_record_is_there_and_the_record_before_it_is_acknowledged(parts, monkeypatch):
    steps = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def kind(path: str | Path) -> str:
        path = Path(path)
        return "folder" if path.is_dir() else "record" if path.read_bytes()[:1] == b"{" else "part"

    def saying(word: str, function, what=kind):
        return lambda *given: (steps.append(f"{word} {what(given[0])}"), function(*given))[1]

    monkeypatch.setattr(os, "fsync", saying("fsync", fsync, lambda fd: kind(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(os, "replace", saying("rename", replace))
    monkeypatch.setattr(os, "link", saying("link", link))
    parts.commit(arrays())
    assert steps == ["fsync part", "rename part", "fsync folder", "fsync record", "link record", "fsync folder"]


def test_a_new_folder_is_made_durable_with_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(staging, "fsync_directory", synced.append)
    with StagingArea(tmp_path / "a.h5.parts", MINE).lock_for_writing():
        assert synced == [tmp_path]


# ------------------------------------------------------------------------------------------------ what is not whole
def test_no_folder_and_an_empty_folder_hold_nothing(tmp_path, parts):
    assert parts.load_committed() == []
    assert StagingArea(tmp_path / "nowhere", MINE).load_committed() == []


@pytest.mark.parametrize("which", ["part", "record"])
def test_every_flipped_byte_is_found(parts, which):
    part = parts.commit(arrays())
    path = part.path if which == "part" else record_of(part)
    data = bytearray(path.read_bytes())
    for place in range(len(data)):
        data[place] ^= 0x01
        path.write_bytes(data)
        assert parts.load_committed() == [], f"byte {place} of the {which}"
        data[place] ^= 0x01
    path.write_bytes(data)
    assert parts.load_committed() == [part]


@pytest.mark.parametrize("which", ["part", "record"])
def test_a_torn_or_missing_file_is_not_there_and_the_others_are(parts, which):
    part, other = parts.commit(arrays(1)), parts.commit(arrays(2))
    path = part.path if which == "part" else record_of(part)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert parts.load_committed() == [other]
    path.write_bytes(data + b"\0")
    assert parts.load_committed() == [other]
    path.unlink()
    assert parts.load_committed() == [other]


def test_a_part_under_another_name_is_not_there(parts):
    part = parts.commit(arrays())
    for path in (part.path, record_of(part)):
        path.rename(path.with_name("0" * 24 + path.suffix))
    assert parts.load_committed() == []


@pytest.mark.parametrize("text", [
    b"", b"{}", b"[]", b"null", b"3", b'"a"', b"\xff", b"[" * 60_000, b'{"check":' * 6000, b"{" + b" " * 70_000 + b"}",
    sealed({}), sealed({"fingerprint": MINE}), b'{"check": NaN, "a": NaN}', b'{"check": "", "a": 1e999}',
])  # fmt: skip
def test_a_foreign_record_is_no_record(parts, text):
    part = parts.commit(arrays())
    (parts.directory / f"{'0' * 24}.record").write_bytes(text)
    record_of(part).rename(parts.directory / "kept")
    record_of(part).write_bytes(text)
    assert parts.load_committed() == []
    (parts.directory / "kept").replace(record_of(part))
    assert parts.load_committed() == [part]


def planted(parts: StagingArea, data: bytes, **changes: object) -> None:
    """A part of these bytes with a record that fits them, as somebody else could lay it here."""
    digest = hashlib.sha256(data).hexdigest()
    path = parts.directory / f"{digest[:24]}.part"
    path.write_bytes(data)
    facts = {"file": path.name, "bytes": len(data), "sha256": digest, "fingerprint": MINE, "rows": 3, **changes}
    path.with_suffix(".record").write_bytes(sealed(facts))


def test_a_planted_part_that_fits_is_taken_as_any_other(parts):
    """The control of the next tests: they refuse for the reason that they state."""
    planted(parts, safetensors.numpy.save(arrays()))
    assert [holds(part, arrays()) for part in parts.load_committed()] == [True]


MISFITS = {
    "digest": np.zeros((4, 32), "u1"),
    "stamp": np.zeros((3, 32), "u1"),
    "status": np.zeros(3, "i8"),
    "features/pooled": np.zeros((2, 5), "f4"),
    "features/layer2": np.zeros((3, 5), "i4"),
    "more": np.zeros(3, "f4"),
}


def header(nbytes: int, text: bytes) -> bytes:
    return nbytes.to_bytes(8, "little") + text


@pytest.mark.parametrize("data", [
    b"", b"not safetensors", b"\xff" * 64, header(2**40, b"{}"), header(10**5, b"[" * 10**5), header(2, b"{}"),
    *(safetensors.numpy.save({k: v for k, v in arrays().items() if k != name}) for name in list(MISFITS)[:3]),
    *(safetensors.numpy.save({**arrays(), name: value}) for name, value in MISFITS.items()),
])  # fmt: skip
def test_a_planted_part_that_is_laid_out_otherwise_is_not_there(parts, data):
    planted(parts, data)
    assert parts.load_committed() == []


@pytest.mark.parametrize("changes", [
    {"rows": 2}, {"rows": "3"}, {"rows": None}, {"rows": -3}, {"rows": [3]}, {"rows": 1e300}, {"bytes": 0},
    {"bytes": None}, {"file": None}, {"file": "../../etc/passwd"}, {"sha256": None}, {"sha256": "0" * 64},
    {"fingerprint": OTHERS}, {"fingerprint": None},
])  # fmt: skip
def test_a_planted_record_that_does_not_fit_its_part_is_not_there(parts, changes):
    planted(parts, safetensors.numpy.save(arrays()), **changes)
    assert parts.load_committed() == []


@pytest.mark.parametrize("which", ["part", "record"])
def test_links_and_pipes_in_place_of_a_file_are_not_followed(parts, tmp_path, which):
    part = parts.commit(arrays())
    path = part.path if which == "part" else record_of(part)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert parts.load_committed() == []
    path.unlink()
    os.mkfifo(path)
    assert parts.load_committed() == []
    path.unlink()
    path.mkdir()
    assert parts.load_committed() == []


def test_a_part_that_is_gone_or_changed_when_it_is_read_is_one_line(parts):
    part = parts.commit(arrays())
    for spoil in (lambda: part.path.write_bytes(b"torn"), part.path.unlink):
        spoil()
        with pytest.raises(CacheError, match="can no longer be read") as caught:
            part.read("status")
        assert "\n" not in str(caught.value)
    with pytest.raises(CacheError, match="features/none"):
        parts.commit(arrays()).read("features/none")


# ----------------------------------------------------------------------------------------------------- full disks
def names(parts: StagingArea) -> set[str]:
    return {path.name for path in parts.directory.iterdir()}


@pytest.mark.parametrize("nbytes", [0, 1, 100, 300, 600])
def test_a_write_that_fails_half_way_leaves_nothing_and_says_so(parts, nbytes):
    earlier = parts.commit(arrays(1))
    before = names(parts)
    with files_of_at_most(nbytes), pytest.raises(CacheError, match="what was committed is kept") as caught:
        parts.commit(arrays(2))
    assert "\n" not in str(caught.value)
    assert str(parts.directory) in str(caught.value)
    assert names(parts) == before
    assert parts.load_committed() == [earlier]
    assert holds(parts.commit(arrays(2)), arrays(2))


def failing(function, at: int, number: int):
    calls = iter(range(1000))

    def call(*given):
        if next(calls) == at:
            raise OSError(number, os.strerror(number))
        return function(*given)

    return call


STEPS = [("fsync", 0), ("replace", 0), ("fsync", 1), ("fsync", 2), ("link", 0), ("fsync", 3)]


@pytest.mark.parametrize(("call", "at"), STEPS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_fails_at_any_step_leaves_nothing_half_visible(parts, monkeypatch, call, at, number):
    earlier = parts.commit(arrays(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), at, number))
        with pytest.raises(CacheError, match=os.strerror(number)):
            parts.commit(arrays(2))
    found = parts.load_committed()
    assert earlier in found
    assert all(holds(part, arrays(1 if part == earlier else 2)) for part in found)
    assert not [name for name in names(parts) if name.endswith(".tmp")]
    assert holds(parts.commit(arrays(2)), arrays(2))
    assert len(parts.load_committed()) == 2


def test_a_file_system_without_links_still_keeps_parts(parts, monkeypatch):
    monkeypatch.setattr(os, "link", failing(os.link, 0, errno.EPERM))
    part = parts.commit(arrays())
    assert parts.load_committed() == [part]
    assert not [name for name in names(parts) if name.endswith(".tmp")]


def test_a_really_full_disk_keeps_what_was_committed_and_goes_on_when_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        parts, committed = StagingArea(disk / "a.h5.parts", MINE), {}
        parts.directory.mkdir()

        def fill() -> None:
            for seed in range(100):
                committed[parts.commit(arrays(seed, 100)).path] = arrays(seed, 100)

        with pytest.raises(CacheError, match="No space left"):
            fill()
        assert len(committed) >= 2
        found = parts.load_committed()
        assert [part.path for part in found] == sorted(committed)
        assert all(holds(part, committed[part.path]) for part in found)
        found[0].path.unlink()
        assert holds(parts.commit(arrays(5000, 50)), arrays(5000, 50))


@pytest.mark.parametrize(
    "make", [StagingArea.lock_for_writing, lambda parts: contextlib.nullcontext(parts.commit(arrays()))]
)
@pytest.mark.parametrize("obstacle", ["file above", "file", "pipe", "dangling link"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, make, obstacle):
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
    with pytest.raises(CacheError, match="choose another --cache"), make(StagingArea(path, MINE)):
        pass


# ---------------------------------------------------------------------------------------------------------- locks
HOLDING = """
import sys, time
from pathlib import Path
from featpipe.storage import StagingArea, lock_file
path = Path(sys.argv[2])
with StagingArea(path, "1" * 64).lock_for_writing() if sys.argv[1] == "parts" else lock_file(path):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[object]:
    """Starts another process that holds a lock, and waits until it does."""
    started = []

    def hold(kind: str, path: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDING, kind, str(path)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["parts", "exclusive"])
def test_a_second_writer_waits_until_the_first_is_gone_even_by_a_kill(tmp_path, holder, kind):
    path = tmp_path / "a.h5.parts"
    first, entered = holder(kind, path), threading.Event()

    def enter() -> None:
        with StagingArea(path, MINE).lock_for_writing() if kind == "parts" else lock_file(path):
            entered.set()

    second = threading.Thread(target=enter, daemon=True)
    second.start()
    assert not entered.wait(0.3)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert entered.wait(10)
    second.join()


def test_busy_tells_of_another_process_and_of_none(tmp_path, holder):
    parts = StagingArea(tmp_path / "a.h5.parts", MINE)
    assert not parts.is_locked()
    process = holder("parts", parts.directory)
    assert parts.is_locked()
    process.kill()
    process.wait()
    assert not parts.is_locked()
    with parts.lock_for_writing():
        assert parts.is_locked()
    assert not parts.is_locked()


def test_the_lock_is_free_after_an_error(parts):
    with pytest.raises(KeyError), parts.lock_for_writing():
        raise KeyError
    with parts.lock_for_writing():
        pass


RACING = """
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


def test_writers_that_come_and_go_are_never_two_at_once(tmp_path):
    """Each removes the folder under the others' feet when it is done."""
    done = subprocess.run(
        [sys.executable, "-c", RACING, str(tmp_path / "a.h5.parts"), str(tmp_path / "token")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("[0, 0, 0, 0]\n", "")


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    with pytest.raises(CacheError, match="cannot be locked"), lock_file(tmp_path / "nowhere" / "lock"):
        pass


# -------------------------------------------------------------------------------------------------------- removing
def test_remove_leaves_no_trace(parts):
    with parts.lock_for_writing():
        parts.commit(arrays(1))
        StagingArea(parts.directory, OTHERS).commit(arrays(1))
        (parts.directory / ".123.0123456789ab.tmp").write_bytes(b"of a writer that was killed")
        parts.remove()
        assert not parts.directory.exists()
    assert not parts.directory.exists()
    parts.remove()


def test_remove_leaves_the_files_of_strangers(parts):
    strange = {
        "notes.txt",
        "film.part",
        "a.record",
        ".x.tmp",
        ".123.tmp",
        f"{'0' * 23}.part",
        "lock.old",
        "A" * 24 + ".part",
    }
    for name in strange:
        (parts.directory / name).write_text("mine")
    (parts.directory / f"{'0' * 24}.part").mkdir()
    with parts.lock_for_writing():
        parts.commit(arrays())
        parts.remove()
    assert names(parts) == strange | {f"{'0' * 24}.part"}
    assert {(parts.directory / name).read_text() for name in strange} == {"mine"}


def test_a_new_writer_removes_what_killed_ones_began_and_nothing_else(parts):
    part = parts.commit(arrays())
    (parts.directory / ".123.0123456789ab.tmp").write_bytes(b"torn")
    (parts.directory / ".mine.tmp").write_bytes(b"mine")
    with parts.lock_for_writing():
        assert names(parts) == {part.path.name, record_of(part).name, "lock", ".mine.tmp"}
