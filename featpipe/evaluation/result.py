"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe.cache import FeatureCache
from featpipe.evaluation.looking import Duplicates, Neighbourhood, duplicates_of, judged_of, neighbourhood_of, tables_of
from featpipe.evaluation.reference import Reference
from featpipe.evaluation.rows import truth_of
from featpipe.evaluation.trusting import Coverage, coverage_of
from featpipe.findings import NEAR, Finding, Forecast, Judged
from featpipe.model import Model
from featpipe.scores import METRICS, Paired, Scores, number

__all__ = ["SCHEMA", "Evaluation", "Rival"]

SCHEMA = "featpipe-evaluation/1.0"
"""What the JSON is called; the second number grows with what is added, the first when something means another thing."""


@dataclass(frozen=True, eq=False)
class Rival:
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
    paired: Paired


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
    rivals: tuple[Rival, ...] = ()
    reference: Reference | None = None
    near: float = NEAR

    @cached_property
    def truth(self) -> NDArray[Any]:
        """What is true of the rows, in the model's terms: names, a 0/1 matrix, or targets."""
        return truth_of(self.model, self.cache, self.rows)

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """The embeddings of the rows, shape (m, d)."""
        return np.asarray(self.cache.features(self.model.output)[self.rows], np.float32)

    @cached_property
    def judged(self) -> Judged:
        """The predictions with sample ids and codes, as findings take them."""
        return judged_of(self)

    @cached_property
    def neighbourhood(self) -> Neighbourhood:
        """The nearest images of each row, in training and among the rows."""
        return neighbourhood_of(self)

    @cached_property
    def duplicates(self) -> Duplicates:
        """Copies of training images among the rows, and the scores without them."""
        return duplicates_of(self)

    @cached_property
    def learning_curve(self) -> Forecast | None:
        """The errors of heads trained on fewer images, and a forecast; None where that cannot be known."""
        from featpipe.evaluation.learning import learning_curve_of

        return learning_curve_of(self)

    @cached_property
    def novelty(self) -> NDArray[np.float64] | None:
        """How new each row looks, shape (m,); None where the model cannot say."""
        return None if self.model.trust.novelty is None else self.model.novelty_features(self.features)

    @cached_property
    def coverage(self) -> list[Coverage]:
        """How often sets of answers hold the right one, at several levels; empty where the model has none."""
        return coverage_of(self)

    @cached_property
    def findings(self) -> list[Finding]:
        """What to look at next."""
        return tables_of(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, as ``featpipe/evaluation/schema.json`` says."""
        from featpipe.evaluation.document import document_of

        return document_of(self)

    def table(self) -> str:
        """The scores for the terminal, how other models compare, and what they do not cover."""
        parts = [self.scores.table(), *(_beside(rival, self.scores) for rival in self.rivals)]
        parts += [text for text in (self.duplicates.told(),) if text]
        left = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return "\n\n".join([*parts, *([f"left out: {left}"] if left else [])])

    def _repr_html_(self) -> str:
        """The scores in a notebook, each beside those of the models that it was compared with."""
        columns = [("", self.scores), *((rival.name, rival.scores) for rival in self.rivals)]
        head = "".join(f"<th>{escape(name)}</th>" for name, _ in [("", None), *columns])
        rows = "".join(
            f"<tr><th>{escape(METRICS[name][0])}</th>"
            + "".join(f"<td>{escape(str(scores.metrics.get(name, '–')))}</td>" for _, scores in columns)
            + "</tr>"
            for name in self.scores.metrics
        )
        caption = f"{self.model!r}, {len(self.rows):,} rows; 95 % intervals"
        return f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{rows}</table>"


def _beside(rival: Rival, scores: Scores) -> str:
    """One other model in a few lines: its score, the difference and its chance."""
    name = next((name for name in scores.metrics if name in rival.paired.contrasts), None)
    head = f"against {rival.name}, on the same {rival.paired.n:,} rows"
    if name is None:
        return head
    contrast = rival.paired.contrasts[name]
    by = "McNemar's exact test" if contrast.test == "mcnemar" else "paired bootstrap"
    difference = contrast.difference
    lines = [
        f"{head}: {METRICS[name][0].lower()} {rival.scores.metrics[name]}",
        f"difference {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}], p = "
        f"{number(contrast.p) if contrast.p >= 0.001 else '< 0.001'} by {by}",
    ]
    if rival.paired.only_first is not None:
        lines.append(
            f"{rival.paired.only_first:,} rows are right by the first alone, {rival.paired.only_second:,} by the other"
        )
    return "\n".join(lines)
