"""Scenarios: work that ends in a file, and the states in which a fault may leave its folder."""

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

import h5py  # noqa: F401  # imported before the forks, which are cheaper then
import numpy as np
import torch
from torch import nn

import featpipe
from featpipe import backbones, inference, maintenance
from featpipe.cache import write_cache, writer
from featpipe.errors import CacheError, CacheIncompleteError
from featpipe.extraction import worker
from featpipe.storage import staging
from tests.faults.children import SharedCounters, UnexpectedState, start_child
from tests.support.caches import SHAPES, CacheContent, has_content, make_facts
from tests.support.images import jpeg
from tests.support.networks import Tiny, tiny_transform
from tests.support.parts import FINGERPRINT, has_arrays, make_arrays

clean_module = import_module("featpipe.maintenance.clean")

__all__ = ["SCENARIOS", "CacheFile", "Command", "Extraction", "PartFile", "Scenario", "make_wide_network", "tiny"]

OLD_SECONDS = 1_000_000_000  # a time long ago, so that stamps are trusted
UNLIMITED = 10**6
ROW_BYTES = 65536  # the size of a shard is a multiple of this


class Scenario:
    """Work in a separate folder.

    Attributes
    ----------
    finds : set of str
        The states in which a fault may leave the folder; the last step of the work makes it ``new``.
    """

    allowed_states: frozenset[str]

    def prepare(self, folder: Path) -> None:
        """Create the state before the work."""

    def run(self, folder: Path, counters: SharedCounters) -> None:
        """Do the work; a repeated call resumes it."""
        raise NotImplementedError

    def get_state(self, folder: Path) -> str:
        """Determine which of ``allowed_states`` the folder is in.

        Raises
        ------
        Wrong
            If it is none of them.
        """
        raise NotImplementedError

    def check(self, folder: Path, acknowledged: int, ended: int) -> str:
        """Check the state after a fault against what was acknowledged before it."""
        state = self.get_state(folder)
        if state not in self.allowed_states or (ended and state != "new"):
            raise UnexpectedState(f"found {state}, {ended=}")
        return state

    def check_resumed(self, folder: Path, acknowledged: int, counters: SharedCounters) -> None:
        """Check the state after the work was repeated and has ended."""
        if self.get_state(folder) != "new":
            raise UnexpectedState(f"found {self.get_state(folder)} after the work was repeated")


class PartFile(Scenario):
    """Commit a second part beside a first one."""

    allowed_states = frozenset({"old", "new"})

    def _make_staging_area(self, folder: Path) -> staging.StagingArea:
        return staging.StagingArea(folder / "a.h5.parts", FINGERPRINT)

    def prepare(self, folder: Path) -> None:
        parts = self._make_staging_area(folder)
        parts.directory.mkdir()
        parts.commit(make_arrays(1))

    def run(self, folder: Path, counters: SharedCounters) -> None:
        parts = self._make_staging_area(folder)
        with parts.lock_for_writing():
            parts.commit(make_arrays(2))
            counters.add("ended", 1)

    def get_state(self, folder: Path) -> str:
        parts = self._make_staging_area(folder).load_committed()
        seeds = sorted(seed for seed in (1, 2) for part in parts if has_arrays(part, make_arrays(seed)))
        if len(parts) != len(seeds) or 1 not in seeds:
            raise UnexpectedState(f"{len(parts)} parts, of which {seeds} are correct")
        return "new" if 2 in seeds else "old"

    def check_resumed(self, folder: Path, acknowledged: int, counters: SharedCounters) -> None:
        super().check_resumed(folder, acknowledged, counters)
        temporary = [path.name for path in folder.rglob("*.tmp")]
        if temporary:
            raise UnexpectedState(f"left {temporary}")


