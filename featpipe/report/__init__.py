"""One self-contained HTML page that says what was done and how well it works."""

from featpipe.report.page import Page, Picture, Row
from featpipe.report.html import render, write

__all__ = ["Page", "Picture", "Row", "render", "write"]
