"""How a long stage tells what it is doing: through one plain function, given by whoever wants to know."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Progress", "ProgressCallback", "report_warnings_only"]


@dataclass(frozen=True)
class Progress:
    """One thing to tell.

    Attributes
    ----------
    kind : {"bar", "note", "warning"}
        ``bar``: ``done`` of ``total`` ``unit`` of the stage named ``text``. ``note``: something that a person
        may want to know. ``warning``: something that the person must know, because a result is smaller than asked for.
    text : str
    done, total : int
    unit : str
    """

    kind: Literal["bar", "note", "warning"]
    text: str
    done: int = 0
    total: int = 0
    unit: str = "images"


ProgressCallback = Callable[[Progress], None]


def report_warnings_only(progress: Progress) -> None:
    """The default: warnings go where Python's warnings go, the rest is not said."""
    if progress.kind == "warning":
        warnings.warn(progress.text, stacklevel=3)
