"""The report of an evaluation: one self-contained HTML file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from featpipe.report.page import BaselineRow, ComparisonRow, Gallery, Page, ReportImage, ReportTable
from featpipe.report.render import render_page, write_page

if TYPE_CHECKING:
    from featpipe.report.write import write_report

__all__ = [
    "BaselineRow",
    "ComparisonRow",
    "Gallery",
    "Page",
    "ReportImage",
    "ReportTable",
    "render_page",
    "write_page",
    "write_report",
]

_LAZY_MODULES = {  # imported when first used: they need torch or scikit-learn
    "write_report": "write",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
