"""``featpipe expand``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.terminal import Terminal, print_json
from featpipe.cli.train import parse_bytes
from featpipe.runtime import format_table

if TYPE_CHECKING:
    from featpipe.incremental import Expansion

__all__ = ["expand"]


def _parse_merges(context: click.Context, option: click.Parameter, texts: Sequence[str]) -> dict[str, list[str]]:
    merges: dict[str, list[str]] = {}
    for text in texts:
        sources, separator, target = text.rpartition("=")
        names = [name for name in sources.split(",") if name]
        if not separator or not names or not target or target in merges:
            raise click.BadParameter(f"{text!r} is not A,B=C; write it as in wolf,dog=canine")
        merges[target] = names
    return merges


@click.command(short_help="Teach a model more classes; prints the path of the new model.")
@click.argument("model", metavar="MODEL")
@click.argument("data", nargs=-1, metavar="CACHE|ARCHIVE...")
@click.option("--method", metavar="M", help="joint, statistics, replay, frozen-old, distill, ewc, naive; all compares.")
@click.option("--memory", type=click.IntRange(1), metavar="N", help="Embeddings to keep of each class.  [default: 20]")
@click.option("--budget", callback=parse_bytes, metavar="SIZE", help="The most bytes that the new model may keep.")
@click.option("--drop", multiple=True, metavar="CLASS", help="Leave a class out.")
@click.option("--merge", multiple=True, callback=_parse_merges, metavar="A,B=C", help="Join classes; A=C renames one.")
@click.option("--test", multiple=True, metavar="CACHE|ARCHIVE", help="Images to judge by; never trained on.")
@click.option(
    "--calibration", multiple=True, metavar="CACHE|ARCHIVE", help="Images for sets; not learnt, nor judged by."
)
@click.option("--keep", metavar="W", help="none, all, statistics, importances, rows=N, network.  [default: as before]")
@click.option(
    "--unfreeze",
    default="head",
    show_default=True,
    metavar="WHAT",
    help="Experimental: train some of the network too, on archives: last, 3, 0.3, all …, as in `finetune`.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="epochs, selection, temperature, strength; with --unfreeze learning_rate, batch, … too.",
)
@click.option("--augment", "augmentation", multiple=True, metavar="KEY=VALUE", help="With --unfreeze: flip=0.5 …")
@click.option("--resume/--restart", default=True, show_default=True, help="Go on from the checkpoint beside --out.")
@click.option("--labels", metavar="TABLE", help="A CSV or Parquet table of paths and labels, for archives.")
@click.option("--cache", default="cache", show_default=True, metavar="DIR", help="Where caches are kept.")
@click.option("--backbone", metavar="NAME", help="Needed for a model that was trained on code of your own.")
@click.option("--device", default="auto", show_default=True, metavar="D", help="auto, cpu, cuda, cuda:N, mps.")
@click.option("--out", metavar="MODEL", help="The new model's file.  [default: MODEL's name with .N-classes.model]")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def expand(model: str, data: tuple[str, ...], as_json: bool, settings: tuple[str, ...], **options: Any) -> None:
    """Teach a model more classes; prints the path of the new model.

    Images that the model was trained on are recognized by their bytes: give their cache too, and old and new images are
    learnt together. Without them, how much is forgotten depends on the method and on what the model retains (see
    `featpipe info MODEL`); the table at the end shows it. Without new images, classes are dropped or merged.

    With --unfreeze (experimental) training goes on in the network from there, as in `featpipe finetune`.

    \b
    Example:
      featpipe expand photos.model cache/more-photos.h5 --method replay
    """
    from featpipe.config import parse_settings
    from featpipe.incremental import expand as run
    from featpipe.model import load_model

    loaded_model = load_model(model, backbone=options.pop("backbone"), device=options.pop("device"))
    options |= {name: list(options[name]) for name in ("test", "calibration", "drop")}
    params, augmentation = parse_settings(settings), parse_settings(options.pop("augmentation"))
    if options["unfreeze"].strip() != "head":
        params |= {"device": loaded_model.device} | ({"augmentation": augmentation} if augmentation else {})
    elif augmentation:
        raise click.UsageError("--augment changes pictures, and without --unfreeze embeddings are trained on")
    with Terminal() as terminal:
        expansion = run(loaded_model, list(data), params=params, place=_make_output_path, progress=terminal, **options)
    if as_json:
        print_json({"model": str(expansion.model.path), **expansion.to_dict()})
        return
    _print_expansion(expansion)
    click.echo(expansion.model.path)


def _make_output_path(model_path: Path, n_classes: int) -> Path:
    """Beside the model before, and never the same file."""
    stem = re.sub(r"\.\d+-classes(-\d+)?$", "", model_path.name.removesuffix(".model"))
    candidates = (f"{stem}.{n_classes}-classes{f'-{number}' if number > 1 else ''}.model" for number in count(1))
    return model_path.with_name(next(name for name in candidates if name != model_path.name))


def _print_expansion(expansion: Expansion) -> None:
    """The epochs of the chosen method, and the table that matters."""
    for rows in (expansion.curve_table(), expansion.as_table() if expansion.outcomes else []):
        if rows:
            log_message(format_table(rows[1:], rows[0], right_aligned=range(1, len(rows[0]))) + "\n", event="table")
    if expansion.outcomes:
        log_message(f"measured on {expansion.how}; 95 % intervals")
    for method, reason in expansion.unavailable.items() if expansion.recommended else []:
        log_message(f"{method} {reason}")
    if expansion.recommended:
        log_message(f"recommended: {expansion.recommended}")
