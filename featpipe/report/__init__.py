"""One self-contained HTML page that says what was done and how well it works."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from featpipe.report.page import BaselineRow, ComparisonRow, Gallery, Page, ReportImage, ReportTable
from featpipe.report.render import render_page, write_page

if TYPE_CHECKING:
    from featpipe.report.from_evaluation import make_evaluation_content

__all__ = [
    "BaselineRow",
    "ComparisonRow",
    "Gallery",
    "Page",
    "ReportImage",
    "ReportTable",
    "make_evaluation_content",
    "render_page",
    "write_page",
]

_LAZY_MODULES = {  # imported when first used: they need torch or scikit-learn
    "make_evaluation_content": "from_evaluation",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
