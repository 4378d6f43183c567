"""What fine-tuning brought: probe and fine-tuned model on the same rows that neither has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featpipe.backbones import Backbone, digest_state
from featpipe.cache import FeatureCache
from featpipe.finetuning.head_layers import HeadLayers, layers_to_head
from featpipe.finetuning.split import Splits, make_dataset
from featpipe.finetuning.trainer import TrainingState
from featpipe.metrics import (
    METRICS,
    Calibration,
    Scores,
    compare_paired,
    compute_logits,
    fit_temperature,
    format_score,
    mcnemar_test,
    score,
)
from featpipe.model import (
    STORED_DIGEST_BYTES,
    ConformalPredictor,
    Model,
    ReplayMemory,
    RetentionPolicy,
    Uncertainty,
    collect_replay_memory,
)
from featpipe.training import EmbeddingDataset, fit_novelty

__all__ = [
    "FineTuningResult",
    "ProbeComparison",
    "compare_models",
    "make_finetuned_backbone",
    "make_finetuned_model",
    "predict_rows",
]


@dataclass(frozen=True, eq=False)
class ProbeComparison:
    """Two models on the same held-out rows.

    Attributes
    ----------
    n : int
    main : str
        The score that decides.
    metrics : list of dict
        For each score: ``name``, ``probe`` and ``tuned`` (value, low, high), ``difference`` (value, low, high), ``p``.
    per_class : list of dict
        For each class ``name``, ``rows``, ``probe`` and ``tuned`` (its recall, low, high), ``p``; empty but of classes.
    """

    n: int
    main: str
    metrics: list[dict[str, Any]]
    per_class: list[dict[str, Any]]

    @property
    def gain(self) -> float:
        """How much better the fine-tuned model is by the main score."""
        value = next(row["difference"][0] for row in self.metrics if row["name"] == self.main)
        return METRICS[self.main].gain(value)

    @property
    def sure(self) -> bool:
        """Whether the interval of the difference is on one side of zero."""
        low, high = next(row["difference"][1:] for row in self.metrics if row["name"] == self.main)
        return low is not None and high is not None and not low <= 0 <= high

    def verdict(self) -> str:
        """In one sentence."""
        row = next(row for row in self.metrics if row["name"] == self.main)
        name, p = METRICS[self.main].title.lower(), row["p"]
        change = f"{name} {_format_interval(row['probe'])} → {_format_interval(row['tuned'])}"
        if self.gain == 0:
            return f"fine-tuned is neither better nor worse than the probe on {self.n} held-out images: {change}"
        direction = "better" if self.gain > 0 else "worse"
        caveat = "" if self.sure else ", which may be chance"
        return f"fine-tuned is {direction} than the probe on {self.n} held-out images{caveat}: {change}, p = {p:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"n": self.n, "main": self.main, "metrics": self.metrics, "per_class": self.per_class}


def compare_models(
    task: str, truth: NDArray[Any], probe: NDArray[Any], tuned: NDArray[Any], classes: tuple[str, ...]
) -> ProbeComparison:
    """Scores of both, with their intervals and the tests of what differs.

    Parameters
    ----------
    task : str
    truth : ndarray
        Class names, 0/1 matrix or targets of m rows.
    probe, tuned : ndarray of shape (m, k)
        Probabilities or numbers.
    classes : tuple of str
    """
    tuned_scores, probe_scores = (score(task, truth, predictions, classes) for predictions in (tuned, probe))
    contrasts = compare_paired(task, truth, tuned, probe, classes).contrasts
    metrics = [
        {
            "name": name,
            "probe": _to_interval(probe_scores, name),
            "tuned": _to_interval(tuned_scores, name),
            "difference": [_finite_or_none(v) for v in (c.difference.value, c.difference.low, c.difference.high)],
            "p": _finite_or_none(c.p),
        }
        for name, c in contrasts.items()
    ]
    per_class = _compare_classes(truth, probe, tuned, tuned_scores, probe_scores) if task == "classification" else []
    main = next(name for name in tuned_scores.metrics if name in contrasts)
    return ProbeComparison(len(truth), main, metrics, per_class)


def _compare_classes(
    truth: NDArray[Any], probe: NDArray[Any], tuned: NDArray[Any], tuned_scores: Scores, probe_scores: Scores
) -> list[dict[str, Any]]:
    class_names = np.array(tuned_scores.classes, dtype=object)
    correct = {"probe": class_names[probe.argmax(axis=1)] == truth, "tuned": class_names[tuned.argmax(axis=1)] == truth}
    rows = []
    for tuned_row, probe_row in zip(tuned_scores.per_class, probe_scores.per_class, strict=True):
        in_class = truth == tuned_row["name"]
        rows.append(
            {
                "name": tuned_row["name"],
                "rows": int(in_class.sum()),
                "probe": [_finite_or_none(v) for v in (probe_row["recall"], *probe_row["recall_interval"])],
                "tuned": [_finite_or_none(v) for v in (tuned_row["recall"], *tuned_row["recall_interval"])],
                "p": mcnemar_test(correct["tuned"][in_class], correct["probe"][in_class]).p if in_class.any() else None,
            }
        )
    return rows


def _to_interval(scores: Scores, name: str) -> list[float | None]:
    metric = scores.metrics[name]
    return [_finite_or_none(value) for value in (metric.value, metric.low, metric.high)]


def _finite_or_none(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _format_interval(values: list[float | None], signed: bool = False) -> str:
    value, low, high = (math.nan if v is None else v for v in values)
    sign = "+" if signed and value > 0 else ""
    bounds = f" [{format_score(low)}, {format_score(high)}]" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{sign}{format_score(value)}{bounds}"


@dataclass(frozen=True, eq=False)
class FineTuningResult:
    """What fine-tuning left.

    Attributes
    ----------
    model : Model
        The one that is kept: fine-tuned, or the probe as it was.
    kept : {"fine-tuned", "probe"}
    comparison : Comparison
    curve : list of dict
        For each epoch, 0 being before the first step: ``number``, ``loss``, ``validation_loss``, ``validation_score``,
        ``rate``.
    best_epoch : int
    notes : tuple of str
        How it was done, for people.
    """

    model: Model
    kept: str
    comparison: ProbeComparison
    curve: list[dict[str, Any]]
    best_epoch: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "kept": self.kept,
            "verdict": self.comparison.verdict(),
            "comparison": self.comparison.to_dict(),
            "curve": self.curve,
            "best_epoch": self.best_epoch,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, model: Model, document: Mapping[str, Any]) -> FineTuningResult:
        """From `to_dict`."""
        comparison = ProbeComparison(**document["comparison"])
        return cls(
            model, document["kept"], comparison, document["curve"], document["best_epoch"], tuple(document["notes"])
        )

    def as_table(self) -> list[list[str]]:
        """The scores for people, a header first."""
        rows = [["", "probe", "fine-tuned", "difference", "p"]]
        for row in self.comparison.metrics:
            difference = _format_interval(row["difference"], signed=True)
            name, p = METRICS[row["name"]].title, row["p"]
            rows.append(
                [
                    name,
                    _format_interval(row["probe"]),
                    _format_interval(row["tuned"]),
                    difference,
                    "" if p is None else f"{p:.2g}",
                ]
            )
        return rows

    def class_table(self) -> list[list[str]]:
        """The share of each class that is right, for people, a header first; only that for tasks without classes."""
        rows = [["class", "rows", "probe", "fine-tuned", "p"]]
        for row in self.comparison.per_class:
            p = "" if row["p"] is None else f"{row['p']:.2g}"
            rows.append(
                [row["name"], str(row["rows"]), _format_interval(row["probe"]), _format_interval(row["tuned"]), p]
            )
        return rows


def make_finetuned_backbone(base: Backbone, network: nn.Module, weights: str | None) -> Backbone:
    """Just another backbone: the same network with other weights; the one before, if nothing of it was trained.

    Parameters
    ----------
    before : Backbone
    network : Module
        A trained copy of its network.
    weights : str or None
        Where the weights are going to be found.
    """
    network = network.cpu().to(memory_format=torch.contiguous_format)
    network = network.eval().requires_grad_(False)
    digest = digest_state(network)
    if digest == base.digest:
        return base
    request = {**base.request, "weights": weights}
    return replace(base, network=network, digest=digest, origin=f"fine-tuned from {base.origin}", request=request)


def make_finetuned_model(
    model: Model,
    start_model: Model,
    backbone: Backbone,
    cache: FeatureCache,
    splits: Splits,
    layers: HeadLayers,
    state: TrainingState,
    history: Mapping[str, Any],
) -> Model:
    """A model like any other.

    Parameters
    ----------
    model : Model
        The one before, which says what is asked of a model.
    start : Model
        The one that it started from.
    backbone : Backbone
    cache : FeatureCache
        Of that backbone.
    sides : Sides
    layers : Layers
        Trained, with answers in the units of the targets.
    state : State
    history : mapping
    """
    name, pipeline = layers_to_head(layers, model.task)
    train_set, validation_set = (
        make_dataset(model, cache, splits.y, rows) for rows in (splits.train, splits.validation)
    )
    backbone_changed = backbone is not model.backbone
    digests = np.concatenate(
        [start_model.trained_on, cache.digests[splits.train_and_validation][:, :STORED_DIGEST_BYTES]]
    )
    finetuned = Model(
        head=pipeline,
        head_name=name,
        task=model.task,
        classes=model.classes,
        output=model.output,
        facts=cache.facts,
        request=dict(backbone.request),
        trained_on=np.unique(digests, axis=0),
        history={**_make_history(model, state), **history},
        calibration=_make_calibration(model, pipeline, validation_set),
        kept=_make_replay_memory(model.kept, pipeline, train_set),
        device=model.device,
        _carries_weights=backbone_changed or model._carries_weights,
        _backbone=backbone,
    )
    finetuned.trust = _make_uncertainty(model, finetuned, train_set, validation_set)
    return finetuned


def predict_rows(model: Model, cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities or numbers of shape (m, k), from the embeddings of a cache."""
    X = np.asarray(cache.features(model.output)[rows], np.float32)
    if model.task == "regression":
        return np.asarray(model.predict_features(X), np.float64).reshape(len(rows), -1)
    return model.predict_proba_features(X)


