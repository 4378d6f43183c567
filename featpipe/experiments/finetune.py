"""Fine-tuning stage of a run: trains the backbone of the best trial too."""

from __future__ import annotations

import csv
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from featpipe.cache import FeatureCache
from featpipe.data import LabelTable
from featpipe.evaluation import Evaluation, evaluate
from featpipe.experiments.dataset import BackboneCaches, TrainTestSplit
from featpipe.experiments.recipe.schema import Recipe
from featpipe.experiments.result import TrialResult
from featpipe.extraction import extract
from featpipe.finetuning import FineTuningResult, finetune
from featpipe.model import Model, load_model
from featpipe.runtime import ProgressCallback
from featpipe.storage import atomic_write, compute_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FineTuneRun:
    """Fine-tunes the backbone of one trial, the probe, with the training and test images of the run."""

    recipe: Recipe
    archives: list[str]
    probe: TrialResult
    caches: BackboneCaches
    split: TrainTestSplit
    folder: Path
    progress: ProgressCallback

    def run(self) -> FineTuningResult:
        """Fine-tune; a finished result is reused."""
        assert self.recipe.finetune is not None
        settings = asdict(self.recipe.finetune)
        logger.info(f"{self.probe.name}: fine-tuning")
        return finetune(
            self._attach_backbone(load_model(self.probe.model)),
            self.archives,
            labels=self._write_label_table(),
            cache=self._cache_folder,
            out=self.path,
            progress=self.progress,
            **settings,
        )

    @property
    def path(self) -> Path:
        """Path of the model."""
        return self.folder / "models" / f"{self.probe.name}.tuned.model"

    @property
    def _cache_folder(self) -> Path:
        return Path(self.recipe.extractions[0].cache)

    def evaluate(self) -> Evaluation:
        """Compare the fine-tuned model with the probe on images that neither was trained on."""
        finetuned, probe = (self._attach_backbone(load_model(path)) for path in (self.path, self.probe.model))
        if self.split.test_cache is not self.caches.cache:
            return evaluate(finetuned, self._extract_test_cache(finetuned), cache=self._cache_folder)
        return evaluate(
            finetuned,
            self.archives,
            against=[probe],
            labels=self._write_label_table(),
            cache=self._cache_folder,
            progress=self.progress,
        )

    def _extract_test_cache(self, model: Model) -> FeatureCache:
        config = self.recipe.evaluation
        labels = None if config.labels is None else LabelTable(Path(config.labels))
        return extract(
            list(config.archive), labels=labels, cache=self._cache_folder, progress=self.progress, **model.extraction()
        )

    def _attach_backbone(self, model: Model) -> Model:
        """Attach a custom network, whose code may run because the recipe names it."""
        return model.attach(model.request["name"]) if ":" in model.request["name"] else model

    def make_result(self, finetuned: FineTuningResult) -> TrialResult:
        """Make the row of the results table."""
        scores = (
            self.evaluate().scores.to_dict() if finetuned.kept == "fine-tuned" else _get_comparison_scores(finetuned)
        )
        metric = self.probe.metric
        return replace(
            self.probe,
            name=f"{self.probe.name}.tuned",
            head=f"{self.probe.head}, fine-tuned",
            cross_validated=None,
            held_out={**scores["metrics"][metric], "n": scores["n"], "metrics": scores["metrics"]},
            goodness=float("nan"),
            seconds_to_fit=None,
            model=self.path,
            model_bytes=self.path.stat().st_size,
            model_digest=compute_fingerprint([self.probe.model_digest, asdict(self.recipe.finetune)]),  # type: ignore[arg-type]
            best=finetuned.kept == "fine-tuned",
        )

    def _write_label_table(self) -> LabelTable:
        """Write the labels of the run and its split as a table, so that fine-tuning holds out the same images."""
        cache, path = self.caches.cache, self.folder / "sides.csv"
        split_by_row = dict.fromkeys(self.split.training_rows.tolist(), "train")
        if self.split.test_cache is cache:
            split_by_row |= dict.fromkeys(self.split.test_rows.tolist(), "test")
        labels = cache.label_table
        with atomic_write(path, text=True) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", *_get_label_columns(cache), "split"])
            for row in sorted(split_by_row):
                writer.writerow([cache.ids[row], *_format_labels(cache, labels.values[row]), split_by_row[row]])
        columns = ",".join(_get_label_columns(cache))
        return LabelTable(path, "path", columns, cache.task)  # type: ignore[arg-type]


def _get_label_columns(cache: FeatureCache) -> list[str]:
    if cache.task == "regression":
        return list(cache.classes)
    return ["labels" if cache.task == "multilabel" else "label"]


def _format_labels(cache: FeatureCache, values: Any) -> list[str]:
    if cache.task == "regression":
        return [repr(float(value)) for value in values]
    if cache.task == "multilabel":
        return [";".join(name for name, value in zip(cache.classes, values.tolist(), strict=True) if value == 1)]
    return [cache.classes[int(values)]]


def _get_comparison_scores(finetuned: FineTuningResult) -> dict[str, Any]:
    """Scores of a fine-tuned network that was not kept."""
    names = ("value", "low", "high")
    metrics = {row["name"]: dict(zip(names, row["tuned"], strict=True)) for row in finetuned.comparison.metrics}
    return {"n": finetuned.comparison.n, "metrics": metrics}
