"""Verify a cache against its checksums and against recomputed embeddings, and repair damaged rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import data
from featpipe.cache import EmbeddingLookup, EmbeddingSource, FeatureCache, SampleTable, parts_directory, write_cache
from featpipe.config import ExtractionConfig
from featpipe.data import Index
from featpipe.errors import ArchiveError, CacheError, ConfigError, SampleError
from featpipe.runtime import Progress, ProgressCallback, ignore_progress
from featpipe.status import Status
from featpipe.storage import StagingArea, digest

TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 0.3}
"""Largest accepted distance of an embedding computed again, relative to its length, for each precision.

Another processor, engine or version of torch sums in another order. On one machine with the same engine and batch size
the distance is 0. Half precision moved EfficientNet-Lite0's embeddings of photographs by up to 0.15, each engine's in
its own way.
"""
FLOAT16_STORAGE_TOLERANCE = 1e-3  # added for float16 storage, whose relative rounding error is at most 2^-11
VERIFY_BLOCK_ROWS = 8192
EMBED_BLOCK_IMAGES = 256

_REPAIRABLE_COLUMNS = ("samples/status", "samples/digest", "samples/stamp", "checks/")


@dataclass(frozen=True)
class DamagedRow:
    """A damaged row.

    Attributes
    ----------
    row : int
    id : str
    what : str
        ``checksum``: digest, status or features do not match the checksum. ``answer``: the backbone computes a
        different embedding for the same image.
    distance : float or None
        For ``answer``: distance between the two embeddings, relative to their norm.
    """

    row: int
    id: str
    what: str
    distance: float | None = None


@dataclass
class Verification:
    """The result of a verification.

    Attributes
    ----------
    cache : str
    samples : int
    checked : bool
        Whether the file holds checksums; files of format 1.0 do not.
    columns : list of str
        Damaged datasets other than features.
    shards : list of str
        Shards that are missing or have the wrong size.
    damaged : list of DamagedRow
    embedded : int
        Number of rows whose images were embedded again.
    changed : int
        Number of sampled rows whose images have changed or are gone, and so were not embedded again.
    farthest : float or None
        The largest distance between a cached and a recomputed embedding, relative to their norm.
    tolerance : float
        The largest accepted relative distance.
    repaired : int
        Number of repaired rows; ``damaged`` lists the remaining ones.
    """

    cache: str
    samples: int
    checked: bool
    tolerance: float
    columns: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    damaged: list[DamagedRow] = field(default_factory=list)
    embedded: int = 0
    changed: int = 0
    farthest: float | None = None
    repaired: int = 0

    @property
    def whole(self) -> bool:
        """Whether no damage was found."""
        return not (self.columns or self.shards or self.damaged)

    def facts(self) -> dict[str, Any]:
        """The attributes and :attr:`whole` as a JSON-serializable dict."""
        return {**asdict(self), "whole": self.whole}


def verify(
    cache: str | os.PathLike[str],
    *,
    sample: int = 0,
    archives: Sequence[str | os.PathLike[str]] = (),
    backbone: Any = None,
    device: str = "auto",
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
) -> Verification:
    """Verify every checksum of a cache. Optionally embed a random sample of rows again and compare them.

    Parameters
    ----------
    cache : path-like
    sample : int
        Number of rows to embed again, at most all rows.
    archives : sequence of path-like
        Present locations of the images. By default the locations from which they were embedded.
    backbone : str or Backbone, optional
        Required for a custom backbone, because the code that a file names is not run.
    device : str
    seed : int
        Seed of the random sample.
    progress : callable

    Returns
    -------
    Verification

    Raises
    ------
    CacheError
        If the file does not open as a cache.
    ArchiveError
        If rows are to be embedded again and the archives do not exist.
    WeightsError
        If the backbone is not the one that made the cache.
    """
    if sample < 0:
        raise ConfigError(f"sample is {sample}; it must be at least 0")
    feature_cache = FeatureCache(cache, salvage=True)
    facts = feature_cache.facts
    tolerance = TOLERANCES.get(facts["precision"], max(TOLERANCES.values()))
    tolerance += FLOAT16_STORAGE_TOLERANCE if facts["storage"] == "float16" else 0.0
    verification = Verification(str(feature_cache.path), len(feature_cache), feature_cache.has_checks, tolerance)
    verification.columns = feature_cache.damaged_columns()
    verification.shards = list(feature_cache.lost_shards)
    is_intact = _find_intact_rows(feature_cache, progress)
    ids = feature_cache.ids
    verification.damaged = [DamagedRow(int(row), ids[int(row)], "checksum") for row in np.flatnonzero(~is_intact)]
    rows = np.flatnonzero(is_intact & feature_cache.ok)
    if sample and len(rows):
        sampled_rows = np.sort(np.random.default_rng(seed).permutation(rows)[:sample])
        index = _index_archives(feature_cache, archives)
        _compare_embeddings(
            feature_cache, sampled_rows, index, _load_backbone(feature_cache, backbone), device, verification, progress
        )
    return verification


def repair(
    cache: str | os.PathLike[str],
    verification: Verification | None = None,
    *,
    archives: Sequence[str | os.PathLike[str]] = (),
    backbone: Any = None,
    device: str = "auto",
    progress: ProgressCallback = ignore_progress,
    found: Verification | None = None,
) -> Verification:
    """Recompute the damaged rows of a cache, and no others.

    The rows are embedded again, not copied from another cache. A row whose image has changed or is gone loses its
    features and gets the matching status. An interrupted repair resumes.

    Parameters
    ----------
    cache : path-like
    verification : Verification
        The result of :func:`verify`.
    archives, backbone, device, progress
        See :func:`verify`.
    found : Verification, optional
        The former name of ``verification``.

    Returns
    -------
    Verification
        Of the repaired cache.

    Raises
    ------
    ConfigError
        If no verification is given.
    CacheError
        If ids, labels or splits are damaged: they cannot be recomputed from the images.
    """
    verification = found if verification is None else verification
    if verification is None:
        raise ConfigError("repair needs a verification; pass the result of featpipe.verify")
    feature_cache = FeatureCache(cache, salvage=True)
    unrepairable = [name for name in verification.columns if not name.startswith(_REPAIRABLE_COLUMNS)]
    if unrepairable:
        raise CacheError(
            f"{feature_cache.path}: {', '.join(unrepairable)} cannot be repaired from the images; "
            "run the same extract command again: it lists the archive again and copies the intact rows"
        )
    if verification.whole:
        return verification
    staging_area = StagingArea(parts_directory(feature_cache.path), feature_cache.fingerprint)
    with staging_area.lock_for_writing():
        if FeatureCache(cache, salvage=True).manifest != feature_cache.manifest:
            raise CacheError(f"{feature_cache.path}: changed during the verification; verify it again")
        damaged_rows = np.array(sorted({damaged_row.row for damaged_row in verification.damaged}), np.int64)
        index = _index_archives(feature_cache, archives)
        index_rows = _match_index_rows(index, feature_cache, damaged_rows)
        available_index = index.take(index_rows[index_rows >= 0])
        recomputed = (
            _extract_rows(
                feature_cache, available_index, _load_backbone(feature_cache, backbone), device, staging_area, progress
            )
            if len(available_index)
            else None
        )
        n_repaired = _write_repaired(feature_cache, verification, damaged_rows, index_rows >= 0, recomputed)
        staging_area.remove()
    repaired = verify(cache, progress=progress)
    repaired.embedded, repaired.changed = verification.embedded, verification.changed
    repaired.farthest, repaired.repaired = verification.farthest, n_repaired
    return repaired


def _find_intact_rows(cache: FeatureCache, progress: ProgressCallback) -> NDArray[np.bool_]:
    """Find which rows match their checksums in all outputs, shape (n,)."""
    n = len(cache)
    is_intact = np.ones(n, bool)
    for start in range(0, n, VERIFY_BLOCK_ROWS):
        rows = np.arange(start, min(n, start + VERIFY_BLOCK_ROWS))
        for output in cache.outputs:
            is_intact[rows] &= cache.whole_rows(rows, output)
        progress(Progress("checking", int(rows[-1]) + 1, n))
    return is_intact


def _index_archives(cache: FeatureCache, archives: Sequence[str | os.PathLike[str]]) -> Index:
    """Index the images of a cache at their present locations.

    Without new archives, single files keep the order of the cache, and files that are gone are indexed as missing.
    """
    archive_paths = [os.fspath(archive_path) for archive_path in archives] or list(cache.manifest.get("archives", ()))
    archive_kinds = cache.manifest.get("archive_kinds", ())
    if not archive_paths:
        raise ArchiveError(f"{cache.path}: does not record its archives; pass them with --archive")
    if not archives and set(archive_kinds) == {"files"} and all(map(os.path.isdir, archive_paths)):
        paths = [os.path.join(archive_paths[0], name) for name in cache.ids]
        return replace(data.index_files(paths, modality=cache.modality), ids=cache.ids)
    return data.index(archive_paths, modality=cache.modality)


def _match_index_rows(index: Index, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Find the index positions of cache rows, by stamp or else by id; -1 for rows that are not in the index."""
    if len(index) == len(cache) and index.ids == cache.ids:
        return rows
    lookup = EmbeddingLookup()
    no_digests = np.zeros((len(index), 32), np.uint8)
    lookup.add(EmbeddingSource(no_digests, index.compute_stamps(), np.zeros(len(index), np.uint8), cache.features))
    source_indices, source_rows = lookup.find_by_stamp(cache.stamps[rows])
    index_rows = np.where(source_indices >= 0, source_rows, -1)
    missing_ids = {cache.ids[int(rows[position])]: position for position in np.flatnonzero(index_rows < 0)}
    for row, name in enumerate(index.ids) if missing_ids else ():
        if name in missing_ids:
            index_rows[missing_ids[name]] = row
    return index_rows


