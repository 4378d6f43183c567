"""Whatever is killed, refused, cut off or flipped: what was acknowledged is there, and what is there is right.

Each test prints its counts. ``FEATPIPE_KILLS`` is the number of kills at random moments, ``FEATPIPE_FAULTS`` a factor
for all other numbers; at 8 no call is left out.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.faults.harness import Harness

pytestmark = pytest.mark.thorough

KILLS = int(os.environ.get("FEATPIPE_KILLS", "150"))
FACTOR = int(os.environ.get("FEATPIPE_FAULTS", "1"))

EVERY = {  # a fault at each call, or at every so many of them: much of it is the same code
    "a part": 1,
    "a cache file": 1,
    "an extraction": 1,
    "an extraction that goes on": 6,
    "an extraction that replaces a cache": 4,
    "an extraction of shards": 8,
    "an extraction that replaces shards": 6,
    "a prediction": 6,
    "the command": 8,
}
INCOMPLETE = ("an extraction", "an extraction that goes on", "an extraction of shards", "a prediction", "the command")
POWER_CUTS = {  # how many of the folders that may be found are tried
    "a part": 100,
    "a cache file": 40,
    "an extraction": 100,
    "an extraction that goes on": 20,
    "an extraction that replaces a cache": 30,
    "an extraction that replaces shards": 40,
    "a prediction": 20,
}


def nothing_is_wrong(outcome: dict[str, Any], *states: str) -> None:
    """All went well, and the trials were of the kinds that they were to be of."""
    print({name: value for name, value in outcome.items() if name != "wrong"}, f"{len(outcome['wrong'])} wrong")
    assert outcome["wrong"] == []
    assert set(states) <= set(outcome["counts"])


def every(scenario: str) -> int:
    return max(1, EVERY[scenario] // FACTOR)


@pytest.mark.parametrize("scenario", EVERY)
def test_no_call_escapes_the_library(harness: Harness, scenario: str) -> None:
    """The control of all that follows: the calls that it saw, made again, make the same files."""
    outcome = harness.run("journal", scenario=scenario)
    print(outcome["kinds"])
    assert outcome["same"]


@pytest.mark.parametrize("mode", ["before", "half"])
@pytest.mark.parametrize("scenario", EVERY)
def test_a_kill_at_any_call_leaves_what_was_there_or_the_whole_and_loses_nothing(
    harness: Harness, scenario: str, mode: str
) -> None:
    before = "incomplete" if scenario in INCOMPLETE else "old"
    nothing_is_wrong(harness.run("at every call", scenario=scenario, mode=mode, every=every(scenario)), before, "new")


@pytest.mark.parametrize("scenario", EVERY)
def test_a_disk_that_is_full_from_any_call_on_is_one_line_and_loses_nothing(harness: Harness, scenario: str) -> None:
    nothing_is_wrong(harness.run("at every call", scenario=scenario, mode="full", every=every(scenario)), "new")


@pytest.mark.parametrize("scenario", EVERY)
def test_any_one_call_that_fails_is_one_line_and_loses_nothing(harness: Harness, scenario: str) -> None:
    nothing_is_wrong(harness.run("at every call", scenario=scenario, mode="broken", every=every(scenario)))


@pytest.mark.parametrize("scenario", POWER_CUTS)
def test_a_power_cut_between_any_two_calls_loses_nothing_that_was_acknowledged(harness: Harness, scenario: str) -> None:
    at_most = POWER_CUTS[scenario] * FACTOR
    nothing_is_wrong(harness.run("power cuts", scenario=scenario, at_most=at_most), "new")


@pytest.mark.parametrize("scenario", ["syncs no files", "syncs no folders"])
def test_the_power_cuts_find_a_sync_that_is_left_out(harness: Harness, scenario: str) -> None:
    assert len(harness.run("power cuts", scenario=scenario, at_most=16)["wrong"]) > 2


def test_the_kills_find_a_file_that_is_written_in_place(harness: Harness) -> None:
    assert harness.run("at every call", scenario="writes in place", mode="half")["wrong"]


def test_kills_of_the_command_at_any_moment_cost_the_part_in_hand(harness: Harness) -> None:
    outcome = harness.run("random kills", scenario="the command", kills=KILLS)
    nothing_is_wrong(outcome, "finished", "incomplete")
    assert outcome["trials"] - outcome["counts"]["finished"] == KILLS


@pytest.mark.parametrize("scenario", ["the command", "an extraction that replaces shards"])
def test_two_at_the_same_work_killed_or_not_embed_nothing_twice(harness: Harness, scenario: str) -> None:
    nothing_is_wrong(harness.run("races", scenario=scenario, trials=10 * FACTOR))


def test_a_bit_that_flips_in_unfinished_work_is_embedded_again(harness: Harness) -> None:
    outcome = harness.run("flipped parts", scenario="an extraction that goes on", at_most=40 * FACTOR)
    nothing_is_wrong(outcome)
    assert {"part", "record"} <= set(outcome["files"])


@pytest.mark.parametrize(("scenario", "at_most"), [("an extraction", 100), ("an extraction of shards", 20)])
def test_a_bit_that_flips_in_a_cache_is_noticed_and_never_copied(harness: Harness, scenario: str, at_most: int) -> None:
    nothing_is_wrong(harness.run("flipped cache", scenario=scenario, at_most=at_most * FACTOR), "noticed")
