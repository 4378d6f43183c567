"""Is a cache still what was written, and what the network answers? Damaged rows are named, and computed again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import archive
from featpipe.archive import Index
from featpipe.cache import FeatureCache, Table, parts_directory, write_cache
from featpipe.commit import Parts
from featpipe.errors import ArchiveError, CacheError, ConfigError, SampleError
from featpipe.fingerprint import digest
from featpipe.known import Known, Source
from featpipe.progress import Progress, Tell, quiet
from featpipe.recipe import Extraction
from featpipe.status import Status

__all__ = ["TOLERANCES", "Damage", "Verification", "repair", "verify"]

TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 0.3}
"""Largest accepted distance of an embedding computed again, relative to its length, for each precision.

Another processor, engine or version of torch sums in another order. On one machine with the same engine and batch size
the distance is 0. Half precision moved EfficientNet-Lite0's embeddings of photographs by up to 0.15, each engine's in
its own way.
"""
HALF_STORAGE = 1e-3  # on top, where float16 is stored: its rounding error is at most 2^-11 for each number
ROWS_AT_ONCE = 8192
PICTURES_AT_ONCE = 256

_MENDABLE = ("samples/status", "samples/digest", "samples/stamp", "checks/")


@dataclass(frozen=True)
class Damage:
    """One row that is not right.

    Attributes
    ----------
    row : int
    id : str
    what : str
        ``checksum`` (digest, status or features are not those that were written), or ``answer`` (the network gives
        other features for the same image).
    distance : float or None
        For an ``answer``: between the two embeddings, relative to their length.
    """

    row: int
    id: str
    what: str
    distance: float | None = None


@dataclass
class Verification:
    """What was found.

    Attributes
    ----------
    cache : str
    samples : int
    checked : bool
        Whether the file holds checksums; those of format 1.0 do not.
    columns : list of str
        Damaged datasets other than features.
    shards : list of str
        Shards that are missing or of another size.
    damaged : list of Damage
    embedded : int
        Rows whose images were embedded again.
    changed : int
        Rows that were to be, but whose images have other bytes by now, or are gone.
    farthest : float or None
        The largest distance of an embedding computed again, relative to its length.
    tolerance : float
    repaired : int
        Rows that were mended; ``damaged`` lists what is left.
    """

    cache: str
    samples: int
    checked: bool
    tolerance: float
    columns: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)
    embedded: int = 0
    changed: int = 0
    farthest: float | None = None
    repaired: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing was found."""
        return not (self.columns or self.shards or self.damaged)

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "whole": self.whole}


def verify(
    cache: str | os.PathLike[str],
    *,
    sample: int = 0,
    archives: Sequence[str | os.PathLike[str]] = (),
    backbone: Any = None,
    device: str = "auto",
    seed: int = 0,
    progress: Tell = quiet,
) -> Verification:
    """Check every digest of a cache, and embed some random rows again to compare them.

    Parameters
    ----------
    cache : path-like
    sample : int
        How many rows to embed again; as many as there are, if there are fewer.
    archives : sequence of path-like
        Where the images are now; where they were when they were embedded, if not given.
    backbone : str or Backbone, optional
        For a network of your own: its code is not run because a file names it.
    device : str
    seed : int
        Decides which rows are embedded again.
    progress : callable

    Returns
    -------
    Verification

    Raises
    ------
    CacheError
        If the file does not open as a cache.
    ArchiveError
        If rows are to be embedded again and the archives are not there.
    WeightsError
        If the backbone is not the one that made the cache.
    """
    if sample < 0:
        raise ConfigError(f"sample is {sample}; it must be at least 0")
    opened = FeatureCache(cache, salvage=True)
    found = Verification(str(opened.path), len(opened), opened.has_checks, _tolerance(opened.facts))
    found.columns = opened.damaged_columns()
    found.shards = list(opened.lost_shards)
    whole = _check(opened, progress)
    ids = opened.ids
    found.damaged = [Damage(int(row), ids[int(row)], "checksum") for row in np.flatnonzero(~whole)]
    rows = np.flatnonzero(whole & opened.ok)
    if sample and len(rows):
        chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:sample])
        index = _index(opened, archives)
        _compare(opened, chosen, index, _backbone(opened, backbone), device, found, progress)
    return found