def _load_backbone(cache: FeatureCache, custom_backbone: Any) -> Any:
    from featpipe import backbones

    backbone_spec = cache.manifest.get("backbone", {})
    if "augmentation" in cache.facts["backbone"].get("transform", {}):
        raise ConfigError(
            f"{cache.path}: contains feature maps of randomly augmented images; only its checksums can be verified: "
            "omit --sample and --repair, or remove the file, which fine-tuning computes again"
        )
    return backbones.reload_backbone(custom_backbone, backbone_spec, cache.facts["backbone"], context=str(cache.path))


def _compare_embeddings(
    cache: FeatureCache,
    rows: NDArray[np.int64],
    index: Index,
    backbone: Any,
    device: str,
    verification: Verification,
    progress: ProgressCallback,
) -> None:
    """Embed rows again, and record those as damaged that differ from the cache by more than the tolerance."""
    from featpipe.inference import Engine, SampleList, embed_sample_list, resolve_device

    engine = Engine(backbone, resolve_device(device), cache.facts["precision"])
    for start in range(0, len(rows), EMBED_BLOCK_IMAGES):
        block_rows = rows[start : start + EMBED_BLOCK_IMAGES]
        image_bytes = _read_unchanged_images(cache, block_rows, index)
        verification.changed += len(block_rows) - len(image_bytes)
        verification.embedded += len(image_bytes)
        block_rows, distances = np.array(list(image_bytes), np.int64), np.zeros(len(image_bytes))
        for output in cache.outputs if image_bytes else ():
            recomputed, _ = embed_sample_list(SampleList(list(image_bytes.values()), cache.modality), engine, output)
            distances = np.maximum(
                distances, _compute_relative_distance(cache.features(output)[block_rows], recomputed)
            )
        for row, row_distance in zip(block_rows.tolist(), distances.tolist(), strict=True):
            verification.farthest = max(verification.farthest or 0.0, row_distance)
            if not row_distance <= verification.tolerance:
                verification.damaged.append(DamagedRow(row, cache.ids[row], "answer", row_distance))
        progress(Progress("embedding again", min(len(rows), start + EMBED_BLOCK_IMAGES), len(rows)))


