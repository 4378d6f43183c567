"""The commands: parse, one call, print. One place turns errors into exit codes."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

import featpipe
from featpipe.cli.logging import LogLevel, is_json, log_message, log_to_stderr, make_log_format_option
from featpipe.errors import FeatpipeError, TimeLimitError
from featpipe.runtime import printable

__all__ = ["main"]

EXIT_TIME_LIMIT = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command is to be run again


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMAND_SUMMARIES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMAND_SUMMARIES:
            return None
        module = importlib.import_module(f"featpipe.cli.{name}")
        command: click.Command = getattr(module, name)
        if not any(parameter.name == "log_format" for parameter in command.params):
            command.params.append(make_log_format_option())
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMAND_SUMMARIES and not args[0].startswith("-"):
            from featpipe.config import unknown_name_error

            raise click.UsageError(str(unknown_name_error("command", args[0], COMMAND_SUMMARIES)), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMAND_SUMMARIES.items()))


COMMAND_SUMMARIES = {  # the group's help must not load the modules; a test holds these against the commands' own first lines
    "demo": "Run the whole line on real photographs, with nothing to download.",
    "extract": "Run a frozen network once over images and cache the embeddings.",
    "train": "Train a head on a cache; prints the path of the model.",
    "expand": "Teach a model more classes; prints the path of the new model.",
    "finetune": "Train some of a model's network too; prints the path of the new model.",
    "evaluate": "Score a model on images that it was not trained on.",
    "predict": "Predict every image of some archives.",
    "run": "Run a recipe: from images to trained models and a page.",
    "info": "Show what a cache or a model holds.",
    "pack": "Make one portable file of a cache that is spread over shards.",
    "merge": "Join caches that were made from the same facts.",
    "clean": "Remove work that was begun and that nobody goes on with.",
    "verify": "Check that a cache is what was written; name and mend the rows that are not.",
    "backbones": "List the networks that can be used.",
    "heads": "List the heads that can be trained.",
    "bench": "Measure how fast this machine can extract, and what stands in the way.",
    "completion": "Print what makes a shell complete commands, options and names.",
}


@click.group(
    cls=_LazyGroup,
    params=[make_log_format_option(for_group=True)],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(featpipe.__version__, prog_name="featpipe")
@click.pass_context
def cli(context: click.Context) -> None:
    """Transfer learning on images: embed once with a frozen network, train heads in seconds.

    \b
    Example:
      featpipe extract photos/ && featpipe train cache/photos-*.h5
    """
    context.with_resource(log_to_stderr())


def main() -> None:
    """The console script: exit code 0 for done, 1 for an error of ours in one line, 2 for wrong usage."""
    signal.signal(signal.SIGTERM, _terminate)
    with _exit_codes():
        cli(prog_name="featpipe", standalone_mode=False)


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except click.exceptions.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except click.UsageError as error:
        _exit_with_usage(error, 2, "usage")
    except click.ClickException as error:
        _exit_with_usage(error, 1, "error")
    except TimeLimitError as error:
        _exit_with_message(str(error), EXIT_TIME_LIMIT, "time-limit", "info")
    except FeatpipeError as error:
        _exit_with_message(printable(str(error)), 1, "error")
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True, nl=not is_json())  # after the terminal's ^C
        _exit_with_message(
            "interrupted; what was finished is kept, the same command goes on from there", 1, "interrupted"
        )
    except BrokenPipeError:  # `featpipe predict … | head` has seen enough
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:  # a bug of ours
        if not is_json():
            raise
        _exit_with_message(f"{type(error).__name__}: {error}", 1, "bug", traceback=traceback.format_exc())


def _exit_with_message(text: str, code: int, event: str, level: LogLevel = "error", **fields: Any) -> NoReturn:
    log_message(text if is_json() else f"featpipe: {text}", level=level, event=event, code=code, **fields)
    sys.exit(code)


def _exit_with_usage(error: click.ClickException, code: int, event: str) -> NoReturn:
    """Show what click has to say, with the usage of the command."""
    if is_json():
        _exit_with_message(error.format_message(), code, event)
    error.show()
    sys.exit(code)


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    """A scheduler's SIGTERM ends the work as Ctrl-C does: what is in hand is committed first."""
    raise KeyboardInterrupt
