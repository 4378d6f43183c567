"""``featpipe bench``."""

from __future__ import annotations

import math
from typing import Any

import click

from featpipe.cli.options import JSON_OPTION, MACHINE_OPTIONS, add_options
from featpipe.cli.terminal import Terminal, print_json
from featpipe.config import ExtractionConfig
from featpipe.runtime import format_table


@click.command()
@click.argument("archives", nargs=-1, metavar="[ARCHIVE]...")
@add_options(*MACHINE_OPTIONS)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=24.0,
    show_default=True,
    metavar="S",
    help="Approximate duration in seconds, without preparation.",
)
@add_options(JSON_OPTION)
def bench(archives: tuple[str, ...], seconds: float, as_json: bool, **settings: Any) -> None:
    """Benchmark extraction on this machine and find the bottleneck.

    Reading, decoding and forward passes are measured one by one, then a whole extraction of the same images. Without an
    ARCHIVE, synthetic images are used.

    \b
    Example:
      featpipe bench photos/ --backbone resnet50
    """
    from featpipe.bench import run_benchmark

    bench_settings = {**settings, "outputs": settings["outputs"] or ExtractionConfig.outputs}
    with Terminal():
        result = run_benchmark(archives, seconds=seconds, **bench_settings)
    if as_json:
        print_json(result.to_dict())
        return
    rate_rows = [
        ("reading", _format_rate(result.reading)),
        ("decoding", _format_rate(result.decoding)),
        *(
            (f"forward, {forward.engine}, {forward.precision}", _format_rate(forward.images_per_second))
            for forward in result.forward
        ),
        ("upper bound of all steps", _format_rate(result.bound)),
        ("whole extraction", f"{_format_rate(result.extraction)} ({result.extraction / result.bound:.0%})"),
    ]
    click.echo(format_table(rate_rows, [result.backbone, "images/s"], right_aligned=[1]))
    time_text = ", ".join(
        f"{name} {value:.1f} s" for name, value in result.seconds.items() if name not in ("preparing", "total")
    )
    click.echo(f"\ntime of all workers: {time_text}; writing {result.writing / 1e6:,.0f} MB/s")
    click.echo(f"bottleneck: {result.bottleneck}")
    for text in result.advice:
        click.echo(f"→ {text}")


def _format_rate(images_per_second: float) -> str:
    return "–" if math.isinf(images_per_second) else f"{images_per_second:,.1f}"
