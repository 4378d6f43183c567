"""``featpipe train``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.completion import HEAD_NAME
from featpipe.cli.logging import log_message
from featpipe.cli.options import CACHE_BACKBONE_OPTION, add_options, make_option_type
from featpipe.cli.terminal import Terminal, print_json
from featpipe.config import TASKS, TrainingConfig
from featpipe.runtime import format_duration, format_size, format_table

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache
    from featpipe.model import Model
    from featpipe.training import HeadComparison

BYTES_PER_UNIT = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """Number of bytes of a text such as 2G."""
    if text is None:
        return None
    size_match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)i?b?", text.strip().lower())
    if not size_match:
        raise click.BadParameter(f"{text!r} is not a size; an example is 2G")
    return int(float(size_match[1]) * BYTES_PER_UNIT[size_match[2]])


def _parse_priors(context: click.Context, option: click.Parameter, texts: Sequence[str]) -> dict[str, float] | None:
    shares: dict[str, float] = {}
    for text in texts:
        name, separator, share = text.rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise click.BadParameter(f"{text!r} is not CLASS=SHARE; an example is cat=0.9")
    return shares or None


@click.command(short_help="Train a head on a cache of embeddings.")
@click.argument("cache", metavar="CACHE")
@click.option(
    "--head",
    "heads",
    multiple=True,
    default=["logistic"],
    type=HEAD_NAME,
    metavar="NAME",
    help="Head; see `featpipe heads`. Of several, or all, the best is saved.  [default: logistic]",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Setting of the head, such as C=10.")
@click.option(
    "--cv",
    type=make_option_type(TrainingConfig, "cv"),
    default=5,
    show_default=True,
    metavar="K",
    help="Folds of cross-validation; 0 for none.",
)
@click.option("--tune/--no-tune", default=None, help="Tune settings on inner folds.  [default: C of logistic only]")
@click.option("--grid", "grids", multiple=True, metavar="KEY=A,B", help="Values to try instead of the default grid.")
@click.option("--metric", metavar="NAME", help="Metric that selects settings and heads, such as macro_f1.")
@click.option("--one-standard-error", is_flag=True, help="Select the smallest C within one standard error of the best.")
@click.option(
    "--balance",
    type=make_option_type(TrainingConfig, "balance"),
    help="Resample rows so that classes are equally frequent.",
)
@click.option("--calibrate", is_flag=True, help="Calibrate probabilities on held-out rows.")
@click.option(
    "--prior",
    multiple=True,
    callback=_parse_priors,
    metavar="CLASS=SHARE",
    help="Frequency of a class at prediction time.",
)
@click.option("--groups", metavar="TABLE:COLUMN", help="Groups of images, such as patients; a group is never split.")
@click.option("--time", "times", metavar="TABLE:COLUMN", help="Times of images; the model is evaluated on later ones.")
@click.option(
    "--since", metavar="TIME", help="With --time: evaluate once, on images from TIME on, instead of on folds."
)
@click.option(
    "--without", metavar="TABLE", help="Exclude the images listed in a table, such as one written by --findings."
)
@click.option("--output", metavar="NODE[:POOL]", help="Output of the cache to train on.  [default: the first]")
@click.option(
    "--memory",
    callback=parse_bytes,
    metavar="SIZE",
    help="Features larger than this stay on disk.  [default: free memory]",
)
@click.option(
    "--keep",
    metavar="WHAT",
    help="Data to retain for `featpipe expand`: none, all, statistics, rows=N, …  [default: no rows]",
)
@click.option("--jobs", type=int, metavar="N", help="Processes of --tune; -1 for all cores.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@click.option("--portable", is_flag=True, help="Include the weights of the backbone in the model file.")
@add_options(CACHE_BACKBONE_OPTION)
@click.option("--findings", metavar="DIR", help="Write CSV tables of images to inspect to this folder, from the folds.")
@click.option("--out", metavar="MODEL", help="File of the model.  [default: CACHE with the suffix .HEAD.model]")
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as JSON.")
def train(cache: str, heads: tuple[str, ...], out: str | None, as_json: bool, **options: Any) -> None:
    """Train a head on a cache of embeddings.

    Cross-validation on the training images estimates the scores; the model is then fitted on all of them. The
    regularization strength of logistic is selected from 45 values on inner folds, unless it is set. Prints the path of
    the model.

    \b
    Example:
      featpipe train cache/photos.h5 --head mlp --set hidden=256
      featpipe train cache/photos.h5 --head all --metric macro_f1
    """
    from featpipe.cache import FeatureCache
    from featpipe.heads import HEAD_REGISTRY, build, check_savable
    from featpipe.metrics import format_protocol
    from featpipe.model import Model

    feature_cache = FeatureCache(cache)
    for name in heads:
        if name not in HEAD_REGISTRY and name != "all":
            check_savable(build(name, feature_cache.task if feature_cache.task in TASKS else "classification"))
    Model.check_target(_make_model_path(out, feature_cache, heads[0]))
    with Terminal() as terminal:
        model, comparison = _train(feature_cache, heads, options, terminal)
    if options["portable"] and options["backbone"]:
        model.attach(options["backbone"])
    path = model.save(_make_model_path(out, feature_cache, model.head_name), portable=options["portable"])
    if as_json:
        print_json({"model": str(path), "scores": model.scores, "history": model.history})
        return
    if comparison is not None:
        log_message(_format_comparison(comparison), event="table")
    estimate = model.scores.get("cross_validation")
    if estimate:
        rows = [[name, _format_interval(value)] for name, value in estimate["metrics"].items()]
        if "calibration" in estimate:
            calibration = estimate["calibration"]
            rows.append(
                ["calibration_error", f"{calibration['error_after']:.3f} (before: {calibration['error_before']:.3f})"]
            )
        log_message(format_table(rows, [format_protocol(estimate["how"]), ""]), event="table")
    click.echo(path)


def _make_model_path(out: str | None, cache: FeatureCache, head: str) -> Path:
    return Path(out) if out else cache.path.with_suffix(f".{re.sub('[^A-Za-z0-9]+', '-', head)}.model")


def _train(
    cache: FeatureCache, heads: Sequence[str], options: dict[str, Any], terminal: Terminal
) -> tuple[Model, HeadComparison | None]:
    """Train a head, or compare several."""
    from featpipe.config import parse_settings
    from featpipe.training import compare
    from featpipe.training import train as run

    training_options: Any = {
        field.name: options[field.name] for field in fields(TrainingConfig) if field.name in options
    }
    training_options["random_state"] = options["seed"]
    if len(set(heads)) == 1 and "all" not in heads:
        grid = parse_settings(options["grids"])
        training_options["cv"] = options["cv"] or None
        training_options["params"] = parse_settings(options["settings"])
        training_options["grid"] = {key: value if isinstance(value, tuple) else (value,) for key, value in grid.items()}
        return run(cache, heads[0], progress=terminal, **training_options), None
    if options["settings"] or options["grids"] or options["findings"]:
        raise click.UsageError(
            "--set, --grid and --findings need a single --head; several heads are compared with default settings"
        )
    del training_options["findings"]
    comparison = compare(cache, "all" if "all" in heads else heads, progress=terminal, **training_options)
    return comparison.model, comparison


def _format_comparison(comparison: HeadComparison) -> str:
    """Format the heads as a table, the best first."""
    from featpipe.training import format_params

    rows = [
        [
            row.head,
            f"{row.score:.3f} ± {row.spread:.3f}",
            *(f"{row.scores[name]:.3f}" for name in _list_extra_metrics(comparison)),
            format_duration(row.seconds_to_fit),
            f"{row.seconds_to_predict * 1000:,.1f} ms",
            format_size(row.bytes),
            format_params(row.chosen),
        ]
        for row in comparison.rows
    ]
    header = ["head", comparison.rows[0].metric, *_list_extra_metrics(comparison), "fit", "1,000 rows", "size", "tuned"]
    note = (
        "the best head is selected by these scores, so they are optimistic; `featpipe evaluate` on other images is not"
    )
    return f"{format_table(rows, header, right_aligned=range(1, len(header) - 1))}\n{note}\n"


def _list_extra_metrics(comparison: HeadComparison) -> list[str]:
    """Metrics shown beside the one that selects."""
    first = comparison.rows[0]
    candidates = ("balanced_accuracy", "macro_f1", "mae")
    return [name for name in candidates if name != first.metric and all(name in row.scores for row in comparison.rows)]


def _format_interval(metric: dict[str, Any]) -> str:
    low, high = metric.get("low"), metric.get("high")
    bounds = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{metric['value']:.3f}{bounds}"
