"""``featpipe info``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.options import IDENTITY_OPTIONS, JSON_OPTION, RUN_OPTIONS, add_options, make_extraction_settings
from featpipe.cli.terminal import print_json
from featpipe.runtime import format_duration, format_size, format_table, printable

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache
    from featpipe.maintenance import CacheDiff, SampleDiff


@click.command()
@click.argument("path", metavar="PATH")
@click.argument("archives", nargs=-1, metavar="[ARCHIVE...|CACHE]")
@click.option("--why", is_flag=True, help="Show the differences to an extract command, or to another cache.")
@add_options(*IDENTITY_OPTIONS)
@add_options(*RUN_OPTIONS, hidden=True)  # so that the options of any extract command can be pasted
@add_options(JSON_OPTION)
@click.pass_context
def info(
    context: click.Context, path: str, archives: tuple[str, ...], why: bool, as_json: bool, **settings: Any
) -> None:
    """Show the contents of a cache or a model.

    With --why and the arguments of an extract command, or with --why and another cache: shows which settings differ,
    and how many images are unchanged, changed, new or gone. No image is read.

    \b
    Example:
      featpipe info cache/photos.h5
      featpipe info cache/photos.h5 --why photos/ --backbone resnet50
    """
    has_options = any(context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT for name in settings)
    if why:
        _print_differences(Path(path), archives, settings, has_options, as_json)
        return
    if archives or has_options:
        raise click.UsageError("archives and options are for --why, which compares with an extraction; give --why")
    is_model = _is_model(Path(path))
    details = _model_to_dict(Path(path)) if is_model else cache_to_dict(Path(path))
    if as_json:
        print_json(details)
    else:
        click.echo(_format_model(details) if is_model else format_cache(details))


def _is_model(path: Path) -> bool:
    """Whether a file is a zip archive; a missing file is a model by its name."""
    if not path.is_file():
        return path.suffix == ".model"
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _print_differences(
    path: Path, archives: tuple[str, ...], settings: dict[str, Any], has_options: bool, as_json: bool
) -> None:
    from featpipe.cache import FeatureCache
    from featpipe.config import ExtractionConfig
    from featpipe.maintenance import diff_with_cache, diff_with_request

    cache = FeatureCache(path, salvage=True)
    other_path = archives[0] if len(archives) == 1 and archives[0].endswith(".h5") else None
    if other_path is None:
        config = ExtractionConfig.from_settings(make_extraction_settings(settings))
        comparison = diff_with_request(cache, config, archives)
    elif has_options:
        raise click.UsageError("a comparison of two caches takes no options of an extraction; remove them")
    else:
        comparison = diff_with_cache(cache, FeatureCache(other_path, salvage=True))
    if as_json:
        print_json({"cache": str(path), **asdict(comparison)})
        return
    click.echo(printable(f"{path} {_format_verdict(comparison, other_path)}"))
    for line in comparison.differences:
        click.echo(f"  {printable(line)}")
    if comparison.samples is not None:
        click.echo("\n" + _format_samples(comparison.samples, comparison.usable))


def _format_verdict(comparison: CacheDiff, other_path: str | None) -> str:
    n_differences = len(comparison.differences)
    count_text = f"{n_differences} {'setting' if n_differences == 1 else 'settings'}"
    if other_path is not None:
        return f"and {other_path} " + (
            f"differ in {count_text}:" if n_differences else "have the same backbone and settings"
        )
    if not n_differences:
        return "matches the request"
    if comparison.usable:
        return f"contains the requested embeddings and differs in {count_text}; its embeddings are copied:"
    return f"does not match the request in {count_text}; its embeddings cannot be used:"


def _format_samples(samples: SampleDiff, usable: bool) -> str:
    """Format the comparison of the images of the archives with those of the cache."""
    counts = [
        [f"{samples.images:,}", "images are in the archives, of which"],
        [f"{samples.unchanged:,}", "are in the cache, with unchanged path, size and time"],
        [f"{samples.changed:,}", "are in the cache under the same id, but changed, moved or to be read again"],
        [f"{samples.new:,}", "are new by id"],
        [f"{samples.gone:,}", "rows of the cache are not in the archives"],
    ]
    if not usable:
        note = "All images would be embedded, except those in other caches with the requested settings."
    elif samples.changed or samples.new:
        note = "Changed and new images are read; those whose bytes are in a cache are copied, the others are embedded."
    elif samples.same_table:
        note = "Samples, order, labels and splits are the cache's own."
    else:
        note = "Order, labels or splits differ: the cache is written again, without a forward pass."
    return f"{format_table(counts[1:], counts[0], right_aligned=[0])}\n{note}"


def _model_to_dict(path: Path) -> dict[str, Any]:
    from featpipe.model import read_document

    document = read_document(path)
    return {
        "model": str(path),
        "format": f"{document['format']} {document['format_version']}",
        "backbone": document["backbone"]["name"],
        "output": document["output"],
        "precision": document["facts"]["precision"],
        "head": document["head"],
        "task": document["task"],
        "classes": document["classes"],
        "keeps": document.get("kept"),
        "scores": document["scores"],
        "history": document["history"],
        "bytes": path.stat().st_size,
    }


def _format_model(details: dict[str, Any]) -> str:
    from featpipe.metrics import ProbeComparison, format_protocol

    history = details.pop("history")
    estimates = [estimate for estimate in details["scores"].values() if isinstance(estimate, dict)]
    finetuning = history.get("finetuning")
    result = finetuning.get("result") if isinstance(finetuning, dict) else None
    details |= {
        "keeps": _format_retained(details["keeps"]),
        "scores": {
            format_protocol(estimate["how"]): {name: metric["value"] for name, metric in estimate["metrics"].items()}
            for estimate in estimates
        },
        "trained_on": history["trained_on"],
        "steps": [
            f"{len(step['classes'])} classes by {step['method']} from {' and '.join(step.get('caches') or ['?'])}"
            for step in history.get("steps") or []
        ],
    }
    if isinstance(result, dict):
        verdict = ProbeComparison(**result["comparison"]).verdict()
        details["fine_tuning"] = f"the {result['kept']} model is kept; {verdict}"
    shown = {name.replace("_", " "): value for name, value in details.items() if value not in (None, {}, [])}
    return "\n".join(f"{name:<18}{_format_value(value)}" for name, value in shown.items())


def _format_retained(retained: dict[str, Any] | None) -> str:
    """Describe the retained training data and its size."""
    if not retained:
        return "nothing of its training data but the digests of the images"
    sizes = {name: format_size(nbytes) for name, nbytes in retained["bytes"].items()}
    texts = {name: f"{name}: {size}" for name, size in sizes.items()}
    if "rows" in sizes:
        n_rows, n_per_class = retained["rows"], retained["rows_a_class"]
        texts["rows"] = f"{n_rows:,} embeddings, at most {n_per_class} of a class, {sizes['rows']}"
    if "network" in sizes:
        texts["network"] = f"importances of the network: {sizes['network']}"
    return "; ".join(texts.values())


def _format_value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{printable(str(name))}: {_format_value(item)}" for name, item in list(value.items())[:40])
    if isinstance(value, list):
        if all(isinstance(item, int) for item in value):
            return " × ".join(map(str, value))
        return ", ".join(printable(str(item)) for item in value[:40])
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


MAX_LISTED_CLASSES = 20  # of more classes, only the largest are listed
N_LARGEST_CLASSES = 10
MAX_LISTED_ARCHIVES = 5


def cache_to_dict(path: Path) -> dict[str, Any]:
    """Describe the contents of a cache; shards may be missing."""
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
    """Describe the random augmentation of a cache of feature maps for fine-tuning; None for other caches."""
    if "augmentation" not in transform:
        return None
    augmentation = {name: value for name, value in transform["augmentation"].items() if name != "versions"}
    return {"number": transform["view"], "seed": transform["seed"], **augmentation}


def _count_splits(cache: FeatureCache) -> dict[str, int]:
    """Count the samples of each split; empty if no sample has a split."""
    import numpy as np

    from featpipe.cache import SPLIT_NAMES

    counts = np.bincount(cache.split, minlength=len(SPLIT_NAMES)).tolist()
    return {name: count for name, count in zip(SPLIT_NAMES, counts, strict=True) if count} if any(counts[1:]) else {}


def _count_labels(cache: FeatureCache) -> dict[str, Any]:
    """Count the samples of each class, or compute the range of each target."""
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
    """Format the contents of a cache as text."""
    merged_from = [source["cache"] for source in details["merged_from"] or []]
    outputs = [f"{name} {' × '.join(map(str, shape)) or '1'}" for name, shape in details["outputs"].items()]
    lines = [
        ("cache", details["cache"]),
        ("samples", f"{details['samples']:,}, {_format_bad(details['bad'])}"),
        ("labels", _format_labels(details)),
        ("splits", ", ".join(f"{count:,} {name}" for name, count in details["splits"].items())),
        ("outputs", ", ".join(outputs)),
        ("backbone", f"{details['backbone']}, weights {details['weights'][:12]}, {details['precision']}"),
        ("view", _format_view(details["view"])),
        ("size", _format_storage(details)),
        ("lost shards", _format_paths(details["lost_shards"])),
        ("created", _format_creation(details)),
        ("archives", _format_paths(details["archives"] or [])),
        ("merged from", _format_paths(merged_from)),
        ("format", details["format"] + ("" if details["row_checks"] else ", without checksums of rows")),
        ("fingerprint", details["fingerprint"]),
    ]
    text = "\n".join(f"{name:<13}{printable(str(value))}" for name, value in lines if value)
    if details.get("classes"):
        return f"{text}\n\n{_format_classes(details['classes'])}"
    return f"{text}\n\n{_format_targets(details['targets'])}" if details.get("targets") else text


def _format_bad(bad: Mapping[str, int]) -> str:
    if not bad:
        return "all with features"
    counts = sorted(bad.items(), key=lambda item: -item[1])
    return f"{sum(bad.values()):,} without features: {', '.join(f'{count:,} {status}' for status, count in counts)}"


def _format_labels(details: Mapping[str, Any]) -> str:
    if details["task"] == "none":
        return "none"
    plural, singular = ("targets", "target") if details["task"] == "regression" else ("classes", "class")
    count = len(details[plural])
    text = f"{details['task']}, {count:,} {plural if count != 1 else singular}"
    return text + (f", {details['unlabelled']:,} without a label" if details["unlabelled"] else "")


def _format_view(view: Mapping[str, Any] | None) -> str:
    if view is None:
        return ""
    augmentation = [f"{name} {value:g}" for name, value in view.items() if name not in ("number", "seed")]
    return f"number {view['number'] + 1} of the augmented views of fine-tuning: {', '.join(augmentation)}"


def _format_storage(details: Mapping[str, Any]) -> str:
    location = f"the file and {details['shards']:,} shards" if details["shards"] else "one file"
    per_sample = f", {format_size(details['bytes'] / details['samples'])} per image" if details["samples"] else ""
    return f"{format_size(details['bytes'])} in {location}{per_sample}, stored as {details['storage']}"


def _format_creation(details: Mapping[str, Any]) -> str:
    text = str(details["created"] or "").replace("T", " ").replace("+00:00", " UTC")
    if not details["embedded"]:
        return text + (", all embeddings copied from other caches" if details["embedded"] == 0 else "")
    text += f", {details['embedded']:,} images embedded" + (f" on {details['device']}" if details["device"] else "")
    total = (details["seconds"] or {}).get("total")
    text += f" in {format_duration(total)}" if total else ""
    return text + (f", {details['images_per_second']:,.1f} images/s" if details["images_per_second"] else "")


def _format_paths(paths: Sequence[str]) -> str:
    remaining = f" and {len(paths) - MAX_LISTED_ARCHIVES:,} more" if len(paths) > MAX_LISTED_ARCHIVES else ""
    return ", ".join(map(str, paths[:MAX_LISTED_ARCHIVES])) + remaining


def _format_classes(counts: Mapping[str, int]) -> str:
    """Format the classes as a table; of many classes, the largest and a summary of the others."""
    listed = dict(counts)
    if len(counts) > MAX_LISTED_CLASSES:
        listed = dict(sorted(counts.items(), key=lambda item: -item[1])[:N_LARGEST_CLASSES])
    text = format_table(
        [[name, f"{count:,}"] for name, count in listed.items()], ["class", "images"], right_aligned=[1]
    )
    others = [count for name, count in counts.items() if name not in listed]
    if others:
        range_text = f"{min(others):,}" if min(others) == max(others) else f"{min(others):,} to {max(others):,}"
        text += f"\nand {len(others):,} others with {range_text} images each"
    return text


def _format_targets(ranges: Mapping[str, Mapping[str, float] | None]) -> str:
    keys = ("least", "mean", "greatest")
    rows = [
        [name, *(f"{statistics[key]:.4g}" if statistics else "" for key in keys)] for name, statistics in ranges.items()
    ]
    return format_table(rows, ["target", "minimum", "mean", "maximum"], right_aligned=[1, 2, 3])