def repair(
    cache: str | os.PathLike[str],
    found: Verification,
    *,
    archives: Sequence[str | os.PathLike[str]] = (),
    backbone: Any = None,
    device: str = "auto",
    progress: Tell = quiet,
) -> Verification:
    """Compute the damaged rows of a cache again, and no others.

    They are embedded again, and not copied from another cache. A row whose image is gone, or has other bytes by now,
    loses its features and gets the status that says so. Interrupted, it goes on where it was.

    Parameters
    ----------
    cache : path-like
    found : Verification
        What :func:`verify` found.
    archives, backbone, device, progress
        As for :func:`verify`.

    Returns
    -------
    Verification
        Of the mended cache.

    Raises
    ------
    CacheError
        If ids, labels or splits are damaged: they are in the archive and not in the cache.
    """
    opened = FeatureCache(cache, salvage=True)
    lost = [name for name in found.columns if not name.startswith(_MENDABLE)]
    if lost:
        raise CacheError(
            f"{opened.path}: {', '.join(lost)} cannot be mended from the images; run the same extract command again: "
            "it lists the archive anew and copies the rows that are whole"
        )
    if found.whole:
        return found
    parts = Parts(parts_directory(opened.path), opened.fingerprint)
    with parts.writing():
        if FeatureCache(cache, salvage=True).manifest != opened.manifest:
            raise CacheError(f"{opened.path}: was written anew meanwhile; verify it again")
        rows = np.array(sorted({damage.row for damage in found.damaged}), np.int64)
        index = _index(opened, archives)
        place = _rows_in(index, opened, rows)
        there = index.take(place[place >= 0])
        again = _extracted(opened, there, _backbone(opened, backbone), device, parts, progress) if len(there) else None
        mended = _mend(opened, found, rows, place >= 0, again)
        parts.remove()
    after = verify(cache, progress=progress)
    after.embedded, after.changed, after.farthest = found.embedded, found.changed, found.farthest
    after.repaired = mended
    return after


def _tolerance(facts: Mapping[str, Any]) -> float:
    half = HALF_STORAGE if facts["storage"] == "float16" else 0.0
    return TOLERANCES.get(facts["precision"], max(TOLERANCES.values())) + half


def _check(cache: FeatureCache, progress: Tell) -> NDArray[np.bool_]:
    """Which rows are as they were written, in all outputs, shape (n,)."""
    n = len(cache)
    whole = np.ones(n, bool)
    for start in range(0, n, ROWS_AT_ONCE):
        rows = np.arange(start, min(n, start + ROWS_AT_ONCE))
        for output in cache.outputs:
            whole[rows] &= cache.whole_rows(rows, output)
        progress(Progress("bar", "checking", int(rows[-1]) + 1, n))
    return whole


def _index(cache: FeatureCache, archives: Sequence[str | os.PathLike[str]]) -> Index:
    """The images of a cache, where they are now, in the cache's own order; those that are gone as missing."""
    places = [os.fspath(place) for place in archives] or list(cache.manifest.get("archives", ()))
    kinds = cache.manifest.get("archive_kinds", ())
    if not places:
        raise ArchiveError(f"{cache.path}: does not say where its images are; give their archives with --archive")
    if not archives and set(kinds) == {"files"} and all(os.path.isdir(place) for place in places):
        found = archive.index_files([os.path.join(places[0], name) for name in cache.ids])
        return replace(found, ids=cache.ids)
    return archive.index(places)


