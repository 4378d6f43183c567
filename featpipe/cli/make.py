"""Commands that make something: extract, train."""

from __future__ import annotations

from typing import Any

import click

from featpipe.cli.request import IDENTITY, RUN, options, settings_of
from featpipe.cli.terminal import Terminal, dump, table

__all__ = ["extract", "train"]


@click.command(short_help="Run a frozen network once over images and cache the embeddings.")
@click.argument("archives", nargs=-1, required=True, metavar="ARCHIVE...")
@options(*IDENTITY, *RUN)
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def extract(archives: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Run a frozen network once over images and cache the embeddings.

    ARCHIVE is a folder, a .tar, .tar.gz or .zip, or a table of paths; globs and shards-{000..099}.tar are expanded.
    Prints the path of the cache. Images that any cache in --cache knows are not embedded again.

    \b
    Example:
      featpipe extract photos/ --backbone resnet50 --precision bf16
    """
    from featpipe.extraction import extract as run

    asked = settings_of(settings)
    with Terminal() as terminal:
        cache = run(list(archives), progress=terminal, **asked)
    if as_json:
        dump({"cache": str(cache.path), "samples": len(cache), "bad": cache.bad_rows(), "manifest": cache.manifest})
    else:
        click.echo(cache.path)


@click.command(short_help="Train a head on a cache; prints the path of the model.")
@click.argument("cache", metavar="CACHE")
@click.option("--head", default="logistic", show_default=True, metavar="NAME", help="See `featpipe heads`.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting of the head, such as C=10.")
@click.option("--cv", type=click.IntRange(0), default=5, show_default=True, metavar="K", help="Folds; 0 for none.")
@click.option("--output", metavar="NODE[:POOL]", help="Which of the cache's outputs.  [default: the first]")
@click.option("--seed", type=int, default=0, show_default=True, help="For what is random in training.")
@click.option("--portable", is_flag=True, help="Carry the backbone's weights in the model file.")
@click.option("--backbone", metavar="NAME", help="With --portable, for a cache made with code of your own.")
@click.option("--out", metavar="MODEL", help="The model's file.  [default: CACHE's name with .HEAD.model]")
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as JSON.")
def train(
    cache: str,
    head: str,
    settings: tuple[str, ...],
    cv: int,
    output: str | None,
    seed: int,
    portable: bool,
    backbone: str | None,
    out: str | None,
    as_json: bool,
) -> None:
    """Train a head on a cache; prints the path of the model.

    Its quality is estimated by cross-validation on the training images; the model is then fitted on all of them.

    \b
    Example:
      featpipe train cache/photos.h5 --head mlp --set hidden=256
    """
    from featpipe import heads
    from featpipe.cache import FeatureCache
    from featpipe.training import train as run

    opened = FeatureCache(cache)
    with Terminal() as terminal:
        model = run(
            opened,
            head,
            cv=cv or None,
            params=heads.parse_settings(settings),
            output=output,
            random_state=seed,
            progress=terminal,
        )
    if portable and backbone:
        model.attach(backbone)
    path = model.save(out or opened.path.with_suffix(f".{head}.model"), portable=portable)
    estimate = model.scores.get("cross_validation")
    if as_json:
        dump({"model": str(path), "scores": model.scores, "history": model.history})
        return
    if estimate:
        rows = [[name, _interval(value)] for name, value in estimate["metrics"].items()]
        click.echo(table(rows, [estimate["how"], ""]), err=True)
    click.echo(path)


def _interval(metric: dict[str, Any]) -> str:
    low, high = metric.get("low"), metric.get("high")
    bounds = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{metric['value']:.3f}{bounds}"
