"""What to look at next: from predictions and embeddings to tables of samples. Arrays in, tables out."""

from featpipe.findings.duplicates import NEAR, Pairs, near_duplicates
from featpipe.findings.forecast import Forecast, forecast
from featpipe.findings.judgements import Judged, suspects
from featpipe.findings.neighbours import nearest, outlying
from featpipe.findings.table import Finding, write_findings

__all__ = [
    "NEAR",
    "Finding",
    "Forecast",
    "Judged",
    "Pairs",
    "forecast",
    "near_duplicates",
    "nearest",
    "outlying",
    "suspects",
    "write_findings",
]
