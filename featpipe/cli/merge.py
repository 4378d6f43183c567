"""``featpipe merge``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from featpipe.cli.options import SHARD_BYTES_OPTION, add_options
from featpipe.cli.terminal import Terminal, print_cache

if TYPE_CHECKING:
    pass

__all__ = ["merge"]


@click.command(short_help="Join caches that were made from the same facts.")
@click.argument("caches", nargs=-1, required=True, metavar="CACHE...")
@click.option("--out", required=True, metavar="FILE.h5", help="The new file.")
@click.option("--overwrite", is_flag=True, help="Replace another cache at --out.")
@add_options(SHARD_BYTES_OPTION)
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def merge(caches: tuple[str, ...], out: str, overwrite: bool, shard_bytes: int, as_json: bool) -> None:
    """Join caches that were made from the same facts, one after the other.

    A sample of the same id, bytes and label in several of them is one row; an id that names another image gets #2.
    Classes are united; labels must be of one kind. Each row is verified before it is copied. Prints the path.

    \b
    Example:
      featpipe merge cache/2023.h5 cache/2024.h5 --out cache/both.h5
    """
    from featpipe.maintenance import merge as run

    with Terminal() as terminal:
        merged_cache = run(caches, out, overwrite=overwrite, shard_bytes=shard_bytes, progress=terminal)
    print_cache(merged_cache, as_json)
