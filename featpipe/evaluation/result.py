"""The result of an evaluation: scores with intervals, comparisons with other models, and error analysis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.diagnostics import NEAR_DUPLICATE_COSINE, Finding, LabeledPredictions, LearningCurve
from featpipe.evaluation.error_analysis import (
    Duplicates,
    NearestNeighbors,
    compute_nearest_neighbors,
    find_duplicates,
    make_findings,
)
from featpipe.evaluation.learning_curve import compute_learning_curve
from featpipe.evaluation.uncertainty import Coverage, summarize_novelty
from featpipe.metrics import METRICS, PairedComparison, Scores, format_protocol, format_score
from featpipe.model import Model
from featpipe.training import EmbeddingDataset

SCHEMA = "featpipe-evaluation/1.0"
"""Version of the JSON document: the minor number grows when keys are added, the major one when a meaning changes."""


@dataclass(frozen=True, eq=False)
class BaselineModel:
    """Another model, scored on the same rows.

    Attributes
    ----------
    name : str
    model : Model
    scores : Scores
    paired : PairedComparison
        Differences: the evaluated model minus this one.
    """

    name: str
    model: Model
    scores: Scores
    paired: PairedComparison

    def __str__(self) -> str:
        """The score of this model, the difference and its p-value, in a few lines."""
        name = next((name for name in self.scores.metrics if name in self.paired.contrasts), None)
        heading = f"against {self.name}, on the same {self.paired.n:,} rows"
        if name is None:
            return heading
        contrast = self.paired.contrasts[name]
        difference = contrast.difference
        test_name = "McNemar's exact test" if contrast.test == "mcnemar" else "paired bootstrap"
        p_value = f"p = {format_score(contrast.p) if contrast.p >= 0.001 else '< 0.001'} by {test_name}"
        lines = [
            f"{heading}: {METRICS[name].title.lower()} {self.scores.metrics[name]}",
            f"difference {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}], {p_value}",
        ]
        if self.paired.only_first is not None:
            lines.append(
                f"only the first model is correct on {self.paired.only_first:,} rows, "
                f"only the other on {self.paired.only_second:,}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": _model_to_dict(self.model),
            "metrics": self.scores.to_dict()["metrics"],
            "paired": self.paired.to_dict(),
        }


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions of a model for some rows of a cache, their scores, and error analysis.

    `neighbourhood`, `duplicates`, `learning_curve` and `findings` take seconds. They are computed when first read,
    because a sweep over many models needs the scores only.

    Attributes
    ----------
    scores : Scores
    cache : FeatureCache
    rows : ndarray of shape (m,), int64
        The scored rows, ascending.
    predicted : ndarray of shape (m, k) or (m,) or (m, t)
        Probabilities in the order of the model's classes, or numbers.
    left_out : dict of str to int
        Rows that were not scored, by reason.
    model : Model
    truth : ndarray of shape (m,), (m, k) or (m, t)
        Labels in the model's terms: class names, a 0/1 matrix, or targets.
    features : ndarray of shape (m, d)
        Embeddings.
    judged : LabeledPredictions
        The predictions with sample ids and class codes.
    novelty : ndarray of shape (m,), or None
        Novelty scores, 0 to 1; None if the model gives none.
    coverage : list of Coverage
        Coverage of prediction sets at several levels; empty if the model gives no sets.
    rivals : tuple of BaselineModel
        Other models on the same rows.
    reference : EmbeddingDataset or None
        The rows on which the model was trained; None if their cache was not found.
    near : float
        The cosine from which two images count as near duplicates.
    """

    scores: Scores
    cache: FeatureCache
    rows: NDArray[np.int64]
    predicted: NDArray[np.float64]
    left_out: dict[str, int]
    model: Model
    truth: NDArray[Any]
    features: NDArray[np.float32]
    judged: LabeledPredictions
    novelty: NDArray[np.float64] | None
    coverage: list[Coverage]
    rivals: tuple[BaselineModel, ...] = ()
    reference: EmbeddingDataset | None = None
    near: float = NEAR_DUPLICATE_COSINE

    @cached_property
    def neighbourhood(self) -> NearestNeighbors:
        """The nearest neighbours of each row, in training and among the rows."""
        return compute_nearest_neighbors(self.features, self.reference)

    @cached_property
    def duplicates(self) -> Duplicates:
        """Duplicates of training images among the rows, and the scores without them."""
        n_exact = self.left_out.get("trained on", 0)
        return find_duplicates(self.neighbourhood, self.truth, self.judged, self.near, n_exact)

    @cached_property
    def learning_curve(self) -> LearningCurve | None:
        """Errors of heads trained on fewer images, and a forecast for twice as many; None if unknown."""
        return compute_learning_curve(self.model, self.reference, self.features, self.truth, self.predicted)

    @cached_property
    def findings(self) -> list[Finding]:
        """Tables of samples and classes to inspect."""
        return make_findings(self.judged, self.neighbourhood, self.duplicates, self.reference, self.scores.per_class)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON, in the format of ``featpipe/evaluation/schema.json``."""
        return {
            "schema": SCHEMA,
            "featpipe": version("featpipe"),
            "model": _model_to_dict(self.model),
            "cache": str(self.cache.path),
            "fingerprint": self.cache.fingerprint,
            "rows": len(self.rows),
            "left_out": self.left_out,
            "how": describe_protocol(self.model, self.cache),
            **self.scores.to_dict(),
            "duplicates": self.duplicates.to_dict(),
            "against": [baseline.to_dict() for baseline in self.rivals],
            "learning_curve": None if self.learning_curve is None else self.learning_curve.to_dict(),
            "sets": [coverage.to_dict() for coverage in self.coverage],
            "novelty": summarize_novelty(self.novelty, self.judged),
            "findings": {finding.name: finding.to_dict() for finding in self.findings},
        }

    def table(self) -> str:
        """The scores, the comparisons with other models, near duplicates and left-out rows, for the terminal."""
        sections = [self.scores.table(), *map(str, self.rivals), self.duplicates.describe()]
        if self.left_out:
            sections.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in self.left_out.items()))
        return "\n\n".join(filter(None, sections))

    def _repr_html_(self) -> str:
        """The scores in a notebook, next to those of the models compared with."""
        score_columns = [("", self.scores), *((baseline.name, baseline.scores) for baseline in self.rivals)]
        header_cells = "".join(f"<th>{escape(name)}</th>" for name, _ in [("", None), *score_columns])
        body_rows = "".join(
            f"<tr><th>{escape(METRICS[name].title)}</th>"
            + "".join(f"<td>{escape(str(scores.metrics.get(name, '–')))}</td>" for _, scores in score_columns)
            + "</tr>"
            for name in self.scores.metrics
        )
        caption = f"{self.model!r}, {len(self.rows):,} rows; 95 % intervals"
        return f"<table><caption>{escape(caption)}</caption><tr>{header_cells}</tr>{body_rows}</table>"


def describe_protocol(model: Model, cache: FeatureCache) -> dict[str, Any]:
    """Describe the evaluation protocol: which rows trained, tuned and tested the model."""
    training_info = model.history.get("trained_on", {})
    chosen = model.history.get("chosen") or {}
    tuned = {
        "settings": chosen.get("settings"),
        "metric": chosen.get("metric"),
        "how": format_protocol(chosen.get("how", "")),
    }
    return {
        "scored": "test rows of the split that came with the labels" if cache.split.any() else "all labelled rows",
        "training_rows": training_info.get("rows", len(model.trained_on)),
        "training_split": training_info.get("split"),
        "bad": sum(cache.bad_rows().values()),
        "bad_in_training": sum((training_info.get("bad") or {}).values()),
        "tuned": tuned if chosen else None,
        "heads_compared": len(model.scores.get("comparison") or []),
        "calibrated": model.calibration is not None,
    }


def _model_to_dict(model: Model) -> dict[str, Any]:
    return {
        "path": None if model.path is None else str(model.path),
        "head": model.head_name,
        "backbone": model.request["name"],
        "output": model.output,
    }
