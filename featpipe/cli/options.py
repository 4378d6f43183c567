"""What an extraction is asked for, as options: of the command that makes a cache and of those that compare with one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from featpipe.cli.completion import BACKBONE_NAME
from featpipe.config import AUTO, ENGINES, PRECISIONS, STORAGES, TASKS, ExtractionConfig

__all__ = [
    "CHECK_CONTENT_OPTION",
    "DEVICE_OPTIONS",
    "IDENTITY_OPTIONS",
    "LIMIT_OPTIONS",
    "MACHINE_OPTIONS",
    "RUN_OPTIONS",
    "SHARD_BYTES_OPTION",
    "add_options",
    "make_extraction_settings",
]

EXTRACTION_DEFAULTS = ExtractionConfig()

_OptionDecorator = Callable[..., Callable[[Any], Any]]
_option: Callable[..., _OptionDecorator] = partial(partial, click.option)

NETWORK_OPTIONS = (
    _option(
        "--backbone",
        default=EXTRACTION_DEFAULTS.backbone,
        type=BACKBONE_NAME,
        show_default=True,
        metavar="NAME",
        help="See `featpipe backbones`.",
    ),
    _option("--weights", metavar="FILE|NAME|none", help="Other than the published default."),
    _option("--output", "outputs", multiple=True, metavar="NODE[:POOL]", help="What to cache.  [default: pooled]"),
)
PRECISION_OPTION = _option(
    "--precision", type=click.Choice([*PRECISIONS, AUTO]), default=EXTRACTION_DEFAULTS.precision, show_default=True
)
DEVICE_OPTIONS = (
    _option(
        "--device",
        default=EXTRACTION_DEFAULTS.device,
        show_default=True,
        metavar="D",
        help="auto, cpu, cuda, cuda:N, mps; several: A,B.",
    ),
    _option(
        "--engine",
        type=click.Choice(ENGINES),
        default=EXTRACTION_DEFAULTS.engine,
        show_default=True,
        help="Computes on a CPU.",
    ),
)
THROUGHPUT_OPTIONS = (
    _option("--workers", type=click.IntRange(1), metavar="N", help="Threads.  [default: the machine's cores]"),
    _option("--batch", type=click.IntRange(1), metavar="N", help="Images in one forward pass."),
)
LIMIT_OPTIONS = (
    _option("--max-bad", metavar="N|P%", help="Stop when more images than this cannot be read."),
    _option(
        "--time-limit", metavar="TIME", help="Stop after 3h, 90m or so many seconds, to go on later: exit code 75."
    ),
)
CHECK_CONTENT_OPTION = _option(
    "--check-content", is_flag=True, help="Read every image, even where size and time say it is unchanged."
)
SHARD_BYTES_OPTION = _option(
    "--shard-bytes",
    type=click.IntRange(1),
    default=EXTRACTION_DEFAULTS.shard_bytes,
    metavar="N",
    help="Spread larger features over several files of about this size.  [default: 4 GiB]",
)
IDENTITY_OPTIONS = (  # what decides the content of a cache, besides the images
    *NETWORK_OPTIONS,
    _option("--labels", metavar="TABLE", help="A CSV or Parquet table of paths and labels."),
    _option("--path-column", metavar="NAME", help="The table's column of paths.  [default: found by its name]"),
    _option("--label-column", metavar="NAME", help="The table's column of labels, or several joined by commas."),
    _option("--task", type=click.Choice(TASKS), help="What the labels are."),
    PRECISION_OPTION,
    _option(
        "--min-cosine",
        type=click.FloatRange(0, 1),
        default=EXTRACTION_DEFAULTS.min_cosine,
        show_default=True,
        help="To fp32, on the first images: what --precision auto accepts.",
    ),
    _option("--storage", type=click.Choice(STORAGES), default=EXTRACTION_DEFAULTS.storage, show_default=True),
    _option("--seed", type=int, default=EXTRACTION_DEFAULTS.seed, show_default=True, help="For --weights none."),
)
RUN_OPTIONS = (  # what decides how and where it is made
    *DEVICE_OPTIONS,
    _option(
        "--cache",
        default=str(EXTRACTION_DEFAULTS.cache),
        show_default=True,
        metavar="DIR",
        help="Where caches are kept.",
    ),
    _option("--out", metavar="FILE.h5", help="The cache's own file, instead of a made name in --cache."),
    _option("--overwrite", is_flag=True, help="Replace a cache at --out that was made otherwise."),
    *THROUGHPUT_OPTIONS,
    *LIMIT_OPTIONS,
    CHECK_CONTENT_OPTION,
    SHARD_BYTES_OPTION,
)
MACHINE_OPTIONS = (*NETWORK_OPTIONS, PRECISION_OPTION, *DEVICE_OPTIONS, *THROUGHPUT_OPTIONS)


def add_options(*decorators: _OptionDecorator, **attributes: Any) -> Callable[[Any], Any]:
    """Options for a command, in this order."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(**attributes)(command)
        return command

    return decorate


def make_extraction_settings(option_values: dict[str, Any]) -> dict[str, Any]:
    """The settings of an extraction from what was given for all of its options."""
    from featpipe.data import LabelTable

    settings = dict(option_values)
    columns = {name: settings.pop(name) for name in ("path_column", "label_column", "task")}
    if settings["labels"] is not None:
        settings["labels"] = LabelTable(Path(settings["labels"]), **columns)
    elif any(columns.values()):
        raise click.UsageError("--path-column, --label-column and --task describe a table; give it with --labels")
    settings["outputs"] = settings["outputs"] or EXTRACTION_DEFAULTS.outputs
    return settings
