"""An evaluation as JSON: the same figures as on the page and the terminal, under keys that stay."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from featpipe.evaluation.result import SCHEMA
from featpipe.evaluation.trusting import novelty_summary
from featpipe.model import Model
from featpipe.scores import Scores

if TYPE_CHECKING:
    from featpipe.evaluation.result import Evaluation

__all__ = ["document_of", "how_of"]


def document_of(evaluation: Evaluation) -> dict[str, Any]:
    """As ``schema.json`` beside this module says."""
    curve = evaluation.learning_curve
    return {
        "schema": SCHEMA,
        "featpipe": version("featpipe"),
        "model": _model(evaluation.model),
        "cache": str(evaluation.cache.path),
        "fingerprint": evaluation.cache.fingerprint,
        "rows": len(evaluation.rows),
        "left_out": evaluation.left_out,
        "how": how_of(evaluation),
        **evaluation.scores.to_dict(),
        "duplicates": _duplicates(evaluation),
        "against": [
            {
                "name": rival.name,
                "model": _model(rival.model),
                "metrics": rival.scores.to_dict()["metrics"],
                "paired": rival.paired.to_dict(),
            }
            for rival in evaluation.rivals
        ],
        "learning_curve": None if curve is None else curve.to_dict(),
        "sets": [coverage.to_dict() for coverage in evaluation.coverage],
        "novelty": novelty_summary(evaluation),
        "findings": {finding.name: finding.to_dict() for finding in evaluation.findings},
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "path": None if model.path is None else str(model.path),
        "head": model.head_name,
        "backbone": model.request["name"],
        "output": model.output,
    }


def how_of(evaluation: Evaluation) -> dict[str, Any]:
    """How the rows were split, and what was chosen by which of them."""
    model, cache = evaluation.model, evaluation.cache
    trained = model.history.get("trained_on", {})
    chosen = model.history.get("chosen") or {}
    return {
        "scored": "test rows of the split that came with the labels" if cache.split.any() else "all labelled rows",
        "training_rows": trained.get("rows", len(model.trained_on)),
        "training_split": trained.get("split"),
        "bad": sum(cache.bad_rows().values()),
        "bad_in_training": sum((trained.get("bad") or {}).values()),
        "tuned": None if not chosen else {key: chosen.get(key) for key in ("settings", "metric", "how")},
        "heads_compared": len(model.scores.get("comparison") or []),
        "calibrated": model.calibration is not None,
    }


def _duplicates(evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.duplicates
    return {
        "exact": found.exact,
        "near": None if found.training is None else len(found.training),
        "within": len(found.within),
        "threshold": found.threshold,
        "without": _scores(found.without),
    }


def _scores(scores: Scores | None) -> dict[str, Any] | None:
    return None if scores is None else {key: scores.to_dict()[key] for key in ("n", "metrics")}
