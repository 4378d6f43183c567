"""``featpipe backbones``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from featpipe.cli.terminal import print_json
from featpipe.config import unknown_name_error

if TYPE_CHECKING:
    pass


@click.command(short_help="List the available backbones.")
@click.argument("pattern", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
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
