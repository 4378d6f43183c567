"""The sixth stage of a run, where it is asked for: the network of the best head is trained too."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from featpipe.archive import Table
from featpipe.cache import FeatureCache
from featpipe.durable import whole_file
from featpipe.evaluation import Evaluation, evaluate
from featpipe.finetuning import FineTuned, finetune
from featpipe.fingerprint import fingerprint
from featpipe.model import Model, load_model
from featpipe.pipeline.embedding import Caches
from featpipe.pipeline.outcome import Result
from featpipe.pipeline.samples import Divided
from featpipe.progress import Progress, Tell
from featpipe.recipe import Recipe

__all__ = ["Tuning"]


@dataclass(frozen=True, eq=False)
class Tuning:
    """The fine-tuning of one row of the table.

    Attributes
    ----------
    recipe : Recipe
    places : list of str
        The archives.
    probe : Result
    caches : Caches
        Of its backbone.
    sides : Divided
    folder : Path
        The run's.
    tell : callable
    """

    recipe: Recipe
    places: list[str]
    probe: Result
    caches: Caches
    sides: Divided
    folder: Path
    tell: Tell

    def found(self) -> FineTuned:
        """What fine-tuning brought; no work, if its file is what is asked for already."""
        assert self.recipe.finetune is not None
        settings = asdict(self.recipe.finetune)
        self.tell(Progress("note", f"{self.probe.name}: fine-tuning"))
        return finetune(
            self._with_backbone(load_model(self.probe.model)),
            self.places,
            labels=self._labels(),
            cache=self._cache,
            out=self.path,
            progress=self.tell,
            **settings,
        )

    @property
    def path(self) -> Path:
        """The model's file."""
        return self.folder / "models" / f"{self.probe.name}.tuned.model"

    @property
    def _cache(self) -> Path:
        return Path(self.recipe.extractions[0].cache)

    def evaluation(self) -> Evaluation:
        """The tuned model against the probe, on the images that neither has learnt from."""
        tuned, probe = (self._with_backbone(load_model(path)) for path in (self.path, self.probe.model))
        if self.sides.scored is not self.caches.cache:
            return evaluate(tuned, self._other_images(tuned), cache=self._cache)
        how: dict[str, Any] = {"labels": self._labels(), "cache": self._cache, "progress": self.tell}
        return evaluate(tuned, self.places, against=[probe], **how)

    def _other_images(self, model: Model) -> FeatureCache:
        from featpipe.extraction import extract

        asked = self.recipe.evaluation
        labels = None if asked.labels is None else Table(Path(asked.labels))
        return extract(list(asked.archive), labels=labels, cache=self._cache, progress=self.tell, **model.extraction())

    def _with_backbone(self, model: Model) -> Model:
        """Code of somebody's own is run here, because the recipe names it."""
        return model.attach(model.request["name"]) if ":" in model.request["name"] else model

    def result(self, found: FineTuned) -> Result:
        """Its row of the table."""
        scores = self.evaluation().scores.to_dict() if found.kept == "fine-tuned" else _of_comparison(found)
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
            model_digest=fingerprint([self.probe.model_digest, asdict(self.recipe.finetune)]),  # type: ignore[arg-type]
            best=found.kept == "fine-tuned",
        )

    def _labels(self) -> Table:
        """The labels of the run as a table, with its split: what it holds out, fine-tuning does not see either."""
        cache, path = self.caches.cache, self.folder / "sides.csv"
        sides = dict.fromkeys(self.sides.training.rows.tolist(), "train")
        if self.sides.scored is cache:
            sides |= dict.fromkeys(self.sides.held.tolist(), "test")
        labels = cache.label_table
        with whole_file(path, text=True) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["path", *_columns(cache), "split"])
            for row in sorted(sides):
                table.writerow([cache.ids[row], *_values(cache, labels.values[row]), sides[row]])
        columns = ",".join(_columns(cache))
        return Table(path, "path", columns, cache.task)  # type: ignore[arg-type]


def _columns(cache: FeatureCache) -> list[str]:
    """Of a table that says what a cache knows of its images."""
    if cache.task == "regression":
        return list(cache.classes)
    return ["labels" if cache.task == "multilabel" else "label"]


def _values(cache: FeatureCache, values: Any) -> list[str]:
    if cache.task == "regression":
        return [repr(float(value)) for value in values]
    if cache.task == "multilabel":
        return [";".join(name for name, one in zip(cache.classes, values.tolist(), strict=True) if one == 1)]
    return [cache.classes[int(values)]]


def _of_comparison(found: FineTuned) -> dict[str, Any]:
    """The scores of the network that was trained and not kept."""
    names = ("value", "low", "high")
    metrics = {row["name"]: dict(zip(names, row["tuned"], strict=True)) for row in found.comparison.metrics}
    return {"n": found.comparison.n, "metrics": metrics}
