"""A cache at a glance: all of it as JSON, what matters as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featpipe.cli.terminal import format_duration, format_size, format_table, printable

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache

__all__ = ["cache_to_dict", "format_cache"]

MAX_LISTED_CLASSES = 20  # as many are all shown, in their order
N_LARGEST_CLASSES = 10  # of more, the largest
MAX_LISTED_ARCHIVES = 5


def cache_to_dict(path: Path) -> dict[str, Any]:
    """What a cache holds, also one of which shards are missing."""
    from featpipe.cache import FeatureCache

    cache = FeatureCache(path, salvage=True)
    manifest = cache.manifest
    return {
        "cache": str(path),
        "format": f"{manifest['format']} {manifest['format_version']}",
        "backbone": manifest["facts"]["backbone"]["name"],
        "weights": manifest["facts"]["backbone"]["weights"],
        "view": _view_to_dict(manifest["facts"]["backbone"].get("transform", {})),
        "outputs": manifest["outputs"],
        "precision": manifest["facts"]["precision"],
        "storage": manifest["facts"]["storage"],
        "samples": len(cache),
        "ok": len(cache) - sum(cache.bad_rows().values()),
        "bad": cache.bad_rows(),
        "splits": _count_splits(cache),
        "task": cache.task,
        **_count_labels(cache),
        "archives": manifest.get("archives"),
        "ignored": manifest.get("ignored"),
        "merged_from": manifest.get("merged_from"),
        "created": manifest.get("created"),
        "device": manifest.get("device"),
        "machine": manifest.get("machine"),
        "embedded": manifest.get("embedded"),
        "images_per_second": manifest.get("images_per_second"),
        "seconds": manifest.get("seconds"),
        "bytes": cache.file_bytes,
        "shards": len(manifest.get("shards") or []),
        "lost_shards": list(cache.lost_shards),
        "row_checks": cache.has_checks,
        "fingerprint": cache.fingerprint,
        "versions": manifest.get("versions"),
    }


def _view_to_dict(transform: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the pictures were changed at random before they were embedded, if they were: for fine-tuning."""
    if "augmentation" not in transform:
        return None
    augmentation = {name: value for name, value in transform["augmentation"].items() if name != "versions"}
    return {"number": transform["view"], "seed": transform["seed"], **augmentation}


def _count_splits(cache: FeatureCache) -> dict[str, int]:
    """How many samples each split has, if any sample is in one."""
    import numpy as np

    from featpipe.cache import SPLIT_NAMES

    counts = np.bincount(cache.split, minlength=len(SPLIT_NAMES)).tolist()
    return {name: count for name, count in zip(SPLIT_NAMES, counts, strict=True) if count} if any(counts[1:]) else {}


def _count_labels(cache: FeatureCache) -> dict[str, Any]:
    """Classes with how many samples each has, or targets with their range."""
    import numpy as np

    if cache.task == "none":
        return {}
    labels = cache.label_table
    is_labelled = labels.known
    values = labels.values[is_labelled]
    unlabelled = {"unlabelled": int(np.count_nonzero(~is_labelled))}
    if cache.task == "regression":
        ranges = {
            name: {"least": float(v.min()), "mean": float(v.mean()), "greatest": float(v.max())} if len(v) else None
            for name, v in zip(cache.classes, values.T, strict=True)
        }
        return {"targets": ranges, **unlabelled}
    if cache.task == "classification":
        counts = np.bincount(values, minlength=len(cache.classes))
    else:
        counts = values.sum(axis=0, dtype=np.int64)
    return {"classes": dict(zip(cache.classes, counts.tolist(), strict=True)), **unlabelled}


