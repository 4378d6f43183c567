"""One self-contained HTML page that says what was done and how well it works."""

from featpipe.report.html import render, write
from featpipe.report.page import Page, Picture, Row

__all__ = ["Page", "Picture", "Row", "render", "write"]
