"""``featpipe verify``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.logging import log_message
from featpipe.cli.options import CACHE_BACKBONE_OPTION, DEVICE_OPTION, JSON_OPTION, add_options
from featpipe.cli.terminal import Terminal, print_json
from featpipe.errors import CacheError
from featpipe.runtime import format_table

if TYPE_CHECKING:
    from featpipe.maintenance import Verification

MAX_LISTED_ROWS = 100


@click.command()
@click.argument("cache", metavar="CACHE")
@click.option(
    "--sample",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Random rows to embed again and compare.",
)
@click.option("--repair", is_flag=True, help="Compute damaged rows again.")
@click.option(
    "--archive", "archives", multiple=True, metavar="ARCHIVE", help="New location of the images, if they were moved."
)
@add_options(CACHE_BACKBONE_OPTION, DEVICE_OPTION)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Random seed of --sample.")
@add_options(JSON_OPTION)
def verify(cache: str, repair: bool, as_json: bool, **settings: Any) -> None:
    """Verify the checksums of a cache; repair damaged rows.

    Checks the checksum of every column and every row. With --sample, random rows are embedded again and compared. Exit
    code 1 if anything is damaged and not repaired.

    \b
    Example:
      featpipe verify cache/photos.h5 --sample 32
    """
    from featpipe.maintenance import repair as repair_cache
    from featpipe.maintenance import verify as verify_cache

    with Terminal() as terminal:
        result = verify_cache(cache, progress=terminal, **settings)
        if repair and not result.whole:
            _print_result(result, terminal_only=True)
            repair_options = {key: settings[key] for key in ("archives", "backbone", "device")}
            result = repair_cache(cache, result, progress=terminal, **repair_options)
    if as_json:
        print_json(result.facts())
    else:
        _print_result(result)
    if not result.whole:
        raise CacheError(
            f"{cache}: {_format_count(len(result.damaged), 'row')} and {_format_count(len(result.columns), 'column')} "
            f"are damaged; `featpipe verify {cache} --repair` computes them again"
        )


def _print_result(result: Verification, terminal_only: bool = False) -> None:
    write_line: Callable[[str], None] = log_message if terminal_only else click.echo
    rows = [
        [damage.row, damage.id, _describe_damage(damage.what, damage.distance)]
        for damage in result.damaged[:MAX_LISTED_ROWS]
    ]
    if rows:
        write_line(format_table(rows, ["row", "id", "damage"], right_aligned=[0]))
    if len(result.damaged) > MAX_LISTED_ROWS:
        write_line(f"… and {len(result.damaged) - MAX_LISTED_ROWS} more rows; --json lists all")
    for name in [*result.columns, *result.shards]:
        write_line(f"damaged: {name}")
    if terminal_only:
        return
    if not result.checked:
        click.echo("the file has format 1.0, which has no checksums: only its layout was checked")
    elif result.whole:
        click.echo(f"{result.samples:,} rows and all columns are intact")
    if result.embedded or result.changed:
        distance_text = "" if result.farthest is None else f", largest relative distance {result.farthest:.2g}"
        changed_text = f"; {_format_count(result.changed, 'image')} changed or removed since" if result.changed else ""
        rows_text = _format_count(result.embedded, "row")
        click.echo(f"{rows_text} embedded again{distance_text}, {result.tolerance:.2g} allowed{changed_text}")
    if result.repaired:
        click.echo(f"{_format_count(result.repaired, 'row')} computed again")


def _describe_damage(check: str, distance: float | None) -> str:
    if check == "checksum":
        return "checksum mismatch"
    return f"the backbone gives another embedding: relative distance {distance:.2g}"


def _format_count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"
