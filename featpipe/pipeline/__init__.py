"""Stages in order: a recipe is run, what is done is skipped, and a page tells what came out."""

from __future__ import annotations

from featpipe.pipeline.outcome import EmbeddingSummary, RunResult, TrialResult
from featpipe.pipeline.page import command_line, write_report
from featpipe.pipeline.running import run

__all__ = ["EmbeddingSummary", "RunResult", "TrialResult", "command_line", "run", "write_report"]
