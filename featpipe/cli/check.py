"""The command that doubts: verify."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from featpipe.cli.log import say
from featpipe.cli.terminal import Terminal, dump, table
from featpipe.errors import CacheError

if TYPE_CHECKING:
    from featpipe.verification import Verification

__all__ = ["verify"]

ROWS_SHOWN = 100


@click.command(short_help="Check that a cache is what was written; name and mend the rows that are not.")
@click.argument("cache", metavar="CACHE")
@click.option(
    "--sample", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Rows to embed again."
)
@click.option("--repair", is_flag=True, help="Compute the rows that fail again, and only those.")
@click.option(
    "--archive", "archives", multiple=True, metavar="ARCHIVE", help="Where the images are now, if they moved."
)
@click.option("--backbone", metavar="NAME", help="For a cache made with code of your own.")
@click.option("--device", default="auto", show_default=True, metavar="D", help="auto, cpu, cuda, cuda:N, mps.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which rows are embedded again.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def verify(cache: str, repair: bool, as_json: bool, **settings: Any) -> None:
    """Check that a cache is what was written; name and mend the rows that are not.

    Every digest is checked: of columns, and of each row. With --sample, random rows are embedded again and compared.
    Exit code 1 if anything is wrong and not mended.

    \b
    Example:
      featpipe verify cache/photos.h5 --sample 32
    """
    from featpipe import verification

    with Terminal() as terminal:
        found = verification.verify(cache, progress=terminal, **settings)
        if repair and not found.whole:
            _tell(found, terminal_only=True)
            places = {key: settings[key] for key in ("archives", "backbone", "device")}
            found = verification.repair(cache, found, progress=terminal, **places)
    if as_json:
        dump(found.facts())
    else:
        _tell(found)
    if not found.whole:
        raise CacheError(
            f"{cache}: {_count(len(found.damaged), 'row')} and {_count(len(found.columns), 'column')} are not what was "
            f"written; `featpipe verify {cache} --repair` computes them again"
        )


def _tell(found: Verification, terminal_only: bool = False) -> None:
    tell: Callable[[str], None] = say if terminal_only else click.echo
    rows = [[damage.row, damage.id, _reason(damage.what, damage.distance)] for damage in found.damaged[:ROWS_SHOWN]]
    if rows:
        tell(table(rows, ["row", "id", "what is wrong"], right=[0]))
    if len(found.damaged) > ROWS_SHOWN:
        tell(f"… and {len(found.damaged) - ROWS_SHOWN} more rows; --json names them all")
    for name in [*found.columns, *found.shards]:
        tell(f"damaged: {name}")
    if terminal_only:
        return
    if not found.checked:
        click.echo("this file is of format 1.0, which holds no checksums: only its layout was checked")
    elif found.whole:
        click.echo(f"{found.samples:,} rows and all columns are what was written")
    if found.embedded or found.changed:
        far = "" if found.farthest is None else f", farthest {found.farthest:.2g} of its length"
        changed = f"; {_count(found.changed, 'image')} changed or gone since" if found.changed else ""
        again = _count(found.embedded, "row")
        click.echo(f"{again} embedded again{far}, {found.tolerance:.2g} allowed{changed}")
    if found.repaired:
        click.echo(f"{_count(found.repaired, 'row')} computed again")


def _reason(what: str, distance: float | None) -> str:
    if what == "checksum":
        return "its bytes are not those that were written"
    return f"the network answers otherwise: {distance:.2g} of its length away"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"
