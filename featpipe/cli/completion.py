"""``featpipe completion``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem, get_completion_class

PROGRAM = "featpipe"
COMPLETION_VARIABLE = "_FEATPIPE_COMPLETE"
"""Set by the script when the shell asks; click looks for it under this name."""
SHELLS = ("bash", "zsh", "fish")


class NameParameter(click.ParamType):
    """A parameter that takes any text and completes names.

    Parameters
    ----------
    name : str
    list_names : callable
        Returns pairs of a name and its summary.
    allow_files : bool
        Whether to complete paths of files too.
    """

    def __init__(
        self, name: str, list_names: Callable[[], Iterable[tuple[str, str]]], allow_files: bool = False
    ) -> None:
        self.name = name
        self._list_names = list_names
        self._allow_files = allow_files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        items = [
            CompletionItem(name, help=summary) for name, summary in self._list_names() if name.startswith(incomplete)
        ]
        return [*items, CompletionItem(incomplete, "file")] if self._allow_files else items


def _list_heads() -> list[tuple[str, str]]:
    from featpipe.heads import HEAD_REGISTRY

    return [(name, spec.summary) for name, spec in HEAD_REGISTRY.items()]


def _list_backbones() -> list[tuple[str, str]]:
    from featpipe.backbones import PACKAGED_BACKBONES, TORCHVISION_BACKBONES

    return [(name, "") for name in (*PACKAGED_BACKBONES, *TORCHVISION_BACKBONES)]  # timm's would cost seconds


HEAD_NAME = NameParameter("head", _list_heads)
BACKBONE_NAME = NameParameter("backbone", _list_backbones)


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the shell completion script.

    In ~/.bashrc: eval "$(featpipe completion bash)"; in ~/.zshrc the same with zsh. For fish, write the output to
    ~/.config/fish/completions/featpipe.fish.

    \b
    Example:
      featpipe completion bash
    """
    from featpipe.cli import cli

    shell_class = get_completion_class(shell)
    assert shell_class is not None
    click.echo(shell_class(cli, {}, PROGRAM, COMPLETION_VARIABLE).source())