class CacheFile(Scenario):
    """Replace a cache by another."""

    allowed_states = frozenset({"old", "new"})

    def __init__(self, home: Path) -> None:
        self.old, self.new = CacheContent(20, seed=1), CacheContent(60, seed=2)

    def prepare(self, folder: Path) -> None:
        self._write(self.old, folder / "a.h5")
        (folder / "a.h5.parts").mkdir()

    def _write(self, content: CacheContent, path: Path) -> None:
        manifest = {"facts": make_facts(content.storage)}
        write_cache(path, content.table, manifest, SHAPES, content.storage, content.gather)

    def run(self, folder: Path, counters: SharedCounters) -> None:
        writer.WRITE_BLOCK_BYTES = 1000  # several for each output
        self._write(self.new, folder / "a.h5")
        counters.add("ended", 1)

    def get_state(self, folder: Path) -> str:
        contents = {"old": self.old, "new": self.new}
        try:
            matches = [name for name, content in contents.items() if has_content(folder / "a.h5", content)]
        except CacheError as error:
            raise UnexpectedState(f"a cache that does not open: {error}") from None
        if len(matches) != 1:
            raise UnexpectedState(f"a cache that is {matches or 'neither the old nor the new one'}")
        return matches[0]


Network = tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]


def tiny() -> Network:
    """The backbone that the command loads."""
    return Tiny(), tiny_transform