def _rows_in(index: Index, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in the index some rows of the cache are, by where they were read or by their ids; -1 where they are not."""
    if len(index) == len(cache) and index.ids == cache.ids:
        return rows
    known = Known()
    nothing = np.zeros((len(index), 32), np.uint8)
    known.add(Source(nothing, index.stamps(), np.zeros(len(index), np.uint8), cache.features))
    source, place = known.by_stamp(cache.stamps[rows])
    found = np.where(source >= 0, place, -1)
    wanted = {cache.ids[int(rows[at])]: at for at in np.flatnonzero(found < 0)}
    for row, name in enumerate(index.ids) if wanted else ():
        if name in wanted:
            found[wanted[name]] = row
    return found


def _backbone(cache: FeatureCache, given: Any) -> Any:
    """The backbone that made a cache."""
    from featpipe import backbone as backbones

    request = cache.manifest.get("backbone", {})
    if "augmentation" in cache.facts["backbone"].get("transform", {}):
        raise ConfigError(
            f"{cache.path}: is of pictures that were changed at random, for fine-tuning, and only its checksums can be "
            "verified; leave --sample and --repair out, or remove it: fine-tuning computes it again"
        )
    return backbones.load_again(given, request, cache.facts["backbone"], where=str(cache.path))


def _compare(
    cache: FeatureCache,
    rows: NDArray[np.int64],
    index: Index,
    backbone: Any,
    device: str,
    found: Verification,
    progress: Tell,
) -> None:
    """Embed some rows again; what is far from the cached row is damage."""
    from featpipe.engine import Engine, resolve_device
    from featpipe.loader import Pictures, embed_pictures

    engine = Engine(backbone, resolve_device(device), cache.facts["precision"])
    for start in range(0, len(rows), PICTURES_AT_ONCE):
        some = rows[start : start + PICTURES_AT_ONCE]
        pictures = _same_images(cache, some, index)
        found.changed += len(some) - len(pictures)
        found.embedded += len(pictures)
        some, distance = np.array(list(pictures), np.int64), np.zeros(len(pictures))
        for output in cache.outputs if pictures else ():
            again, _ = embed_pictures(Pictures(list(pictures.values())), engine, output)
            distance = np.maximum(distance, _distance(cache.features(output)[some], again))
        for row, far in zip(some.tolist(), distance.tolist(), strict=True):
            found.farthest = max(found.farthest or 0.0, far)
            if not far <= found.tolerance:
                found.damaged.append(Damage(row, cache.ids[row], "answer", far))
        progress(Progress("bar", "embedding again", min(len(rows), start + PICTURES_AT_ONCE), len(rows)))


def _same_images(cache: FeatureCache, rows: NDArray[np.int64], index: Index) -> dict[int, bytes]:
    """The bytes of the images of some rows, of those that still are what was embedded."""
    found = {}
    with index.open() as reader:
        for row, place in zip(rows.tolist(), _rows_in(index, cache, rows).tolist(), strict=True):
            try:
                data = reader.read(place) if place >= 0 else b""
            except SampleError:
                continue
            if digest(data) == cache.digests[row].tobytes():
                found[row] = data
    return found


def _distance(one: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.float64]:
    """How far apart two embeddings of each row are, relative to their length; infinite where one has none."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (one, other))
    length = np.maximum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    with np.errstate(invalid="ignore"):
        far = np.linalg.norm(a - b, axis=1) / np.where(length > 0, length, 1)
    return np.where(np.isfinite(far), far, np.inf)


def _extracted(
    cache: FeatureCache, index: Index, backbone: Any, device: str, parts: Parts, progress: Tell
) -> FeatureCache:
    """Some images as a cache of their own, which a repair that is interrupted finds again.

    It lies where there is no other cache, because one may hold the same wrong answer to be copied.
    """
    from featpipe.extraction import extract_index

    settings = Extraction(
        precision=cache.facts["precision"],
        storage=cache.facts["storage"],
        device=device,
        out=parts.repairs / "rows.h5",
        overwrite=True,
    )
    return extract_index(index, backbone, settings, progress, refuse_all_bad=False)


def _mend(
    cache: FeatureCache,
    found: Verification,
    rows: NDArray[np.int64],
    there: NDArray[np.bool_],
    again: FeatureCache | None,
) -> int:
    """Write the cache anew with some rows computed again; how many of them have features now.

    Parameters
    ----------
    rows : ndarray of shape (m,), int64
        Those that are damaged.
    there : ndarray of shape (m,), bool
        Whose images are still in the archive.
    again : FeatureCache, optional
        The rows that are there, in their order.
    """
    table = _renewed(cache.table(), found, rows, there, again)
    source = np.full(len(cache), -1, np.int64)
    source[rows[there]] = np.arange(np.count_nonzero(there))

    def gather(output: str, start: int, stop: int) -> NDArray[np.floating]:
        block = np.array(cache.features(output)[start:stop])
        new = np.flatnonzero(source[start:stop] >= 0)
        if len(new) and again is not None:
            block[new] = again.features(output)[source[start:stop][new]]
        block[table.status[start:stop] != Status.OK] = np.nan
        return block

    manifest = {key: value for key, value in cache.manifest.items() if key not in ("columns", "shards")}
    repaired = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "rows": len(rows)}
    manifest["repaired"] = [*manifest.get("repaired", []), repaired]
    write_cache(cache.path, table, manifest, cache.shapes, cache.facts["storage"], gather, cache.shard_bytes)
    return int(np.count_nonzero(table.status[rows] == Status.OK))


def _renewed(
    table: Table, found: Verification, rows: NDArray[np.int64], there: NDArray[np.bool_], again: FeatureCache | None
) -> Table:
    """The table with what is known of some rows by now."""
    status, digests, stamps = np.array(table.status), np.array(table.digests), np.array(table.stamps)
    if "samples/stamp" in found.columns:
        stamps[:] = 0
    status[rows[~there]] = Status.MISSING
    taken = rows[there]
    if again is not None:
        status[taken], stamps[taken] = again.status_codes, again.stamps
        if "samples/digest" not in found.columns:
            other = (again.digests != digests[taken]).any(axis=1) & (again.status_codes == Status.OK)
            status[taken[other]] = Status.MISSING  # another image has its name by now
        digests[taken] = again.digests
    stamps[rows[status[rows] != Status.OK]] = 0
    digests[rows[status[rows] == Status.MISSING]] = 0
    return replace(table, status=status, digests=digests, stamps=stamps)
