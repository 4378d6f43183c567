"""One self-contained HTML page that says what was done and how well it works."""

from featpipe.report.html import render_page, write_page
from featpipe.report.page import BaselineRow, ComparisonRow, Gallery, Page, ReportImage, ReportTable

__all__ = ["BaselineRow", "ComparisonRow", "Gallery", "Page", "ReportImage", "ReportTable", "render_page", "write_page"]
