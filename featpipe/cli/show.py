"""Commands that show something: info, backbones, heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featpipe.cli.terminal import dump, printable, table
from featpipe.names import unknown

__all__ = ["backbones", "heads", "info"]


@click.command(short_help="Show what a cache or a model holds.")
@click.argument("path", metavar="PATH")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def info(path: str, as_json: bool) -> None:
    """Show what a cache or a model holds.

    \b
    Example:
      featpipe info cache/photos.h5
    """
    facts = _of_model(Path(path)) if _is_zip(Path(path)) else _of_cache(Path(path))
    if as_json:
        dump(facts)
        return
    if "scores" in facts:
        facts |= {"scores": _metrics(facts["scores"]), "trained_on": facts["history"]["trained_on"], "history": None}
    rows = [[name.replace("_", " "), _shown(value)] for name, value in facts.items() if value not in (None, {}, [])]
    click.echo("\n".join(f"{name:<18}{value}" for name, value in rows))


def _is_zip(path: Path) -> bool:
    if not path.is_file():
        return path.suffix == ".model"
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _of_cache(path: Path) -> dict[str, Any]:
    import numpy as np

    from featpipe.cache import FeatureCache

    cache = FeatureCache(path)
    manifest = cache.manifest
    classes: dict[str, int] | None = None
    if cache.task == "classification":
        codes = cache.label_table.values
        counts = np.bincount(codes[codes >= 0], minlength=len(cache.classes))
        classes = dict(zip(cache.classes, counts.tolist(), strict=True))
    return {
        "cache": str(path),
        "format": f"{manifest['format']} {manifest['format_version']}",
        "backbone": manifest["facts"]["backbone"]["name"],
        "outputs": manifest["outputs"],
        "precision": manifest["facts"]["precision"],
        "storage": manifest["facts"]["storage"],
        "samples": len(cache),
        "bad": cache.bad_rows(),
        "task": cache.task,
        "classes": classes if classes is not None else list(cache.classes),
        "unlabelled": int(np.count_nonzero(~cache.label_table.known)) if cache.task != "none" else None,
        "archives": manifest.get("archives"),
        "created": manifest.get("created"),
        "images_per_second": manifest.get("images_per_second"),
        "seconds": manifest.get("seconds"),
        "bytes": path.stat().st_size,
        "fingerprint": cache.fingerprint,
        "versions": manifest.get("versions"),
    }


def _of_model(path: Path) -> dict[str, Any]:
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
        "scores": document["scores"],
        "history": document["history"],
        "bytes": path.stat().st_size,
    }


def _metrics(scores: dict[str, Any]) -> dict[str, Any]:
    """How each estimate was made, and its figures alone."""
    return {
        estimate["how"]: {name: metric["value"] for name, metric in estimate["metrics"].items()}
        for estimate in scores.values()
    }


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{printable(str(name))}: {_shown(item)}" for name, item in list(value.items())[:40])
    if isinstance(value, list):
        return (
            " × ".join(map(str, value))
            if all(isinstance(v, int) for v in value)
            else ", ".join(printable(str(item)) for item in value[:40])
        )
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value))


@click.command(short_help="List the networks that can be used.")
@click.argument("pattern", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def backbones(pattern: str | None, as_json: bool) -> None:
    """List the networks that can be used, all or those whose names match PATTERN.

    \b
    Example:
      featpipe backbones 'resnet*'
    """
    from featpipe import backbone

    found = backbone.names(pattern)
    if pattern and not found:
        raise unknown("backbone", pattern, backbone.names())
    if as_json:
        dump(found)
    else:
        click.echo("\n".join(found))


@click.command(short_help="List the heads that can be trained.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def heads(as_json: bool) -> None:
    """List the heads that can be trained, what they are for and what can be set.

    \b
    Example:
      featpipe heads
    """
    from featpipe import heads as rooms

    tasks = ("classification", "regression", "multilabel")
    rows = [
        {"head": name, "tasks": [task for task in tasks if name in rooms.names(task)], "what": rooms.describe(name)}
        for name in rooms.TABLE
    ]
    if as_json:
        dump(rows)
    else:
        click.echo(table([[row["head"], ", ".join(row["tasks"]), row["what"]] for row in rows], ["head", "for", ""]))
