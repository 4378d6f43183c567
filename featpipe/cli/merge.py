"""``featpipe merge``."""

from __future__ import annotations

import click

from featpipe.cli.options import JSON_OPTION, OVERWRITE_CACHE_OPTION, SHARD_BYTES_OPTION, add_options
from featpipe.cli.outputs import claim_outputs
from featpipe.cli.terminal import Terminal, print_cache


@click.command()
@click.argument("caches", nargs=-1, required=True, metavar="CACHE...")
@click.option("--out", required=True, metavar="FILE.h5", help="File of the merged cache.")
@add_options(OVERWRITE_CACHE_OPTION, SHARD_BYTES_OPTION, JSON_OPTION)
def merge(caches: tuple[str, ...], out: str, overwrite: bool, shard_bytes: int, as_json: bool) -> None:
    """Merge caches with the same backbone and settings.

    Rows follow in the order of the caches. An image with equal id, bytes and label in several caches becomes one row;
    an id that is used for different images gets the suffix #2. Class lists are united; the tasks of the labels must
    agree. Each row is verified before it is copied. Prints the path of the merged cache.

    \b
    Example:
      featpipe merge cache/2023.h5 cache/2024.h5 --out cache/both.h5
    """
    from featpipe.maintenance import merge as run

    claim_outputs(*caches, overwrite=overwrite).reject_input(out)
    with Terminal() as terminal:
        merged_cache = run(caches, out, overwrite=overwrite, shard_bytes=shard_bytes, progress=terminal)
    print_cache(merged_cache, as_json)
