"""One trial of a run: train a head and score it; finished work is reused."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads
from featpipe.config import TrainingConfig
from featpipe.errors import ConfigError
from featpipe.evaluation import evaluate
from featpipe.experiments.dataset import BackboneCaches, TrainTestSplit, draw_per_class
from featpipe.experiments.grid import TrialSpec
from featpipe.experiments.recipe.schema import Recipe
from featpipe.experiments.result import TrialResult
from featpipe.metrics import METRICS, Calibration, Scores, score
from featpipe.model import Model, load_model
from featpipe.runtime import Progress, ProgressCallback
from featpipe.storage import RecordStore, compute_fingerprint, digest_arrays
from featpipe.training import (
    EmbeddingDataset,
    HeadConfig,
    fit_head,
    get_package_versions,
    make_head_config,
    parse_policy,
    train_head,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrialRun:
    """Trains and scores one row of the table, unless that is done, and records it in the folder of the run."""

    recipe: Recipe
    trial: TrialSpec
    caches: BackboneCaches
    training: EmbeddingDataset
    split: TrainTestSplit
    folder: Path
    records: RecordStore
    progress: ProgressCallback

    @property
    def path(self) -> Path:
        """Path of the model."""
        return self.folder / "models" / f"{self.trial.slug}.model"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Inputs that determine the model: embeddings, rows and labels, head, settings, seeds and versions."""
        head, training = asdict(self.trial.head), asdict(self.recipe.training)
        del head["table"], training["jobs"], training["portable"]  # these change no number
        split, n_per_class = self.recipe.split, self.trial.per_class
        return {
            "cache": self.caches.cache.fingerprint,
            "rows": self.training.compute_digest(),
            "head": head,
            "training": training,
            "draws": None if n_per_class is None else [n_per_class, split.draws, split.seed],
            "versions": get_package_versions(),
        }

    @cached_property
    def _score_inputs(self) -> dict[str, Any]:
        """Inputs that determine the scores."""
        test_cache, test_rows = self.split.test_cache, self.split.test_rows
        labels = test_cache.label_table.take(test_rows)
        rows_digest = digest_arrays(
            [("digests", test_cache.digests[test_rows]), ("y", np.ascontiguousarray(labels.values))]
        )
        return {
            "model": compute_fingerprint(self.inputs),
            "scored": [test_cache.fingerprint, rows_digest, list(test_cache.classes)],
        }

    def is_done(self) -> tuple[bool, bool]:
        """Whether the model is trained, and whether it is scored."""
        trained = self.records.find(f"{self.trial.slug}.model", self.inputs, self.path) is not None
        return trained, trained and self.records.find(f"{self.trial.slug}.scores", self._score_inputs) is not None

    def run(self) -> TrialResult:
        """Train and score; finished work is reused."""
        model, held_out = self._load_or_train(), self._load_or_score()
        cross_validation = model.scores.get("cross_validation")
        metric, goodness = self._get_selection_score(cross_validation, held_out)
        head, history = self.trial.head, model.history
        head_options = {name: getattr(head, name) for name in ("output", "balance") if getattr(head, name)}
        return TrialResult(
            name=self.trial.slug,
            backbone=self.caches.label,
            head=head.name,
            settings={**head.settings, **head_options},
            chosen_settings=(history.get("chosen") or {}).get("settings", {}),
            per_class=self.trial.per_class,
            metric=metric,
            cross_validated=None
            if cross_validation is None
            else _select_metric(metric, cross_validation, ("spread", "folds", "how", "metrics")),
            held_out=_select_metric(metric, held_out, ("n", "left_out", "metrics", "by_draw")),
            goodness=goodness,
            seconds_to_fit=float(history["seconds_to_fit"] + history["seconds_to_tune"]),
            model=self.path,
            model_bytes=self.path.stat().st_size,
            head_bytes=len(heads.dumps(model.head)),
            model_digest=compute_fingerprint(self.inputs),
        )

    def _load_or_train(self) -> Model:
        name = f"{self.trial.slug}.model"
        if self.records.find(name, self.inputs, self.path) is not None:
            return load_model(self.path)
        training, rows, n_per_class = self.recipe.training, self.training, self.trial.per_class
        if n_per_class is not None:
            rows = draw_per_class(rows, n_per_class, self.recipe.split.seed + 1)
        logger.info(f"{self.trial.label}: training on {len(rows):,} images")
        model = self._fit_head(rows, training.cv if n_per_class is None else None)
        if training.portable:
            model.attach(self.caches.backbone)
        model.save(self.path, portable=training.portable)
        self.records.write(name, self.inputs, {"model": self.path.name}, self.path)
        return load_model(self.path)

    def _fit_head(self, rows: EmbeddingDataset, cv: int | None) -> Model:
        cache, config = self.caches.cache, replace(self._training_config, cv=cv)
        trained_head = train_head(cache, rows, config, self._make_head_config(rows), self.progress)
        return trained_head.to_model(cache, rows, parse_policy(config.keep if cv else "none"))

    @property
    def _training_config(self) -> TrainingConfig:
        head, training = self.trial.head, self.recipe.training
        return TrainingConfig(
            head=head.name,
            params=head.settings,
            output=head.output,
            tune=head.tune,
            grid={key: tuple(values) for key, values in head.grid.items()},
            metric=training.metric,
            one_standard_error=training.one_standard_error,
            balance=head.balance,
            calibrate=training.calibrate,
            prior=training.prior or None,
            keep=training.keep,
            jobs=training.jobs,
            random_state=training.seed,
        )

    def _make_head_config(self, rows: EmbeddingDataset) -> HeadConfig:
        try:
            return make_head_config(self._training_config, rows)
        except ConfigError as error:
            raise ConfigError(f"{self.recipe.where}: [{self.trial.head.table}] {error}") from None

    def _load_or_score(self) -> dict[str, Any]:
        name = f"{self.trial.slug}.scores"
        scores = self.records.find(name, self._score_inputs)
        if scores is None:
            if self.trial.per_class is None:
                evaluation = evaluate(load_model(self.path), self.split.test_cache, without=self.split.excluded_table)
                scores = {**evaluation.scores.to_dict(), "left_out": evaluation.left_out}
            else:
                scores = self._score_draws(self.trial.per_class)
            self.records.write(name, self._score_inputs, scores)
        return scores

    def _score_draws(self, n_per_class: int) -> dict[str, Any]:
        """Score heads fitted on repeated random draws of images of each class."""
        test_rows, test_cache = self.split.test_rows, self.split.test_cache
        X = np.asarray(test_cache.features(self.trial.head.output)[test_rows], np.float32)
        y_true = test_cache.label_table.take(test_rows).y
        metrics_by_draw = []
        for draw in range(self.recipe.split.draws):
            rows = draw_per_class(self.training, n_per_class, self.recipe.split.seed + 1 + draw)
            scores = self._fit_and_score(rows, X, y_true)
            metrics_by_draw.append({name: float(interval.value) for name, interval in scores.metrics.items()})
            self.progress(Progress(self.trial.label, draw + 1, self.recipe.split.draws, "draws"))
        metrics = {}
        for key in metrics_by_draw[0]:
            values = [draw_metrics[key] for draw_metrics in metrics_by_draw]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            metrics[key] = {"value": float(np.mean(values)), "low": None, "high": None, "spread": spread}
        return {"n": len(test_rows), "metrics": metrics, "by_draw": metrics_by_draw}

    def _fit_and_score(self, rows: EmbeddingDataset, X: NDArray[np.float32], y_true: NDArray[Any]) -> Scores:
        fitted_head = fit_head(self._make_head_config(rows), rows)
        calibration = None if fitted_head.has_probabilities else Calibration()
        return score("classification", y_true, fitted_head.predict(X, calibration), rows.classes, bootstrap=0)

    def _get_selection_score(
        self, cross_validation: dict[str, Any] | None, held_out: dict[str, Any]
    ) -> tuple[str, float]:
        """The score that the table compares, and its goodness (larger is better)."""
        metrics: dict[str, Any] = (held_out if cross_validation is None else cross_validation)["metrics"]
        requested_metric = self.recipe.training.metric
        name: str = (
            requested_metric if requested_metric is not None and requested_metric in metrics else next(iter(metrics))
        )
        if cross_validation is None:
            return name, math.nan
        value = metrics[name]["value"]
        if value is None:
            return name, -math.inf
        return name, METRICS[name].gain(value)


def _select_metric(metric: str, scores: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    undefined = {"value": None, "low": None, "high": None}
    return {**scores["metrics"].get(metric, undefined), **{key: scores[key] for key in keys if key in scores}}