def format_cache(details: Mapping[str, Any]) -> str:
    """The text for people."""
    lines = [
        ("cache", details["cache"]),
        ("samples", f"{details['samples']:,}, {_format_bad(details)}"),
        ("labels", _format_labels(details)),
        ("splits", ", ".join(f"{count:,} {name}" for name, count in details["splits"].items())),
        ("outputs", ", ".join(f"{name} {_format_shape(shape)}" for name, shape in details["outputs"].items())),
        ("backbone", f"{details['backbone']}, weights {details['weights'][:12]}, {details['precision']}"),
        ("view", _format_view(details["view"])),
        ("size", _format_storage(details)),
        ("lost", _format_paths(details["lost_shards"])),
        ("made", _format_creation(details)),
        ("from", _format_paths(details["archives"] or [])),
        ("merged from", _format_paths([source["cache"] for source in details["merged_from"] or []])),
        ("format", details["format"] + ("" if details["row_checks"] else ", without checks of its rows")),
        ("fingerprint", details["fingerprint"]),
    ]
    text = "\n".join(f"{name:<13}{printable(str(value))}" for name, value in lines if value)
    labels_text = (
        _format_classes(details["classes"]) if details.get("classes") else _format_targets(details.get("targets") or {})
    )
    return f"{text}\n\n{labels_text}" if labels_text else text


def _format_bad(details: Mapping[str, Any]) -> str:
    bad = sorted(details["bad"].items(), key=lambda item: -item[1])
    if not bad:
        return "all with features"
    return f"{sum(details['bad'].values()):,} without features: " + ", ".join(
        f"{count:,} {status}" for status, count in bad
    )


def _format_view(view: Mapping[str, Any] | None) -> str:
    if view is None:
        return ""
    augmentation = [f"{name} {value:g}" for name, value in view.items() if name not in ("number", "seed")]
    return f"number {view['number'] + 1} of the pictures as fine-tuning changes them: {', '.join(augmentation)}"


def _format_labels(details: Mapping[str, Any]) -> str:
    if details["task"] == "none":
        return "none"
    plural, singular = ("targets", "target") if details["task"] == "regression" else ("classes", "class")
    count = len(details[plural])
    text = f"{details['task']}, {count:,} {plural if count != 1 else singular}"
    return text + (f", {details['unlabelled']:,} without a label" if details["unlabelled"] else "")


def _format_shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "1"


def _format_storage(details: Mapping[str, Any]) -> str:
    location = f"the file and {details['shards']:,} shards" if details["shards"] else "one file"
    per_sample = f", {format_size(details['bytes'] / details['samples'])} a sample" if details["samples"] else ""
    return f"{format_size(details['bytes'])} in {location}{per_sample}, stored as {details['storage']}"


def _format_creation(details: Mapping[str, Any]) -> str:
    text = str(details["created"] or "").replace("T", " ").replace("+00:00", " UTC")
    if not details["embedded"]:
        return text + (", all copied from other caches" if details["embedded"] == 0 else "")
    text += f", {details['embedded']:,} images embedded" + (f" on {details['device']}" if details["device"] else "")
    total = (details["seconds"] or {}).get("total")
    text += f" in {format_duration(total)}" if total else ""
    return text + (f", {details['images_per_second']:,.1f} images/s" if details["images_per_second"] else "")


def _format_paths(paths: Sequence[str]) -> str:
    remaining = f" and {len(paths) - MAX_LISTED_ARCHIVES:,} more" if len(paths) > MAX_LISTED_ARCHIVES else ""
    return ", ".join(map(str, paths[:MAX_LISTED_ARCHIVES])) + remaining


def _format_classes(counts: Mapping[str, int]) -> str:
    """The classes as a table: all of a few, else the largest and what the others have."""
    listed = list(counts.items())
    if len(listed) > MAX_LISTED_CLASSES:
        listed = sorted(listed, key=lambda item: -item[1])[:N_LARGEST_CLASSES]
    text = format_table([[name, f"{count:,}"] for name, count in listed], ["class", "images"], right_aligned=[1])
    listed_classes = dict(listed)
    others = [count for name, count in counts.items() if name not in listed_classes]
    if others:
        range_text = f"{min(others):,}" if min(others) == max(others) else f"{min(others):,} to {max(others):,}"
        text += f"\nand {len(others):,} others with {range_text} images each"
    return text


def _format_targets(ranges: Mapping[str, Mapping[str, float] | None]) -> str:
    rows = [
        [name, *([f"{statistics[key]:.4g}" for key in ("least", "mean", "greatest")] if statistics else ["", "", ""])]
        for name, statistics in ranges.items()
    ]
    return format_table(rows, ["target", "least", "mean", "greatest"], right_aligned=[1, 2, 3]) if rows else ""
