"""The fourth and fifth stage of a run: one head is trained and scored, unless that was done from the same content."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpipe import heads
from featpipe.calibration import Calibration
from featpipe.errors import ConfigError
from featpipe.evaluation import evaluate
from featpipe.fingerprint import digest_arrays, fingerprint
from featpipe.model import Model, load_model
from featpipe.pipeline.embedding import Caches
from featpipe.pipeline.outcome import Result
from featpipe.pipeline.records import Records, facts_of_model
from featpipe.pipeline.samples import Divided, drawn, identity_of
from featpipe.pipeline.trials import Trial
from featpipe.progress import Progress, Tell
from featpipe.recipe import Recipe
from featpipe.scores import Scores, score
from featpipe.training import Rows
from featpipe.training.estimate import LOWER_IS_BETTER
from featpipe.training.verb import keeping, plan_of, train_on

__all__ = ["Attempt"]


@dataclass(frozen=True, eq=False)
class Attempt:
    """One row of the table, on its way.

    Attributes
    ----------
    recipe : Recipe
    trial : Trial
    caches : Caches
    sides : Divided
        Its training rows, and those that it is scored on.
    folder : Path
        The run's.
    records : Records
    tell : callable
    """

    recipe: Recipe
    trial: Trial
    caches: Caches
    sides: Divided
    folder: Path
    records: Records
    tell: Tell

    @property
    def path(self) -> Path:
        """The model's file."""
        return self.folder / "models" / f"{self.trial.slug}.model"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides the model."""
        return facts_of_model(self.recipe, self.trial, self.caches.cache.fingerprint, identity_of(self.sides.training))

    @cached_property
    def _scored_facts(self) -> dict[str, Any]:
        """What decides its scores."""
        scored, held = self.sides.scored, self.sides.held
        labels = scored.label_table.take(held)
        rows = digest_arrays([("digests", scored.digests[held]), ("y", np.ascontiguousarray(labels.values))])
        return {"model": fingerprint(self.facts), "scored": [scored.fingerprint, rows, list(scored.classes)]}

    def is_done(self) -> tuple[bool, bool]:
        """Whether the model is trained, and whether it is scored."""
        trained = self.records.find(f"{self.trial.slug}.model", self.facts, self.path) is not None
        return trained, trained and self.records.find(f"{self.trial.slug}.scores", self._scored_facts) is not None

    def result(self) -> Result:
        """The row of the table."""
        model, held_out = self._trained(), self._scored()
        folds = model.scores.get("cross_validation")
        metric, goodness = self._judged(folds, held_out)
        head, history = self.trial.head, model.history
        beside = {name: getattr(head, name) for name in ("output", "balance") if getattr(head, name)}
        return Result(
            name=self.trial.slug,
            backbone=self.caches.label,
            head=head.name,
            settings={**head.settings, **beside},
            chosen_settings=(history.get("chosen") or {}).get("settings", {}),
            per_class=self.trial.per_class,
            metric=metric,
            cross_validated=None if folds is None else _with(metric, folds, ("spread", "folds", "how", "metrics")),
            held_out=_with(metric, held_out, ("n", "left_out", "metrics", "by_draw")),
            goodness=goodness,
            seconds_to_fit=float(history["seconds_to_fit"] + history["seconds_to_tune"]),
            model=self.path,
            model_bytes=self.path.stat().st_size,
            head_bytes=len(heads.dumps(model.head)),
            model_digest=fingerprint(self.facts),
        )

    def _trained(self) -> Model:
        name = f"{self.trial.slug}.model"
        if self.records.find(name, self.facts, self.path) is not None:
            return load_model(self.path)
        training, rows, each = self.recipe.training, self.sides.training, self.trial.per_class
        if each is not None:
            rows = drawn(rows, each, self.recipe.split.seed + 1)
        self.tell(Progress("note", f"{self.trial.label}: {len(rows):,} images to learn from"))
        model = self._fitted(rows, training.cv if each is None else None)
        if training.portable:
            model.attach(self.caches.backbone)
        model.save(self.path, portable=training.portable)
        self.records.write(name, self.facts, {"model": self.path.name}, self.path)
        return load_model(self.path)

    def _fitted(self, rows: Rows, cv: int | None) -> Model:
        training, head, cache = self.recipe.training, self.trial.head, self.caches.cache
        trained = train_on(
            cache,
            rows,
            self._plan(rows),
            cv,
            calibrate=training.calibrate,
            prior=training.prior or None,
            progress=self.tell,
        )
        return trained.model(cache, rows, head.output, head.settings, keeping(training.keep if cv else "none"))

    def _plan(self, rows: Rows) -> Any:
        head, training = self.trial.head, self.recipe.training
        how = {"metric": training.metric, "one_standard_error": training.one_standard_error, "jobs": training.jobs}
        try:
            return plan_of(
                self.caches.cache,
                rows,
                head.name,
                head.settings,
                grid={key: tuple(values) for key, values in head.grid.items()},
                tune=head.tune,
                balance=head.balance,
                random_state=training.seed,
                **how,
            )
        except ConfigError as error:
            raise ConfigError(f"{self.recipe.where}: [{head.table}] {error}") from None

    def _scored(self) -> dict[str, Any]:
        name = f"{self.trial.slug}.scores"
        found = self.records.find(name, self._scored_facts)
        if found is None:
            found = self._score_of_model() if self.trial.per_class is None else self._score_of_draws()
            self.records.write(name, self._scored_facts, found)
        return found

    def _score_of_model(self) -> dict[str, Any]:
        evaluation = evaluate(load_model(self.path), self.sides.scored, without=self.sides.without)
        return {**evaluation.scores.to_dict(), "left_out": evaluation.left_out}

    def _score_of_draws(self) -> dict[str, Any]:
        """The scores of heads that are fitted on so many images of each class, drawn again and again."""
        assert self.trial.per_class is not None
        held, scored = self.sides.held, self.sides.scored
        X = np.asarray(scored.features(self.trial.head.output)[held], np.float32)
        truth = scored.label_table.take(held).y
        by_draw = []
        for draw in range(self.recipe.split.draws):
            rows = drawn(self.sides.training, self.trial.per_class, self.recipe.split.seed + 1 + draw)
            by_draw.append(_values(self._answers_scored(rows, X, truth)))
            self.tell(Progress("bar", self.trial.label, draw + 1, self.recipe.split.draws, "draws"))
        metrics = {}
        for key in by_draw[0]:
            values = [draw[key] for draw in by_draw]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            metrics[key] = {"value": float(np.mean(values)), "low": None, "high": None, "spread": spread}
        return {"n": len(held), "metrics": metrics, "by_draw": by_draw}

    def _answers_scored(self, rows: Rows, X: NDArray[np.float32], truth: NDArray[Any]) -> Scores:
        fitted = self._plan(rows).fit(rows)
        calibration = None if fitted.gives_probabilities else Calibration()
        return score("classification", truth, fitted.answers(X, calibration), rows.classes, bootstrap=0)

    def _judged(self, folds: dict[str, Any] | None, held_out: dict[str, Any]) -> tuple[str, float]:
        """What the table compares, and how good this is by it."""
        metrics: dict[str, Any] = (held_out if folds is None else folds)["metrics"]
        wanted = self.recipe.training.metric
        name: str = wanted if wanted is not None and wanted in metrics else next(iter(metrics))
        if folds is None:
            return name, math.nan
        value = metrics[name]["value"]
        if value is None:
            return name, -math.inf
        return name, -value if name in LOWER_IS_BETTER else value


def _values(scores: Scores) -> dict[str, float]:
    return {name: float(interval.value) for name, interval in scores.metrics.items()}


def _with(metric: str, found: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    undefined = {"value": None, "low": None, "high": None}
    return {**found["metrics"].get(metric, undefined), **{key: found[key] for key in keys if key in found}}
