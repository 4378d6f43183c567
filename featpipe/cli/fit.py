"""The command that trains heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.complete import HEAD
from featpipe.cli.log import say
from featpipe.cli.terminal import Terminal, dump, duration, size, table

if TYPE_CHECKING:
    from featpipe.cache import FeatureCache
    from featpipe.model import Model
    from featpipe.training import Comparison

__all__ = ["bytes_option", "train"]

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def bytes_option(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """How many bytes a text such as 2G means."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)i?b?", text.strip().lower())
    if not found:
        raise click.BadParameter(f"{text!r} is no size; write it as in 2G")
    return int(float(found[1]) * UNITS[found[2]])


def _shares(context: click.Context, option: click.Parameter, texts: Sequence[str]) -> dict[str, float] | None:
    shares: dict[str, float] = {}
    for text in texts:
        name, equals, share = text.rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise click.BadParameter(f"{text!r} is not CLASS=SHARE; write it as in cat=0.9")
    return shares or None


@click.command(short_help="Train a head on a cache; prints the path of the model.")
@click.argument("cache", metavar="CACHE")
@click.option(
    "--head",
    "heads",
    multiple=True,
    default=["logistic"],
    type=HEAD,
    metavar="NAME",
    help="See `featpipe heads`; several, or all, are compared and the best is saved.  [default: logistic]",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the head, such as C=10.")
@click.option("--cv", type=click.IntRange(0), default=5, show_default=True, metavar="K", help="Folds; 0 for none.")
@click.option("--tune/--no-tune", default=None, help="Choose settings on inner folds.  [default: C of logistic alone]")
@click.option("--grid", "grids", multiple=True, metavar="KEY=A,B", help="What to try, instead of the head's own grid.")
@click.option("--metric", metavar="NAME", help="What settings and heads are chosen by, such as macro_f1.")
@click.option("--one-standard-error", is_flag=True, help="Take the smallest C within a standard error of the best.")
@click.option("--balance", type=click.Choice(["over", "under", "smote"]), help="Resample rows: classes as frequent.")
@click.option("--calibrate", is_flag=True, help="Make probabilities mean what they say, on held-out rows.")
@click.option("--prior", multiple=True, callback=_shares, metavar="CLASS=SHARE", help="How frequent it is in use.")
@click.option("--groups", metavar="TABLE:COLUMN", help="What images belong to (a patient): never on both sides.")
@click.option("--time", "times", metavar="TABLE:COLUMN", help="When images were made: judged on later ones.")
@click.option("--since", metavar="TIME", help="With --time: judged once, by images from then on, and not on folds.")
@click.option("--without", metavar="TABLE", help="Leave out the images of a table, such as one of --findings.")
@click.option("--output", metavar="NODE[:POOL]", help="Which of the cache's outputs.  [default: the first]")
@click.option(
    "--memory", callback=bytes_option, metavar="SIZE", help="Larger features stay on disk.  [default: what is free]"
)
@click.option(
    "--keep", metavar="WHAT", help="For more classes later: none, all, statistics, rows=N …  [default: no rows]"
)
@click.option("--jobs", type=int, metavar="N", help="Processes for --tune; -1 for all cores.")
@click.option("--seed", type=int, default=0, show_default=True, help="For what is random in training.")
@click.option("--portable", is_flag=True, help="Carry the backbone's weights in the model file.")
@click.option("--backbone", metavar="NAME", help="With --portable, for a cache made with code of your own.")
@click.option("--findings", metavar="DIR", help="Write tables of training images to look at, by the folds.")
@click.option("--out", metavar="MODEL", help="The model's file.  [default: CACHE's name with .HEAD.model]")
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as JSON.")
def train(cache: str, heads: tuple[str, ...], out: str | None, as_json: bool, **asked: Any) -> None:
    """Train a head on a cache; prints the path of the model.

    Its quality is estimated by cross-validation on the training images; the model is then fitted on all of them. The
    strength of logistic is chosen along 45 values, on inner folds, unless it is set.

    \b
    Example:
      featpipe train cache/photos.h5 --head mlp --set hidden=256
      featpipe train cache/photos.h5 --head all --metric macro_f1
    """
    from featpipe.cache import FeatureCache
    from featpipe.heads import TABLE, TASKS, build, refuse_unsavable
    from featpipe.model import Model

    opened = FeatureCache(cache)
    for name in heads:
        if name not in TABLE and name != "all":
            refuse_unsavable(build(name, opened.task if opened.task in TASKS else "classification"))
    several = len(set(heads)) > 1 or "all" in heads
    Model.check_target(_target(out, opened, heads[0]))
    with Terminal() as terminal:
        model, comparison = (
            _compare(opened, heads, asked, terminal) if several else _train(opened, heads, asked, terminal)
        )
    if asked["portable"] and asked["backbone"]:
        model.attach(asked["backbone"])
    path = model.save(_target(out, opened, model.head_name), portable=asked["portable"])
    if as_json:
        dump({"model": str(path), "scores": model.scores, "history": model.history})
        return
    if comparison is not None:
        say(_heads(comparison), event="table")
    estimate = model.scores.get("cross_validation")
    if estimate:
        rows = [[name, _interval(value)] for name, value in estimate["metrics"].items()]
        if "calibration" in estimate:
            found = estimate["calibration"]
            rows.append(["calibration_error", f"{found['error_after']:.3f} (before: {found['error_before']:.3f})"])
        say(table(rows, [estimate["how"], ""]), event="table")
    click.echo(path)


def _target(out: str | None, cache: FeatureCache, head: str) -> Path:
    return Path(out) if out else cache.path.with_suffix(f".{re.sub('[^A-Za-z0-9]+', '-', head)}.model")


def _common(asked: dict[str, Any]) -> dict[str, Any]:
    from featpipe.heads import parse_settings

    grid = {
        key: value if isinstance(value, tuple) else (value,) for key, value in parse_settings(asked["grids"]).items()
    }
    names = (
        "output",
        "tune",
        "metric",
        "one_standard_error",
        "balance",
        "calibrate",
        "prior",
        "groups",
        "times",
        "since",
        "without",
    )
    return {
        **{name: asked[name] for name in (*names, "memory", "keep", "jobs")},
        "grid": grid,
        "random_state": asked["seed"],
    }


def _train(
    cache: FeatureCache, heads: Sequence[str], asked: dict[str, Any], terminal: Terminal
) -> tuple[Model, Comparison | None]:
    from featpipe.heads import parse_settings
    from featpipe.training import train as run

    params = parse_settings(asked["settings"])
    how = {"cv": asked["cv"] or None, "params": params, "findings": asked["findings"], **_common(asked)}
    return run(cache, heads[0], progress=terminal, **how), None


def _compare(
    cache: FeatureCache, heads: Sequence[str], asked: dict[str, Any], terminal: Terminal
) -> tuple[Model, Comparison | None]:
    from featpipe.training import compare

    if asked["settings"] or asked["grids"] or asked["findings"]:
        raise click.UsageError(
            "--set, --grid and --findings are of one head; several are compared with their own settings"
        )
    common = _common(asked)
    del common["grid"]
    names = "all" if "all" in heads else heads
    comparison = compare(cache, names, cv=asked["cv"], progress=terminal, **common)
    return comparison.model, comparison


def _heads(comparison: Comparison) -> str:
    """The heads as a table, the best first."""
    from featpipe.training.selection import shown

    rows = [
        [
            row.head,
            f"{row.score:.3f} ± {row.spread:.3f}",
            *(f"{row.scores[name]:.3f}" for name in _beside(comparison)),
            duration(row.seconds_to_fit),
            f"{row.seconds_to_predict * 1000:,.1f} ms",
            size(row.bytes),
            shown(row.chosen),
        ]
        for row in comparison.rows
    ]
    header = ["head", comparison.rows[0].metric, *_beside(comparison), "fit", "1,000 rows", "size", "tuned"]
    note = "the best is chosen by these very scores: `featpipe evaluate` on other images says how good it is"
    return f"{table(rows, header, right=range(1, len(header) - 1))}\n{note}\n"


def _beside(comparison: Comparison) -> list[str]:
    """Scores that stand beside the one that heads are compared by."""
    first = comparison.rows[0]
    wanted = ("balanced_accuracy", "macro_f1", "mae")
    return [name for name in wanted if name != first.metric and all(name in row.scores for row in comparison.rows)]


def _interval(metric: dict[str, Any]) -> str:
    low, high = metric.get("low"), metric.get("high")
    bounds = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{metric['value']:.3f}{bounds}"
