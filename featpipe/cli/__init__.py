"""The command-line interface: each command parses, makes one call and prints; errors become exit codes here."""

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

EXIT_TIME_LIMIT = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


RESUMABLE_COMMANDS = frozenset({"demo", "evaluate", "expand", "extract", "finetune", "predict", "run"})


class _Interrupted(Exception):
    """A command was interrupted."""

    def __init__(self, command: str | None) -> None:
        resumes = command in RESUMABLE_COMMANDS
        super().__init__(
            "interrupted; finished work is kept, run the same command again to resume"
            if resumes
            else "interrupted; no output was written"
        )


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

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted(ctx.invoked_subcommand) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMAND_SUMMARIES and not args[0].startswith("-"):
            from featpipe.config import unknown_name_error

            hint = "(`featpipe --help` lists the commands)"
            raise click.UsageError(str(unknown_name_error("command", args[0], COMMAND_SUMMARIES, hint)), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMAND_SUMMARIES.items()))


COMMAND_SUMMARIES = {  # the group's help loads no command module; a test compares these with the commands' first lines
    "demo": "Run the full pipeline on sample photos; needs no download.",
    "extract": "Run a frozen backbone once over images and cache the embeddings.",
    "train": "Train a head on a cache of embeddings.",
    "expand": "Add classes to a model (class-incremental learning).",
    "finetune": "Fine-tune part of a model's backbone.",
    "evaluate": "Evaluate a model on images it was not trained on.",
    "predict": "Predict every image of one or more archives.",
    "run": "Run a recipe: from images to trained models and a report.",
    "info": "Show the contents of a cache or a model.",
    "pack": "Pack a cache and its shards into one file.",
    "merge": "Merge caches with the same backbone and settings.",
    "clean": "Remove unfinished work that no process uses.",
    "verify": "Verify the checksums of a cache; repair damaged rows.",
    "backbones": "List the available backbones.",
    "heads": "List the available heads.",
    "doctor": "Check the installation, this machine and the caches in DIR, by default `cache`.",
    "bench": "Benchmark extraction on this machine and find the bottleneck.",
    "completion": "Print the shell completion script.",
}


@click.group(
    cls=_LazyGroup,
    params=[make_log_format_option(for_group=True)],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(featpipe.__version__, prog_name="featpipe")
@click.pass_context
def cli(context: click.Context) -> None:
    """Transfer learning on images: embed once with a frozen backbone, train heads in seconds.

    \b
    Example:
      featpipe extract photos/ && featpipe train cache/photos-*.h5
    """
    context.with_resource(log_to_stderr())


def main() -> None:
    """Console script. Exit codes: 0 done, 1 error (one line), 2 wrong usage, 75 time limit."""
    signal.signal(signal.SIGTERM, _terminate)
    with _exit_on_error():
        cli(prog_name="featpipe", standalone_mode=False)


@contextmanager
def _exit_on_error() -> Iterator[None]:
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
    except (_Interrupted, KeyboardInterrupt, click.Abort) as error:
        click.echo(err=True, nl=not is_json())  # after the terminal's ^C
        _exit_with_message(str(error) if isinstance(error, _Interrupted) else "interrupted", 1, "interrupted")
    except BrokenPipeError:  # as in `featpipe predict … | head`
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:  # a bug
        if not is_json():
            raise
        _exit_with_message(f"{type(error).__name__}: {error}", 1, "bug", traceback=traceback.format_exc())


def _exit_with_message(text: str, code: int, event: str, level: LogLevel = "error", **fields: Any) -> NoReturn:
    log_message(text if is_json() else f"featpipe: {text}", level=level, event=event, code=code, **fields)
    sys.exit(code)


def _exit_with_usage(error: click.ClickException, code: int, event: str) -> NoReturn:
    """Print click's message with the usage of the command."""
    if is_json():
        _exit_with_message(error.format_message(), code, event)
    error.show()
    sys.exit(code)


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM, which schedulers send, like Ctrl-C: finished work is committed first."""
    raise KeyboardInterrupt
