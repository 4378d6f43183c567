"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.diagnostics import NEAR_DUPLICATE_COSINE, Finding, LabeledPredictions, LearningCurve
from featpipe.evaluation.dataset import TrainingReference, load_true_labels
from featpipe.evaluation.error_analysis import (
    Coverage,
    Duplicates,
    NearestNeighbors,
    compute_coverage,
    compute_nearest_neighbors,
    find_duplicates,
    make_findings,
    make_labeled_predictions,
)
from featpipe.metrics import METRICS, PairedComparison, Scores, format_score
from featpipe.model import Model

__all__ = ["SCHEMA", "BaselineModel", "Evaluation"]

SCHEMA = "featpipe-evaluation/1.0"
"""What the JSON is called; the second number grows with what is added, the first when something means another thing."""


@dataclass(frozen=True, eq=False)
class BaselineModel:
    """Another model on the same rows.

    Attributes
    ----------
    name : str
    model : Model
    scores : Scores
    paired : Paired
        The first model minus this one.
    """

    name: str
    model: Model
    scores: Scores
    paired: PairedComparison


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model says of some rows of a cache, and how right it is.

    Attributes
    ----------
    scores : Scores
    cache : FeatureCache
    rows : ndarray of shape (m,), int64
        The rows that were scored, ascending.
    predicted : ndarray of shape (m, k) or (m,) or (m, t)
        Probabilities in the order of the model's classes, or numbers.
    left_out : dict
        How many rows were not scored, by reason.
    model : Model
    rivals : tuple of Rival
        Other models on the same rows.
    reference : Reference or None
        The rows that the model was trained on, where their embeddings are at hand.
    near : float
        The cosine from which two images are near-duplicates.
    """

    scores: Scores
    cache: FeatureCache
    rows: NDArray[np.int64]
    predicted: NDArray[np.float64]
    left_out: dict[str, int]
    model: Model
    rivals: tuple[BaselineModel, ...] = ()
    reference: TrainingReference | None = None
    near: float = NEAR_DUPLICATE_COSINE

    @cached_property
    def truth(self) -> NDArray[Any]:
        """What is true of the rows, in the model's terms: names, a 0/1 matrix, or targets."""
        return load_true_labels(self.model, self.cache, self.rows)

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """The embeddings of the rows, shape (m, d)."""
        return np.asarray(self.cache.features(self.model.output)[self.rows], np.float32)

    @cached_property
    def judged(self) -> LabeledPredictions:
        """The predictions with sample ids and codes, as findings take them."""
        return make_labeled_predictions(self)

    @cached_property
    def neighbourhood(self) -> NearestNeighbors:
        """The nearest images of each row, in training and among the rows."""
        return compute_nearest_neighbors(self)

    @cached_property
    def duplicates(self) -> Duplicates:
        """Copies of training images among the rows, and the scores without them."""
        return find_duplicates(self)

    @cached_property
    def learning_curve(self) -> LearningCurve | None:
        """The errors of heads trained on fewer images, and a forecast; None where that cannot be known."""
        from featpipe.evaluation.learning_curve import compute_learning_curve

        return compute_learning_curve(self)

    @cached_property
    def novelty(self) -> NDArray[np.float64] | None:
        """How new each row looks, shape (m,); None where the model cannot say."""
        return None if self.model.trust.novelty is None else self.model.novelty_features(self.features)

    @cached_property
    def coverage(self) -> list[Coverage]:
        """How often sets of answers hold the right one, at several levels; empty where the model has none."""
        return compute_coverage(self)

    @cached_property
    def findings(self) -> list[Finding]:
        """What to look at next."""
        return make_findings(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, as ``featpipe/evaluation/schema.json`` says."""
        from featpipe.evaluation.to_json import evaluation_to_dict

        return evaluation_to_dict(self)

    def table(self) -> str:
        """The scores for the terminal, how other models compare, and what they do not cover."""
        sections = [self.scores.table(), *(_format_baseline(baseline, self.scores) for baseline in self.rivals)]
        sections += [text for text in (self.duplicates.describe(),) if text]
        left_out_text = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return "\n\n".join([*sections, *([f"left out: {left_out_text}"] if left_out_text else [])])

    def _repr_html_(self) -> str:
        """The scores in a notebook, each beside those of the models that it was compared with."""
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


def _format_baseline(baseline: BaselineModel, scores: Scores) -> str:
    """One other model in a few lines: its score, the difference and its chance."""
    name = next((name for name in scores.metrics if name in baseline.paired.contrasts), None)
    heading = f"against {baseline.name}, on the same {baseline.paired.n:,} rows"
    if name is None:
        return heading
    contrast = baseline.paired.contrasts[name]
    test_name = "McNemar's exact test" if contrast.test == "mcnemar" else "paired bootstrap"
    difference = contrast.difference
    lines = [
        f"{heading}: {METRICS[name].title.lower()} {baseline.scores.metrics[name]}",
        f"difference {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}], p = "
        f"{format_score(contrast.p) if contrast.p >= 0.001 else '< 0.001'} by {test_name}",
    ]
    if baseline.paired.only_first is not None:
        lines.append(
            f"{baseline.paired.only_first:,} rows are right by the first alone, {baseline.paired.only_second:,} by the other"
        )
    return "\n".join(lines)
