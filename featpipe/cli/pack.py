"""``featpipe pack``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from featpipe.cli.terminal import Terminal, print_cache

if TYPE_CHECKING:
    pass

__all__ = ["pack"]


@click.command(short_help="Make one portable file of a cache that is spread over shards.")
@click.argument("cache", metavar="CACHE")
@click.option("--out", metavar="FILE.h5", help="The new file.  [default: CACHE itself becomes one file]")
@click.option("--overwrite", is_flag=True, help="Replace another cache at --out.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def pack(cache: str, out: str | None, overwrite: bool, as_json: bool) -> None:
    """Make one portable file of a cache that is spread over shards.

    Its rows are those of CACHE, byte for byte; each is verified before it is copied. Prints the path.

    \b
    Example:
      featpipe pack cache/photos.h5 --out photos-portable.h5
    """
    from featpipe.maintenance import pack as run

    with Terminal() as terminal:
        packed_cache = run(cache, out, overwrite=overwrite, progress=terminal)
    print_cache(packed_cache, as_json)
