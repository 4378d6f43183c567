"""Options that several commands share, each with one definition and one help text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from featpipe.cli.completion import BACKBONE_NAME
from featpipe.config import TASKS, ExtractionConfig, get_choices, get_field_types, get_range, is_integer_type

EXTRACTION_DEFAULTS = ExtractionConfig()


def make_option_type(settings_class: type, name: str) -> click.ParamType:
    """The type of an option from the field of a settings class: its choices or its bounds."""
    annotation = get_field_types(settings_class)[name]
    choices, bounds = get_choices(annotation), get_range(annotation)
    if choices:
        return click.Choice(choices)
    range_type: Any = click.IntRange if is_integer_type(annotation) else click.FloatRange
    return range_type(bounds.minimum, bounds.maximum)


_OptionDecorator = Callable[..., Callable[[Any], Any]]
_option: Callable[..., _OptionDecorator] = partial(partial, click.option)

NETWORK_OPTIONS = (
    _option(
        "--backbone",
        default=EXTRACTION_DEFAULTS.backbone,
        type=BACKBONE_NAME,
        show_default=True,
        metavar="NAME",
        help="Name of the backbone; see `featpipe backbones`.",
    ),
    _option(
        "--weights",
        metavar="FILE|NAME|none",
        help="Weights: a file, a published name, or none for random.  [default: the published ones]",
    ),
    _option(
        "--output",
        "outputs",
        multiple=True,
        metavar="NODE[:POOL]",
        help="Output of the backbone to cache.  [default: pooled]",
    ),
)
PRECISION_OPTION = _option(
    "--precision",
    type=make_option_type(ExtractionConfig, "precision"),
    default=EXTRACTION_DEFAULTS.precision,
    show_default=True,
    help="Precision of the forward pass; auto takes the fastest that meets --min-cosine.",
)
DEVICE_OPTION = _option(
    "--device",
    default=EXTRACTION_DEFAULTS.device,
    show_default=True,
    metavar="D",
    help="Device: auto, cpu, cuda, cuda:N or mps.",
)
MULTI_DEVICE_OPTION = _option(
    "--device",
    default=EXTRACTION_DEFAULTS.device,
    show_default=True,
    metavar="D",
    help="Device: auto, cpu, cuda, cuda:N or mps; several, separated by commas.",
)
MODEL_BACKBONE_OPTION = _option(
    "--backbone", metavar="NAME", help="Backbone as module:function, for a model trained on custom code."
)
CACHE_BACKBONE_OPTION = _option(
    "--backbone", metavar="NAME", help="Backbone as module:function, for a cache computed with custom code."
)
CACHE_OPTION = _option(
    "--cache", default=str(EXTRACTION_DEFAULTS.cache), show_default=True, metavar="DIR", help="Folder of caches."
)
LABELS_OPTION = _option("--labels", metavar="TABLE", help="CSV or Parquet table of paths and labels.")
DEVICE_OPTIONS = (
    MULTI_DEVICE_OPTION,
    _option(
        "--engine",
        type=make_option_type(ExtractionConfig, "engine"),
        default=EXTRACTION_DEFAULTS.engine,
        show_default=True,
        help="CPU inference backend.",
    ),
)
WORKERS_OPTION = _option(
    "--workers",
    type=make_option_type(ExtractionConfig, "workers"),
    metavar="N",
    help="Worker threads.  [default: number of CPU cores]",
)
THROUGHPUT_OPTIONS = (
    WORKERS_OPTION,
    _option(
        "--batch",
        type=make_option_type(ExtractionConfig, "batch"),
        metavar="N",
        help="Images per forward pass.  [default: chosen by device and backbone]",
    ),
)
LIMIT_OPTIONS = (
    _option(
        "--max-bad", metavar="N|P%", help="Stop when more images than this cannot be read: a number or a percentage."
    ),
    _option(
        "--time-limit",
        metavar="TIME",
        help="Stop after 3h, 90m or a number of seconds with exit code 75; run again to resume.",
    ),
)
CHECK_CONTENT_OPTION = _option(
    "--check-content", is_flag=True, help="Read every image, even if its size and modification time are unchanged."
)
SHARD_BYTES_OPTION = _option(
    "--shard-bytes",
    type=make_option_type(ExtractionConfig, "shard_bytes"),
    default=EXTRACTION_DEFAULTS.shard_bytes,
    metavar="N",
    help="Split features larger than this over several files (shards).  [default: 4 GiB]",
)
IDENTITY_OPTIONS = (  # besides the images, these determine the contents of a cache
    *NETWORK_OPTIONS,
    LABELS_OPTION,
    _option("--path-column", metavar="NAME", help="Column of paths in the table.  [default: detected by name]"),
    _option("--label-column", metavar="NAME", help="Column of labels in the table; several, separated by commas."),
    _option("--task", type=click.Choice(TASKS), help="Type of task of the labels."),
    PRECISION_OPTION,
    _option(
        "--min-cosine",
        type=make_option_type(ExtractionConfig, "min_cosine"),
        default=EXTRACTION_DEFAULTS.min_cosine,
        show_default=True,
        help="With --precision auto: least cosine similarity to fp32 on the first images.",
    ),
    _option(
        "--storage",
        type=make_option_type(ExtractionConfig, "storage"),
        default=EXTRACTION_DEFAULTS.storage,
        show_default=True,
        help="Data type of the embeddings in the cache.",
    ),
    _option(
        "--seed", type=int, default=EXTRACTION_DEFAULTS.seed, show_default=True, help="Random seed of --weights none."
    ),
)
RUN_OPTIONS = (  # how and where a cache is computed
    *DEVICE_OPTIONS,
    CACHE_OPTION,
    _option("--out", metavar="FILE.h5", help="File of the cache.  [default: a generated name in --cache]"),
    _option("--overwrite", is_flag=True, help="Replace a cache at --out that has other contents."),
    *THROUGHPUT_OPTIONS,
    *LIMIT_OPTIONS,
    CHECK_CONTENT_OPTION,
    SHARD_BYTES_OPTION,
)
MACHINE_OPTIONS = (*NETWORK_OPTIONS, PRECISION_OPTION, *DEVICE_OPTIONS, *THROUGHPUT_OPTIONS)


def add_options(*decorators: _OptionDecorator, **attributes: Any) -> Callable[[Any], Any]:
    """Decorate a command with options, in this order."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(**attributes)(command)
        return command

    return decorate


def make_extraction_settings(option_values: dict[str, Any]) -> dict[str, Any]:
    """Settings of an extraction, from the values of its options."""
    from featpipe.data import LabelTable

    settings = dict(option_values)
    columns = {name: settings.pop(name) for name in ("path_column", "label_column", "task")}
    if settings["labels"] is not None:
        settings["labels"] = LabelTable(Path(settings["labels"]), **columns)
    elif any(columns.values()):
        raise click.UsageError("--path-column, --label-column and --task describe a table; give it with --labels")
    settings["outputs"] = settings["outputs"] or EXTRACTION_DEFAULTS.outputs
    return settings
