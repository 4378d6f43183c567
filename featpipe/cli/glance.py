"""A cache at a glance: all of it as JSON, what matters as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featpipe.cli.terminal import duration, printable, size, table

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache

__all__ = ["facts_of_cache", "shown_cache"]

CLASSES_MAX = 20  # as many are all shown, in their order
CLASSES_TOP = 10  # of more, the largest
ARCHIVES_MAX = 5


def facts_of_cache(path: Path) -> dict[str, Any]:
    """What a cache holds, also one of which shards are missing."""
    from featpipe.cache import FeatureCache

    cache = FeatureCache(path, salvage=True)
    manifest = cache.manifest
    return {
        "cache": str(path),
        "format": f"{manifest['format']} {manifest['format_version']}",
        "backbone": manifest["facts"]["backbone"]["name"],
        "weights": manifest["facts"]["backbone"]["weights"],
        "view": _view(manifest["facts"]["backbone"].get("transform", {})),
        "outputs": manifest["outputs"],
        "precision": manifest["facts"]["precision"],
        "storage": manifest["facts"]["storage"],
        "samples": len(cache),
        "ok": len(cache) - sum(cache.bad_rows().values()),
        "bad": cache.bad_rows(),
        "splits": _splits(cache),
        "task": cache.task,
        **_labels(cache),
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


def _view(transform: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the pictures were changed at random before they were embedded, if they were: for fine-tuning."""
    if "augmentation" not in transform:
        return None
    changes = {name: value for name, value in transform["augmentation"].items() if name != "versions"}
    return {"number": transform["view"], "seed": transform["seed"], **changes}


def _splits(cache: FeatureCache) -> dict[str, int]:
    """How many samples each split has, if any sample is in one."""
    import numpy as np

    from featpipe.cache import SPLITS

    counts = np.bincount(cache.split, minlength=len(SPLITS)).tolist()
    return {name: count for name, count in zip(SPLITS, counts, strict=True) if count} if any(counts[1:]) else {}


def _labels(cache: FeatureCache) -> dict[str, Any]:
    """Classes with how many samples each has, or targets with their range."""
    import numpy as np

    if cache.task == "none":
        return {}
    labels = cache.label_table
    known = labels.known
    values = labels.values[known]
    unlabelled = {"unlabelled": int(np.count_nonzero(~known))}
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


def shown_cache(facts: Mapping[str, Any]) -> str:
    """The text for people."""
    lines = [
        ("cache", facts["cache"]),
        ("samples", f"{facts['samples']:,}, {_bad(facts)}"),
        ("labels", _labelled(facts)),
        ("splits", ", ".join(f"{count:,} {name}" for name, count in facts["splits"].items())),
        ("outputs", ", ".join(f"{name} {_shape(shape)}" for name, shape in facts["outputs"].items())),
        ("backbone", f"{facts['backbone']}, weights {facts['weights'][:12]}, {facts['precision']}"),
        ("view", _viewed(facts["view"])),
        ("size", _size(facts)),
        ("lost", _few(facts["lost_shards"])),
        ("made", _made(facts)),
        ("from", _few(facts["archives"] or [])),
        ("merged from", _few([source["cache"] for source in facts["merged_from"] or []])),
        ("format", facts["format"] + ("" if facts["row_checks"] else ", without checks of its rows")),
        ("fingerprint", facts["fingerprint"]),
    ]
    text = "\n".join(f"{name:<13}{printable(str(value))}" for name, value in lines if value)
    below = _classes(facts["classes"]) if facts.get("classes") else _targets(facts.get("targets") or {})
    return f"{text}\n\n{below}" if below else text


def _bad(facts: Mapping[str, Any]) -> str:
    bad = sorted(facts["bad"].items(), key=lambda item: -item[1])
    if not bad:
        return "all with features"
    return f"{sum(facts['bad'].values()):,} without features: " + ", ".join(f"{count:,} {word}" for word, count in bad)


def _viewed(view: Mapping[str, Any] | None) -> str:
    if view is None:
        return ""
    changes = [f"{name} {value:g}" for name, value in view.items() if name not in ("number", "seed")]
    return f"number {view['number'] + 1} of the pictures as fine-tuning changes them: {', '.join(changes)}"


def _labelled(facts: Mapping[str, Any]) -> str:
    if facts["task"] == "none":
        return "none"
    kind, several = ("targets", "target") if facts["task"] == "regression" else ("classes", "class")
    number = len(facts[kind])
    text = f"{facts['task']}, {number:,} {kind if number != 1 else several}"
    return text + (f", {facts['unlabelled']:,} without a label" if facts["unlabelled"] else "")


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "1"


def _size(facts: Mapping[str, Any]) -> str:
    where = f"the file and {facts['shards']:,} shards" if facts["shards"] else "one file"
    each = f", {size(facts['bytes'] / facts['samples'])} a sample" if facts["samples"] else ""
    return f"{size(facts['bytes'])} in {where}{each}, stored as {facts['storage']}"


def _made(facts: Mapping[str, Any]) -> str:
    text = str(facts["created"] or "").replace("T", " ").replace("+00:00", " UTC")
    if not facts["embedded"]:
        return text + (", all copied from other caches" if facts["embedded"] == 0 else "")
    text += f", {facts['embedded']:,} images embedded" + (f" on {facts['device']}" if facts["device"] else "")
    total = (facts["seconds"] or {}).get("total")
    text += f" in {duration(total)}" if total else ""
    return text + (f", {facts['images_per_second']:,.1f} images/s" if facts["images_per_second"] else "")


def _few(places: Sequence[str]) -> str:
    more = f" and {len(places) - ARCHIVES_MAX:,} more" if len(places) > ARCHIVES_MAX else ""
    return ", ".join(map(str, places[:ARCHIVES_MAX])) + more


def _classes(counts: Mapping[str, int]) -> str:
    """The classes as a table: all of a few, else the largest and what the others have."""
    shown = list(counts.items())
    if len(shown) > CLASSES_MAX:
        shown = sorted(shown, key=lambda item: -item[1])[:CLASSES_TOP]
    text = table([[name, f"{count:,}"] for name, count in shown], ["class", "images"], right=[1])
    named = dict(shown)
    others = [count for name, count in counts.items() if name not in named]
    if others:
        each = f"{min(others):,}" if min(others) == max(others) else f"{min(others):,} to {max(others):,}"
        text += f"\nand {len(others):,} others with {each} images each"
    return text


def _targets(ranges: Mapping[str, Mapping[str, float] | None]) -> str:
    rows = [
        [name, *([f"{found[key]:.4g}" for key in ("least", "mean", "greatest")] if found else ["", "", ""])]
        for name, found in ranges.items()
    ]
    return table(rows, ["target", "least", "mean", "greatest"], right=[1, 2, 3]) if rows else ""
