"""``featpipe expand``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.options import (
    JSON_OPTION,
    MODEL_OPTIONS,
    OVERWRITE_OPTION,
    RESUME_OPTION,
    add_options,
    parse_bytes,
    settings_option,
)
from featpipe.cli.outputs import claim_outputs
from featpipe.cli.terminal import Terminal, print_json
from featpipe.runtime import format_table

if TYPE_CHECKING:
    from featpipe.incremental import Expansion


def _parse_merges(context: click.Context, option: click.Parameter, texts: Sequence[str]) -> dict[str, list[str]]:
    merges: dict[str, list[str]] = {}
    for text in texts:
        sources, separator, target = text.rpartition("=")
        names = [name for name in sources.split(",") if name]
        if not separator or not names or not target or target in merges:
            raise click.BadParameter(f"{text!r} is not A,B=C; an example is wolf,dog=canine")
        merges[target] = names
    return merges


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("data", nargs=-1, metavar="CACHE|ARCHIVE...")
@click.option(
    "--method", metavar="M", help="joint, statistics, replay, frozen-old, distill, ewc or naive; all compares them."
)
@click.option(
    "--memory", type=click.IntRange(1), metavar="N", help="Exemplars (embeddings) to keep per class.  [default: 20]"
)
@click.option(
    "--budget",
    callback=parse_bytes,
    metavar="SIZE",
    help="Upper limit for the data that the new model retains, such as 10M.",
)
@click.option("--drop", multiple=True, metavar="CLASS", help="Remove a class.")
@click.option("--merge", multiple=True, callback=_parse_merges, metavar="A,B=C", help="Merge classes; A=C renames one.")
@click.option(
    "--test", multiple=True, metavar="CACHE|ARCHIVE", help="Held-out images for the comparison; never trained on."
)
@click.option(
    "--calibration", multiple=True, metavar="CACHE|ARCHIVE", help="Held-out images for calibrating prediction sets."
)
@click.option(
    "--keep",
    metavar="WHAT",
    help="Data to retain for later steps: none, all, statistics, importances, rows=N, network.  [default: as before]",
)
@click.option(
    "--unfreeze",
    default="head",
    show_default=True,
    metavar="WHAT",
    help="Experimental: part of the backbone to train too, on archives; values as for `featpipe finetune`.",
)
@add_options(
    settings_option(
        "--set",
        "settings",
        "Setting: epochs, selection, temperature, strength; with --unfreeze also learning_rate, batch, …",
    ),
    settings_option("--augment", "augmentation", "Augmentation of images with --unfreeze, such as flip=0.5."),
    RESUME_OPTION,
    *MODEL_OPTIONS,
)
@click.option(
    "--out", metavar="MODEL", help="File of the new model.  [default: MODEL with the suffix .N-classes.model]"
)
@add_options(OVERWRITE_OPTION, JSON_OPTION)
def expand(
    model: str,
    data: tuple[str, ...],
    overwrite: bool,
    backbone: str | None,
    device: str,
    settings: dict[str, Any],
    augmentation: dict[str, Any],
    as_json: bool,
    **options: Any,
) -> None:
    """Add classes to a model (class-incremental learning).

    If the cache of the old training images is given too, the model is trained on old and new classes together; old
    images are recognized by their bytes. Otherwise, forgetting depends on the method and on the training data that the
    model retains (see `featpipe info MODEL`); a table shows it. Without new images, classes are only removed or merged.
    With --unfreeze (experimental), part of the backbone is trained too. Prints the path of the new model.

    \b
    Example:
      featpipe expand photos.model cache/more-photos.h5 --method replay
    """
    from featpipe.incremental import expand as run
    from featpipe.model import load_model

    claim = claim_outputs(
        model, *data, *options["test"], *options["calibration"], options["labels"], overwrite=overwrite
    )
    if options["out"] is not None:
        claim.add(options["out"])
    loaded_model = load_model(model, backbone=backbone, device=device)
    options |= {name: list(options[name]) for name in ("test", "calibration", "drop")}
    params = dict(settings)
    if options["unfreeze"].strip() != "head":
        params |= {"device": loaded_model.device} | ({"augmentation": augmentation} if augmentation else {})
    elif augmentation:
        raise click.UsageError("--augment needs --unfreeze: without it, training uses cached embeddings, not images")

    def claim_path(model_path: Path, n_classes: int) -> Path:
        return claim.add(_make_output_path(model_path, n_classes))

    with Terminal() as terminal:
        expansion = run(loaded_model, list(data), params=params, place=claim_path, progress=terminal, **options)
    claim.record()
    if as_json:
        print_json({"model": str(expansion.model.path), **expansion.to_dict()})
        return
    _print_expansion(expansion)
    click.echo(expansion.model.path)


def _make_output_path(model_path: Path, n_classes: int) -> Path:
    """Path beside the old model; never the same file."""
    stem = re.sub(r"\.\d+-classes(-\d+)?$", "", model_path.name.removesuffix(".model"))
    candidates = (f"{stem}.{n_classes}-classes{f'-{number}' if number > 1 else ''}.model" for number in count(1))
    return model_path.with_name(next(name for name in candidates if name != model_path.name))


def _print_expansion(expansion: Expansion) -> None:
    """Print the epochs of the selected method and the comparison."""
    for rows in (expansion.curve_table(), expansion.as_table() if expansion.outcomes else []):
        if rows:
            log_message(format_table(rows[1:], rows[0], right_aligned=range(1, len(rows[0]))) + "\n", event="table")
    if expansion.outcomes:
        log_message(f"measured on {expansion.how}; 95 % intervals")
    for method, reason in expansion.unavailable.items() if expansion.recommended else []:
        log_message(f"{method} {reason}")
    if expansion.recommended:
        log_message(f"recommended: {expansion.recommended}")
