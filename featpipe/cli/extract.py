"""``featpipe extract``."""

from __future__ import annotations

from typing import Any

import click

from featpipe.cli.options import IDENTITY_OPTIONS, JSON_OPTION, RUN_OPTIONS, add_options, make_extraction_settings
from featpipe.cli.outputs import claim_outputs
from featpipe.cli.terminal import Terminal, print_json


@click.command()
@click.argument("archives", nargs=-1, required=True, metavar="ARCHIVE...")
@add_options(*IDENTITY_OPTIONS, *RUN_OPTIONS, JSON_OPTION)
def extract(archives: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Run a frozen backbone once over images and cache the embeddings.

    ARCHIVE is a folder, a .tar, .tar.gz or .zip, or a table of paths; globs and shards-{000..099}.tar are expanded.
    Prints the path of the cache. Embeddings of images that are in any cache in --cache are copied.

    \b
    Example:
      featpipe extract photos/ --backbone resnet50 --precision bf16
    """
    from featpipe.extraction import extract as run

    extraction_settings = make_extraction_settings(settings)
    if settings["out"] is not None:
        claim_outputs(*archives, settings["labels"], overwrite=settings["overwrite"]).reject_input(settings["out"])
    with Terminal() as terminal:
        cache = run(list(archives), progress=terminal, **extraction_settings)
    if as_json:
        print_json(
            {"cache": str(cache.path), "samples": len(cache), "bad": cache.bad_rows(), "manifest": cache.manifest}
        )
    else:
        click.echo(cache.path)
