"""Progress of long stages: the callback type, and a tqdm bar that implements it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """The progress of a stage.

    Attributes
    ----------
    stage : str
        Name of the stage, such as ``embedding``.
    done, total : int
        Finished units, and all units of the stage.
    unit : str
        Name of the unit, such as ``images``.
    """

    stage: str
    done: int
    total: int
    unit: str = "images"


ProgressCallback = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """Do nothing: the default callback."""


class ProgressBar:
    """A tqdm bar for one stage at a time, on stderr or in the output of a notebook."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __call__(self, progress: Progress) -> None:
        if self._stage != progress.stage:
            self.close()
        if self._bar is None:
            from tqdm.auto import tqdm

            self._stage = progress.stage
            self._bar = tqdm(
                total=progress.total, desc=progress.stage, unit=f" {progress.unit}", leave=False, smoothing=0.1
            )
        self._bar.update(progress.done - self._bar.n)
        if progress.done >= progress.total:
            self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""


def in_notebook() -> bool:
    """Whether this process is a notebook kernel, which shows bars although its stderr is not a terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"
