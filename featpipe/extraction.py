"""Archive + backbone → cache. No image is embedded twice, and what was committed is never lost."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, time_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import archive
from featpipe import backbone as backbones
from featpipe.archive import Index
from featpipe.backbone import Backbone
from featpipe.cache import FeatureCache, Table, parts_directory, serves, write_cache
from featpipe.commit import Part, Parts, exclusive
from featpipe.engine import Engine, resolve_device
from featpipe.errors import ArchiveError, CacheError, CacheMismatchError, ConfigError
from featpipe.fingerprint import differences, fingerprint
from featpipe.known import Known, Source
from featpipe.loader import Batch, Loader, embedded
from featpipe.progress import Progress, Tell, quiet
from featpipe.recipe import Extraction
from featpipe.status import Status

__all__ = ["EXTRACTION_VERSION", "embed_files", "extract", "extract_index", "facts_of", "load_backbone"]

EXTRACTION_VERSION = 1  # raised by any change of this code that changes an embedding
PART_SECONDS = 7.0  # with a batch of at most three seconds in hand, a kill costs at most about ten of work
PART_BYTES = 64 * 2**20
RACY_NANOSECONDS = 2 * 10**9  # a file changed this shortly before it is read may change again under the same time


def extract(
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    progress: Tell = quiet,
    **settings: Any,
) -> FeatureCache:
    """Run the frozen backbone once over the images of some archives and cache the embeddings.

    Images whose bytes were embedded before under the same facts, in any cache of the same folder, are copied.

    Parameters
    ----------
    archives : path-like or sequence of path-like
        Folders, ``.tar``, ``.tar.gz``, ``.zip``, tables of paths; globs and ``{000..099}`` are expanded.
    progress : callable
        Told what is going on, as :class:`featpipe.progress.Progress`.
    **settings
        The fields of :class:`featpipe.recipe.Extraction`.

    Returns
    -------
    FeatureCache

    Raises
    ------
    ArchiveError
        If an archive is missing, empty, unreadable or hostile, or more images are bad than ``max_bad`` allows.
    CacheMismatchError
        If ``out`` is a cache that was made from something else.

    Examples
    --------
    >>> cache = extract("photos/", backbone="resnet18", cache="cache/")          # doctest: +SKIP
    """
    settings_ = Extraction.of(settings)
    device = resolve_device(settings_.device)  # before minutes are spent on listing an archive
    index = archive.index(archives, labels=settings_.labels)
    _tell_index(index, progress)
    return extract_index(index, load_backbone(settings_), replace(settings_, device=str(device)), progress)


def load_backbone(settings: Extraction) -> Backbone:
    """The backbone that the settings name."""
    if isinstance(settings.backbone, Backbone):
        return settings.backbone
    return backbones.load(
        settings.backbone,
        weights=None if settings.weights is None else os.fspath(settings.weights),
        outputs=tuple(settings.outputs),
        transform=settings.transform,
        seed=settings.seed,
    )


def facts_of(backbone: Backbone, settings: Extraction) -> dict[str, Any]:
    """The facts that decide the embeddings: equal facts and equal image bytes mean equal embeddings."""
    return {
        "backbone": backbone.facts(),
        "precision": settings.precision,
        "storage": settings.storage,
        "extraction": EXTRACTION_VERSION,
    }


def extract_index(
    index: Index, backbone: Backbone, settings: Extraction, progress: Tell = quiet, *, refuse_all_bad: bool = True
) -> FeatureCache:
    """The cache of an index: from what is known already, and a forward pass for the rest."""
    facts = facts_of(backbone, settings)
    path = _path(index, backbone, facts, settings)
    parts = Parts(parts_directory(path), fingerprint(facts))
    _make_folder(path.parent)
    if parts.busy():
        progress(Progress("note", f"{path}: another extraction writes this cache; waiting for it"))
    with parts.writing():
        existing = _existing(path, facts, index, settings)
        shapes = dict(backbone.shapes)
        ledger = _Ledger(index, settings.check_content)
        for cache in _caches(path.parent, facts):
            ledger.known.add(Source.of_cache(cache, shapes))
        for part in parts.committed():
            ledger.known.add(_source(part))
        ledger.resolve()
        if existing is None or not _is_cache_of(existing, ledger, shapes):
            ledger.drop_damaged()
        run = _Run(ledger, backbone, settings, parts, progress)
        run.embed()
        if existing is not None and _is_cache_of(existing, ledger, shapes):
            parts.remove()
            return existing
        table = ledger.table()
        if refuse_all_bad:
            _refuse_all_bad(table, index)
        gather = ledger.gather(shapes, settings.storage)
        write_cache(path, table, run.manifest(facts), shapes, settings.storage, gather, settings.shard_bytes)
        parts.remove()
    return FeatureCache(path)


def embed_files(
    paths: Sequence[str | os.PathLike[str]], backbone: Backbone, settings: Extraction, progress: Tell = quiet
) -> tuple[NDArray[np.floating], NDArray[np.uint8]]:
    """The embeddings of some files, in the order given, through the caches of a folder.

    What no cache of the folder holds is embedded into one more cache there.

    Returns
    -------
    features : ndarray of shape (n, d)
        NaN in the rows whose status is not 0.
    status : ndarray of shape (n,), uint8
        Codes of :class:`featpipe.status.Status`.
    """
    names, inverse = np.unique([os.path.abspath(path) for path in paths], return_inverse=True)
    facts, folder = facts_of(backbone, settings), Path(settings.cache)
    _make_folder(folder)
    with exclusive(folder / f".files-{fingerprint(facts)[:8]}.lock"):
        ledger = _Ledger(archive.index_files(names.tolist()), settings.check_content)
        shapes = dict(backbone.shapes)
        for cache in _caches(folder, facts):
            ledger.known.add(Source.of_cache(cache, shapes))
        ledger.resolve()
        ledger.drop_damaged()
        output = next(iter(shapes))
        features = ledger.gather(shapes, settings.storage)(output, 0, len(names))
        unread = ledger.unread
        if len(unread):
            rest = archive.index_files(names[unread].tolist())
            made_from = hashlib.sha256("\n".join([fingerprint(facts), *names[unread]]).encode("utf-8", "replace"))
            out = folder / f"files-{made_from.hexdigest()[:16]}.h5"
            cache = extract_index(rest, backbone, replace(settings, out=out), progress)
            features[unread], ledger.status[unread] = cache.features(output), cache.status_codes
    return features[inverse], ledger.status[inverse]


class _Ledger:
    """For each row of an index: its digest and status, and from which source its features come."""

    def __init__(self, index: Index, check_content: bool) -> None:
        n = len(index)
        self.index = index
        self.known = Known()
        self.origin = np.full(n, -1, np.int32)
        self.place = np.zeros(n, np.int64)
        self.status = index.fault.astype(np.uint8)
        self.digests = np.zeros((n, 32), np.uint8)
        self.stamps = index.stamps()
        self.stamps[index.mtime_ns > time_ns() - RACY_NANOSECONDS] = 0
        self._check_content = check_content

    def resolve(self) -> None:
        """Take what is known by stamp, without reading a byte of an image."""
        if self._check_content:
            return
        origin, place = self.known.by_stamp(self.stamps)
        for number in np.unique(origin[origin >= 0]):
            rows = np.flatnonzero(origin == number)
            self._take(rows, int(number), place[rows])

    def drop_damaged(self) -> None:
        """Forget what is to be copied and is not as it was written; it is embedded again."""
        for number in np.unique(self.origin[self.origin >= 0]):
            rows = np.flatnonzero(self.origin == number)
            damaged = rows[~self.known.sources[number].whole(self.place[rows])]
            self.origin[damaged], self.status[damaged] = -1, self.index.fault[damaged]
            self.digests[damaged] = 0

    def _take(self, rows: NDArray[np.intp], number: int, place: NDArray[np.int64]) -> None:
        source = self.known.sources[number]
        self.origin[rows], self.place[rows] = number, place
        self.status[rows] = source.status[place]
        self.digests[rows] = source.digests[place]

    @property
    def unread(self) -> NDArray[np.int64]:
        """Rows of which nothing is known yet; what the listing found faulty for good is not among them."""
        sound = np.isin(self.index.fault, [status for status in Status if status == Status.OK or status.transient])
        return np.flatnonzero((self.origin < 0) & sound)

    def settle(self) -> None:
        """Give the rows that were read and not embedded what is known of their bytes by now."""
        for row in np.flatnonzero((self.origin < 0) & self.digests.any(axis=1)):
            found = self.known.by_digest(self.digests[row].tobytes())
            if found is None:  # the image with the same bytes ran out of memory, and so would this one
                self.status[row] = self.status[row] or Status.OUT_OF_MEMORY
            else:
                self._take(np.array([row]), found[0], np.array([found[1]]))

    def table(self) -> Table:
        index = self.index
        stamps = np.where((self.origin >= 0)[:, None], self.stamps, 0).astype(np.uint8)
        return Table(index.ids, self.status, self.digests, stamps, index.split, index.labels)

    def gather(self, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Any:
        """The function that :func:`write_cache` asks for blocks of features."""

        def block(output: str, start: int, stop: int) -> NDArray[np.floating]:
            values = np.full((stop - start, *shapes[output]), np.nan, dtype)
            origin = np.where(self.status[start:stop] == Status.OK, self.origin[start:stop], -1)
            for number in np.unique(origin[origin >= 0]):
                rows = np.flatnonzero(origin == number)
                values[rows] = self.known.sources[number].features(output)[self.place[start:stop][rows]]
            return values

        return block


@dataclass
class _Part:
    """The part in hand."""

    digests: list[bytes] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    features: dict[str, list[NDArray[np.floating]]] = field(default_factory=dict)
    bytes: int = 0


class _Run:
    """One extraction: reads and embeds what is not known, and commits it part by part."""

    def __init__(self, ledger: _Ledger, backbone: Backbone, settings: Extraction, parts: Parts, progress: Tell) -> None:
        self.ledger = ledger
        self.backbone = backbone
        self.settings = settings
        self.parts = parts
        self.progress = progress
        self.seconds: dict[str, float] = dict.fromkeys(
            ("reading", "decoding", "embedding", "committing", "waiting", "total"), 0.0
        )
        self.embedded = 0
        self.batch: int | None = None
        self._claimed: set[bytes] = set()
        self._claims = threading.Lock()
        self._part = _Part()
        self._committed_at = perf_counter()

    def embed(self) -> None:
        """Read the rows of which nothing is known; embed the images whose bytes are new."""
        rows = self.ledger.unread
        n = len(self.ledger.index)
        if len(rows):
            if len(rows) < n:
                self.progress(Progress("note", f"{n - len(rows)} of {n} images are in a cache already"))
            self._embed_rows(rows)
        if not self.embedded:
            what = f"all {n} images are" if not self.ledger.status.any() else f"all that can be read of {n} images is"
            self.progress(Progress("note", f"{what} in a cache already: no forward pass"))
        self._refuse_too_many_bad()
        self._tell_bad()

    def _embed_rows(self, rows: NDArray[np.int64]) -> None:
        started = self._committed_at = perf_counter()
        device = resolve_device(self.settings.device)
        engine = Engine(self.backbone, device, self.settings.precision, self.settings.batch)
        self.batch = engine.batch
        backbones.prove_frozen(self.backbone)
        try:
            self._stream(engine, rows)
        finally:  # also when interrupted: what is finished is not lost
            self._commit()
        self.ledger.settle()
        self.seconds["total"] = perf_counter() - started

    def _stream(self, engine: Engine, rows: NDArray[np.int64]) -> None:
        workers = self.settings.workers or engine.workers
        loader = Loader(self.ledger.index, rows, self.backbone.transform, engine.batch, self._is_known)
        started, done = perf_counter(), 0
        with closing(loader), engine.running(), closing(embedded(loader, engine, workers)) as results:
            for batch, features in results:
                if batch.places and not self.embedded:
                    self._tell_engine(engine)
                self._collect(batch, features)
                done += len(batch.rows)
                self.progress(Progress("bar", "embedding" if self.embedded else "reading", done, len(rows)))
                self._refuse_too_many_bad()
        busy = sum(self.seconds[name] for name in ("reading", "decoding", "embedding"))
        self.seconds["waiting"] = max(0.0, workers * (perf_counter() - started) - busy)

    def _tell_engine(self, engine: Engine) -> None:
        batches = f"batches of {engine.batch}" if engine.batch > 1 else "one at a time"
        text = f"embedding on {engine.device} in {self.settings.precision}, {batches}"
        if self.settings.batch is None and engine.multiply_adds is None and engine.device.type == "cpu":
            text += "; how much work an image is could not be counted: --batch says how many at a time"
        self.progress(Progress("note", text))

    def _is_known(self, digest: bytes) -> bool:
        """Whether an image with these bytes is embedded already, or another worker has it in hand."""
        with self._claims:
            if digest in self._claimed:
                return True
            if self.ledger.known.by_digest(digest) is not None:
                return True
            self._claimed.add(digest)
            return False

    def _collect(self, batch: Batch, features: Mapping[str, NDArray[np.float32]]) -> None:
        ledger, part = self.ledger, self._part
        for name in ("reading", "decoding", "embedding"):
            self.seconds[name] += getattr(batch.seconds, name)
        stored = {name: value.astype(self.settings.storage) for name, value in features.items()}
        finite = np.ones(len(batch.places), bool)
        for value in stored.values():
            finite &= np.isfinite(value.reshape(len(value), -1)).all(axis=1)
        place = dict(zip(batch.places, range(len(batch.places)), strict=True))
        for at, row in enumerate(batch.rows):
            status, digest = batch.status[at], batch.digests[at]
            if at in place and not finite[place[at]]:
                status = Status.NOT_FINITE
            ledger.status[row] = status
            if digest:
                ledger.digests[row] = np.frombuffer(digest, np.uint8)
            if at in place or (digest and not status.transient and status != Status.OK):
                part.rows.append(row)
                part.digests.append(digest)
                part.status.append(int(status))
                for name, shape in self.backbone.shapes.items():
                    value = stored[name][place[at]] if status == Status.OK else _nan(shape, self.settings.storage)
                    part.features.setdefault(name, []).append(value)
                    part.bytes += value.nbytes
                self.embedded += status == Status.OK
        if part.bytes > PART_BYTES or perf_counter() - self._committed_at > PART_SECONDS:
            self._commit()

    def _commit(self) -> None:
        part, self._part = self._part, _Part()
        started = perf_counter()
        if part.rows:
            rows = np.array(part.rows)
            digests = np.frombuffer(b"".join(part.digests), np.uint8).reshape(-1, 32)
            arrays = {name: np.stack(values) for name, values in part.features.items()}
            published = self.parts.commit(
                {
                    "digest": digests,
                    "stamp": self.ledger.stamps[rows],
                    "status": np.array(part.status, np.uint8),
                    **{f"features/{name}": value for name, value in arrays.items()},
                }
            )
            number = self.ledger.known.add(_source(published))
            self.ledger._take(rows, number, np.arange(len(rows)))
            with self._claims:
                self._claimed.difference_update(part.digests)
        self._committed_at = perf_counter()
        self.seconds["committing"] += self._committed_at - started

    def _bad(self) -> Counter[str]:
        codes, counts = np.unique(self.ledger.status, return_counts=True)
        return Counter({Status(c).word: int(k) for c, k in zip(codes, counts, strict=True) if c != Status.OK})

    def _refuse_too_many_bad(self) -> None:
        limit = self.settings.bad_limit(len(self.ledger.index))
        if limit is None or np.count_nonzero(self.ledger.status) <= limit:
            return
        raise ArchiveError(
            f"{self._bad().total()} images have no features ({_reasons(self._bad())}), more than --max-bad "
            f"{self.settings.max_bad} allows; the finished work is kept: run again with a higher --max-bad to go on"
        )

    def _tell_bad(self) -> None:
        bad = self._bad()
        if bad:
            text = f"{bad.total()} of {len(self.ledger.index)} images have no features: {_reasons(bad)}"
            self.progress(Progress("warning", f"{text}; their rows stay, with the reason as status"))

    def manifest(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        index, backbone = self.ledger.index, self.backbone
        total = self.seconds["total"]
        return {
            "facts": facts,
            "backbone": backbone.request,
            "archives": _places(index),
            "archive_kinds": [source.kind for source in index.sources],
            "ignored": dict(index.ignored),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "embedded": int(self.embedded),
            "images_per_second": round(self.embedded / total, 2) if total else None,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "device": self.settings.device,
            "batch": self.batch,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in ("featpipe", "torch", "torchvision", "timm", "h5py")},
        }


def _source(part: Part) -> Source:
    return Source(part.read("digest"), part.read("stamp"), part.read("status"), partial(_part_features, part))


@lru_cache(maxsize=4)  # a few parts at a time: all of them together may be larger than memory
def _part_features(part: Part, output: str) -> NDArray[np.floating]:
    return part.read(f"features/{output}")


def _nan(shape: tuple[int, ...], dtype: str) -> NDArray[np.floating]:
    return np.full(shape, np.nan, dtype)


def _reasons(bad: Counter[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in bad.most_common())


def _tell_index(index: Index, progress: Tell) -> None:
    text = f"{len(index)} images"
    if index.labels.task in ("classification", "multilabel"):
        text += f", {len(index.labels.classes)} classes"
        unlabelled = int(np.count_nonzero(~index.labels.known))
        text += f", {unlabelled} without a label" if unlabelled else ""
    if index.ignored:
        text += "; not images: " + ", ".join(f"{count} {what}" for what, count in index.ignored.items())
    progress(Progress("note", text))


def _refuse_all_bad(table: Table, index: Index) -> None:
    if not np.any(table.status == Status.OK):
        counts = Counter(Status(int(code)).word for code in table.status)
        first = index.ids[0]
        raise ArchiveError(f"none of the {len(index)} images can be read ({_reasons(counts)}); the first is {first}")


def _path(index: Index, backbone: Backbone, facts: Mapping[str, Any], settings: Extraction) -> Path:
    if settings.out is not None:
        out = Path(settings.out)
        if out.suffix != ".h5":
            raise ConfigError(f"--out {out}: a cache is one HDF5 file; give it a name that ends in .h5")
        return out
    places = _places(index)
    table = getattr(settings.labels, "path", settings.labels)
    labels = [] if table is None else ["labels", os.path.abspath(table)]  # another table is another cache
    made_from = hashlib.sha256("\n".join([fingerprint(facts), *places, *labels]).encode("utf-8", "replace"))
    stem = Path(places[0]).name.split(".")[0] or "images"
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-") for text in (stem, backbone.name))
    return Path(settings.cache) / f"{name[:100]}-{made_from.hexdigest()[:8]}.h5"


def _places(index: Index) -> list[str]:
    """Where the archives lie, as absolute paths."""
    return [os.path.abspath(source.path) for source in index.sources]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{folder}: cannot be made ({error.strerror}); choose another --cache or --out") from None
    if not os.access(folder, os.W_OK):
        raise CacheError(f"{folder}: may not be written; choose another --cache or --out")


def _existing(path: Path, facts: Mapping[str, Any], index: Index, settings: Extraction) -> FeatureCache | None:
    """The finished cache of this name, if it was made of the same archives under the same facts."""
    if not path.exists() or settings.overwrite:
        return None
    cache = FeatureCache(path, salvage=True)
    differ = differences(cache.facts, facts)[:4]
    places = cache.manifest.get("archives")
    if not differ and places == _places(index):
        return cache
    what = "; ".join(differ) if differ else f"from {places}, asked for {_places(index)}"
    raise CacheMismatchError(f"{path}: was made otherwise ({what}); choose another --out, or pass --overwrite")


def _is_cache_of(cache: FeatureCache, ledger: _Ledger, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a cache is already what the ledger would write."""
    if cache.lost_shards or cache.outputs != tuple(shapes):
        return False
    return cache.table().same_as(ledger.table())


def _caches(folder: Path, facts: Mapping[str, Any]) -> list[FeatureCache]:
    """The caches of a folder that hold the wanted outputs under the same facts, whatever others they hold."""
    found = []
    for path in sorted(folder.glob("*.h5")):
        try:
            cache = FeatureCache(path, salvage=True)
        except CacheError:
            continue  # not ours to judge here: a file that is no cache has nothing to copy
        if serves(cache.facts, facts):
            found.append(cache)
    return found
