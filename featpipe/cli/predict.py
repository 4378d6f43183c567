"""``featpipe predict``."""

from __future__ import annotations

from typing import Any

import click

from featpipe.cli.options import CHECK_CONTENT_OPTION, LIMIT_OPTIONS, add_options
from featpipe.cli.terminal import Terminal, print_json

__all__ = ["predict"]


@click.command(short_help="Predict every image of some archives.")
@click.argument("model", metavar="MODEL")
@click.argument("archives", nargs=-1, required=True, metavar="ARCHIVE...")
@click.option("--out", metavar="FILE", help="A .csv, .jsonl or .parquet file.  [default: CSV on standard output]")
@click.option("--also", multiple=True, metavar="MODEL", help="Another model, by the same forward pass: more columns.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, metavar="K", help="Classes to name.")
@click.option(
    "--sets", type=float, metavar="LEVEL", help="Name classes that hold the right one this often, such as 0.9."
)
@click.option("--cache", metavar="DIR", help="Keep the embeddings as a cache, and take from it what is there.")
@click.option("--backbone", metavar="NAME", help="Needed for a model that was trained on code of your own.")
@click.option(
    "--device", default="auto", show_default=True, metavar="D", help="auto, cpu, cuda, cuda:N, mps; several: A,B."
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads.  [default: the machine's cores]")
@add_options(*LIMIT_OPTIONS, CHECK_CONTENT_OPTION)
@click.option("--json", "as_json", is_flag=True, help="Print how many samples have which status, as JSON.")
def predict(
    model: str,
    archives: tuple[str, ...],
    out: str | None,
    also: tuple[str, ...],
    backbone: str | None,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Predict every image of some archives.

    One row for each sample, in the archive's order, also for those that cannot be read; memory is flat. The column
    novelty says which share of training-like images look less new. Interrupted, the same command goes on; finished, it
    does nothing until an image, a model or an option changes.

    \b
    Example:
      featpipe predict photos.model 'shards-{000..099}.tar' --out predictions.csv
    """
    from featpipe.model import load_model
    from featpipe.prediction import predict as run

    if as_json and not out:
        raise click.UsageError("--json prints counts on standard output, where the predictions would go; give --out")
    loaded_model = load_model(model, backbone=backbone, device=device)
    other_models = [load_model(path) for path in also]
    with Terminal() as terminal:
        counts = run(loaded_model, list(archives), out, also=other_models, progress=terminal, **settings)
    if as_json:
        print_json({"out": out, "samples": sum(counts.values()), "status": counts})
    elif out:
        click.echo(out)
