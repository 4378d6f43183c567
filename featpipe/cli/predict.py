"""``featpipe predict``."""

from __future__ import annotations

from typing import Any

import click

from featpipe.cli.options import (
    CHECK_CONTENT_OPTION,
    LIMIT_OPTIONS,
    MODEL_BACKBONE_OPTION,
    MULTI_DEVICE_OPTION,
    OVERWRITE_OPTION,
    WORKERS_OPTION,
    add_options,
)
from featpipe.cli.outputs import claim_outputs
from featpipe.cli.terminal import Terminal, print_json


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("archives", nargs=-1, required=True, metavar="ARCHIVE...")
@click.option(
    "--out", metavar="FILE", help="File of predictions: .csv, .jsonl or .parquet.  [default: CSV on standard output]"
)
@click.option("--also", multiple=True, metavar="MODEL", help="Another model with the same backbone; adds columns.")
@click.option(
    "--top", type=click.IntRange(1), default=5, show_default=True, metavar="K", help="Number of classes per image."
)
@click.option("--sets", type=float, metavar="LEVEL", help="Add prediction sets with this coverage, such as 0.9.")
@click.option("--cache", metavar="DIR", help="Folder of caches, to store and reuse the embeddings.  [default: none]")
@add_options(
    MODEL_BACKBONE_OPTION, MULTI_DEVICE_OPTION, WORKERS_OPTION, *LIMIT_OPTIONS, CHECK_CONTENT_OPTION, OVERWRITE_OPTION
)
@click.option("--json", "as_json", is_flag=True, help="Print the number of images per status as JSON.")
def predict(
    model: str,
    archives: tuple[str, ...],
    out: str | None,
    also: tuple[str, ...],
    backbone: str | None,
    device: str,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Predict every image of one or more archives.

    Writes one row per image in the archive's order, also for images that cannot be read, in constant memory. The column
    novelty is the out-of-distribution score: the percentile among held-out training images. An interrupted command
    resumes when it is run again; a finished one does nothing until an image, a model or an option changes.

    \b
    Example:
      featpipe predict photos.model 'shards-{000..099}.tar' --out predictions.csv
    """
    from featpipe.model import open_model
    from featpipe.prediction import predict as run

    if as_json and not out:
        raise click.UsageError("--json writes counts to standard output, like the predictions; give --out")
    claim = claim_outputs(model, *archives, *also, overwrite=overwrite)
    if out:
        claim.add(out)
    first_model = open_model(model, device=device)
    if backbone is not None:
        first_model.attach(backbone)
    other_models = [open_model(path) for path in also]
    with Terminal() as terminal:
        counts = run(first_model, list(archives), out, also=other_models, progress=terminal, **settings)
    claim.record()
    if as_json:
        print_json({"out": out, "samples": sum(counts.values()), "status": counts})
    elif out:
        click.echo(out)
