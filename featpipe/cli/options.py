"""Options that several commands share, each with one definition and one help text."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from featpipe.cli.completion import BACKBONE_NAME
from featpipe.config import (
    TASKS,
    ExtractionConfig,
    Range,
    get_choices,
    get_field_types,
    get_range,
    is_integer_type,
    parse_settings,
)

BYTES_PER_UNIT = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}

_OptionDecorator = Callable[..., Callable[[Any], Any]]
_option: Callable[..., _OptionDecorator] = partial(partial, click.option)


def setting(settings_class: Any, name: str, help: str, *, flag: str = "", **attributes: Any) -> _OptionDecorator:
    """Make an option for a field of a settings class, with the type, bounds and default of the field.

    Parameters
    ----------
    settings_class : type
    name : str
        Name of the field, and of the option unless `flag` is given.
    help : str
    flag : str
    **attributes
        Attributes of the click option, which take precedence.
    """
    annotation = get_field_types(settings_class)[name]
    default = attributes.get("default", settings_class.__dataclass_fields__[name].default)
    if annotation is bool:
        attributes["is_flag"] = True
    elif choices := get_choices(annotation):
        attributes.setdefault("type", click.Choice(choices))
    elif "type" not in attributes and "callback" not in attributes and get_range(annotation) != Range():
        bounds = get_range(annotation)
        range_type: Any = click.IntRange if is_integer_type(annotation) else click.FloatRange
        attributes["type"] = range_type(bounds.minimum, bounds.maximum)
    if default is not None and annotation is not bool:
        attributes = {"default": default, "show_default": "[default:" not in help, **attributes}
    return _option(flag or f"--{name.replace('_', '-')}", name, help=help, **attributes)


def settings_option(flag: str, name: str, help: str, metavar: str = "KEY=VALUE") -> _OptionDecorator:
    """Make an option that is given once for each setting; its value is a dict."""
    return _option(
        flag, name, multiple=True, callback=lambda _, __, texts: parse_settings(texts), metavar=metavar, help=help
    )


def parse_bytes(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """Parse a number of bytes such as 2G."""
    if text is None:
        return None
    size_match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)i?b?", text.strip().lower())
    if not size_match:
        raise click.BadParameter(f"{text!r} is not a size; an example is 2G")
    return int(float(size_match[1]) * BYTES_PER_UNIT[size_match[2]])


JSON_OPTION = _option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
OVERWRITE_CACHE_OPTION = _option("--overwrite", is_flag=True, help="Replace a cache at --out that has other contents.")
OVERWRITE_OPTION = _option("--overwrite", is_flag=True, help="Replace output files that another command wrote.")
RESUME_OPTION = _option(
    "--resume/--restart", default=True, show_default=True, help="Resume from the checkpoint beside --out, or restart."
)
FINDINGS_OPTION = _option("--findings", metavar="DIR", help="Write CSV tables of images to inspect to this folder.")
WITHOUT_OPTION = _option(
    "--without", metavar="TABLE", help="Exclude the images listed in a table, such as one written by --findings."
)
LABELS_OPTION = _option("--labels", metavar="TABLE", help="CSV or Parquet table of paths and labels.")
CACHE_OPTION = setting(ExtractionConfig, "cache", "Folder of caches.", metavar="DIR")
DEVICE_OPTION = setting(ExtractionConfig, "device", "Device: auto, cpu, cuda, cuda:N or mps.", metavar="D")
MULTI_DEVICE_OPTION = setting(
    ExtractionConfig, "device", "Device: auto, cpu, cuda, cuda:N or mps; several, separated by commas.", metavar="D"
)
MODEL_BACKBONE_OPTION = _option(
    "--backbone", metavar="NAME", help="Backbone as module:function, for a model trained on a custom network."
)
CACHE_BACKBONE_OPTION = _option(
    "--backbone", metavar="NAME", help="Backbone as module:function, for a cache computed with a custom network."
)
MODEL_OPTIONS = (LABELS_OPTION, CACHE_OPTION, MODEL_BACKBONE_OPTION, DEVICE_OPTION)  # of a model and its images
NETWORK_OPTIONS = (
    setting(
        ExtractionConfig,
        "backbone",
        "Name of the backbone; see `featpipe backbones`.",
        type=BACKBONE_NAME,
        metavar="NAME",
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
PRECISION_OPTION = setting(
    ExtractionConfig, "precision", "Precision of the forward pass; auto takes the fastest that meets --min-cosine."
)
DEVICE_OPTIONS = (MULTI_DEVICE_OPTION, setting(ExtractionConfig, "engine", "CPU inference backend."))
WORKERS_OPTION = setting(ExtractionConfig, "workers", "Worker threads.  [default: number of CPU cores]", metavar="N")
THROUGHPUT_OPTIONS = (
    WORKERS_OPTION,
    setting(
        ExtractionConfig, "batch", "Images per forward pass.  [default: chosen by device and backbone]", metavar="N"
    ),
)
LIMIT_OPTIONS = (
    _option(
        "--max-bad", metavar="N|P%", help="Stop if more images than this cannot be read: a number or a percentage."
    ),
    _option(
        "--time-limit",
        metavar="TIME",
        help="Stop after 3h, 90m or a number of seconds with exit code 75; run again to resume.",
    ),
)
CHECK_CONTENT_OPTION = setting(
    ExtractionConfig, "check_content", "Read every image, even if its size and modification time are unchanged."
)
SHARD_BYTES_OPTION = setting(
    ExtractionConfig,
    "shard_bytes",
    "Split features larger than this over several files (shards).  [default: 4 GiB]",
    metavar="N",
)
IDENTITY_OPTIONS = (  # besides the images, these determine the contents of a cache
    *NETWORK_OPTIONS,
    LABELS_OPTION,
    _option("--path-column", metavar="NAME", help="Column of paths in the table.  [default: detected by name]"),
    _option("--label-column", metavar="NAME", help="Column of labels in the table; several, separated by commas."),
    _option("--task", type=click.Choice(TASKS), help="Task of the labels.  [default: detected by type]"),
    PRECISION_OPTION,
    setting(
        ExtractionConfig, "min_cosine", "With --precision auto: minimum cosine similarity to fp32 on the first images."
    ),
    setting(ExtractionConfig, "storage", "Data type of the embeddings in the cache."),
    setting(ExtractionConfig, "seed", "Random seed of --weights none.", metavar="N"),
)
RUN_OPTIONS = (  # how and where a cache is computed
    *DEVICE_OPTIONS,
    CACHE_OPTION,
    _option("--out", metavar="FILE.h5", help="File of the cache.  [default: a generated name in --cache]"),
    OVERWRITE_CACHE_OPTION,
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
    """Make the keyword arguments of an extraction from the values of its options."""
    from featpipe.data import LabelTable

    settings = dict(option_values)
    columns = {name: settings.pop(name) for name in ("path_column", "label_column", "task")}
    if settings["labels"] is not None:
        settings["labels"] = LabelTable(Path(settings["labels"]), **columns)
    elif any(columns.values()):
        raise click.UsageError(
            "--path-column, --label-column and --task describe a table of labels; give the table with --labels"
        )
    settings["outputs"] = settings["outputs"] or ExtractionConfig.outputs
    return settings
