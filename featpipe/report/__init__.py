"""One self-contained HTML page that says what was done and how well it works."""

from featpipe.report.html import render, write
from featpipe.report.page import Gallery, Page, Picture, Rival, Row, Table

__all__ = ["Gallery", "Page", "Picture", "Rival", "Row", "Table", "render", "write"]
