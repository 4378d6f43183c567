"""``featpipe demo``."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import click

from featpipe.cli.options import JSON_OPTION, OVERWRITE_OPTION, add_options
from featpipe.cli.terminal import Terminal, get_command_line, print_json
from featpipe.runtime import format_table
from featpipe.storage import claim_folder


@click.command()
@click.option("--out", default="demo", show_default=True, metavar="DIR", help="Output folder.")
@add_options(OVERWRITE_OPTION, JSON_OPTION)
def demo(out: str, overwrite: bool, as_json: bool) -> None:
    """Run the full pipeline on sample photos; needs no download.

    Tiles of seventeen photos are embedded with an ImageNet backbone; three heads are trained on the left half of each
    photo and tested on the right half.

    \b
    Example:
      featpipe demo --out demo
    """
    from featpipe.demo import run_demo

    claim_folder(Path(out), "demo", overwrite=overwrite)
    started = perf_counter()
    with Terminal() as terminal:
        result = run_demo(Path(out), terminal, get_command_line())
    if as_json:
        scores = [{"name": row.name, "accuracy": row.score.value} for row in result.comparison]
        paths = {"cache": str(result.cache.path), "report": str(result.report)}
        print_json({**paths, "chosen": result.best_head, "comparison": scores})
        return
    rows = []
    for row in result.comparison:
        seconds = f"{row.seconds_to_fit:.2f}" if row.seconds_to_fit else ""
        rows.append(["→" if row.is_selected else "", row.name, str(row.score), seconds, row.note])
    click.echo(f"\nAccuracy on {result.n_tested} tiles from the right halves, with 95 % intervals\n")
    click.echo(format_table(rows, ["", "", "accuracy", "fit s", ""], right_aligned=[3]))
    click.echo("\nSome predictions of the selected head\n")
    examples = [
        [name, predicted_class, f"{probability:.2f}", "" if predicted_class == true_class else f"no: {true_class}"]
        for name, true_class, predicted_class, probability in result.examples
    ]
    click.echo(format_table(examples, ["tile", "predicted", "", ""]))
    model_paths = ", ".join(map(str, result.models.values()))
    click.echo(
        f"""
Finished in {perf_counter() - started:.0f} s: {result.archive}, {result.cache.path}, {model_paths}
Open {result.report} in a browser.

With your own images, one folder per class:
  featpipe extract photos/
  featpipe train cache/photos-*.h5
  featpipe predict cache/photos-*.logistic.model more-photos/"""
    )
