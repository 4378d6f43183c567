"""``featpipe backbones``."""

from __future__ import annotations

import click

from featpipe.cli.options import JSON_OPTION, add_options
from featpipe.cli.terminal import print_json
from featpipe.config import unknown_name_error


@click.command()
@click.argument("pattern", required=False)
@add_options(JSON_OPTION)
def backbones(pattern: str | None, as_json: bool) -> None:
    """List the available backbones, all or those whose names match PATTERN.

    \b
    Example:
      featpipe backbones 'resnet*'
    """
    from featpipe import backbones as backbone

    names = backbone.names(pattern)
    if pattern and not names:
        raise unknown_name_error("backbone", pattern, backbone.names())
    if as_json:
        print_json(names)
    else:
        click.echo("\n".join(names))
