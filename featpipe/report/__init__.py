"""The report of an evaluation: one self-contained HTML file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featpipe.report.page import BaselineRow, ComparisonRow, Gallery, Page, ReportImage, ReportTable
from featpipe.report.render import render_page, write_page
from featpipe.runtime import lazy_imports

if TYPE_CHECKING:
    from featpipe.report.write import write_report
else:
    __getattr__, __dir__ = lazy_imports(__name__)

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
