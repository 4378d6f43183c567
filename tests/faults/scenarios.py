"""What is interrupted, and what must then be found: pieces of work that end in a file."""

from __future__ import annotations

import copy
import os
import shutil
import stat
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py  # noqa: F401  # imported before the forks, which then are cheap
import numpy as np
import torch
from torch import nn

import featpipe
from featpipe import backbones, inference, maintenance
from featpipe.cache import write_cache, writer
from featpipe.errors import CacheError, CacheIncompleteError
from featpipe.extraction import worker
from featpipe.storage import staging
from tests.faults.children import Tally, Wrong, start
from tests.support.caches import SHAPES, Made, facts, is_whole
from tests.support.images import jpeg
from tests.support.networks import Tiny, tiny_transform
from tests.support.parts import MINE, arrays, holds

cleaning = import_module("featpipe.maintenance.clean")

__all__ = ["SCENARIOS", "CacheFile", "Command", "Extraction", "PartFile", "Scenario", "tiny", "wide"]

OLD_SECONDS = 1_000_000_000  # files that changed long ago: their stamps are to be trusted
PLENTY = 10**6
ROW_BYTES = 65536  # shards are made of so many bytes, or a multiple


class Scenario:
    """A piece of work in a folder of its own.

    Attributes
    ----------
    finds : set of str
        The states in which the folder may be found after a fault; the last step of the work makes it ``new``.
    """

    finds: frozenset[str]

    def prepare(self, folder: Path) -> None:
        """The folder as it is before the work."""

    def act(self, folder: Path, tally: Tally) -> None:
        """The work; started again, it goes on."""
        raise NotImplementedError

    def state(self, folder: Path) -> str:
        """One of ``finds``.

        Raises
        ------
        Wrong
            If it is none of them.
        """
        raise NotImplementedError

    def check(self, folder: Path, acknowledged: int, ended: int) -> str:
        """The state after a fault, held against what was promised before it."""
        state = self.state(folder)
        if state not in self.finds or (ended and state != "new"):
            raise Wrong(f"found {state}, {ended=}")
        return state

    def check_resumed(self, folder: Path, acknowledged: int, tally: Tally) -> None:
        """After the fault the work was started again and has ended."""
        if self.state(folder) != "new":
            raise Wrong(f"found {self.state(folder)} when it was done again")


class PartFile(Scenario):
    """A second part is committed beside a first."""

    finds = frozenset({"old", "new"})

    def _parts(self, folder: Path) -> staging.StagingArea:
        return staging.StagingArea(folder / "a.h5.parts", MINE)

    def prepare(self, folder: Path) -> None:
        parts = self._parts(folder)
        parts.directory.mkdir()
        parts.commit(arrays(1))

    def act(self, folder: Path, tally: Tally) -> None:
        parts = self._parts(folder)
        with parts.lock_for_writing():
            parts.commit(arrays(2))
            tally.add("ended", 1)

    def state(self, folder: Path) -> str:
        found = self._parts(folder).load_committed()
        seeds = sorted(seed for seed in (1, 2) for part in found if holds(part, arrays(seed)))
        if len(found) != len(seeds) or 1 not in seeds:
            raise Wrong(f"{len(found)} parts, of which {seeds} are right")
        return "new" if 2 in seeds else "old"

    def check_resumed(self, folder: Path, acknowledged: int, tally: Tally) -> None:
        super().check_resumed(folder, acknowledged, tally)
        temporary = [path.name for path in folder.rglob("*.tmp")]
        if temporary:
            raise Wrong(f"left {temporary}")


