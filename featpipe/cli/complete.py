"""What a shell completes: commands and options, and the names of recipes, heads and backbones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem, get_completion_class

__all__ = ["BACKBONE", "HEAD", "Name", "completion"]

PROGRAM = "featpipe"
VARIABLE = "_FEATPIPE_COMPLETE"
"""Set by the script when the shell asks; click looks for it under this name."""
SHELLS = ("bash", "zsh", "fish")


class Name(click.ParamType):
    """Text, of which some names are known; any other is accepted.

    Parameters
    ----------
    name : str
        What it is.
    known : callable
        Gives pairs of a name and what it is about, when it is asked for.
    files : bool
        Whether it may be a file too.
    """

    def __init__(self, name: str, known: Callable[[], Iterable[tuple[str, str]]], files: bool = False) -> None:
        self.name = name
        self._known = known
        self._files = files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name, help=about) for name, about in self._known() if name.startswith(incomplete)]
        return [*found, CompletionItem(incomplete, "file")] if self._files else found


def _heads() -> list[tuple[str, str]]:
    from featpipe.heads import TABLE

    return [(name, spec.summary) for name, spec in TABLE.items()]


def _backbones() -> list[tuple[str, str]]:
    from featpipe.backbone.catalogue import PACKAGED, TORCHVISION

    return [(name, "") for name in (*PACKAGED, *TORCHVISION)]  # timm's would cost seconds


HEAD = Name("head", _heads)
BACKBONE = Name("backbone", _backbones)


@click.command(short_help="Print what makes a shell complete commands, options and names.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, options and names.

    In ~/.bashrc: eval "$(featpipe completion bash)"; in ~/.zshrc the same with zsh. For fish, write what is printed to
    ~/.config/fish/completions/featpipe.fish.

    \b
    Example:
      featpipe completion bash
    """
    from featpipe.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, PROGRAM, VARIABLE).source())