def _make_calibration(model: Model, pipeline: Any, validation_set: EmbeddingDataset) -> Calibration | None:
    """A temperature from the validation rows, of a model that had one; offsets are in the new layer already."""
    if model.calibration is None or model.calibration.temperature == 1:
        return None
    return Calibration(fit_temperature(compute_logits(pipeline, np.asarray(validation_set.X)), validation_set.y))


def _make_replay_memory(previous: ReplayMemory | None, pipeline: Any, rows: EmbeddingDataset) -> ReplayMemory | None:
    """As much as the model before kept of its training data, of the new embeddings."""
    if previous is None:
        return None
    policy = RetentionPolicy(
        previous.statistics is not None, previous.importances is not None, previous.to_summary()["rows_a_class"]
    )
    return collect_replay_memory(policy, pipeline, rows.X, rows.y, len(rows.classes))


def _make_uncertainty(
    model: Model, finetuned: Model, train_set: EmbeddingDataset, validation_set: EmbeddingDataset
) -> Uncertainty:
    """How new an image looks, and sets of answers from the validation rows; where the model before knew."""
    novelty = fit_novelty(train_set, model.task) if model.trust.novelty is not None else None
    if model.trust.conformal is None:
        return Uncertainty(novelty, None)
    X = np.asarray(validation_set.X)
    predictions = finetuned.predict_features(X) if model.task == "regression" else finetuned.predict_proba_features(X)
    return Uncertainty(novelty, ConformalPredictor.from_predictions(predictions, validation_set.y))


def _make_history(model: Model, state: TrainingState) -> dict[str, Any]:
    curve = [epoch.to_dict() for epoch in state.curve]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trained_on": model.history.get("trained_on"),
        "params": {},
        "curves": {
            "loss_curve": [epoch["loss"] for epoch in curve[1:]],
            "validation_curve": [epoch["validation_loss"] for epoch in curve],
            "validation_score_curve": [epoch["validation_score"] for epoch in curve],
        },
        "versions": {name: version(name) for name in ("featpipe", "scikit-learn", "numpy", "torch")},
    }
