"""``featpipe train``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.completion import HEAD_NAME
from featpipe.cli.logging import log_message
from featpipe.cli.options import (
    CACHE_BACKBONE_OPTION,
    FINDINGS_OPTION,
    JSON_OPTION,
    OVERWRITE_OPTION,
    WITHOUT_OPTION,
    add_options,
    parse_bytes,
    setting,
    settings_option,
)
from featpipe.cli.outputs import claim_outputs
from featpipe.cli.terminal import Terminal, print_json
from featpipe.config import TASKS, TrainingConfig
from featpipe.runtime import format_duration, format_size, format_table

if TYPE_CHECKING:
    from featpipe.model import Model
    from featpipe.training import HeadComparison


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


_setting = partial(setting, TrainingConfig)


@click.command()
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
@add_options(
    settings_option("--set", "params", "Setting of the head, such as C=10."),
    _setting("cv", "Folds of cross-validation; 0 for none.", default=5, metavar="K"),
)
@click.option("--tune/--no-tune", default=None, help="Tune settings on inner folds.  [default: C of logistic only]")
@add_options(
    settings_option("--grid", "grid", "Values to try instead of the default grid.", metavar="KEY=A,B"),
    _setting("metric", "Metric that selects settings and heads, such as macro_f1.", metavar="NAME"),
    _setting("one_standard_error", "Select the smallest C within one standard error of the best."),
    _setting("balance", "Resample rows so that classes are equally frequent."),
    _setting("calibrate", "Calibrate probabilities on held-out rows."),
    _setting(
        "prior",
        "Frequency of a class at prediction time.",
        multiple=True,
        callback=_parse_priors,
        metavar="CLASS=SHARE",
    ),
    _setting("groups", "Groups of images, such as patients; a group is never split.", metavar="TABLE:COLUMN"),
    _setting("times", "Times of images; the model is evaluated on later ones.", flag="--time", metavar="TABLE:COLUMN"),
    _setting("since", "With --time: evaluate once, on images from TIME on, instead of on folds.", metavar="TIME"),
    WITHOUT_OPTION,
    _setting("output", "Output of the cache to train on.  [default: the first]", metavar="NODE[:POOL]"),
    _setting(
        "memory",
        "Features larger than this stay on disk.  [default: free memory]",
        callback=parse_bytes,
        metavar="SIZE",
    ),
    _setting(
        "keep",
        "Data to retain for `featpipe expand`: none, all, statistics, rows=N, …  [default: no rows]",
        metavar="WHAT",
    ),
    _setting("jobs", "Processes of --tune; -1 for all cores.", type=int, metavar="N"),
    _setting("random_state", "Random seed.", flag="--seed", metavar="N"),
)
@click.option("--portable", is_flag=True, help="Include the weights of the backbone in the model file.")
@add_options(CACHE_BACKBONE_OPTION, FINDINGS_OPTION)
@click.option("--out", metavar="MODEL", help="File of the model.  [default: CACHE with the suffix .HEAD.model]")
@add_options(OVERWRITE_OPTION, JSON_OPTION)
def train(
    cache: str,
    heads: tuple[str, ...],
    out: str | None,
    overwrite: bool,
    backbone: str | None,
    portable: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a head on a cache of embeddings.

    Cross-validation on the training images estimates the scores; the model is then fitted on all of them. The
    regularization strength of logistic is selected from 45 values on inner folds, unless it is set. A model at --out
    that the same command made is up to date and is left as it is. Prints the path of the model.

    \b
    Example:
      featpipe train cache/photos.h5 --head mlp --set hidden=256
      featpipe train cache/photos.h5 --head all --metric macro_f1
    """
    from featpipe.cache import FeatureCache
    from featpipe.heads import HEAD_REGISTRY, build, check_savable
    from featpipe.model import Model
    from featpipe.training import compare_or_load, train_or_load

    settings["grid"] = {key: value if isinstance(value, tuple) else (value,) for key, value in settings["grid"].items()}
    compares_heads = len(set(heads)) > 1 or "all" in heads
    if compares_heads and (settings["params"] or settings["grid"] or settings["findings"]):
        raise click.UsageError("--set, --grid and --findings need a single --head; several heads use their defaults")
    feature_cache = FeatureCache(cache)
    for name in heads:
        if name not in HEAD_REGISTRY and name != "all":
            check_savable(build(name, feature_cache.task if feature_cache.task in TASKS else "classification"))

    def make_path(head: str) -> Path:
        return Path(out) if out else feature_cache.path.with_suffix(f".{re.sub('[^A-Za-z0-9]+', '-', head)}.model")

    claim = claim_outputs(cache, settings["without"], *_list_table_paths(settings), overwrite=overwrite)
    for name in HEAD_REGISTRY if "all" in heads else heads:
        claim.add(make_path(name))
    claim.add_findings(settings["findings"])
    Model.check_target(make_path(heads[0]))
    comparison: HeadComparison | None = None
    with Terminal() as terminal:
        if compares_heads:
            names = "all" if "all" in heads else heads
            config = TrainingConfig.from_settings(settings)
            comparison = compare_or_load(feature_cache, names, config, make_path, progress=terminal)
            model = comparison.model
        else:
            config = TrainingConfig.from_settings({**settings, "head": heads[0]})
            model = train_or_load(feature_cache, config, make_path(heads[0]), terminal)
    path = make_path(model.head_name)
    if model.path is None or model.history.get("portable") != portable:
        if portable and backbone:
            model.attach(backbone)
        model.save(path, portable=portable)
    claim.record()
    if as_json:
        print_json({"model": str(path), "scores": model.scores, "history": model.history})
        return
    if comparison is not None:
        log_message(_format_comparison(comparison), event="table")
    _print_estimate(model)
    click.echo(path)


def _list_table_paths(settings: dict[str, Any]) -> list[str]:
    """Paths of the tables of groups and times, which are given as TABLE:COLUMN."""
    return [settings[name].rpartition(":")[0] for name in ("groups", "times") if settings[name]]


def _print_estimate(model: Model) -> None:
    """Print the cross-validated scores."""
    from featpipe.metrics import format_protocol

    estimate = model.scores.get("cross_validation")
    if not estimate:
        return
    rows = [[name, _format_interval(value)] for name, value in estimate["metrics"].items()]
    if "calibration" in estimate:
        calibration = estimate["calibration"]
        error_text = f"{calibration['error_after']:.3f} (before: {calibration['error_before']:.3f})"
        rows.append(["calibration_error", error_text])
    log_message(format_table(rows, [format_protocol(estimate["how"]), ""]), event="table")


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
