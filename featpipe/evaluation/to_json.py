"""An evaluation as JSON: the same figures as on the page and the terminal, under keys that stay."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from featpipe.evaluation.error_analysis import summarize_novelty
from featpipe.evaluation.result import SCHEMA
from featpipe.metrics import Scores
from featpipe.model import Model

if TYPE_CHECKING:
    from featpipe.evaluation.result import Evaluation

__all__ = ["describe_protocol", "evaluation_to_dict"]


def evaluation_to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """As ``schema.json`` beside this module says."""
    curve = evaluation.learning_curve
    return {
        "schema": SCHEMA,
        "featpipe": version("featpipe"),
        "model": _model_to_dict(evaluation.model),
        "cache": str(evaluation.cache.path),
        "fingerprint": evaluation.cache.fingerprint,
        "rows": len(evaluation.rows),
        "left_out": evaluation.left_out,
        "how": describe_protocol(evaluation),
        **evaluation.scores.to_dict(),
        "duplicates": _duplicates_to_dict(evaluation),
        "against": [
            {
                "name": baseline.name,
                "model": _model_to_dict(baseline.model),
                "metrics": baseline.scores.to_dict()["metrics"],
                "paired": baseline.paired.to_dict(),
            }
            for baseline in evaluation.rivals
        ],
        "learning_curve": None if curve is None else curve.to_dict(),
        "sets": [coverage.to_dict() for coverage in evaluation.coverage],
        "novelty": summarize_novelty(evaluation),
        "findings": {finding.name: finding.to_dict() for finding in evaluation.findings},
    }


def _model_to_dict(model: Model) -> dict[str, Any]:
    return {
        "path": None if model.path is None else str(model.path),
        "head": model.head_name,
        "backbone": model.request["name"],
        "output": model.output,
    }


def describe_protocol(evaluation: Evaluation) -> dict[str, Any]:
    """How the rows were split, and what was chosen by which of them."""
    model, cache = evaluation.model, evaluation.cache
    training_info = model.history.get("trained_on", {})
    selected_settings = model.history.get("chosen") or {}
    return {
        "scored": "test rows of the split that came with the labels" if cache.split.any() else "all labelled rows",
        "training_rows": training_info.get("rows", len(model.trained_on)),
        "training_split": training_info.get("split"),
        "bad": sum(cache.bad_rows().values()),
        "bad_in_training": sum((training_info.get("bad") or {}).values()),
        "tuned": None
        if not selected_settings
        else {key: selected_settings.get(key) for key in ("settings", "metric", "how")},
        "heads_compared": len(model.scores.get("comparison") or []),
        "calibrated": model.calibration is not None,
    }


def _duplicates_to_dict(evaluation: Evaluation) -> dict[str, Any]:
    duplicates = evaluation.duplicates
    return {
        "exact": duplicates.exact,
        "near": None if duplicates.training is None else len(duplicates.training),
        "within": len(duplicates.within),
        "threshold": duplicates.threshold,
        "without": _scores_to_dict(duplicates.without),
    }


def _scores_to_dict(scores: Scores | None) -> dict[str, Any] | None:
    return None if scores is None else {key: scores.to_dict()[key] for key in ("n", "metrics")}