class CacheFile(Scenario):
    """A cache is written over an older one."""

    finds = frozenset({"old", "new"})

    def __init__(self, home: Path) -> None:
        self.old, self.new = Made(20, seed=1), Made(60, seed=2)

    def prepare(self, folder: Path) -> None:
        self._write(self.old, folder / "a.h5")
        (folder / "a.h5.parts").mkdir()

    def _write(self, made: Made, path: Path) -> None:
        manifest = {"facts": facts(made.storage)}
        write_cache(path, made.table, manifest, SHAPES, made.storage, made.gather)

    def act(self, folder: Path, tally: Tally) -> None:
        writer.WRITE_BLOCK_BYTES = 1000  # several for each output
        self._write(self.new, folder / "a.h5")
        tally.add("ended", 1)

    def state(self, folder: Path) -> str:
        both = {"old": self.old, "new": self.new}
        try:
            found = [name for name, made in both.items() if is_whole(folder / "a.h5", made)]
        except CacheError as error:
            raise Wrong(f"a cache that does not open: {error}") from None
        if len(found) != 1:
            raise Wrong(f"a cache that is {found or 'neither the old nor the new one'}")
        return found[0]


Network = tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]


def tiny() -> Network:
    """What the command is told to embed with."""
    return Tiny(), tiny_transform


