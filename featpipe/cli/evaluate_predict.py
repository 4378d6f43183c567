"""Commands that use a model: evaluate, predict."""

from __future__ import annotations

from typing import Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.options import CHECK_CONTENT_OPTION, LIMIT_OPTIONS, add_options
from featpipe.cli.terminal import Terminal, print_json

__all__ = ["evaluate", "predict"]


@click.command(short_help="Score a model on images that it was not trained on.")
@click.argument("model", metavar="MODEL")
@click.argument("data", nargs=-1, required=True, metavar="CACHE|ARCHIVE...")
@click.option("--against", multiple=True, metavar="MODEL", help="Compare with another model on the same rows.")
@click.option("--labels", metavar="TABLE", help="A CSV or Parquet table of paths and labels, for archives.")
@click.option("--without", metavar="TABLE", help="Leave out the samples of a table, such as one of --findings.")
@click.option(
    "--trained-on", metavar="CACHE", help="What the model was trained on, for near-duplicates.  [default: looked for]"
)
@click.option("--near", type=click.FloatRange(0, 1, min_open=True), metavar="COSINE", help="Of near-duplicates.")
@click.option("--cache", default="cache", show_default=True, metavar="DIR", help="Where caches are kept.")
@click.option("--backbone", metavar="NAME", help="Needed for a model that was trained on code of your own.")
@click.option("--device", default="auto", show_default=True, metavar="D", help="auto, cpu, cuda, cuda:N, mps.")
@click.option("--report", metavar="PAGE.html", help="Write a page with pictures.")
@click.option("--findings", metavar="DIR", help="Write tables of what to look at next, as CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print scores and findings as JSON.")
def evaluate(
    model: str,
    data: tuple[str, ...],
    against: tuple[str, ...],
    backbone: str | None,
    device: str,
    report: str | None,
    findings: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score a model on images that it was not trained on.

    Images whose bytes were among the training images are left out, and counted; near-duplicates of them are counted.

    \b
    Example:
      featpipe evaluate photos.model new-photos/ --report page.html
      featpipe evaluate photos.model cache/photos.h5 --against other.model --findings findings/
    """
    from featpipe import experiments
    from featpipe.diagnostics import write_findings
    from featpipe.evaluation import evaluate as run
    from featpipe.model import load_model

    loaded_model = load_model(model, backbone=backbone, device=device)
    baselines = [load_model(path, backbone=backbone, device=device) for path in against]
    settings = {name: value for name, value in settings.items() if value is not None}
    with Terminal() as terminal:
        evaluation = run(loaded_model, list(data), against=baselines, progress=terminal, **settings)
        if report:
            experiments.write_report(report, evaluation, command=experiments.command_line())
        finding_paths = write_findings(evaluation.findings, findings) if findings else []
    if as_json:
        print_json(evaluation.to_dict())
        return
    click.echo(evaluation.table())
    for path in [*([report] if report else []), *map(str, finding_paths)]:
        log_message(path)


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
