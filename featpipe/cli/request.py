"""What an extraction is asked for, as options: of the command that makes a cache and of those that compare with one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from featpipe.cli.complete import BACKBONE
from featpipe.recipe import AUTO, ENGINES, PRECISIONS, STORAGES, Extraction

__all__ = ["CHECK_CONTENT", "DEVICE", "IDENTITY", "LIMITS", "MACHINE", "RUN", "SHARD_BYTES", "options", "settings_of"]

DEFAULT = Extraction()

_Option = Callable[..., Callable[[Any], Any]]
_option: Callable[..., _Option] = partial(partial, click.option)

NETWORK = (
    _option(
        "--backbone",
        default=DEFAULT.backbone,
        type=BACKBONE,
        show_default=True,
        metavar="NAME",
        help="See `featpipe backbones`.",
    ),
    _option("--weights", metavar="FILE|NAME|none", help="Other than the published default."),
    _option("--output", "outputs", multiple=True, metavar="NODE[:POOL]", help="What to cache.  [default: pooled]"),
)
PRECISION = _option("--precision", type=click.Choice([*PRECISIONS, AUTO]), default=DEFAULT.precision, show_default=True)
DEVICE = (
    _option(
        "--device",
        default=DEFAULT.device,
        show_default=True,
        metavar="D",
        help="auto, cpu, cuda, cuda:N, mps; several: A,B.",
    ),
    _option(
        "--engine", type=click.Choice(ENGINES), default=DEFAULT.engine, show_default=True, help="Computes on a CPU."
    ),
)
PACE = (
    _option("--workers", type=click.IntRange(1), metavar="N", help="Threads.  [default: the machine's cores]"),
    _option("--batch", type=click.IntRange(1), metavar="N", help="Images in one forward pass."),
)
LIMITS = (
    _option("--max-bad", metavar="N|P%", help="Stop when more images than this cannot be read."),
    _option(
        "--time-limit", metavar="TIME", help="Stop after 3h, 90m or so many seconds, to go on later: exit code 75."
    ),
)
CHECK_CONTENT = _option(
    "--check-content", is_flag=True, help="Read every image, even where size and time say it is unchanged."
)
SHARD_BYTES = _option(
    "--shard-bytes",
    type=click.IntRange(1),
    default=DEFAULT.shard_bytes,
    metavar="N",
    help="Spread larger features over several files of about this size.  [default: 4 GiB]",
)
IDENTITY = (  # what decides the content of a cache, besides the images
    *NETWORK,
    _option("--labels", metavar="TABLE", help="A CSV or Parquet table of paths and labels."),
    _option("--path-column", metavar="NAME", help="The table's column of paths.  [default: found by its name]"),
    _option("--label-column", metavar="NAME", help="The table's column of labels, or several joined by commas."),
    _option("--task", type=click.Choice(["classification", "regression", "multilabel"]), help="What the labels are."),
    PRECISION,
    _option(
        "--min-cosine",
        type=click.FloatRange(0, 1),
        default=DEFAULT.min_cosine,
        show_default=True,
        help="To fp32, on the first images: what --precision auto accepts.",
    ),
    _option("--storage", type=click.Choice(STORAGES), default=DEFAULT.storage, show_default=True),
    _option("--seed", type=int, default=DEFAULT.seed, show_default=True, help="For --weights none."),
)
RUN = (  # what decides how and where it is made
    *DEVICE,
    _option("--cache", default=str(DEFAULT.cache), show_default=True, metavar="DIR", help="Where caches are kept."),
    _option("--out", metavar="FILE.h5", help="The cache's own file, instead of a made name in --cache."),
    _option("--overwrite", is_flag=True, help="Replace a cache at --out that was made otherwise."),
    *PACE,
    *LIMITS,
    CHECK_CONTENT,
    SHARD_BYTES,
)
MACHINE = (*NETWORK, PRECISION, *DEVICE, *PACE)


def options(*several: _Option, **more: Any) -> Callable[[Any], Any]:
    """Options for a command, in this order."""

    def decorated(command: Any) -> Any:
        for option in reversed(several):
            command = option(**more)(command)
        return command

    return decorated


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of an extraction from what was given for all of its options."""
    from featpipe.archive import Table

    settings = dict(given)
    columns = {name: settings.pop(name) for name in ("path_column", "label_column", "task")}
    if settings["labels"] is not None:
        settings["labels"] = Table(Path(settings["labels"]), **columns)
    elif any(columns.values()):
        raise click.UsageError("--path-column, --label-column and --task describe a table; give it with --labels")
    settings["outputs"] = settings["outputs"] or DEFAULT.outputs
    return settings
