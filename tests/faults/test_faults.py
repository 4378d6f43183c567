"""Kills, disk errors, power cuts and flipped bits: acknowledged work is never lost, and no file is ever wrong.

Each test prints its counts. ``FEATPIPE_KILLS`` is the number of kills at random moments. ``FEATPIPE_FAULTS`` is a
factor for all other numbers of trials; at 8 a fault is injected at every call.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.faults.harness import Harness

pytestmark = pytest.mark.thorough

KILLS = int(os.environ.get("FEATPIPE_KILLS", "150"))
FACTOR = int(os.environ.get("FEATPIPE_FAULTS", "1"))

EVERY = {  # inject a fault at every n-th call: many calls are in the same code
    "a part": 1,
    "a cache file": 1,
    "an extraction": 1,
    "a resumed extraction": 6,
    "an extraction that replaces a cache": 4,
    "an extraction of shards": 8,
    "an extraction that replaces shards": 6,
    "a prediction": 6,
    "the command": 8,
}
INCOMPLETE = ("an extraction", "a resumed extraction", "an extraction of shards", "a prediction", "the command")
POWER_CUTS = {  # how many of the possible folders are checked
    "a part": 100,
    "a cache file": 40,
    "an extraction": 100,
    "a resumed extraction": 20,
    "an extraction that replaces a cache": 30,
    "an extraction that replaces shards": 40,
    "a prediction": 20,
}


def assert_all_correct(outcome: dict[str, Any], *states: str) -> None:
    """Assert that no check failed and that each of ``states`` occurred."""
    print({name: value for name, value in outcome.items() if name != "wrong"}, f"{len(outcome['wrong'])} wrong")
    assert outcome["wrong"] == []
    assert set(states) <= set(outcome["counts"])


def get_step(scenario: str) -> int:
    return max(1, EVERY[scenario] // FACTOR)


@pytest.mark.parametrize("scenario", EVERY)
def test_the_library_records_all_calls(harness: Harness, scenario: str) -> None:
    """Control for all other tests: replaying the recorded calls gives the same files."""
    outcome = harness.run("journal", scenario=scenario)
    print(outcome["kinds"])
    assert outcome["same"]


@pytest.mark.parametrize("mode", ["before", "half"])
@pytest.mark.parametrize("scenario", EVERY)
def test_a_kill_at_any_call_leaves_the_old_or_the_complete_file_and_loses_nothing(
    harness: Harness, scenario: str, mode: str
) -> None:
    before = "incomplete" if scenario in INCOMPLETE else "old"
    assert_all_correct(
        harness.run("at every call", scenario=scenario, mode=mode, every=get_step(scenario)), before, "new"
    )


@pytest.mark.parametrize("scenario", EVERY)
def test_a_disk_that_is_full_from_any_call_on_is_an_error_in_one_line_and_loses_nothing(
    harness: Harness, scenario: str
) -> None:
    assert_all_correct(harness.run("at every call", scenario=scenario, mode="full", every=get_step(scenario)), "new")


@pytest.mark.parametrize("scenario", EVERY)
def test_any_single_call_that_fails_is_an_error_in_one_line_and_loses_nothing(harness: Harness, scenario: str) -> None:
    assert_all_correct(harness.run("at every call", scenario=scenario, mode="broken", every=get_step(scenario)))


@pytest.mark.parametrize("scenario", POWER_CUTS)
def test_a_power_cut_between_any_two_calls_loses_no_acknowledged_work(harness: Harness, scenario: str) -> None:
    at_most = POWER_CUTS[scenario] * FACTOR
    assert_all_correct(harness.run("power cuts", scenario=scenario, at_most=at_most), "new")


@pytest.mark.parametrize("scenario", ["syncs no files", "syncs no folders"])
def test_the_power_cuts_detect_a_missing_sync(harness: Harness, scenario: str) -> None:
    assert len(harness.run("power cuts", scenario=scenario, at_most=16)["wrong"]) > 2


def test_the_kills_detect_a_file_that_is_written_in_place(harness: Harness) -> None:
    assert harness.run("at every call", scenario="writes in place", mode="half")["wrong"]


def test_kills_of_the_command_at_any_moment_lose_at_most_the_current_part(harness: Harness) -> None:
    outcome = harness.run("random kills", scenario="the command", kills=KILLS)
    assert_all_correct(outcome, "finished", "incomplete")
    assert outcome["trials"] - outcome["counts"]["finished"] == KILLS


@pytest.mark.parametrize("scenario", ["the command", "an extraction that replaces shards"])
def test_two_processes_with_the_same_work_embed_nothing_twice(harness: Harness, scenario: str) -> None:
    assert_all_correct(harness.run("races", scenario=scenario, trials=10 * FACTOR))


def test_unfinished_work_with_a_flipped_bit_is_embedded_again(harness: Harness) -> None:
    outcome = harness.run("flipped parts", scenario="a resumed extraction", at_most=40 * FACTOR)
    assert_all_correct(outcome)
    assert {"part", "record"} <= set(outcome["files"])


@pytest.mark.parametrize(("scenario", "at_most"), [("an extraction", 100), ("an extraction of shards", 20)])
def test_a_flipped_bit_in_a_cache_is_detected_and_never_copied(harness: Harness, scenario: str, at_most: int) -> None:
    assert_all_correct(harness.run("flipped cache", scenario=scenario, at_most=at_most * FACTOR), "noticed")
