"""Time limits of long work."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from time import monotonic

from featpipe.errors import ConfigError, TimeLimitError

SECONDS_PER_UNIT = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?[dhms])+")
_DURATION_TERM = re.compile(r"([0-9.]+)([dhms])")


@dataclass(frozen=True)
class Deadline:
    """A time limit after which no new work starts.

    Attributes
    ----------
    limit : float or str or None
        The limit as the user gave it: seconds, or a text such as ``"3h"``; None for no limit.
    started : float
        Start of the clock, in seconds of `time.monotonic`.
    """

    limit: float | str | None = None
    started: float = field(default_factory=monotonic)

    def check(self) -> None:
        """Raise an error if the limit has passed. Call this only where the work can resume later.

        Raises
        ------
        TimeLimitError
            If the limit has passed.
        """
        if self.limit is not None and monotonic() - self.started >= parse_duration(self.limit):
            unit = "" if str(self.limit)[-1].isalpha() else " seconds"
            raise TimeLimitError(
                f"the time limit of {self.limit}{unit} has passed; finished work is kept: run the same command "
                "again to resume"
            )


def parse_duration(limit: float | str) -> float:
    """Convert a time limit to seconds.

    Examples
    --------
    >>> parse_duration(90), parse_duration("90"), parse_duration("90m"), parse_duration("1h30m")
    (90.0, 90.0, 5400.0, 5400.0)
    """
    try:
        seconds = float(limit)
    except ValueError:
        text = str(limit).strip().lower().replace(" ", "")
        full_match = _DURATION.fullmatch(text)
        seconds = (
            sum(float(number) * SECONDS_PER_UNIT[unit] for number, unit in _DURATION_TERM.findall(text))
            if full_match
            else math.nan
        )
    if not 0 < seconds < math.inf:
        raise ConfigError(f"time-limit is {limit!r}; give seconds, or a time such as 90m or 3h")
    return seconds
