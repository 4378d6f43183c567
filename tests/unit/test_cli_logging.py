"""Log output on stderr, as text and as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from logging import getLogger
from typing import Any

import click
import pytest

from featpipe import cli
from featpipe.cli import logging
from featpipe.cli.terminal import Terminal
from featpipe.errors import ArchiveError, TimeLimitError
from featpipe.runtime import Progress
from tests.support.logs import logged_warning

logger = getLogger("featpipe.tests")

HOSTILE_TEXT = 'new\nline, "quoted" \x1b[31m and 🐝'


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(logging._log_settings, "format", "json")
    with warnings.catch_warnings():
        yield


def read_json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.isascii()  # no name from an archive reaches a terminal as it is
    return [json.loads(line) for line in captured.err.splitlines()]


def test_each_json_line_has_time_level_event_and_text(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    with logging.log_to_stderr(), logged_warning("quoted"):
        logger.info("hello")
        logger.warning(HOSTILE_TEXT)
    logging.log_message("a\nb", event="table")
    log_lines = read_json_lines(capsys)
    assert [(line["level"], line["event"]) for line in log_lines] == [
        ("info", "note"),
        ("warning", "warning"),
        ("info", "table"),
    ]
    assert all(line["time"].endswith("+00:00") for line in log_lines)
    assert [log_lines[0]["text"], log_lines[2]["text"]] == ["hello", "a\nb"]


def test_json_progress_is_logged_at_stage_boundaries_and_every_minute(
    as_json: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("featpipe.cli.terminal.time.monotonic", lambda: now[0])
    with Terminal() as terminal:
        for stage in ("reading", "embedding"):
            for n_done in range(1, 101):
                now[0] += 1
                terminal(Progress(stage, n_done, 100))
    progress_lines = [(line["stage"], line["done"], line["total"]) for line in read_json_lines(capsys)]
    reading = [("reading", n_done, 100) for n_done in (1, 62, 100)]
    assert progress_lines == [*reading, *(("embedding", n_done, 100) for n_done in (1, 62, 100))]


def test_warnings_of_libraries_are_logged_as_json(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logging._log_warning
        warnings.warn(HOSTILE_TEXT, stacklevel=1)
    (line,) = read_json_lines(capsys)
    assert (line["event"], line["text"]) == ("warning", f"UserWarning: {HOSTILE_TEXT}")
    assert "test_cli_logging.py:" in line["where"]


ERRORS = [
    (ArchiveError("none"), 1, "error", "none"),
    (TimeLimitError("over"), 75, "time-limit", "over"),
    (KeyboardInterrupt(), 1, "interrupted", "interrupted"),
    (cli._Interrupted("extract"), 1, "interrupted", "interrupted; finished work is kept, run the same command again"),
    (cli._Interrupted("train"), 1, "interrupted", "interrupted; no output was written"),
    (click.UsageError("which?"), 2, "usage", "which?"),
    (ZeroDivisionError("oh"), 1, "bug", "ZeroDivisionError: oh"),
]


@pytest.mark.parametrize(("error", "code", "event", "text"), ERRORS)
def test_an_error_as_json_has_its_exit_code_and_event(
    error: BaseException, code: int, event: str, text: str, as_json: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info, cli._exit_on_error():
        raise error
    assert exit_info.value.code == code
    (line,) = read_json_lines(capsys)
    assert (line["event"], line["code"]) == (event, code)
    assert line["text"].startswith(text)
    assert ("Traceback" in line.get("traceback", "")) == (event == "bug")


@pytest.mark.parametrize(("error", "code", "event", "text"), ERRORS[:6])
def test_an_error_as_text_has_its_exit_code_and_prefix(
    error: BaseException, code: int, event: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info, cli._exit_on_error():
        raise error
    assert exit_info.value.code == code
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith(f"{'Error' if event == 'usage' else 'featpipe'}: {text}")


@pytest.mark.parametrize(
    ("arguments", "variable", "is_json"),
    [
        (["heads"], None, False),
        (["heads"], "json", True),
        (["--log-format", "json", "heads"], None, True),
        (["heads", "--log-format", "json"], None, True),
        (["--log-format", "json", "heads", "--log-format", "text"], None, False),
        (["--log-format", "text", "heads"], "json", False),
    ],
)
def test_the_log_format_is_set_by_group_command_or_environment(
    arguments: list[str],
    variable: str | None,
    is_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(logging._log_settings, "format", "text")
    monkeypatch.setattr(sys, "argv", ["featpipe", *arguments])
    if variable is not None:
        monkeypatch.setenv(logging.LOG_FORMAT_VARIABLE, variable)
    with warnings.catch_warnings():
        cli.cli(arguments, standalone_mode=False)
        assert logging.is_json() == is_json
    assert "logistic" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMAND_SUMMARIES)
def test_every_command_has_the_log_format_option(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert [p.name for p in command.params].count("log_format") == 1