def _read_unchanged_images(cache: FeatureCache, rows: NDArray[np.int64], index: Index) -> dict[int, bytes]:
    """Read the images of rows; skip images whose bytes have changed since they were embedded."""
    image_bytes = {}
    with index.open() as reader:
        for row, index_row in zip(rows.tolist(), _match_index_rows(index, cache, rows).tolist(), strict=True):
            try:
                data = reader.read(index_row) if index_row >= 0 else b""
            except SampleError:
                continue
            if digest(data) == cache.digests[row].tobytes():
                image_bytes[row] = data
    return image_bytes


def _compute_relative_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute the distance of two embeddings for each row, relative to the larger norm; infinite if one is NaN."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (first, second))
    norms = np.maximum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    with np.errstate(invalid="ignore"):
        distances = np.linalg.norm(a - b, axis=1) / np.where(norms > 0, norms, 1)
    return np.where(np.isfinite(distances), distances, np.inf)


def _extract_rows(
    cache: FeatureCache, index: Index, backbone: Any, device: str, staging_area: StagingArea, progress: ProgressCallback
) -> FeatureCache:
    """Extract images into a separate cache, which an interrupted repair reuses.

    Its folder holds no other cache, because the extraction could copy the same wrong embedding from it.
    """
    from featpipe.extraction import extract_index

    config = ExtractionConfig(
        precision=cache.facts["precision"],
        storage=cache.facts["storage"],
        device=device,
        out=staging_area.repair_folder / "rows.h5",
        overwrite=True,
    )
    return extract_index(index, backbone, config, progress, require_readable=False)