def make_wide_network() -> Network:
    """A backbone whose embeddings are so wide that each row may be a shard."""
    torch.manual_seed(0)
    return nn.Sequential(Tiny(), nn.Linear(8, ROW_BYTES // 4)), tiny_transform


class Extraction(Scenario):
    """Embed images part by part into a cache.

    Parameters
    ----------
    home : Path
        Folder of the archive and of the reference results.
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
        self.allowed_states = frozenset(
            {"absent", "incomplete", "new"} | ({"old"} if after == "another cache" else set())
        )
        self.counters, self.out = SharedCounters(), "a.h5"
        module, transform = network()
        self.backbone = backbones.load(module, transform=transform)  # before the forks: it imports half of torch
        for folder in (self.archive, self.start, home / "reference", home / "counted"):
            folder.mkdir(parents=True)
        self._make_archive()
        self._run_undisturbed(home / "reference")
        self.expected, self.files = _read_content(home / "reference" / "a.h5"), _list_paths(home / "reference")
        self.prepare(home / "counted")
        self._run_undisturbed(home / "counted")
        self.n_new_images = self.counters["embedded"]  # images without an embedding at the start of the scenario

    def _make_archive(self) -> None:
        for i in range(self.images):
            self._add(f"{i:02}.jpg", jpeg(i))
        self._add("bad.jpg", b"\xff\xd8\xff, but no picture")
        self._add("twin.jpg", jpeg(3))
        if self.after == "a kill":
            self._run_undisturbed(self.start, parts=2)
        elif self.after == "another cache":
            self._run_undisturbed(self.start)
            self.before = _read_content(self.start / "a.h5")
            self._add("03.jpg", jpeg(500))  # changed, so that its twin is alone; removed; added
            (self.archive / "01.jpg").unlink()
            for i in range(4):
                self._add(f"new{i}.jpg", jpeg(600 + i))

    def _add(self, name: str, data: bytes) -> None:
        path = self.archive / name
        path.write_bytes(data)
        os.utime(path, (OLD_SECONDS + len(data), OLD_SECONDS + len(data)))

    def _run_undisturbed(self, folder: Path, parts: int = UNLIMITED) -> None:
        """Do the work without a fault, in a separate process; optionally kill it after some parts."""
        self.counters.clear()

        def work() -> None:
            if parts < UNLIMITED:
                self._kill_after(parts)
            self.run(folder, self.counters)

        result = start_child(work).wait()
        if result.code != (0 if parts == UNLIMITED else 9):
            raise RuntimeError(f"the undisturbed work ended with {result}")

    def _kill_after(self, parts: int) -> None:
        commit, parts_left = staging.StagingArea.commit, iter(range(parts))

        def commit_or_exit(self: staging.StagingArea, arrays: Mapping[str, np.ndarray]) -> staging.Part:
            if next(parts_left, None) is None:
                os._exit(9)
            return commit(self, arrays)

        staging.StagingArea.commit = commit_or_exit

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.start, folder, dirs_exist_ok=True)

    def run(self, folder: Path, counters: SharedCounters) -> None:
        count_work(counters)
        self.extract(folder / self.out)
        counters.add("ended", 1)

    def extract(self, out: Path) -> None:
        settings = {"device": "cpu", "batch": 4, "workers": 1, **self.settings}
        featpipe.extract(self.archive, backbone=self.backbone, out=out, **settings)

    def get_state(self, folder: Path) -> str:
        path = folder / self.out
        try:
            content = _read_content(path)
        except CacheIncompleteError:
            return "incomplete"
        except CacheError as error:
            if path.exists():
                raise UnexpectedState(f"a cache that does not open: {error}") from None
            return "absent"
        if content == self.expected:
            return "new"
        if self.after == "another cache" and content == self.before:
            return "old"
        raise UnexpectedState(f"a cache that differs in {[k for k, v in self.expected.items() if content.get(k) != v]}")

    def check_resumed(self, folder: Path, acknowledged: int, counters: SharedCounters) -> None:
        super().check_resumed(folder, acknowledged, counters)
        if any((folder / f"{self.out}.shards").glob("*")):
            clean_module.MIN_AGE_SECONDS = -1  # no need to wait an hour
            # removes the shards of the old cache if the kill came after the new one got its name
            maintenance.clean(folder, yes=True)
        if _list_paths(folder) != self.files:
            raise UnexpectedState(f"left {sorted(_list_paths(folder) ^ self.files)}")
        if counters["embedded"] > self.n_new_images - acknowledged:
            raise UnexpectedState(
                f"embedded {counters['embedded']} of {self.n_new_images} again, {acknowledged} had been acknowledged"
            )

    def with_other_output(self) -> Extraction:
        """Return the same work with another cache of the same folder as its output."""
        scenario = copy.copy(self)
        scenario.out, scenario.allowed_states = "b.h5", frozenset({"absent", "incomplete", "new"})
        return scenario

    def classify_damage(self, folder: Path) -> str:
        """Determine whether damage to a finished cache is refused on opening, reported, or harmless."""
        try:
            content = _read_content(folder / "a.h5")
        except CacheError:
            return "refused"
        damaged = content.pop("damaged", None)
        if content == {name: value for name, value in self.expected.items() if name != "damaged"}:
            return "harmless"
        if damaged is None or damaged == self.expected["damaged"]:
            raise UnexpectedState(
                f"was not noticed, and differs in {[k for k, v in content.items() if v != self.expected[k]]}"
            )
        return "noticed"


class Command(Extraction):
    """Do the same with the command."""

    def extract(self, out: Path) -> None:
        options = ["--backbone", f"{__name__}:tiny", "--batch", "4", "--workers", "1", "--device", "cpu"]
        options += [
            text for name, value in self.settings.items() for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        sys.argv = ["featpipe", "extract", str(self.archive), "--out", str(out), *options]
        from featpipe.cli import main

        main()


class Prediction(Scenario):
    """Embed images part by part, and write their predictions."""

    allowed_states = frozenset({"absent", "incomplete", "new"})

    def __init__(self, home: Path, images: int = 20) -> None:
        self.archive = home / "photos"
        self.archive.mkdir(parents=True)
        for i in range(images):
            path = self.archive / f"{i:02}.jpg"
            path.write_bytes(jpeg(i))
            os.utime(path, (OLD_SECONDS, OLD_SECONDS))
        self.n_new_images = images
        network = backbones.load(*tiny()[:1], transform=tiny_transform)
        lines = ["path,label", *(f"photos/{i:02}.jpg,{'ab'[i % 2]}" for i in range(images))]
        (home / "labels.csv").write_text("\n".join(lines) + "\n")
        cache = featpipe.extract(self.archive, backbone=network, out=home / "a.h5", labels=home / "labels.csv")
        trained = featpipe.train(cache, params={"C": 1.0}).save(home / "a.model")
        self.model = featpipe.load_model(trained, backbone=network, device="cpu")
        featpipe.predict(self.model, self.archive, home / "reference" / "p.csv", workers=1)
        self.expected, self.files = (home / "reference" / "p.csv").read_bytes(), _list_paths(home / "reference")

    def run(self, folder: Path, counters: SharedCounters) -> None:
        count_work(counters)
        featpipe.predict(self.model, self.archive, folder / "p.csv", workers=1)
        counters.add("ended", 1)

    def get_state(self, folder: Path) -> str:
        path = folder / "p.csv"
        if not path.exists():
            return "incomplete" if any(folder.glob("p.csv.parts/*.record")) else "absent"
        if path.read_bytes() != self.expected:
            raise UnexpectedState(f"a file of {path.stat().st_size} bytes that differs")
        return "new"

    def check_resumed(self, folder: Path, acknowledged: int, counters: SharedCounters) -> None:
        super().check_resumed(folder, acknowledged, counters)
        if _list_paths(folder) != self.files:
            raise UnexpectedState(f"left {sorted(_list_paths(folder) ^ self.files)}")
        if counters["embedded"] > self.n_new_images - acknowledged:
            raise UnexpectedState(
                f"embedded {counters['embedded']} of {self.n_new_images} again, {acknowledged} had been acknowledged"
            )


def count_work(counters: SharedCounters) -> None:
    """Count embedded and committed images in this process, and commit a part after every batch."""
    if not hasattr(worker, "MAX_PART_SECONDS"):
        raise AttributeError(
            "featpipe.extraction.worker.MAX_PART_SECONDS is gone; make parts small in another way here"
        )
    worker.MAX_PART_SECONDS = 0
    embed, commit = inference.Engine.embed, staging.StagingArea.commit

    def embed_and_count(self: inference.Engine, images: torch.Tensor) -> dict[str, np.ndarray]:
        counters.add("embedded", len(images))
        return embed(self, images)

    def commit_and_count(self: staging.StagingArea, arrays: Mapping[str, np.ndarray]) -> staging.Part:
        part = commit(self, arrays)
        counters.add("acknowledged", int(np.count_nonzero(arrays["status"] == 0)))
        return part

    inference.Engine.embed, staging.StagingArea.commit = embed_and_count, commit_and_count


def _read_content(path: Path) -> dict[str, object]:
    """Read everything in a cache except what describes the run."""
    cache = featpipe.FeatureCache(path)
    content: dict[str, object] = {f"features/{name}": cache.features(name).tobytes() for name in cache.outputs}
    content["ids"] = list(cache.ids)
    for name in ("status_codes", "digests", "stamps", "split"):
        content[name] = getattr(cache, name).tobytes()
    content["labels"] = repr(cache.labels)
    content["manifest"] = {
        name: cache.manifest[name] for name in ("facts", "fingerprint", "outputs", "task", "samples", "ok")
    }
    if cache.has_checks:
        content["damaged"] = (
            cache.damaged_columns(),
            [bool(cache.whole_rows(np.arange(len(cache)), output).all()) for output in cache.outputs],
        )
    return content


def _list_paths(folder: Path) -> frozenset[str]:
    return frozenset(str(path.relative_to(folder)) for path in folder.rglob("*"))


class WithoutSync(Extraction):
    """Control for the power cuts: does not sync its files, or its folders.

    Parameters
    ----------
    unsynced : {"files", "folders"}
    """

    def __init__(self, home: Path, unsynced: str, **options: Any) -> None:
        self.unsynced = unsynced
        super().__init__(home, **options)

    def run(self, folder: Path, counters: SharedCounters) -> None:
        sync = os.fsync

        def sync_some(descriptor: int) -> None:
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            if is_folder != (self.unsynced == "folders"):
                sync(descriptor)

        os.fsync = sync_some
        super().run(folder, counters)


class WritesInPlace(CacheFile):
    """Control for the kills: overwrites the old cache in place."""

    def run(self, folder: Path, counters: SharedCounters) -> None:
        self._write(self.new, folder.parent / f"{folder.name}.h5")
        (folder / "a.h5").write_bytes((folder.parent / f"{folder.name}.h5").read_bytes())
        counters.add("ended", 1)


SHARDED_EXTRACTION = partial(Extraction, network=make_wide_network, settings={"shard_bytes": 5 * ROW_BYTES})

SCENARIOS: dict[str, Callable[..., Scenario]] = {
    "a part": lambda home: PartFile(),
    "a cache file": CacheFile,
    "an extraction": Extraction,
    "a resumed extraction": partial(Extraction, after="a kill"),
    "an extraction that replaces a cache": partial(Extraction, after="another cache"),
    "an extraction of shards": SHARDED_EXTRACTION,
    "an extraction that replaces shards": partial(SHARDED_EXTRACTION, after="another cache"),
    "a prediction": Prediction,
    "the command": Command,
    "syncs no files": partial(WithoutSync, unsynced="files"),
    "syncs no folders": partial(WithoutSync, unsynced="folders"),
    "writes in place": WritesInPlace,
}
