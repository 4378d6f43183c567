"""Log lines, progress bars and tables on the terminal; fingerprints and status codes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import numpy as np
import pytest

from featpipe.cli import info
from featpipe.cli.logging import log_to_stderr
from featpipe.cli.terminal import Terminal, print_json
from featpipe.config import ExtractionConfig
from featpipe.runtime import Progress, ProgressBar, format_table
from featpipe.status import Status
from featpipe.storage import hashing
from tests.support.logs import logged_warning

logger = logging.getLogger("featpipe.tests")


def test_control_characters_in_table_cells_are_replaced():
    text = format_table([["\x1b[31mred\x07", "a\nb", "\u202egpj.exe"]], ["", "", ""])
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert len(text.splitlines()) == 2


def test_control_characters_in_log_lines_are_replaced(capsys):
    with log_to_stderr(), logged_warning("all is well"):
        logger.info("ignored \x1b[2J\x1b]0;title\x07")
        logger.warning("a\r\nfeatpipe: all is well")
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "\r" not in err
    assert len(err.splitlines()) == 2


def test_columns_are_aligned_by_display_width():
    text = format_table([["日本", "1"], ["ab", "22"]], ["name", "n"], right_aligned=[1])
    assert text.splitlines() == ["name   n", "日本   1", "ab    22"]


def test_no_bar_is_drawn_without_a_terminal(capsys):
    with Terminal() as terminal:
        for n_done in range(100):
            terminal(Progress("embedding", n_done, 100))
    assert capsys.readouterr().err == ""


def test_progress_is_one_line_a_minute_without_a_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("featpipe.cli.terminal.time.monotonic", lambda: now[0])
    with Terminal() as terminal:
        for n_done in range(180):
            now[0] += 1
            terminal(Progress("embedding", n_done, 180))
    assert len(capsys.readouterr().err.splitlines()) == 2


LOGGING_SCRIPT = """
import logging
import featpipe
logger = logging.getLogger("featpipe.extraction.run")
logger.info("hello")
logger.warning("2 of 3 images have no features")
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
logger.info("hello")
"""


def test_in_python_warnings_are_shown_and_notes_once_logging_is_configured():
    process = subprocess.run(
        [sys.executable, "-c", LOGGING_SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )
    assert process.stdout == ""
    assert process.stderr.splitlines() == ["2 of 3 images have no features", "featpipe.extraction.run: hello"]


def test_a_bar_is_closed_before_a_line_is_written(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with log_to_stderr(), Terminal() as terminal:
        terminal(Progress("embedding", 10, 100))
        logger.info("hello")
        terminal(Progress("embedding", 20, 100))
    text = capsys.readouterr().err
    text_before, text_after = text.split("hello\n")
    assert "embedding: " in text_before
    assert text_before.endswith(" \r"), "the bar is erased"
    assert "embedding: " in text_after


def test_a_bar_shows_one_stage_at_a_time(capsys):
    bar = ProgressBar()
    for stage in ("reading", "embedding"):
        bar(Progress(stage, 50, 100))
    bar.close()
    text = capsys.readouterr().err
    assert text.rindex("reading: ") < text.index("embedding: ")
    assert text.endswith(" \r"), "the bar is erased"


def test_fingerprints_do_not_depend_on_the_order_of_keys():
    assert hashing.compute_fingerprint({"a": 1, "b": [1.5, None]}) == hashing.compute_fingerprint(
        {"b": [1.5, None], "a": 1}
    )
    assert hashing.compute_fingerprint({"a": 1}) != hashing.compute_fingerprint({"a": 1.0})


def test_the_digest_of_arrays_covers_values_shape_dtype_and_name():
    array = np.arange(6, dtype=np.float32)
    digests = {
        hashing.digest_arrays([("a", array)]),
        hashing.digest_arrays([("b", array)]),
        hashing.digest_arrays([("a", array.reshape(2, 3))]),
        hashing.digest_arrays([("a", array.view(np.int32))]),
        hashing.digest_arrays([("a", np.nextafter(array, 9))]),
    }
    assert len(digests) == 5


def test_status_codes_match_the_specification():
    assert {status.word: int(status) for status in Status} == {
        "ok": 0,
        "missing": 1,
        "unreadable": 2,
        "empty": 3,
        "unsupported": 4,
        "damaged": 5,
        "too-large": 6,
        "not-a-file": 7,
        "out-of-memory": 8,
        "not-finite": 9,
    }


@pytest.mark.parametrize(
    ("limit", "allowed"), [(None, None), (0, 0), (7, 7), ("7", 7), ("5%", 10), (0.05, 10), ("0.05", 10), ("100%", 200)]
)
def test_max_bad_is_a_number_or_a_share(limit, allowed):
    assert ExtractionConfig(max_bad=limit).get_max_bad_count(200) == allowed


def test_control_characters_in_info_are_replaced():
    text = info._format_value({"\x1b[31mred\x07": 3, "names": ["a\nb", "\x1b]0;title\x07"]})
    assert text.isprintable()


def test_json_has_null_for_numbers_that_it_cannot_hold(capsys):
    print_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": {"c": -float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, [None]], "b": {"c": None}}