def wide() -> Network:
    """An embedding of which each row may be a shard."""
    torch.manual_seed(0)
    return nn.Sequential(Tiny(), nn.Linear(8, ROW_BYTES // 4)), tiny_transform


class Extraction(Scenario):
    """Images are embedded part by part, and made a cache.

    Parameters
    ----------
    home : Path
        Where the archive and what it is compared with are kept.
    images : int
    after : {"nothing", "a kill", "another cache"}
        What the extraction finds: an empty folder, some parts, or the finished cache of an archive that then changed.
    network : callable
    settings : mapping
        More settings of the extraction.
    """

    def __init__(
        self,
        home: Path,
        images: int = 8,
        after: str = "nothing",
        network: Callable[[], Network] = tiny,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.archive, self.images, self.after = home / "photos", images, after
        self.settings = dict(settings or {})
        self.start = home / "start"
        self.finds = frozenset({"absent", "incomplete", "new"} | ({"old"} if after == "another cache" else set()))
        self.tally, self.out = Tally(), "a.h5"
        module, transform = network()
        self.backbone = backbones.load(module, transform=transform)  # before the forks: it imports half of torch
        for folder in (self.archive, self.start, home / "reference", home / "counted"):
            folder.mkdir(parents=True)
        self._make_archive()
        self._do(home / "reference")
        self.expected, self.files = _content(home / "reference" / "a.h5"), _names(home / "reference")
        self.prepare(home / "counted")
        self._do(home / "counted")
        self.fresh = self.tally["embedded"]  # of so many images nothing is known from where the scenario starts

    def _make_archive(self) -> None:
        for i in range(self.images):
            self._add(f"{i:02}.jpg", jpeg(i))
        self._add("bad.jpg", b"\xff\xd8\xff, but no picture")
        self._add("twin.jpg", jpeg(3))
        if self.after == "a kill":
            self._do(self.start, parts=2)
        elif self.after == "another cache":
            self._do(self.start)
            self.before = _content(self.start / "a.h5")
            self._add("03.jpg", jpeg(500))  # changed, so that its twin is alone; removed; added
            (self.archive / "01.jpg").unlink()
            for i in range(4):
                self._add(f"new{i}.jpg", jpeg(600 + i))

    def _add(self, name: str, data: bytes) -> None:
        path = self.archive / name
        path.write_bytes(data)
        os.utime(path, (OLD_SECONDS + len(data), OLD_SECONDS + len(data)))

    def _do(self, folder: Path, parts: int = PLENTY) -> None:
        """Work of which nothing goes wrong, in a process of its own; killed when it has committed some parts."""
        self.tally.clear()

        def work() -> None:
            if parts < PLENTY:
                self._end_after(parts)
            self.act(folder, self.tally)

        ended = start(work).wait()
        if ended.code != (0 if parts == PLENTY else 9):
            raise RuntimeError(f"what nothing disturbs ended with {ended}")

    def _end_after(self, parts: int) -> None:
        publish, left = staging.StagingArea.commit, iter(range(parts))

        def last(self: staging.StagingArea, arrays: Mapping[str, np.ndarray]) -> staging.Part:
            if next(left, None) is None:
                os._exit(9)
            return publish(self, arrays)

        staging.StagingArea.commit = last

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.start, folder, dirs_exist_ok=True)

    def act(self, folder: Path, tally: Tally) -> None:
        watch(tally)
        self.extract(folder / self.out)
        tally.add("ended", 1)

    def extract(self, out: Path) -> None:
        given = {"device": "cpu", "batch": 4, "workers": 1, **self.settings}
        featpipe.extract(self.archive, backbone=self.backbone, out=out, **given)

    def state(self, folder: Path) -> str:
        path = folder / self.out
        try:
            content = _content(path)
        except CacheIncompleteError:
            return "incomplete"
        except CacheError as error:
            if path.exists():
                raise Wrong(f"a cache that does not open: {error}") from None
            return "absent"
        if content == self.expected:
            return "new"
        if self.after == "another cache" and content == self.before:
            return "old"
        raise Wrong(f"a cache that differs in {[k for k, v in self.expected.items() if content.get(k) != v]}")

    def check_resumed(self, folder: Path, acknowledged: int, tally: Tally) -> None:
        super().check_resumed(folder, acknowledged, tally)
        if any((folder / f"{self.out}.shards").glob("*")):
            cleaning.MIN_AGE_SECONDS = -1  # no need to wait an hour
            maintenance.clean(
                folder, yes=True
            )  # shards of a cache before, if the kill came after the new one had its name
        if _names(folder) != self.files:
            raise Wrong(f"left {sorted(_names(folder) ^ self.files)}")
        if tally["embedded"] > self.fresh - acknowledged:
            raise Wrong(f"embedded {tally['embedded']} of {self.fresh} again, {acknowledged} had been acknowledged")

    def beside(self) -> Extraction:
        """The same into another cache of the same folder."""
        other = copy.copy(self)
        other.out, other.finds = "b.h5", frozenset({"absent", "incomplete", "new"})
        return other

    def damage(self, folder: Path) -> str:
        """What becomes of a finished cache of which some bytes are not as they were written."""
        try:
            content = _content(folder / "a.h5")
        except CacheError:
            return "refused"
        damaged = content.pop("damaged", None)
        if content == {name: value for name, value in self.expected.items() if name != "damaged"}:
            return "harmless"
        if damaged is None or damaged == self.expected["damaged"]:
            raise Wrong(f"was not noticed, and differs in {[k for k, v in content.items() if v != self.expected[k]]}")
        return "noticed"


class Command(Extraction):
    """The same by the command."""

    def extract(self, out: Path) -> None:
        given = ["--backbone", f"{__name__}:tiny", "--batch", "4", "--workers", "1", "--device", "cpu"]
        more = [text for name, value in self.settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        sys.argv = ["featpipe", "extract", str(self.archive), "--out", str(out), *given, *more]
        from featpipe.cli import main

        main()


class Prediction(Scenario):
    """Images are embedded part by part, and predictions written."""

    finds = frozenset({"absent", "incomplete", "new"})

    def __init__(self, home: Path, images: int = 20) -> None:
        self.archive = home / "photos"
        self.archive.mkdir(parents=True)
        for i in range(images):
            path = self.archive / f"{i:02}.jpg"
            path.write_bytes(jpeg(i))
            os.utime(path, (OLD_SECONDS, OLD_SECONDS))
        self.fresh = images
        network = backbones.load(*tiny()[:1], transform=tiny_transform)
        lines = ["path,label", *(f"photos/{i:02}.jpg,{'ab'[i % 2]}" for i in range(images))]
        (home / "labels.csv").write_text("\n".join(lines) + "\n")
        cache = featpipe.extract(self.archive, backbone=network, out=home / "a.h5", labels=home / "labels.csv")
        trained = featpipe.train(cache, params={"C": 1.0}).save(home / "a.model")
        self.model = featpipe.load_model(trained, backbone=network, device="cpu")
        featpipe.predict(self.model, self.archive, home / "reference" / "p.csv", workers=1)
        self.expected, self.files = (home / "reference" / "p.csv").read_bytes(), _names(home / "reference")

    def act(self, folder: Path, tally: Tally) -> None:
        watch(tally)
        featpipe.predict(self.model, self.archive, folder / "p.csv", workers=1)
        tally.add("ended", 1)

    def state(self, folder: Path) -> str:
        path = folder / "p.csv"
        if not path.exists():
            return "incomplete" if any(folder.glob("p.csv.parts/*.record")) else "absent"
        if path.read_bytes() != self.expected:
            raise Wrong(f"a file of {path.stat().st_size} bytes that differs")
        return "new"

    def check_resumed(self, folder: Path, acknowledged: int, tally: Tally) -> None:
        super().check_resumed(folder, acknowledged, tally)
        if _names(folder) != self.files:
            raise Wrong(f"left {sorted(_names(folder) ^ self.files)}")
        if tally["embedded"] > self.fresh - acknowledged:
            raise Wrong(f"embedded {tally['embedded']} of {self.fresh} again, {acknowledged} had been acknowledged")


def watch(tally: Tally) -> None:
    """Count in this process what is embedded and what is acknowledged, and commit a part after every batch."""
    if not hasattr(worker, "MAX_PART_SECONDS"):
        raise AttributeError("featpipe.extraction.worker.PART_SECONDS is gone; say here how a part is made small")
    worker.MAX_PART_SECONDS = 0
    embed, publish = inference.Engine.embed, staging.StagingArea.commit

    def counted(self: inference.Engine, images: torch.Tensor) -> dict[str, np.ndarray]:
        tally.add("embedded", len(images))
        return embed(self, images)

    def acknowledged(self: staging.StagingArea, arrays: Mapping[str, np.ndarray]) -> staging.Part:
        part = publish(self, arrays)
        tally.add("acknowledged", int(np.count_nonzero(arrays["status"] == 0)))
        return part

    inference.Engine.embed, staging.StagingArea.commit = counted, acknowledged


def _content(path: Path) -> dict[str, object]:
    """All of a cache that does not tell of one run."""
    found = featpipe.FeatureCache(path)
    content: dict[str, object] = {f"features/{name}": found.features(name).tobytes() for name in found.outputs}
    content["ids"] = list(found.ids)
    for name in ("status_codes", "digests", "stamps", "split"):
        content[name] = getattr(found, name).tobytes()
    content["labels"] = repr(found.labels)
    content["manifest"] = {
        name: found.manifest[name] for name in ("facts", "fingerprint", "outputs", "task", "samples", "ok")
    }
    if getattr(found, "has_checks", False):
        content["damaged"] = (
            found.damaged_columns(),
            [bool(found.whole_rows(np.arange(len(found)), o).all()) for o in found.outputs],
        )
    return content


def _names(folder: Path) -> frozenset[str]:
    return frozenset(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Forgetful(Extraction):
    """The control of the power cuts: it does not sync its files, or its folders.

    Parameters
    ----------
    what : {"files", "folders"}
    """

    def __init__(self, home: Path, what: str, **given: Any) -> None:
        self.what = what
        super().__init__(home, **given)

    def act(self, folder: Path, tally: Tally) -> None:
        sync = os.fsync

        def forgets(descriptor: int) -> None:
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            if is_folder != (self.what == "folders"):
                sync(descriptor)

        os.fsync = forgets
        super().act(folder, tally)


class InPlace(CacheFile):
    """The control of the kills: it writes over the older cache."""

    def act(self, folder: Path, tally: Tally) -> None:
        self._write(self.new, folder.parent / f"{folder.name}.h5")
        (folder / "a.h5").write_bytes((folder.parent / f"{folder.name}.h5").read_bytes())
        tally.add("ended", 1)


SHARDED = partial(Extraction, network=wide, settings={"shard_bytes": 5 * ROW_BYTES})

SCENARIOS: dict[str, Callable[..., Scenario]] = {
    "a part": lambda home: PartFile(),
    "a cache file": CacheFile,
    "an extraction": Extraction,
    "an extraction that goes on": partial(Extraction, after="a kill"),
    "an extraction that replaces a cache": partial(Extraction, after="another cache"),
    "an extraction of shards": SHARDED,
    "an extraction that replaces shards": partial(SHARDED, after="another cache"),
    "a prediction": Prediction,
    "the command": Command,
    "syncs no files": partial(Forgetful, what="files"),
    "syncs no folders": partial(Forgetful, what="folders"),
    "writes in place": InPlace,
}