def _write_repaired(
    cache: FeatureCache,
    verification: Verification,
    rows: NDArray[np.int64],
    is_available: NDArray[np.bool_],
    recomputed: FeatureCache | None,
) -> int:
    """Rewrite the cache with recomputed rows. Return how many of ``rows`` have features now.

    Parameters
    ----------
    cache : FeatureCache
    verification : Verification
    rows : ndarray of shape (m,), int64
        The damaged rows.
    is_available : ndarray of shape (m,), bool
        Whether the image of each damaged row is still in the archive.
    recomputed : FeatureCache, optional
        The recomputed rows, one for each available image, in the order of ``rows``.
    """
    repaired_table = _repair_table(cache.table(), verification, rows, is_available, recomputed)
    recomputed_row = np.full(len(cache), -1, np.int64)
    recomputed_row[rows[is_available]] = np.arange(np.count_nonzero(is_available))

    def gather(output: str, start: int, stop: int) -> NDArray[np.floating]:
        block = np.array(cache.features(output)[start:stop])
        replaced = np.flatnonzero(recomputed_row[start:stop] >= 0)
        if len(replaced) and recomputed is not None:
            block[replaced] = recomputed.features(output)[recomputed_row[start:stop][replaced]]
        block[repaired_table.status[start:stop] != Status.OK] = np.nan
        return block

    manifest = {key: value for key, value in cache.manifest.items() if key not in ("columns", "shards")}
    repair_entry = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "rows": len(rows)}
    manifest["repaired"] = [*manifest.get("repaired", []), repair_entry]
    write_cache(cache.path, repaired_table, manifest, cache.shapes, cache.facts["storage"], gather, cache.shard_bytes)
    return int(np.count_nonzero(repaired_table.status[rows] == Status.OK))


def _repair_table(
    table: SampleTable,
    verification: Verification,
    rows: NDArray[np.int64],
    is_available: NDArray[np.bool_],
    recomputed: FeatureCache | None,
) -> SampleTable:
    """Update status, digests and stamps of the damaged rows in the sample table."""
    status, digests, stamps = np.array(table.status), np.array(table.digests), np.array(table.stamps)
    if "samples/stamp" in verification.columns:
        stamps[:] = 0
    status[rows[~is_available]] = Status.MISSING
    available_rows = rows[is_available]
    if recomputed is not None:
        status[available_rows], stamps[available_rows] = recomputed.status_codes, recomputed.stamps
        if "samples/digest" not in verification.columns:
            is_other_image = (recomputed.digests != digests[available_rows]).any(axis=1) & (
                recomputed.status_codes == Status.OK
            )
            status[available_rows[is_other_image]] = Status.MISSING  # its name now belongs to another image
        digests[available_rows] = recomputed.digests
    stamps[rows[status[rows] != Status.OK]] = 0
    digests[rows[status[rows] == Status.MISSING]] = 0
    return replace(table, status=status, digests=digests, stamps=stamps)
