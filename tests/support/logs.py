"""Records of the log of the package, for tests that check them; a warning that no test expects is an error."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from featpipe.cli.logging import HANDLER

PACKAGE_LOGGER = logging.getLogger("featpipe")


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.messages.append(record.getMessage())


_unexpected_warnings: list[logging.LogRecord] = []


class _WarningCollector(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if HANDLER not in PACKAGE_LOGGER.handlers:  # a command writes its warnings to stderr
            _unexpected_warnings.append(record)


PACKAGE_LOGGER.addHandler(_WarningCollector(logging.WARNING))


def pop_unexpected_warnings() -> list[str]:
    """The warnings since the last call that were logged outside `logged_messages` and `logged_warning`."""
    messages = [record.getMessage() for record in _unexpected_warnings]
    _unexpected_warnings.clear()
    return messages


@contextmanager
def logged_messages() -> Iterator[list[str]]:
    """The notes and warnings of the block."""
    recorder, level = _Recorder(), PACKAGE_LOGGER.level
    PACKAGE_LOGGER.addHandler(recorder)
    PACKAGE_LOGGER.setLevel(logging.INFO)
    try:
        yield recorder.messages
    finally:
        PACKAGE_LOGGER.setLevel(level)
        PACKAGE_LOGGER.removeHandler(recorder)
        _expect(recorder.records)


@contextmanager
def logged_warning(pattern: str) -> Iterator[None]:
    """Assert that the block logs a warning that matches."""
    recorder = _Recorder()
    recorder.setLevel(logging.WARNING)
    PACKAGE_LOGGER.addHandler(recorder)
    try:
        yield
    finally:
        PACKAGE_LOGGER.removeHandler(recorder)
        matching = [record for record in recorder.records if re.search(pattern, record.getMessage())]
        _expect(matching)
    assert matching, f"no warning matches {pattern!r}: {recorder.messages}"


def _expect(records: list[logging.LogRecord]) -> None:
    for record in records:
        if record in _unexpected_warnings:
            _unexpected_warnings.remove(record)
