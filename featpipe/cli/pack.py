"""``featpipe pack``."""

from __future__ import annotations

import click

from featpipe.cli.options import JSON_OPTION, OVERWRITE_CACHE_OPTION, add_options
from featpipe.cli.terminal import Terminal, print_cache


@click.command()
@click.argument("cache", metavar="CACHE")
@click.option("--out", metavar="FILE.h5", help="File of the packed cache.  [default: CACHE is replaced]")
@add_options(OVERWRITE_CACHE_OPTION, JSON_OPTION)
def pack(cache: str, out: str | None, overwrite: bool, as_json: bool) -> None:
    """Pack a cache and its shards into one file.

    The rows are copied byte for byte; each is verified first. Prints the path of the packed cache.

    \b
    Example:
      featpipe pack cache/photos.h5 --out photos-portable.h5
    """
    from featpipe.maintenance import pack as run

    with Terminal() as terminal:
        packed_cache = run(cache, out, overwrite=overwrite, progress=terminal)
    print_cache(packed_cache, as_json)
