"""The commands: parse, one call, print. One place turns errors into exit codes."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

import featpipe
from featpipe.cli.terminal import printable
from featpipe.errors import FeatpipeError

__all__ = ["main"]

COMMANDS = {  # name → module; loaded when the command is called, so that help costs no torch
    "demo": "demonstrate",
    "extract": "make",
    "train": "fit",
    "expand": "grow",
    "finetune": "tune",
    "evaluate": "use",
    "predict": "use",
    "info": "show",
    "pack": "keep",
    "merge": "keep",
    "clean": "keep",
    "verify": "check",
    "backbones": "show",
    "heads": "show",
    "bench": "gauge",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"featpipe.cli.{COMMANDS[name]}")
        command: click.Command = getattr(module, name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from featpipe.names import unknown

            raise click.UsageError(str(unknown("command", args[0], COMMANDS)), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


SUMMARIES = {  # the group's help must not load the modules; a test holds these against the commands' own first lines
    "demo": "Run the whole line on real photographs, with nothing to download.",
    "extract": "Run a frozen network once over images and cache the embeddings.",
    "train": "Train a head on a cache; prints the path of the model.",
    "expand": "Teach a model more classes; prints the path of the new model.",
    "finetune": "Train some of a model's network too; prints the path of the new model.",
    "evaluate": "Score a model on images that it was not trained on.",
    "predict": "Predict every image of some archives.",
    "info": "Show what a cache or a model holds.",
    "pack": "Make one portable file of a cache that is spread over shards.",
    "merge": "Join caches that were made from the same facts.",
    "clean": "Remove work that was begun and that nobody goes on with.",
    "verify": "Check that a cache is what was written; name and mend the rows that are not.",
    "backbones": "List the networks that can be used.",
    "heads": "List the heads that can be trained.",
    "bench": "Measure how fast this machine can extract, and what stands in the way.",
}


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(featpipe.__version__, prog_name="featpipe")
def cli() -> None:
    """Transfer learning on images: embed once with a frozen network, train heads in seconds.

    \b
    Example:
      featpipe extract photos/ && featpipe train cache/photos-*.h5
    """


def main() -> None:
    """The console script: exit code 0 for done, 1 for an error of ours in one line, 2 for wrong usage."""
    signal.signal(signal.SIGTERM, _terminate)
    with _exit_codes():
        cli(prog_name="featpipe", standalone_mode=False)


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except FeatpipeError as error:
        click.echo(f"featpipe: {printable(str(error))}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nfeatpipe: interrupted; what was finished is kept, the same command goes on from there", err=True)
        sys.exit(1)
    except BrokenPipeError:  # `featpipe predict … | head` has seen enough
        sys.stderr.close()
        sys.exit(0)


def _terminate(number: int, frame: FrameType | None) -> None:
    """A scheduler's SIGTERM ends the work as Ctrl-C does: what is in hand is committed first."""
    raise KeyboardInterrupt
