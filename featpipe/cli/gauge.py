"""The command that measures a machine."""

from __future__ import annotations

import math
from typing import Any

import click

from featpipe.cli.request import DEFAULT, MACHINE, options
from featpipe.cli.terminal import Terminal, dump, table

__all__ = ["bench"]

SPENT = ("reading", "decoding", "embedding", "committing", "waiting")


@click.command(short_help="Measure how fast this machine can extract, and what stands in the way.")
@click.argument("archives", nargs=-1, metavar="[ARCHIVE]...")
@options(*MACHINE)
@click.option(
    "--seconds", type=click.FloatRange(1), default=24.0, show_default=True, help="About how long, besides preparing."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(archives: tuple[str, ...], seconds: float, as_json: bool, **settings: Any) -> None:
    """Measure how fast this machine can extract, and what stands in the way.

    Reading, decoding and forward passes are measured alone, then an extraction of the same images. Without an ARCHIVE
    made-up photographs are used.

    \b
    Example:
      featpipe bench photos/ --backbone resnet50
    """
    from featpipe.limits import measure

    asked = {**settings, "outputs": settings["outputs"] or DEFAULT.outputs}
    with Terminal() as terminal:
        found = measure(archives, seconds=seconds, progress=terminal, **asked)
    if as_json:
        dump(found.as_dict())
        return
    steps = [
        ("reading", _rate(found.reading)),
        ("decoding", _rate(found.decoding)),
        *((f"forward, {way.engine}, {way.precision}", _rate(way.images_per_second)) for way in found.forward),
        ("bound of all together", _rate(found.bound)),
        ("an extraction", f"{_rate(found.extraction)} ({found.extraction / found.bound:.0%})"),
    ]
    click.echo(table(steps, [found.backbone, "images/s"], right=[1]))
    spent = ", ".join(
        f"{name} {value:.1f} s" for name, value in found.seconds.items() if name not in ("preparing", "total")
    )
    click.echo(f"\nof all workers' time: {spent}; writing {found.writing / 1e6:,.0f} MB/s")
    click.echo(f"bottleneck: {found.bottleneck}")
    for text in found.advice:
        click.echo(f"→ {text}")


def _rate(images_per_second: float) -> str:
    return "–" if math.isinf(images_per_second) else f"{images_per_second:,.1f}"
